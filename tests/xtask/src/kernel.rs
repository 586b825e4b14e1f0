//! Debian kernels, unpacked into the cache.

use std::fs;
use std::path::{Path, PathBuf};

use crate::apt::Apt;
use crate::cache::Cache;
use crate::{Error, tool};

/// A Debian kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The bzImage.
    pub image: PathBuf,
    /// The module tree, with `kernel/` and `modules.builtin`.
    pub modules: PathBuf,
    /// The ELF kernel inside the bzImage.
    pub elf: PathBuf,
}

/// Which of Debian's kernels.
#[derive(Clone, Copy, Debug)]
pub struct Build {
    /// The package that depends on the newest one.
    package: &'static str,
    /// The release whose backports have it.
    release: &'static str,
    /// The version, as far as it is certain.
    series: &'static str,
}

/// For the rig's outer machine: with everything, 9p among it.
pub const OUTER: Build = Build { package: "linux-image-amd64", release: "bookworm", series: "6.12." };
/// For guests: the flavour for clouds has fewer drivers, and is quicker to boot.
pub const GUEST: Build = Build { package: "linux-image-cloud-amd64", ..OUTER };
/// For an outer machine with SEV-SNP, of which 6.12 can do no more than launch guests: it neither tells which policy
/// bits it has nor asks for certificates.
pub const SNP_OUTER: Build = Build { release: "trixie", series: "7.", ..OUTER };

/// The newest kernel of `build`; fetched if it is not in `cache`.
pub fn fetch(cache: &Cache, build: Build) -> Result<Kernel, Error> {
    let entry = cache.entry(build.package, &[b"1", build.series.as_bytes()], |directory| {
        let suites = [format!("{}-backports", build.release), build.release.to_owned()];
        let lines = suites.each_ref().map(|suite| format!("deb main {suite}"));
        let apt = Apt::new(cache, &suites[0], &lines.each_ref().map(String::as_str))?;
        for package in packages(&apt, build)? {
            apt.unpack(&package, directory)?;
        }
        lay_out(directory, build.series)
    })?;
    Ok(Kernel { image: entry.join("vmlinuz"), modules: entry.join("modules"), elf: entry.join("vmlinux") })
}

/// The packages that make up the kernel which the newest fitting version of the metapackage names: one or, since
/// Linux 7, several with the same ending.
fn packages(apt: &Apt, build: Build) -> Result<Vec<String>, Error> {
    const PREFIX: &str = "linux-image-";
    let missing = || Error::Unavailable {
        what: build.package.into(),
        reason: format!("{}-backports has no version {}*", build.release, build.series),
    };
    let versions = apt.show("show", build.package)?;
    let mut images = versions.iter().flat_map(|version| version.packages("Depends"));
    let fits = |name: &&str| name.strip_prefix(PREFIX).is_some_and(|rest| rest.starts_with(build.series));
    let image = images.find(fits).ok_or_else(missing)?;
    let version = image.strip_prefix(PREFIX).unwrap_or_default();
    let paragraphs = apt.show("show", image)?;
    let parts = paragraphs.first().ok_or_else(missing)?.packages("Depends");
    let parts = parts.filter(|part| part.ends_with(version));
    Ok(parts.chain([image]).map(str::to_owned).collect())
}

/// From the packages' files to `vmlinuz`, `vmlinux` and `modules`.
fn lay_out(directory: &Path, series: &str) -> Result<(), Error> {
    let of_one_package = directory.join("lib/modules").exists();
    let modules = if of_one_package { "lib/modules" } else { "usr/lib/modules" };
    let modules = only_entry(&directory.join(modules), series)?;
    let image = match of_one_package {
        true => only_entry(&directory.join("boot"), "vmlinuz-")?,
        false => modules.join("vmlinuz"),
    };
    let bytes = fs::read(&image).map_err(Error::file("read", &image))?;
    let elf = unpack_image(&image, &bytes)?;
    let vmlinux = directory.join("vmlinux");
    fs::write(&vmlinux, elf).map_err(Error::file("write", &vmlinux))?;
    for (from, to) in [(image, "vmlinuz"), (modules, "modules")] {
        fs::rename(&from, directory.join(to)).map_err(Error::file("rename", from))?;
    }
    for rest in ["boot", "lib", "usr"].map(|name| directory.join(name)) {
        if rest.exists() {
            fs::remove_dir_all(&rest).map_err(Error::file("remove", &rest))?;
        }
    }
    Ok(())
}

fn only_entry(directory: &Path, prefix: &str) -> Result<PathBuf, Error> {
    let entries = fs::read_dir(directory).map_err(Error::file("read", directory))?;
    let mut fitting =
        entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix));
    fitting.next().map(|entry| entry.path()).ok_or_else(|| Error::Malformed {
        path: directory.to_owned(),
        reason: format!("the kernel package has no {prefix}* here"),
    })
}

/// The ELF kernel inside the bzImage `bytes` (Linux,
/// Documentation/arch/x86/boot.rst, `payload_offset` and `payload_length`).
fn unpack_image(path: &Path, bytes: &[u8]) -> Result<Vec<u8>, Error> {
    let malformed = |reason: &str| Error::Malformed { path: path.to_owned(), reason: reason.into() };
    let payload = payload(bytes).ok_or_else(|| malformed("not a bzImage of boot protocol 2.08 or later"))?;
    // All compressors but gzip are followed by the length of the contents.
    let body = payload.get(..payload.len().saturating_sub(4)).unwrap_or_default();
    let elf = match payload {
        [0x1f, 0x8b, ..] => tool::filter("gzip", &["-dcq"], payload)?,
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => tool::filter("xz", &["-dc"], body)?,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => tool::filter("zstd", &["-dcq"], body)?,
        _ => return Err(malformed("the kernel is compressed by none of gzip, xz and zstd")),
    };
    if !elf.starts_with(b"\x7fELF") {
        return Err(malformed("the payload is not an ELF file"));
    }
    Ok(elf)
}

fn payload(bytes: &[u8]) -> Option<&[u8]> {
    let field = |at: usize| {
        let bytes: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    let version = u16::from_le_bytes(bytes.get(0x206..0x208)?.try_into().ok()?);
    if bytes.get(0x202..0x206)? != b"HdrS" || version < 0x208 {
        return None;
    }
    let setup_sectors = match *bytes.get(0x1f1)? {
        0 => 4,
        count => usize::from(count),
    };
    let start = ((setup_sectors + 1) * 512).checked_add(field(0x248)?)?;
    bytes.get(start..start.checked_add(field(0x24c)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 1024 + 16];
        bytes[0x1f1] = 1;
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        bytes[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        bytes[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        bytes[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        bytes.extend_from_slice(payload);
        bytes
    }

    fn unpack(bytes: &[u8]) -> Result<Vec<u8>, String> {
        unpack_image(Path::new("vmlinuz"), bytes).map_err(|error| error.to_string())
    }

    #[test]
    fn the_elf_kernel_comes_out_of_each_compression() {
        let elf = [b"\x7fELF".as_slice(), &[7; 5000]].concat();
        for (program, trailer) in [("gzip", &[][..]), ("xz", &[1, 2, 3, 4]), ("zstd", &[1, 2, 3, 4])] {
            let mut payload = tool::filter(program, &["-c"], &elf).unwrap();
            payload.extend_from_slice(trailer);
            assert_eq!(unpack(&image(&payload)).unwrap(), elf, "{program}");
        }
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let payload = tool::filter("gzip", &["-c"], b"text").unwrap();
        assert!(unpack(&image(&payload)).unwrap_err().contains("not an ELF"));
        assert!(unpack(&image(b"??")).unwrap_err().contains("none of"));
        assert!(unpack(&image(b"")).unwrap_err().contains("none of"));
        assert!(unpack(b"").unwrap_err().contains("not a bzImage"));
        let mut cut = image(&payload);
        cut.pop();
        assert!(unpack(&cut).unwrap_err().contains("not a bzImage"));
        let mut old = image(&payload);
        old[0x206] = 7;
        old[0x207] = 2;
        assert!(unpack(&old).unwrap_err().contains("2.08"));
        let mut far = image(&payload);
        far[0x248..0x250].fill(0xff);
        assert!(unpack(&far).unwrap_err().contains("not a bzImage"));
    }
}
