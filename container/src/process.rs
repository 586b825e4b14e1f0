//! The manifest of an image: what the image says of its process, and little that the host may do.

use cofferdam_container_manifest::{Host, Manifest, OnVerityFailure, Process, Signal, Stop};

use crate::image::Image;

/// The search path of an image that has none.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The home of a user whom an image does not know.
const HOME: &str = "/";
/// What other container tools leave to a process of user 0.
const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];
/// How long an orderly stop takes at most, in milliseconds.
const STOP_MS: u64 = 10_000;

/// Why an image has no manifest.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProcessError {
    /// A user that the image does not know.
    #[error("the image has no user {0:?} in /etc/passwd")]
    User(String),
    /// A group that the image does not know.
    #[error("the image has no group {0:?} in /etc/group")]
    Group(String),
    /// A signal that no manifest can have.
    #[error("the image is stopped with the signal {0:?}, which no manifest can name")]
    Signal(String),
    /// Nothing to run.
    #[error("the image names no program; give one after --")]
    NoProgram,
}

/// User, group and further groups.
pub type Identity = (u32, u32, Vec<u32>);

impl Image {
    /// Program and arguments: `command`, if it is given, replaces the image's own, but not its entry point.
    ///
    /// # Errors
    /// If there is no program then.
    pub fn args(&self, command: &[String]) -> Result<Vec<String>, ProcessError> {
        let command = if command.is_empty() { &self.command } else { command };
        let args = [self.entrypoint.as_slice(), command].concat();
        if args.is_empty() { Err(ProcessError::NoProgram) } else { Ok(args) }
    }

    /// User, group and further groups of `USER[:GROUP]`, each a name that the image knows or a number; nothing is root.
    ///
    /// # Errors
    /// If the image does not know a name.
    pub fn identity(&self, wanted: &str) -> Result<Identity, ProcessError> {
        Users { passwd: &self.passwd, group: &self.group }.find(wanted)
    }

    /// The variable `HOME` of `USER[:GROUP]`, as the image's `/etc/passwd` has it; nothing if the image itself gives it a value.
    pub fn home(&self, wanted: &str) -> Option<String> {
        if self.env.iter().any(|entry| entry.starts_with("HOME=")) {
            return None;
        }
        let (user, _) = parts(wanted);
        let users = Users { passwd: &self.passwd, group: &self.group };
        let entry = users.entry(user);
        let home = entry.as_ref().and_then(|entry| entry.get(5)).filter(|home| !home.is_empty());
        Some(format!("HOME={}", home.unwrap_or(&HOME)))
    }

    /// The manifest of this image. `command` and `user` replace what the image says, if they are given.
    ///
    /// # Errors
    /// If something that the image names is not there.
    pub fn manifest(&self, command: &[String], user: Option<&str>) -> Result<Manifest, ProcessError> {
        manifest(self, self.args(command)?, user.unwrap_or(&self.user))
    }
}

/// User and group of `USER[:GROUP]`, if both are numbers: those need no image.
pub fn identity_by_numbers(wanted: &str) -> Option<Identity> {
    let numbers = wanted.split(':').all(|part| part.parse::<u32>().is_ok());
    if numbers { Users { passwd: "", group: "" }.find(wanted).ok() } else { None }
}

fn manifest(image: &Image, args: Vec<String>, user: &str) -> Result<Manifest, ProcessError> {
    let (uid, gid, groups) = image.identity(user)?;
    let mut env = image.env.clone();
    if !env.iter().any(|entry| entry.starts_with("PATH=")) {
        env.insert(0, PATH.to_owned());
    }
    env.extend(image.home(user));
    let signal = match image.stop_signal.as_deref() {
        None | Some("") => Signal::Term,
        Some(name) => Signal::from_name(name).ok_or_else(|| ProcessError::Signal(name.to_owned()))?,
    };
    Ok(Manifest {
        host: Host {
            exec: vec![],
            signals: vec![Signal::Int, Signal::Term],
            stderr: true,
            stdin: false,
            stdout: true,
            stop: Some(Stop { signal, timeout_ms: STOP_MS }),
        },
        hostname: "container".to_owned(),
        layers: image.layers.clone(),
        mounts: vec![],
        on_verity_failure: OnVerityFailure::Kill,
        process: Process {
            args,
            capabilities: CAPABILITIES.map(str::to_owned).to_vec(),
            cwd: absolute(&image.working_dir),
            env,
            gid,
            groups,
            no_new_privs: false,
            read_only_root: false,
            rlimits: vec![],
            start_env: vec![],
            terminal: false,
            uid,
        },
        scratch: None,
        version: 1,
    })
}

/// A working directory in the form that a manifest has. One with `..` stays, and is refused there.
fn absolute(path: &str) -> String {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    format!("/{}", parts.join("/"))
}

/// User and group of `USER[:GROUP]`.
fn parts(wanted: &str) -> (&str, Option<&str>) {
    let (user, group) = wanted.split_once(':').unwrap_or((wanted, ""));
    (if user.is_empty() { "0" } else { user }, Some(group).filter(|group| !group.is_empty()))
}

/// The users and groups that an image knows.
struct Users<'a> {
    passwd: &'a str,
    group: &'a str,
}

impl Users<'_> {
    fn find(&self, wanted: &str) -> Result<Identity, ProcessError> {
        let (user, group) = parts(wanted);
        let number = user.parse::<u32>().ok();
        let entry = self.entry(user);
        let field = |at: usize| entry.as_ref().and_then(|entry| entry.get(at)?.parse::<u32>().ok());
        let uid = number.or(field(2)).ok_or_else(|| ProcessError::User(user.to_owned()))?;
        let Some(group) = group else {
            let name = entry.as_ref().and_then(|entry| entry.first()).copied();
            return Ok((uid, field(3).unwrap_or(0), name.map_or_else(Vec::new, |name| self.groups(name))));
        };
        let by_name = || {
            self.group.lines().find_map(|line| {
                let mut fields = line.split(':');
                if fields.next()? == group { fields.nth(1)?.parse().ok() } else { None }
            })
        };
        let gid = group.parse().ok().or_else(by_name).ok_or_else(|| ProcessError::Group(group.to_owned()))?;
        // With a group of one's own choice there are no further ones, as elsewhere.
        Ok((uid, gid, vec![]))
    }

    /// The fields of a user's entry in `/etc/passwd`, by name or number.
    fn entry(&self, user: &str) -> Option<Vec<&str>> {
        let number = user.parse::<u32>().ok();
        let mut entries = self.passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
        entries.find(|entry| match (number, entry.as_slice()) {
            (Some(number), [_, _, uid, ..]) => uid.parse() == Ok(number),
            (None, [name, ..]) => *name == user,
            _ => false,
        })
    }

    /// The groups that have this member, sorted.
    fn groups(&self, member: &str) -> Vec<u32> {
        let mut groups: Vec<u32> = self
            .group
            .lines()
            .filter_map(|line| {
                let fields: Vec<&str> = line.split(':').collect();
                let [_, _, gid, members] = fields.as_slice() else { return None };
                members.split(',').any(|one| one == member).then(|| gid.parse().ok())?
            })
            .collect();
        groups.sort_unstable();
        groups.dedup();
        groups
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_and_groups() {
        let users = Users {
            passwd: "root:x:0:0::/root:/bin/sh\nweb:x:33:34:w:/:/x\nbroken\n",
            group: "root:x:0:\nweb:x:34:\nlog:x:7:web,root\nadm:x:4:web\nlog2:x:7:web\n",
        };
        assert_eq!(users.find(""), Ok((0, 0, vec![7])));
        assert_eq!(users.find("web"), Ok((33, 34, vec![4, 7])));
        assert_eq!(users.find("33"), Ok((33, 34, vec![4, 7])));
        assert_eq!(users.find("1000"), Ok((1000, 0, vec![])));
        assert_eq!(users.find("1000:web"), Ok((1000, 34, vec![])));
        assert_eq!(users.find("web:9"), Ok((33, 9, vec![])));
        assert_eq!(users.find("nobody"), Err(ProcessError::User("nobody".to_owned())));
        assert_eq!(users.find("web:nobody"), Err(ProcessError::Group("nobody".to_owned())));
        assert_eq!(users.find("broken"), Err(ProcessError::User("broken".to_owned())));
    }

    #[test]
    fn homes() {
        let mut image = Image {
            command: vec!["/a".to_owned()],
            entrypoint: vec![],
            env: vec![],
            group: String::new(),
            layers: vec![],
            passwd: "root:x:0:0::/root:/bin/sh\nweb:x:33:34:w:/srv:/x\nbin:x:2:2:::\nshort:x:3\n".to_owned(),
            stop_signal: None,
            user: "web".to_owned(),
            version: crate::image::VERSION,
            working_dir: String::new(),
        };
        for (user, home) in [
            ("", "/root"),
            ("0:7", "/root"),
            ("33", "/srv"),
            ("web:0", "/srv"),
            ("bin", "/"),
            ("3", "/"),
            ("9", "/"),
        ] {
            assert_eq!(image.home(user), Some(format!("HOME={home}")), "{user}");
        }
        assert_eq!(image.manifest(&[], None).unwrap().process.env, [PATH, "HOME=/srv"]);
        image.env = vec!["HOME=/app".to_owned(), "PATH=/bin".to_owned()];
        assert_eq!(image.manifest(&[], Some("root")).unwrap().process.env, image.env);
    }

    #[test]
    fn working_directories() {
        for (given, path) in
            [("", "/"), ("/", "/"), ("/a//b/./c/", "/a/b/c"), ("a", "/a"), ("/../a", "/../a")]
        {
            assert_eq!(absolute(given), path);
        }
    }
}
