//! Paths in the container's root file system, which is somebody else's: no link leads out of it.

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags, ResolveFlags, mkdirat, open, openat2};
use rustix::io::{Errno, Result};

/// An existing folder, as a place and not to be read.
///
/// # Errors
/// If it is not there, or no folder.
pub fn folder(path: &str) -> Result<OwnedFd> {
    open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// The folder `path` below `root`; links in it are followed as if `root` were the root.
///
/// # Errors
/// If it is not there, or no folder.
fn below(root: impl AsFd, path: &str) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
}

/// The folder `path` below `root`, which is made, with those above it, as far as it is missing. They belong to user 0 and have
/// mode 755.
///
/// # Errors
/// If something that is no folder is in the way, a link that leads to nothing included.
pub fn make_folder(root: impl AsFd, path: &str) -> Result<OwnedFd> {
    let mut at = below(&root, "/")?;
    let mut so_far = String::new();
    for part in path.split('/').filter(|part| !part.is_empty()) {
        so_far.push('/');
        so_far.push_str(part);
        at = match below(&root, &so_far) {
            Err(Errno::NOENT) => {
                // Not there, or a link to nothing, which this does not follow.
                mkdirat(&at, part, Mode::from_raw_mode(0o755))?;
                below(&root, &so_far)?
            }
            found => found?,
        };
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn no_link_leads_out_of_the_root() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        fs::create_dir_all(root.join("var")).unwrap();
        symlink("/run", root.join("var/run")).unwrap();
        symlink("../../..", root.join("up")).unwrap();
        symlink("/nothing", root.join("dangling")).unwrap();
        fs::write(root.join("file"), "").unwrap();
        let opened = folder(root.to_str().unwrap()).unwrap();

        // /run is made in the root, though the link is absolute.
        fs::create_dir(root.join("run")).unwrap();
        make_folder(&opened, "/var/run/deep/er").unwrap();
        assert!(root.join("run/deep/er").is_dir());
        make_folder(&opened, "/up/up/inside").unwrap();
        assert!(root.join("inside").is_dir());
        assert_eq!(make_folder(&opened, "/dangling/x").unwrap_err(), Errno::EXIST);
        assert_eq!(make_folder(&opened, "/file").unwrap_err(), Errno::NOTDIR);
        assert_eq!(make_folder(&opened, "/file/x").unwrap_err(), Errno::NOTDIR);
        let mut names: Vec<_> =
            fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["root"], "nothing was made outside");
    }
}
