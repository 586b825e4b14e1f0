use super::*;
use clap::CommandFactory;
use cofferdam_api::config::{
    DEFAULT_COMMAND_LINE, DomainConfig, HostData, MachineConfig, PlatformChoice, Serial, SerialMode,
    SnpConfig, Vsock,
};
use std::ffi::OsString;

fn run_args(extra: &[&str]) -> Result<Box<RunArgs>, clap::Error> {
    let words = ["cofferdam", "run", "--kernel", "k"].iter().chain(extra);
    match Cli::try_parse_from(words)?.command {
        Command::Run(args) => Ok(args),
        _ => unreachable!("the command line says run"),
    }
}

fn config(extra: &[&str]) -> Result<DomainConfig, String> {
    run_args(extra).map_err(|error| error.to_string())?.domain_config(None)
}

#[test]
fn clap_finds_the_definition_sound() {
    Cli::command().debug_assert();
}

#[test]
fn run_by_itself_is_the_command_run() {
    RunOnly::command().debug_assert();
    let mut cli = Cli::command();
    cli.build();
    let mut within = cli.find_subcommand_mut("run").unwrap().clone();
    let mut alone = RunOnly::command();
    assert_eq!(within.render_long_help().to_string(), alone.render_long_help().to_string());
    assert_eq!(within.render_version(), alone.render_version());
    let words = |first: &'static [&str]| first.iter().copied().chain(["run", "--kernel", "k", "--cpus", "x"]);
    assert_eq!(
        Cli::try_parse_from(words(&["cofferdam"])).unwrap_err().to_string(),
        RunOnly::try_parse_from(words(&[])).unwrap_err().to_string()
    );
    for bad in [&["run"][..], &["run", "--kernel", "k", "--no"]] {
        assert_eq!(
            Cli::try_parse_from(["cofferdam"].iter().chain(bad)).unwrap_err().to_string(),
            RunOnly::try_parse_from(bad).unwrap_err().to_string()
        );
    }
}

#[test]
fn defaults() {
    let config = config(&[]).unwrap();
    assert_eq!(config.machine, MachineConfig { vcpu_count: 1, mem_size_mib: 128 });
    assert_eq!(config.boot.kernel_image_path, Some("k".into()));
    assert_eq!(config.boot.initrd_path, None);
    assert_eq!(config.command_line(), DEFAULT_COMMAND_LINE);
    assert_eq!((config.drives.len(), &config.vsock), (0, &None));
    assert_eq!(config.serial, Serial::default());
    assert_eq!(config.confidential.platform, PlatformChoice::Auto);
    assert_eq!(config.stop_timeout_ms, 10_000);
    assert_eq!(run_args(&[]).unwrap().domain_id(7).unwrap(), "domain-7");
}

#[test]
fn a_path_that_is_not_utf_8_is_refused_by_its_option() {
    use std::os::unix::ffi::OsStringExt;
    let words = ["cofferdam", "run", "--kernel", "k", "--vsock"].map(OsString::from);
    let words = words.into_iter().chain([OsString::from_vec(b"a\xff".into())]);
    let Command::Run(args) = Cli::try_parse_from(words).unwrap().command else { unreachable!() };
    assert_eq!(args.domain_config(None).unwrap_err(), "--vsock: the path \"a\\xFF\" is not UTF-8");
}

#[test]
fn the_line_of_the_issue() {
    let config = config(&[
        "--initrd",
        "initrd.img",
        "--cmdline",
        "-q S",
        "--cpus",
        "2",
        "--memory",
        "256M",
        "--drive",
        "path=disk.img,ro,id=root,iops=7,bandwidth=8",
        "--drive",
        "path=b,root",
        "--vsock",
        "d.sock",
        "--console",
        "file=F",
        "--platform",
        "plain",
        "--id",
        "NAME",
        "--json",
        "--guest-cid",
        "5",
        "--stop-timeout",
        "500ms",
        "--host-data",
        &"0f".repeat(32),
        "--snp-policy",
        "0x30000",
        "--snp-id-block",
        "B",
        "--snp-id-auth",
        "A",
        "--snp-certs",
        "C",
        "--boot",
        "image",
    ])
    .unwrap();
    let snp = SnpConfig {
        policy: Some(0x30000),
        id_block: Some("B".into()),
        id_auth: Some("A".into()),
        certs: Some("C".into()),
    };
    assert_eq!((&config.confidential.snp, config.confidential.host_data), (&snp, Some(HostData([15; 32]))));
    assert!(!config.confidential.require_protected);
    assert_eq!(config.machine, MachineConfig { vcpu_count: 2, mem_size_mib: 256 });
    assert_eq!(config.boot.initrd_path, Some("initrd.img".into()));
    assert_eq!(config.command_line(), "-q S root=/dev/vdb rw");
    assert_eq!(config.drives[0].drive_id, "root");
    assert_eq!(config.drives[1].drive_id, "drive1");
    assert_eq!(config.vsock, Some(Vsock { guest_cid: 5, uds_path: "d.sock".into() }));
    let file = Serial { mode: SerialMode::File, serial_out_path: Some("F".into()), ..Serial::default() };
    assert_eq!(config.serial, file);
    assert_eq!(config.confidential.platform, PlatformChoice::Plain);
    assert_eq!(config.stop_timeout_ms, 500);
}

#[test]
fn bad_values_name_the_option() {
    let long = "x".repeat(2049);
    let socket = "s".repeat(97);
    for (extra, part) in [
        (vec!["--cpus", "0"], "--cpus: 0 is not between 1 and 32"),
        (vec!["--cpus", "33"], "--cpus: 33 is not between 1 and 32"),
        (vec!["--cpus", "300"], "--cpus: 300 is not between 1 and 32"),
        (vec!["--cpus", "two"], "--cpus"),
        (vec!["--cpus", "-1"], "--cpus"),
        (vec!["--memory", "16M"], "--memory: 16 MiB is not between 32 and 65536 MiB"),
        (vec!["--memory", "65G"], "--memory: 66560 MiB is not"),
        (vec!["--memory", "33000K"], "--memory: 33792000 bytes are not a whole number of MiB"),
        (vec!["--memory", "256"], "write 256M"),
        (vec!["--cmdline", &long], "--cmdline: 2049 bytes long"),
        (vec!["--initrd", ""], "'--initrd <FILE>'"),
        (vec!["--drive", "path=a,id=x", "--drive", "path=b,id=x"], "--drive 2, id: \"x\" is used twice"),
        (vec!["--drive", "path=a,id=drive1", "--drive", "path=b"], "\"drive1\" is used twice"),
        (vec!["--drive", "path=a,iops=0"], "iops: must not be 0"),
        (vec!["--drive", "path="], "--drive 1, path: is empty"),
        (
            vec!["--drive", "path=a,root", "--drive", "path=b,root"],
            "--drive 2, root: drive 1 is the root already",
        ),
        (vec!["--drive", "a"], "path=FILE"),
        (vec!["--vsock", &socket], "--vsock: 97 bytes long"),
        (vec!["--vsock", "s", "--guest-cid", "2"], "--guest-cid: 2 is not between 3 and"),
        (vec!["--guest-cid", "4"], "--vsock"),
        (vec!["--console", "tty"], "stdio, none or file=FILE"),
        (vec!["--console", "file="], "--console: is empty"),
        (vec!["--platform", "sev"], "--platform"),
        (vec!["--platform", "plain", "--require-protected"], "--require-protected"),
        (vec!["--host-data", "00"], "64 hexadecimal digits"),
        (vec!["--snp-id-block", "b"], "--snp-id-auth"),
        (vec!["--snp-policy", "x"], "number such as 0x30000"),
        (vec!["--stop-timeout", "25000m"], "--stop-timeout: 1500000000 ms is not between 0 and 86400000 ms"),
        (vec!["--kernel", "k2"], "--kernel"),
    ] {
        let error = config(&extra).unwrap_err();
        assert!(error.contains(part), "{extra:?}: {error}");
    }
    let too_many = ["--drive", "path=a"].repeat(65);
    assert!(config(&too_many).unwrap_err().starts_with("--drive: 65 devices"));
    let id = |id| run_args(&["--id", id]).unwrap().domain_id(7);
    assert_eq!(id("web-1").unwrap(), "web-1");
    assert!(id("a/b").unwrap_err().starts_with("--id: "));
}
