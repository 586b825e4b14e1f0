//! What is known of SEV-SNP domains from elsewhere than the monitor: the emulated secure processor's own log, and the
//! certificates that vouch for it. Hardware keeps no such log.

use std::env;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use xtask::rig;

/// A launch that was finished: pages by type, as they passed through the secure processor, and the digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Measured ones with content.
    pub normal: u32,
    /// Save areas, one for each vCPU.
    pub vmsa: u32,
    /// Zero pages.
    pub zero: u32,
    /// Ones that are not measured.
    pub unmeasured: u32,
    /// Secrets pages.
    pub secrets: u32,
    /// CPUID pages.
    pub cpuid: u32,
    /// The launch digest, in hexadecimal digits.
    pub digest: String,
}

impl Launch {
    /// Number of pages, of whatever type.
    pub fn pages(&self) -> u32 {
        self.normal + self.vmsa + self.zero + self.unmeasured + self.secrets + self.cpuid
    }

    /// Of a line like `sev: psp: guest asid 1 launched: 7 normal 1 vmsa 0 zero 1 unmeasured 1 secrets 1 cpuid, digest db56…`.
    fn parse(line: &str) -> Option<Self> {
        let (_, counts) = line.split_once(" launched: ")?;
        let (counts, digest) = counts.split_once(", digest ")?;
        let words: Vec<&str> = counts.split(' ').collect();
        let count = |kind: &str| {
            let at = words.iter().position(|word| *word == kind)?;
            words.get(at.checked_sub(1)?)?.parse().ok()
        };
        Some(Self {
            normal: count("normal")?,
            vmsa: count("vmsa")?,
            zero: count("zero")?,
            unmeasured: count("unmeasured")?,
            secrets: count("secrets")?,
            cpuid: count("cpuid")?,
            digest: digest.to_owned(),
        })
    }
}

/// What the emulated secure processor says from some moment on.
pub struct Log {
    path: PathBuf,
    from: u64,
}

impl Log {
    /// From now on; nothing on hardware.
    pub fn from_now_on() -> Option<Self> {
        if !rig::inside() {
            return None;
        }
        let path =
            PathBuf::from(env::var_os(rig::LOG).expect("the rig says where the emulator's messages are"));
        let from = path.metadata().expect("the emulator's messages are there").len();
        Some(Self { path, from })
    }

    /// The lines.
    pub fn lines(&self) -> Vec<String> {
        // Past this machine's caches: the file grows outside.
        let mut file =
            File::options().read(true).custom_flags(libc::O_DIRECT).open(&self.path).expect("it is there");
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(self.from))
            .and_then(|_| file.read_to_end(&mut bytes))
            .expect("it can be read");
        String::from_utf8_lossy(&bytes).lines().map(str::to_owned).collect()
    }

    /// The launches that were finished.
    pub fn launches(&self) -> Vec<Launch> {
        self.lines().iter().filter_map(|line| Launch::parse(line)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launch_is_read_as_the_emulator_writes_it() {
        let line = "sev: psp: guest asid 1 launched: 1025 normal 2 vmsa 44 zero 3 unmeasured 1 secrets 1 cpuid, digest db56";
        let launch = Launch::parse(line).unwrap();
        assert_eq!((launch.pages(), launch.vmsa, launch.digest.as_str()), (1076, 2, "db56"));
        assert_eq!(Launch::parse("sev: psp: command 0xa2 -> 0xb"), None);
        assert_eq!(Launch::parse("sev: psp: guest asid 1 launched: 1 normal, digest 00"), None);
    }
}
