//! The command line: Firecracker's flags with the same meaning, and a few more.
//! What could reach outside the jail is refused here, before anything is done.

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use clap::Parser;
use cofferdam_api::validate::check_id;

use crate::cgroup::{Setting, Version};
use crate::devices::Device;
use crate::limits::Limit;

const MORE: &str = "\
The jail's root directory is DIR/<name of the program>/<id>/root; sockets that the program makes there can be
reached from outside, and <name of the program>.pid holds its process id. What lies in it before the start is
left alone at the end; all else that was made for the jail, mounts, cgroups and directories, goes when the
program ends, however it or the jailer ends.

Examples:
  A monitor as user 1000 that sees its kernel, a disk, its configuration and /dev/kvm, and nothing else:
    cofferdam-jailer --id d1 --exec-file /usr/local/bin/cofferdam-vmm --uid 1000 --gid 1000 \\
        --bind /srv/vmlinux:/kernel --bind /srv/d1.img:/disk.img,rw --bind /srv/d1.json:/config.json \\
        -- --config-file /config.json

  The configuration through a descriptor, at most 100 open files, and half a CPU:
    cofferdam-jailer --id d2 --exec-file ... --uid 1000 --gid 1000 --resource-limit no-file=100 \\
        --cgroup cpu.max='50000 100000' -- --config-file fd:3 3< d2.json

Exit status: that of the program, 128 + N if signal N ended it, 125 if it could not be started.
SIGTERM, SIGINT and SIGHUP are passed on to it.";

/// Run a program, as a rule cofferdam-vmm, where it can reach only what was named for it.
#[derive(Debug, Parser)]
#[command(name = "cofferdam-jailer", version, after_help = MORE)]
pub struct Arguments {
    /// Name of the domain and of its jail: 1 to 64 letters, digits, _ and -
    #[arg(long, value_name = "NAME", value_parser = parse_id)]
    pub id: String,
    /// The program; static, because there are no libraries in the jail
    #[arg(long, value_name = "FILE")]
    pub exec_file: PathBuf,
    /// User that the program runs as. A caller who is not root is shown to it under this id
    #[arg(long, value_name = "N")]
    pub uid: u32,
    /// Group that the program runs as, likewise
    #[arg(long, value_name = "N")]
    pub gid: u32,
    /// Where the root directories of jails are made
    #[arg(long, value_name = "DIR", default_value = "/srv/jailer")]
    pub chroot_base_dir: PathBuf,
    /// Network namespace to join, as made by ip-netns(8) [default: a new and empty one]
    #[arg(long, value_name = "FILE")]
    pub netns: Option<PathBuf>,
    /// Return once the program runs, which then has no terminal, and /dev/null as its standard streams
    #[arg(long)]
    pub daemonize: bool,
    /// Accepted for Firecracker's sake: there is a new PID namespace always
    #[arg(long)]
    pub new_pid_ns: bool,
    /// Run in a cgroup of its own with this limit, such as memory.max=512M; may be given several times
    #[arg(long = "cgroup", value_name = "FILE=VALUE", value_parser = Setting::parse)]
    pub cgroups: Vec<Setting>,
    /// Version of cgroups [default: 2, or 1 where only that has the controllers]
    #[arg(long, value_name = "VERSION", value_enum)]
    pub cgroup_version: Option<Version>,
    /// Cgroup beneath which to make it, relative to the root; made if missing [default: name of the program]
    #[arg(long, value_name = "PATH", value_parser = parse_parent_cgroup)]
    pub parent_cgroup: Option<PathBuf>,
    /// Limit of the program: fsize=BYTES or no-file=N; no-file is 2048 unless given
    #[arg(long = "resource-limit", value_name = "NAME=N", value_parser = Limit::parse)]
    pub limits: Vec<Limit>,
    /// A file or directory to show in the jail, read-only unless `rw` is added: HOST[:IN][,ro|,rw]
    ///
    /// IN is its absolute path in the jail, that of HOST unless given. A comma in a path is written twice.
    #[arg(long = "bind", value_name = "SPEC", value_parser = Bind::parse)]
    pub binds: Vec<Bind>,
    /// Devices that the program may use
    #[arg(long = "device", value_name = "NAME", value_enum, value_delimiter = ',', default_value = "kvm")]
    pub devices: Vec<Device>,
    /// Descriptors that the program inherits, besides 0 to 2 and those that ARGS name as fd:N
    #[arg(long = "fd", value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(i32).range(3..))]
    pub descriptors: Vec<RawFd>,
    /// Arguments of the program, after --id NAME and --start-time-us N
    #[arg(last = true, value_name = "ARGS")]
    pub arguments: Vec<OsString>,
}

impl Arguments {
    /// The descriptors that are passed on, ascending.
    pub fn kept_descriptors(&self) -> Vec<RawFd> {
        let mut kept = self.descriptors.clone();
        kept.extend(self.arguments.iter().filter_map(|word| named_descriptor(word)));
        kept.sort_unstable();
        kept.dedup();
        kept
    }
}

/// N of `fd:N` or `--option=fd:N`, from 3 on.
fn named_descriptor(word: &OsStr) -> Option<RawFd> {
    let word = word.to_str()?;
    let value = match word.split_once('=') {
        Some((option, value)) if option.starts_with("--") => value,
        _ => word,
    };
    value.strip_prefix("fd:")?.parse().ok().filter(|fd| *fd > 2)
}

fn parse_id(text: &str) -> Result<String, String> {
    check_id("--id", text).map(|()| text.to_owned()).map_err(|error| error.to_string())
}

fn parse_parent_cgroup(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if text.is_empty() || !path.components().all(|part| matches!(part, Component::Normal(_))) {
        return Err("it is a relative path without . and ..".to_owned());
    }
    Ok(path)
}

/// A file or directory of the host that is shown in the jail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// Its absolute path on the host.
    pub host: PathBuf,
    /// Its path in the jail, relative to the root; plain names only, one at least.
    pub inside: PathBuf,
    /// Whether the jailed may write.
    pub writable: bool,
}

impl Bind {
    fn parse(text: &str) -> Result<Self, String> {
        // A doubled comma stands for one; a single one ends the paths.
        let mut parts = vec![Vec::new()];
        let mut bytes = text.bytes().peekable();
        while let Some(byte) = bytes.next() {
            if byte == b',' && bytes.next_if_eq(&b',').is_none() {
                parts.push(Vec::new());
            } else if let Some(part) = parts.last_mut() {
                part.push(byte);
            }
        }
        let paths = OsString::from_vec(parts.remove(0));
        let writable = match parts.iter().map(Vec::as_slice).collect::<Vec<_>>().as_slice() {
            [] | [b"ro"] => false,
            [b"rw"] => true,
            _ => return Err("after the path only ,ro or ,rw may follow".to_owned()),
        };
        let bytes = paths.as_bytes();
        let (host, inside) = match bytes.windows(2).rposition(|pair| pair == b":/") {
            Some(at) => {
                let (host, rest) = bytes.split_at_checked(at).unwrap_or((bytes, b""));
                (OsStr::from_bytes(host), OsStr::from_bytes(rest.get(1..).unwrap_or_default()))
            }
            None => (paths.as_os_str(), paths.as_os_str()),
        };
        let absolute = |path: &OsStr| std::path::absolute(path).map_err(|error| format!("{path:?}: {error}"));
        let host = absolute(host)?;
        let inside = if inside == paths { host.clone() } else { PathBuf::from(inside) };
        Ok(Self { host, inside: inside_path(&inside)?, writable })
    }
}

/// Takes the root off the path of something in the jail.
fn inside_path(path: &Path) -> Result<PathBuf, String> {
    // `Path` leaves out a lone dot, so look at the bytes.
    let bytes = path.as_os_str().as_bytes();
    let relative = bytes
        .strip_prefix(b"/")
        .ok_or_else(|| format!("{}: in the jail, paths are absolute", path.display()))?;
    if relative.split(|byte| *byte == b'/').any(|part| matches!(part, b"." | b"..")) {
        return Err(format!("{}: a path in the jail has no . or ..", path.display()));
    }
    let parts: PathBuf = Path::new(OsStr::from_bytes(relative))
        .components()
        .filter(|part| *part != Component::RootDir)
        .collect();
    match parts.as_os_str().is_empty() {
        true => Err("the root of the jail cannot be bound".to_owned()),
        false => Ok(parts),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(extra: &[&str]) -> Result<Arguments, String> {
        let words = ["cofferdam-jailer", "--exec-file", "/bin/x", "--uid", "1", "--gid", "2"];
        let extra = if extra.contains(&"--id") { extra.to_vec() } else { [&["--id", "a"], extra].concat() };
        Arguments::try_parse_from(words.into_iter().chain(extra)).map_err(|error| error.to_string())
    }

    #[test]
    fn the_definition_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn ids_that_are_no_plain_names_are_refused() {
        assert_eq!(parse(&["--id", "a_B-9"]).unwrap().id, "a_B-9");
        assert!(parse(&["--id", &"x".repeat(64)]).is_ok());
        for bad in ["", "a/b", "..", ".", "a\0b", "a b", "ä", &"x".repeat(65)] {
            assert!(parse(&["--id", bad]).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn binds_have_a_place_in_the_jail() {
        let bind =
            |host: &str, inside: &str, writable| Bind { host: host.into(), inside: inside.into(), writable };
        for (text, expected) in [
            ("/a/b", bind("/a/b", "a/b", false)),
            ("/a/b,ro", bind("/a/b", "a/b", false)),
            ("/a:/b", bind("/a", "b", false)),
            ("/a:/b//c/,rw", bind("/a", "b/c", true)),
            ("/a:b:/c", bind("/a:b", "c", false)),
            ("/a,,b:/c,,d,rw", bind("/a,b", "c,d", true)),
        ] {
            assert_eq!(Bind::parse(text), Ok(expected), "{text}");
        }
        let relative = Bind::parse("x:/y").unwrap();
        assert!(relative.host.is_absolute() && relative.host.ends_with("x"));
    }

    #[test]
    fn binds_that_would_leave_the_jail_are_refused() {
        for bad in [
            "",
            "/a:/",
            "/",
            "/a:/..",
            "/a:/b/../c",
            "/a:/./b",
            "/a:/b/.",
            "/a/../b",
            "/a,wr",
            "/a,ro,rw",
            "/a,",
        ] {
            assert!(Bind::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn descriptors_are_named_by_option_or_argument() {
        let kept = |extra: &[&str]| parse(extra).map(|arguments| arguments.kept_descriptors());
        assert_eq!(kept(&[]), Ok(vec![]));
        assert_eq!(
            kept(&["--fd", "9,4", "--", "--config-file", "fd:4", "--x=fd:3", "fd:1", "fd:y"]),
            Ok(vec![3, 4, 9])
        );
        for bad in ["2", "-1", "x", "99999999999"] {
            assert!(kept(&["--fd", bad]).is_err(), "{bad}");
        }
    }

    #[test]
    fn parent_cgroups_stay_beneath_the_root() {
        assert!(parse(&["--parent-cgroup", "a/b"]).is_ok());
        for bad in ["", "/a", "..", "a/../b"] {
            assert!(parse(&["--parent-cgroup", bad]).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn devices_are_kvm_unless_named() {
        assert_eq!(parse(&[]).unwrap().devices, [Device::Kvm]);
        assert_eq!(parse(&["--device", "kvm,sev"]).unwrap().devices, [Device::Kvm, Device::Sev]);
        assert!(parse(&["--device", "mem"]).is_err());
    }
}
