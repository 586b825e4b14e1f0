//! Cgroups: a directory per hierarchy, `PARENT/ID` beneath its mount, with the limits of `--cgroup` written into
//! it. Version 2 has one hierarchy; version 1 has one per controller, or per few.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::process::Pid;

/// What a cgroup's files are first asked for, and what new ones of version 1 have to be given.
const CPUSET_FILES: [&str; 2] = ["cpuset.cpus", "cpuset.mems"];

/// Why cgroups could not be set up or removed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A call failed.
    #[error("cgroup: {call} {path}: {error}")]
    Call {
        /// What was tried.
        call: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// Nothing is mounted that has the controller.
    #[error("cgroup: no mounted hierarchy{version} has the controller {controller:?}")]
    NoController {
        /// The part of the file's name before the dot.
        controller: String,
        /// Which version was asked for.
        version: &'static str,
    },
    /// No version 2 is mounted.
    #[error("cgroup: --parent-cgroup without --cgroup needs a mounted hierarchy of version 2")]
    NoUnified,
}

/// Version of cgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Version {
    /// One hierarchy per controller.
    #[value(name = "1")]
    V1,
    /// One for all.
    #[value(name = "2")]
    V2,
}

/// One `--cgroup`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    file: String,
    value: String,
}

impl Setting {
    /// Reads `FILE=VALUE`, where `FILE` is `CONTROLLER.NAME`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (file, value) = text.split_once('=').ok_or("it is FILE=VALUE")?;
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        let named =
            file.split_once('.').is_some_and(|(controller, name)| !controller.is_empty() && !name.is_empty());
        if !named || !file.bytes().all(allowed) || file.starts_with("cgroup.") {
            return Err(format!("{file:?} is not a controller's file, such as memory.max"));
        }
        if value.is_empty() {
            return Err(format!("{file} has no value"));
        }
        Ok(Self { file: file.to_owned(), value: value.to_owned() })
    }

    fn controller(&self) -> &str {
        self.file.split_once('.').map_or(self.file.as_str(), |(controller, _)| controller)
    }
}

/// A hierarchy that is mounted.
#[derive(Debug, PartialEq, Eq)]
struct Hierarchy {
    mount: PathBuf,
    version: Version,
    controllers: Vec<String>,
}

/// The mounted hierarchies.
fn hierarchies() -> Result<Vec<Hierarchy>, CgroupError> {
    let path = Path::new("/proc/self/mounts");
    let mut found = parse_mounts(&fs::read_to_string(path).map_err(failed("read", path))?);
    for hierarchy in found.iter_mut().filter(|hierarchy| hierarchy.version == Version::V2) {
        let file = hierarchy.mount.join("cgroup.controllers");
        let names = fs::read_to_string(&file).map_err(failed("read", &file))?;
        hierarchy.controllers = names.split_whitespace().map(str::to_owned).collect();
    }
    Ok(found)
}

fn parse_mounts(text: &str) -> Vec<Hierarchy> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (mount, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
            let version = match kind {
                "cgroup" => Version::V1,
                "cgroup2" => Version::V2,
                _ => return None,
            };
            let controllers = options.split(',').map(str::to_owned).collect();
            Some(Hierarchy { mount: unescape(mount), version, controllers })
        })
        .collect()
}

/// The kernel writes blanks and backslashes of a mount point as three octal digits.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let digits = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(escaped) if byte == b'\\' => {
                bytes.push(escaped);
                rest = tail.get(3..).unwrap_or_default();
            }
            _ => {
                bytes.push(byte);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

/// The cgroups of one domain.
#[derive(Debug, Default)]
pub struct Cgroups {
    groups: Vec<Group>,
    /// Cgroups that go with the last domain in them.
    parents: Vec<PathBuf>,
}

#[derive(Debug)]
struct Group {
    mount: PathBuf,
    version: Version,
    /// Beneath the mount.
    parent: PathBuf,
    directory: PathBuf,
    settings: Vec<Setting>,
}

impl Cgroups {
    /// Finds a place for each of `settings`. `parent` is that of `--parent-cgroup`.
    pub fn plan(
        settings: &[Setting],
        version: Option<Version>,
        parent: Option<&Path>,
        program: &str,
        id: &str,
    ) -> Result<Self, CgroupError> {
        if settings.is_empty() && parent.is_none() {
            return Ok(Self::default());
        }
        let mut by_mount: BTreeMap<PathBuf, (Version, Vec<Setting>)> = BTreeMap::new();
        let hierarchies = hierarchies()?;
        for (hierarchy, setting) in assign(&hierarchies, settings, version)? {
            let group = by_mount.entry(hierarchy.mount.clone()).or_insert((hierarchy.version, Vec::new()));
            group.1.extend(setting.cloned());
        }
        let of_parent = parent.unwrap_or(Path::new(program));
        let group = |(mount, (version, settings)): (PathBuf, (Version, Vec<Setting>))| Group {
            directory: mount.join(of_parent).join(id),
            parent: of_parent.to_owned(),
            mount,
            version,
            settings,
        };
        let groups: Vec<Group> = by_mount.into_iter().map(group).collect();
        let parents = match parent {
            Some(_) => Vec::new(),
            None => groups.iter().map(|group| group.mount.join(program)).collect(),
        };
        Ok(Self { groups, parents })
    }

    /// The directories to remove in the end, in this order.
    pub fn directories(&self) -> Vec<PathBuf> {
        self.groups.iter().map(|group| &group.directory).chain(&self.parents).cloned().collect()
    }

    /// Makes the cgroups and writes their limits.
    pub fn create(&self) -> Result<(), CgroupError> {
        self.groups.iter().try_for_each(Group::create)
    }

    /// Moves a process in.
    pub fn admit(&self, pid: Pid) -> Result<(), CgroupError> {
        for group in &self.groups {
            let file = group.directory.join("cgroup.procs");
            write(&file, &pid.as_raw_nonzero().to_string())?;
        }
        Ok(())
    }
}

type Assigned<'a> = Vec<(&'a Hierarchy, Option<&'a Setting>)>;

/// Finds the hierarchy of each setting; without settings, that of version 2.
fn assign<'a>(
    hierarchies: &'a [Hierarchy],
    settings: &'a [Setting],
    version: Option<Version>,
) -> Result<Assigned<'a>, CgroupError> {
    if settings.is_empty() {
        let unified = hierarchies.iter().find(|hierarchy| hierarchy.version == Version::V2);
        return unified.map(|hierarchy| vec![(hierarchy, None)]).ok_or(CgroupError::NoUnified);
    }
    let with = |version: Version, wanted: &str| {
        hierarchies.iter().find(|hierarchy| {
            hierarchy.version == version
                && hierarchy.controllers.iter().any(|controller| controller == wanted)
        })
    };
    let all = |version| -> Result<Assigned<'a>, CgroupError> {
        let place = |setting: &'a Setting| match with(version, setting.controller()) {
            Some(hierarchy) => Ok((hierarchy, Some(setting))),
            None => Err(CgroupError::NoController {
                controller: setting.controller().to_owned(),
                version: if version == Version::V1 { " of version 1" } else { " of version 2" },
            }),
        };
        settings.iter().map(place).collect()
    };
    match version {
        Some(version) => all(version),
        None => all(Version::V2).or_else(|_| all(Version::V1)),
    }
}

impl Group {
    fn create(&self) -> Result<(), CgroupError> {
        match self.make_directories() {
            // The parent went with another domain that was the last in it.
            Err(CgroupError::Call { error, .. }) if error.kind() == io::ErrorKind::NotFound => {
                self.make_directories()?;
            }
            other => other?,
        }
        for setting in &self.settings {
            write(&self.directory.join(&setting.file), &setting.value)?;
        }
        Ok(())
    }

    fn make_directories(&self) -> Result<(), CgroupError> {
        let mut path = self.mount.clone();
        for part in self.parent.components() {
            self.delegate(&path)?;
            path.push(part);
            match fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(failed("mkdir", &path)(error));
                }
                _ => self.inherit(&path)?,
            }
        }
        self.delegate(&path)?;
        fs::create_dir(&self.directory).map_err(failed("mkdir", &self.directory))?;
        self.inherit(&self.directory)
    }

    /// Version 2: has the children of `path` know the controllers.
    fn delegate(&self, path: &Path) -> Result<(), CgroupError> {
        if self.version == Version::V2 && !self.settings.is_empty() {
            let mut names: Vec<String> =
                self.settings.iter().map(|setting| format!("+{}", setting.controller())).collect();
            names.dedup();
            write(&path.join("cgroup.subtree_control"), &names.join(" "))?;
        }
        Ok(())
    }

    /// Version 1: a new cgroup may run nowhere until it is told where.
    fn inherit(&self, path: &Path) -> Result<(), CgroupError> {
        if self.version == Version::V2
            || !self.settings.iter().any(|setting| setting.controller() == "cpuset")
        {
            return Ok(());
        }
        for name in CPUSET_FILES {
            let own = path.join(name);
            let parents = path.parent().unwrap_or(path).join(name);
            if fs::read_to_string(&own).map_err(failed("read", &own))?.trim().is_empty() {
                let value = fs::read_to_string(&parents).map_err(failed("read", &parents))?;
                write(&own, value.trim())?;
            }
        }
        Ok(())
    }
}

/// Removes the cgroups `directories`, whose processes are dead or dying. A parent in use stays.
pub fn remove(directories: &[PathBuf]) -> Result<(), CgroupError> {
    let mut result = Ok(());
    for path in directories {
        // A process leaves its cgroup some time after it can be waited for.
        for attempt in 0..200 {
            let error = match fs::remove_dir(path) {
                Ok(()) => break,
                Err(error) => error,
            };
            if error.kind() == io::ErrorKind::NotFound || has_children(path) {
                break;
            }
            if attempt == 199 {
                result = Err(failed("rmdir", path)(error));
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
    result
}

fn has_children(path: &Path) -> bool {
    fs::read_dir(path).is_ok_and(|mut entries| {
        entries.any(|entry| entry.is_ok_and(|e| e.file_type().is_ok_and(|t| t.is_dir())))
    })
}

fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    let open = fs::OpenOptions::new().write(true).open(path);
    open.and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes())).map_err(failed("write", path))
}

fn failed(call: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |error| CgroupError::Call { call, path, error }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setting(text: &str) -> Setting {
        Setting::parse(text).unwrap()
    }

    #[test]
    fn settings_are_files_of_controllers() {
        let memory = setting("memory.max=1=2");
        assert_eq!(
            (memory.controller(), memory.file.as_str(), memory.value.as_str()),
            ("memory", "memory.max", "1=2")
        );
        for bad in [
            "",
            "memory.max",
            "memory=1",
            ".x=1",
            "memory.=1",
            "../a.b=1",
            "a/b.c=1",
            "cgroup.procs=1",
            "a.b=",
        ] {
            assert!(Setting::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn mounts_are_found() {
        let found = parse_mounts(
            "proc /proc proc rw 0 0\ncgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n\
             cgroup2 /a\\040b cgroup2 rw 0 0\nbroken\n",
        );
        let [cpu, unified] = found.as_slice() else { panic!("{found:?}") };
        assert_eq!(cpu.version, Version::V1);
        assert!(cpu.controllers.contains(&"cpuacct".to_owned()));
        assert_eq!((unified.version, unified.mount.as_path()), (Version::V2, Path::new("/a b")));
    }

    #[test]
    fn version_2_comes_first_and_1_where_the_controller_is() {
        let hierarchy = |mount: &str, version, controllers: &[&str]| Hierarchy {
            mount: mount.into(),
            version,
            controllers: controllers.iter().map(|name| (*name).to_owned()).collect(),
        };
        let hybrid = [hierarchy("/m", Version::V1, &["memory"]), hierarchy("/u", Version::V2, &["hugetlb"])];
        let unified = [hierarchy("/u", Version::V2, &["memory", "cpu"])];
        let memory = [setting("memory.max=1")];
        let place = |hierarchies: &[Hierarchy], settings: &[Setting], version| {
            assign(hierarchies, settings, version).map(|found| found.first().unwrap().0.mount.clone()).ok()
        };
        assert_eq!(place(&hybrid, &memory, None), Some("/m".into()));
        assert_eq!(place(&unified, &memory, None), Some("/u".into()));
        assert_eq!(place(&unified, &memory, Some(Version::V1)), None);
        assert_eq!(place(&hybrid, &memory, Some(Version::V2)), None);
        assert_eq!(place(&hybrid, &[setting("pids.max=1")], None), None);
        assert_eq!(place(&hybrid, &[], None), Some("/u".into()));
    }
}
