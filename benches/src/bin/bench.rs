//! `bench`: all comparisons, then their table, and the same in `target/bench.json`. `make bench` runs it.

use std::path::Path;
use std::process::ExitCode;
use std::{env, fs};

use cofferdam_benches::guests::Rounds;
use cofferdam_benches::report::{self, Row};
use cofferdam_benches::{
    Result, api, container_runs, containers, crowd, guests, image, inside, jail, programs, progress, start_up,
};
use cofferdam_tests::place;

/// Numbers of runs: more make the medians steadier, and `make bench` longer.
const STARTS: usize = 100;
const IMAGES: usize = 20;
const JAILS: usize = 100;
const CROWDS: usize = 20;
const BOOTS: usize = 5;
const DEVICES: usize = 30;
const HASHES: usize = 5;
const CONTAINERS: usize = 5;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        [] => all(),
        ["start-up"] => programs::install().and_then(|()| start_up::run(STARTS)).map(show),
        ["image"] => programs::install().and_then(|()| image::run(IMAGES)).map(show),
        ["api"] => programs::install().and_then(|()| api_and_jail()).map(show),
        ["hash"] => guests::run(Rounds { hashes: HASHES, ..Rounds::default() }).map(show),
        ["boot"] => guests::run(Rounds { boots: BOOTS, ..Rounds::default() }).map(show),
        ["devices"] => guests::run(Rounds { devices: DEVICES, ..Rounds::default() }).map(show),
        ["container"] => containers::run(CONTAINERS).map(show),
        ["inside-containers", plan] => container_runs::run(Path::new(plan)),
        ["inside", plan] => inside::run(Path::new(plan)),
        // The rig starts this program as its agent.
        ["agent"] => xtask::agent::run().map_err(Into::into),
        _ => Err("usage: bench [start-up | image | api | hash | boot | devices | container]".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            progress(error);
            ExitCode::FAILURE
        }
    }
}

fn show(rows: Vec<Row>) {
    print!("{}", report::table(&rows));
}

fn all() -> Result<()> {
    programs::install()?;
    let mut rows = start_up::run(STARTS)?;
    rows.extend(image::run(IMAGES)?);
    rows.extend(api_and_jail()?);
    rows.extend(guests::run(Rounds { boots: BOOTS, devices: DEVICES, hashes: HASHES })?);
    rows.extend(containers::run(CONTAINERS)?);
    let path = place::root().join("target/bench.json");
    fs::write(&path, serde_json::to_vec_pretty(&rows)?)?;
    show(rows);
    progress(format_args!("{} has the same", path.display()));
    Ok(())
}

fn api_and_jail() -> Result<Vec<Row>> {
    Ok([api::run(STARTS)?, jail::run(JAILS)?, crowd::run(CROWDS)?].concat())
}
