//! Many domains: how many can be created per second, one after another and several at a time, against as many starts
//! of `floor`; and whether a domain takes longer the more there were before it, or the more there are beside it.
//!
//! A domain is created as an orchestrator does it: a monitor is started, configured and told to start in one request,
//! and has answered that the vCPUs run.

use std::fs;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use cofferdam_tests::place;

use crate::api::{domain, monitor};
use crate::report::{Better, Row, Subject};
use crate::server::{Server, Sockets, now};
use crate::{Result, in_turns, programs, progress};

/// Domains that are created.
const DOMAINS: usize = 100;
const AT_A_TIME: usize = 16;
/// Domains that live beside the one that is measured, and how many are measured per round.
const LIVE: usize = 200;
const BESIDE: usize = 20;
/// Memory of a domain, MiB.
const MEMORY: u64 = 32;
/// What growth there may be: none, but for what the medians of so few samples differ anyway.
const NO_GROWTH: Option<f64> = Some(1.1);

const fn rate(name: &'static str) -> Subject {
    Subject { name, unit: "1/s", better: Better::Higher, goal: None }
}

const fn growth(name: &'static str) -> Subject {
    Subject { name, unit: "ms", better: Better::Lower, goal: NO_GROWTH }
}

const ONE_BY_ONE: (usize, Subject, Subject) =
    (1, rate("domains, one after another"), growth("last of 100, one after another"));
const SEVERAL: (usize, Subject, Subject) =
    (AT_A_TIME, rate("domains, 16 at a time"), growth("last of 100, 16 at a time"));
const BESIDE_OTHERS: Subject = growth("a domain beside 200 that live");

/// Creates `rounds` times each crowd, and half as often those who live.
pub fn run(rounds: usize) -> Result<Vec<Row>> {
    let directory = tempfile::tempdir_in("/dev/shm")?;
    let place = |number: usize| -> Result<Sockets> {
        let own = directory.path().join(number.to_string());
        fs::create_dir(&own)?;
        Sockets::new(&own)
    };
    let places = (0..AT_A_TIME).map(place).collect::<Result<Vec<_>>>()?;
    let mut rows = Vec::new();
    for (at_a_time, rate, growth) in [ONE_BY_ONE, SEVERAL] {
        progress(format_args!(
            "{rounds} times {DOMAINS} domains and as many of floor, {at_a_time} at a time"
        ));
        let workers = places.get(..at_a_time).unwrap_or(&places);
        let (ours, theirs) =
            in_turns(rounds, || Crowd::run(workers, short_life), || Crowd::run(workers, floor))?;
        let rates = |crowds: &[Crowd]| crowds.iter().map(|crowd| crowd.rate).collect::<Vec<_>>();
        rows.push(rate.row(&rates(&ours), &rates(&theirs), "floor"));
        let tenths = |of: fn(&[f64]) -> &[f64]| {
            ours.iter().flat_map(|crowd| of(crowd.steady(at_a_time))).copied().collect::<Vec<_>>()
        };
        rows.push(growth.row(&tenths(last_tenth), &tenths(first_tenth), "the first of them"));
    }
    if let Some(place) = places.first() {
        rows.push(beside_others(place, rounds.div_ceil(2))?);
    }
    Ok(rows)
}

/// What came of creating [`DOMAINS`].
struct Crowd {
    /// Milliseconds of each, in the order of their starts.
    times: Vec<f64>,
    /// Domains per second, from the first start to the last end.
    rate: f64,
}

impl Crowd {
    /// Has each of `workers` create one after another; `create` returns the milliseconds that are to count.
    fn run<Worker: Sync>(workers: &[Worker], create: impl Fn(&Worker) -> Result<f64> + Sync) -> Result<Self> {
        let next = AtomicUsize::new(0);
        let times = Mutex::new(vec![Ok(0.0); DOMAINS]);
        let work = |worker| {
            while let number = next.fetch_add(1, Ordering::Relaxed)
                && number < DOMAINS
            {
                let time = create(worker).map_err(|error| error.to_string());
                if let Some(slot) = times.lock().unwrap_or_else(PoisonError::into_inner).get_mut(number) {
                    *slot = time;
                }
            }
        };
        let start = now();
        thread::scope(|scope| {
            workers.iter().for_each(|worker| drop(scope.spawn(|| work(worker))));
        });
        let rate = DOMAINS as f64 / (now() - start) * 1e3;
        let times = times.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(Self { times: times.into_iter().collect::<std::result::Result<_, String>>()?, rate })
    }

    /// Those that had `at_a_time` - 1 others beside them from beginning to end.
    fn steady(&self, at_a_time: usize) -> &[f64] {
        self.times.get(at_a_time..self.times.len() - at_a_time).unwrap_or_default()
    }
}

fn first_tenth(times: &[f64]) -> &[f64] {
    times.get(..DOMAINS / 10).unwrap_or(times)
}

fn last_tenth(times: &[f64]) -> &[f64] {
    times.get(times.len().saturating_sub(DOMAINS / 10)..).unwrap_or(times)
}

/// Creates a domain that ends at once. Returns the milliseconds to its start.
fn short_life(place: &Sockets) -> Result<f64> {
    let (server, time) = create(place, "short", &domain("first", MEMORY).to_string())?;
    server.finish()?;
    Ok(time)
}

/// Creates a domain; returns its monitor, and the milliseconds from before the start of that until the vCPUs ran.
fn create(place: &Sockets, socket: &str, config: &str) -> Result<(Server, f64)> {
    let mut server = Server::start(&mut monitor(&place.path(socket)), place, socket)?;
    server.ask("PUT /vm?start=true", config, 204)?;
    let time = server.age();
    Ok((server, time))
}

/// The whole life of `floor`, milliseconds.
fn floor(place: &Sockets) -> Result<f64> {
    let mut command = Command::new(programs::reference("floor"));
    command.arg(place::payload("first")).arg(place.path("status")).stdin(Stdio::null());
    let start = now();
    match command.status()?.success() {
        true => Ok(now() - start),
        false => Err("floor failed".into()),
    }
}

/// Domains that live, with halted vCPUs.
struct Live(Vec<Server>);

impl Live {
    fn create(place: &Sockets) -> Result<Self> {
        let mut config = domain("spin", MEMORY);
        config["boot-source"]["boot_args"] = "mode=halt".into();
        let config = config.to_string();
        let one = |number| Ok(create(place, &format!("live-{number}"), &config)?.0);
        (0..LIVE).map(one).collect::<Result<_>>().map(Self)
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        // The kernel takes a while for each, so all at once.
        self.0.iter_mut().for_each(Server::kill);
    }
}

fn beside_others(place: &Sockets, rounds: usize) -> Result<Row> {
    progress(format_args!("{rounds} times {BESIDE} domains beside {LIVE} others and beside none, in turns"));
    let some = || (0..BESIDE).map(|_| short_life(place)).collect::<Result<Vec<f64>>>();
    let (beside, alone) = in_turns(
        rounds,
        || {
            let _live = Live::create(place)?;
            some()
        },
        some,
    )?;
    Ok(BESIDE_OTHERS.row(&beside.concat(), &alone.concat(), "beside none"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crowd_has_a_time_for_each_in_the_order_of_starts() {
        for at_a_time in [1, 16] {
            let (workers, count) = (vec![(); at_a_time], AtomicUsize::new(0));
            let crowd = Crowd::run(&workers, |()| Ok(count.fetch_add(1, Ordering::Relaxed) as f64)).unwrap();
            assert_eq!((crowd.times.len(), count.into_inner()), (DOMAINS, DOMAINS));
            let sum: f64 = crowd.times.iter().sum();
            assert_eq!(sum, (DOMAINS * (DOMAINS - 1) / 2) as f64);
            assert_eq!(crowd.steady(at_a_time).len(), DOMAINS - 2 * at_a_time);
        }
        let failed = Crowd::run(&[(), ()], |()| Err("no".into()));
        assert_eq!(failed.err().unwrap().to_string(), "no");
    }

    #[test]
    fn tenths_are_at_the_ends() {
        let times: Vec<f64> = (0..98).map(f64::from).collect();
        assert_eq!((first_tenth(&times)[0], first_tenth(&times).len()), (0.0, 10));
        assert_eq!((last_tenth(&times)[0], last_tenth(&times).len()), (88.0, 10));
    }
}
