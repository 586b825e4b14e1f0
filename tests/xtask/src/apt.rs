//! Debian packages without installing them.
//!
//! `apt-get` runs with a state of its own (sources, package lists, an empty
//! list of installed packages), so the machine's settings and packages stay as
//! they are, no privileges are needed, and other releases than the machine's
//! can be read. What comes from the machine is the address of its mirror, from
//! `/etc/apt/sources.list*`, and its proxy settings, from `/etc/apt/apt.conf*`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache::{Cache, Lock};
use crate::{Error, tool};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// One package source of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Source {
    uri: String,
    suites: Vec<String>,
    components: Vec<String>,
}

/// Where the machine gets Debian from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirrors {
    /// The archive with the releases, updates and backports.
    pub main: String,
    /// The archive with the security updates.
    pub security: String,
}

impl Mirrors {
    /// Reads the machine's package sources.
    pub fn of_this_machine() -> Result<Self, Error> {
        let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
        let parts = fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten();
        files.extend(parts.map(|entry| entry.path()));
        files.sort();
        let mut sources = Vec::new();
        for path in files {
            let text = fs::read_to_string(&path).unwrap_or_default();
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("list") => sources.extend(parse_one_line(&text)),
                Some("sources") => sources.extend(parse_deb822(&text)),
                _ => {}
            }
        }
        Self::choose(&sources).ok_or_else(|| Error::Unavailable {
            what: "Debian mirror".into(),
            reason:
                "no source of Debian's main component in /etc/apt/sources.list or /etc/apt/sources.list.d"
                    .into(),
        })
    }

    /// Of all sources, those of Debian itself: they have a component `main` and
    /// a release of Debian. Other people's archives may use the releases'
    /// names, too, so an address that ends like Debian's is preferred.
    fn choose(sources: &[Source]) -> Option<Self> {
        let releases = ["bookworm", "trixie", "forky", "sid", "stable", "testing", "unstable", "oldstable"];
        let with_suite = |suffix: &str| {
            let matches = |source: &&Source| {
                let suite =
                    |suite: &String| suite.strip_suffix(suffix).is_some_and(|name| releases.contains(&name));
                source.components.iter().any(|name| name == "main") && source.suites.iter().any(suite)
            };
            sources.iter().filter(matches).map(|source| source.uri.trim_end_matches('/')).collect::<Vec<_>>()
        };
        let ends_in = |uris: &[&str], end: &str| {
            uris.iter().find(|uri| uri.ends_with(end)).or(uris.first()).map(|uri| (*uri).to_owned())
        };
        let main = ends_in(&with_suite(""), "/debian")?;
        let security = ends_in(&with_suite("-security"), "/debian-security")
            .unwrap_or_else(|| format!("{main}-security"));
        Some(Self { main, security })
    }
}

/// Parses `sources.list(5)`, one-line style.
fn parse_one_line(text: &str) -> Vec<Source> {
    let entry = |line: &str| {
        let line = line.split('#').next()?.trim();
        let rest = line.strip_prefix("deb")?;
        let rest = rest.strip_prefix(char::is_whitespace)?.trim_start();
        let rest = match rest.strip_prefix('[') {
            Some(options) => options.split_once(']')?.1,
            None => rest,
        };
        let mut words = rest.split_ascii_whitespace().map(str::to_owned);
        let (uri, suite) = (words.next()?, words.next()?);
        if uri.starts_with("cdrom:") {
            return None;
        }
        Some(Source { uri, suites: vec![suite], components: words.collect() })
    };
    text.lines().filter_map(entry).collect()
}

/// Parses `sources.list(5)`, deb822 style: stanzas of fields, which may go on
/// in lines that start with a blank.
fn parse_deb822(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut stanza: Vec<(String, Vec<String>)> = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')).chain([""]) {
        if line.trim().is_empty() {
            sources.extend(stanza_sources(&stanza));
            stanza.clear();
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, words)) = stanza.last_mut() {
                words.extend(line.split_ascii_whitespace().map(str::to_owned));
            }
        } else if let Some((name, value)) = line.split_once(':') {
            let words = value.split_ascii_whitespace().map(str::to_owned).collect();
            stanza.push((name.trim().to_ascii_lowercase(), words));
        }
    }
    sources
}

fn stanza_sources(stanza: &[(String, Vec<String>)]) -> Vec<Source> {
    let field = |name: &str| {
        stanza.iter().find(|(field, _)| field == name).map(|(_, words)| words.clone()).unwrap_or_default()
    };
    let disabled = field("enabled").first().is_some_and(|word| word.eq_ignore_ascii_case("no"));
    if disabled || !field("types").iter().any(|kind| kind == "deb") {
        return Vec::new();
    }
    let source = |uri| Source { uri, suites: field("suites"), components: field("components") };
    field("uris").into_iter().map(source).collect()
}

/// A private apt state that knows some suites.
#[derive(Debug)]
pub struct Apt {
    options: Vec<String>,
    /// The state is used by nobody else.
    _lock: Lock,
}

impl Apt {
    /// A state named `name` in `cache` with the `lines` "TYPE ARCHIVE SUITE",
    /// where ARCHIVE is `main` or `security`. Fetches the package lists anew.
    pub fn new(cache: &Cache, name: &str, lines: &[&str]) -> Result<Self, Error> {
        if !Path::new(KEYRING).exists() {
            return Err(Error::Packages {
                purpose: "checking Debian's signatures",
                packages: vec!["debian-archive-keyring".into()],
            });
        }
        let mirrors = Mirrors::of_this_machine()?;
        let (state, lock) = cache.state(name)?;
        for directory in ["lists/partial", "cache/archives/partial"] {
            let path = state.join(directory);
            fs::create_dir_all(&path).map_err(Error::file("create", &path))?;
        }
        let sources: String = lines.iter().map(|line| source_line(line, &mirrors)).collect();
        for (file, content) in [("sources.list", sources.as_str()), ("status", "")] {
            let path = state.join(file);
            fs::write(&path, content).map_err(Error::file("write", &path))?;
        }
        let apt = Self { options: options(&state), _lock: lock };
        tool::progress(format_args!("reading package lists of {name} from {}", mirrors.main));
        tool::run(apt.command("apt-get").args(["-qq", "update"]))?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("LC_ALL", "C").args(&self.options);
        command
    }

    /// The paragraphs that `apt-cache show` (or `showsrc`) has for `package`,
    /// newest version first.
    pub fn show(&self, what: &str, package: &str) -> Result<Vec<Paragraph>, Error> {
        let text = tool::run(self.command("apt-cache").args([what, package]))?;
        Ok(String::from_utf8_lossy(&text).split("\n\n").map(Paragraph::parse).collect())
    }

    /// Downloads `package` (`NAME`, `NAME=VERSION` or `NAME/SUITE`) and unpacks
    /// its files below `directory`.
    pub fn unpack(&self, package: &str, directory: &Path) -> Result<(), Error> {
        tool::progress(format_args!("fetching {package}"));
        let downloads =
            tempfile::tempdir_in(directory).map_err(Error::file("create a directory in", directory))?;
        tool::run(self.command("apt-get").args(["-qq", "download", package]).current_dir(downloads.path()))?;
        unpack_all(downloads.path(), directory)
    }

    /// Downloads `packages` and all that they depend on, the C library included, and unpacks their files below `directory`.
    pub fn unpack_with_dependencies(&self, packages: &[&str], directory: &Path) -> Result<(), Error> {
        tool::progress(format_args!("fetching {} and what they depend on", packages.join(" ")));
        let downloads =
            tempfile::tempdir_in(directory).map_err(Error::file("create a directory in", directory))?;
        let archives = format!("Dir::Cache::archives={}", downloads.path().display());
        fs::create_dir(downloads.path().join("partial")).map_err(Error::file("create", downloads.path()))?;
        let mut command = self.command("apt-get");
        command.args(["-o", &archives, "-qq", "-y", "--no-install-recommends", "--download-only", "install"]);
        tool::run(command.args(packages))?;
        unpack_all(downloads.path(), directory)
    }

    /// Downloads the source package `package` (`NAME=VERSION`) into `directory`.
    pub fn source(&self, package: &str, directory: &Path) -> Result<(), Error> {
        tool::progress(format_args!("fetching the source of {package}"));
        let mut command = self.command("apt-get");
        tool::run(command.args(["-qq", "source", "--download-only", package]).current_dir(directory))?;
        Ok(())
    }
}

/// Unpacks all packages in `downloads` below `directory`.
fn unpack_all(downloads: &Path, directory: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(downloads).map_err(Error::file("read", downloads))? {
        let path = entry.map_err(Error::file("read", downloads))?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            tool::run(Command::new("dpkg-deb").arg("-x").arg(path).arg(directory))?;
        }
    }
    Ok(())
}

fn source_line(line: &str, mirrors: &Mirrors) -> String {
    let words: Vec<&str> = line.split(' ').collect();
    let (kind, archive, suite) = match words.as_slice() {
        [kind, "security", suite] => (kind, &mirrors.security, suite),
        [kind, _, suite] => (kind, &mirrors.main, suite),
        _ => return String::new(),
    };
    format!("{kind} [signed-by={KEYRING}] {archive} {suite} main\n")
}

fn options(state: &Path) -> Vec<String> {
    let path = |name: &str| state.join(name).to_string_lossy().into_owned();
    let settings = [
        format!("Dir::Etc::sourcelist={}", path("sources.list")),
        "Dir::Etc::sourceparts=/dev/null".into(),
        "Dir::Etc::preferences=/dev/null".into(),
        "Dir::Etc::preferencesparts=/dev/null".into(),
        format!("Dir::State::Lists={}", path("lists")),
        format!("Dir::State::status={}", path("status")),
        format!("Dir::Cache={}", path("cache")),
        "Acquire::Languages=none".into(),
        "APT::Architecture=amd64".into(),
        "APT::Default-Release=".into(),
        "APT::Sandbox::User=root".into(),
    ];
    settings.into_iter().flat_map(|setting| ["-o".to_owned(), setting]).collect()
}

/// A paragraph of a Debian control file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paragraph(Vec<(String, String)>);

impl Paragraph {
    fn parse(text: &str) -> Self {
        let field =
            |line: &str| line.split_once(": ").map(|(name, value)| (name.to_owned(), value.to_owned()));
        Self(text.lines().filter(|line| !line.starts_with(' ')).filter_map(field).collect())
    }

    /// The one-line value of field `name`.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str())
    }

    /// The names of the packages in the relation field `name`.
    pub fn packages(&self, name: &str) -> impl Iterator<Item = &str> {
        let relations = self.get(name).unwrap_or_default().split([',', '|']);
        relations.filter_map(|relation| relation.split_ascii_whitespace().next())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mirrors(sources: &[Source]) -> Option<(String, String)> {
        Mirrors::choose(sources).map(|mirrors| (mirrors.main, mirrors.security))
    }

    const DEBIAN: &str = "http://deb.debian.org/debian";

    #[test]
    fn deb822_sources_of_a_container_image() {
        let text = "Types: deb\n# a snapshot\nURIs: http://deb.debian.org/debian\nSuites: bookworm bookworm-updates\n\
                    Components: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n\
                    Types: deb\nURIs: http://deb.debian.org/debian-security\nSuites: bookworm-security\nComponents: main\n";
        let sources = parse_deb822(text);
        assert_eq!(sources.len(), 2);
        assert_eq!(mirrors(&sources), Some((DEBIAN.into(), format!("{DEBIAN}-security"))));
    }

    #[test]
    fn one_line_sources() {
        let text = "# deb http://old/debian bookworm main\ndeb cdrom:[Debian 12]/ bookworm main\n\
                    deb [arch=amd64 signed-by=/k.gpg] https://download.example/linux/debian bookworm stable\n\
                    deb-src http://deb.debian.org/debian bookworm main\n\
                    deb   [ trusted=yes ]  http://ftp.example/debian/  bookworm main contrib # ours\n\
                    deb http://security.example/debian-security bookworm-security main\ndeb\ndeb x\ndebug y z main\n";
        let sources = parse_one_line(text);
        assert_eq!(sources.len(), 3);
        let expected = ("http://ftp.example/debian".into(), "http://security.example/debian-security".into());
        assert_eq!(mirrors(&sources), Some(expected));
    }

    #[test]
    fn foreign_disabled_and_broken_stanzas_are_no_mirror() {
        let text = "Types: deb\nURIs: https://deb.node.example/node\nSuites: nodistro\nComponents: main\n\n\
                    Enabled: no\nTypes: deb\nURIs: http://off.example/debian\nSuites: bookworm\nComponents: main\n\n\
                    Types: deb-src\nURIs: http://src.example/debian\nSuites: bookworm\nComponents: main\n\n\
                    \u{20}continuation of nothing\nno colon\nURIs:\n";
        assert_eq!(mirrors(&parse_deb822(text)), None);
        assert_eq!(mirrors(&parse_deb822("")), None);
    }

    #[test]
    fn continued_fields_and_other_addresses_are_understood() {
        let text = "types: deb deb-src\nURIs:\n mirror+file:///etc/apt/mirrors/debian.list\nSuites:\n\ttrixie\n\ttrixie-backports\n\
                    Components: main\n";
        let uri = "mirror+file:///etc/apt/mirrors/debian.list";
        assert_eq!(mirrors(&parse_deb822(text)), Some((uri.into(), format!("{uri}-security"))));
    }

    #[test]
    fn an_address_like_debians_is_preferred() {
        let source = |uri: &str| Source {
            uri: uri.into(),
            suites: vec!["bookworm".into()],
            components: vec!["main".into()],
        };
        let both = [source("https://packages.example/apt"), source("http://mirror.example/debian/")];
        assert_eq!(mirrors(&both).map(|found| found.0), Some("http://mirror.example/debian".into()));
    }

    #[test]
    fn relations_of_a_paragraph() {
        let text = "Package: linux-image-amd64\nDescription: x\n more: text\nDepends: linux-image-6.12+x (= 1:6), b | c (>= 2)\n";
        let paragraph = Paragraph::parse(text);
        assert_eq!(paragraph.packages("Depends").collect::<Vec<_>>(), ["linux-image-6.12+x", "b", "c"]);
        assert_eq!(paragraph.get("more"), None);
        assert_eq!(paragraph.packages("Recommends").count(), 0);
    }
}
