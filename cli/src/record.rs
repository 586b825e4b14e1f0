//! How the last domains ended, for `cofferdam wait` when it comes late: a small file for each in `.ended` of the run
//! directory, until a domain of that id starts anew or [`MAX_RECORDS`] others have ended.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use cofferdam_api::status::Outcome;
use rustix::fs::{AtFlags, Dir, Mode, OFlags, mkdirat, openat, renameat, statat, unlinkat};
use rustix::io::Errno;

/// Most ends that are kept.
pub const MAX_RECORDS: usize = 64;
const FOLDER: &str = ".ended";
/// What is being written; no id has a dot.
const NEW: &str = ".new";
/// Largest record that is read, bytes.
const MAX_SIZE: u64 = 64 * 1024;

/// Keeps how domain `id` ended.
pub fn keep(run_dir: &OwnedFd, id: &str, outcome: &Outcome) -> io::Result<()> {
    match mkdirat(run_dir, FOLDER, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let folder = open(run_dir)?;
    let new = format!("{NEW}-{id}");
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat(&folder, &new, flags, Mode::RUSR | Mode::WUSR)?;
    File::from(file).write_all(&serde_json::to_vec(outcome)?)?;
    renameat(&folder, &new, &folder, id)?;
    trim(&folder)
}

/// How domain `id` ended, if that is kept.
pub fn read(run_dir: &OwnedFd, id: &str) -> Option<Outcome> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat(open(run_dir).ok()?, id, flags, Mode::empty()).ok()?;
    let mut text = Vec::new();
    File::from(file).take(MAX_SIZE).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

/// Forgets how domain `id` ended.
pub fn forget(run_dir: &OwnedFd, id: &str) {
    if let Ok(folder) = open(run_dir) {
        // As a rule there is none.
        let _ = unlinkat(&folder, id, AtFlags::empty());
    }
}

fn open(run_dir: &OwnedFd) -> Result<OwnedFd, Errno> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(run_dir, FOLDER, flags, Mode::empty())
}

/// Removes the oldest of those that are too many.
fn trim(folder: &OwnedFd) -> io::Result<()> {
    let mut records = Vec::new();
    for file in Dir::read_from(folder)? {
        let name = file?.file_name().to_owned();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        // Others may be trimming too.
        if let Ok(stat) = statat(folder, &name, AtFlags::SYMLINK_NOFOLLOW) {
            records.push((stat.st_mtime, stat.st_mtime_nsec, name));
        }
    }
    records.sort();
    let too_many = records.len().saturating_sub(MAX_RECORDS);
    for (_, _, name) in records.into_iter().take(too_many) {
        let _ = unlinkat(folder, &name, AtFlags::empty());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use cofferdam_api::status::{ExitReason, Phases};

    #[test]
    fn the_last_ends_are_kept_and_no_more() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir: OwnedFd = File::open(folder.path()).unwrap().into();
        let outcome = |code| Outcome {
            platform: None,
            protected: false,
            identity: Default::default(),
            container: None,
            exit_reason: ExitReason::PowerOff,
            exit_code: Some(code),
            message: "m".to_owned(),
            phases: Phases::new(),
        };
        assert_eq!(read(&run_dir, "d"), None);
        forget(&run_dir, "d");
        for code in [1, 2] {
            keep(&run_dir, "d", &outcome(code)).unwrap();
            assert_eq!(read(&run_dir, "d"), Some(outcome(code)));
        }
        forget(&run_dir, "d");
        assert_eq!(read(&run_dir, "d"), None);

        for index in 0..=MAX_RECORDS {
            keep(&run_dir, &format!("d{index}"), &outcome(0)).unwrap();
            // The clock of the file system is coarse.
            let path = folder.path().join(format!("{FOLDER}/d{index}"));
            let time =
                std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1000 + index as u64);
            File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
        }
        keep(&run_dir, "last", &outcome(9)).unwrap();
        assert_eq!(std::fs::read_dir(folder.path().join(FOLDER)).unwrap().count(), MAX_RECORDS);
        assert_eq!((read(&run_dir, "d0"), read(&run_dir, "d1")), (None, None));
        assert_eq!((read(&run_dir, "d2"), read(&run_dir, "last")), (Some(outcome(0)), Some(outcome(9))));
    }
}
