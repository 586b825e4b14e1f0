//! The initial RAM disk of a container's domain: its init, and the modules that its kernel needs.
//!
//! ```text
//! /init            cofferdam-init
//! /modules/order   names of files, one a line, in the order in which they are to be loaded, and for what
//! /modules/*.ko    unpacked
//! ```
//!
//! Everything is as it is in memory: to unpack something in the domain takes longer than to copy and hash what was unpacked here.

pub mod cpio;
pub mod modinfo;
pub mod modules;

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::{env, fs};

use cofferdam_confidential::image::importer::ImagePlatform;
use cofferdam_container_protocol::modules as order;

use self::cpio::Archive;
use self::modules::{Module, ModuleTree, ModulesError, Need};

/// The program of the domain's init.
const INIT: &str = "cofferdam-init";

/// What containers need of the kernel in any domain, in the order in which they need it. The first tells of panics from then on.
const NEEDS: [Need; 8] = [
    Need::Module("pvpanic_mmio"),
    Need::Module("virtio_mmio"),
    Need::Module("virtio_blk"),
    Need::Module("vmw_vsock_virtio_transport"),
    // Of dm-verity.
    Need::Algorithm("sha256"),
    Need::Module("dm_verity"),
    Need::Module("erofs"),
    Need::Module("overlay"),
];
/// What an encrypted scratch device needs.
const SCRATCH_NEEDS: [Need; 7] = [
    Need::Algorithm("aes"),
    Need::Algorithm("xts"),
    Need::Algorithm("hmac"),
    Need::Algorithm("authenc"),
    Need::Module("dm_crypt"),
    Need::Module("dm_integrity"),
    Need::Module("ext4"),
];
/// What gets a report of the secure processor, with the ciphers that its messages are in.
const SNP_NEEDS: [Need; 5] = [
    Need::Algorithm("aes"),
    Need::Algorithm("ctr"),
    Need::Algorithm("ghash"),
    Need::Algorithm("gcm"),
    Need::Module("sev_guest"),
];
/// What gets a report of the TDX module.
const TDX_NEEDS: [Need; 1] = [Need::Module("tdx_guest")];

/// Why there is no initial RAM disk.
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    /// The init program is not there.
    #[error("the init of containers' domains is neither {}", .0.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" nor "))]
    NoInit(Vec<PathBuf>),
    /// It is none that can run without anything else.
    #[error("{} is no static program for x86-64", .0.display())]
    NotStatic(PathBuf),
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel's file has no version in it.
    #[error("{}: the kernel's version is not in it", .0.display())]
    NoVersion(PathBuf),
    /// There are no modules.
    #[error(
        "the modules of the kernel {version} are not in {}: say where they are with --modules",
        searched.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" or ")
    )]
    NoModules {
        /// The kernel's version.
        version: String,
        /// Where they were looked for.
        searched: Vec<PathBuf>,
    },
    /// The modules are not all there.
    #[error(transparent)]
    Modules(#[from] ModulesError),
}

/// Makes the RAM disk for the kernel in the file `path`, `kernel`, and the modules in `modules` or where they usually are.
pub fn make(
    path: &Path,
    kernel: &[u8],
    modules: Option<&Path>,
    platforms: &[ImagePlatform],
) -> Result<Vec<u8>, InitrdError> {
    let init = init()?;
    let version = version(kernel).ok_or_else(|| InitrdError::NoVersion(path.to_owned()))?;
    let tree = match modules {
        Some(folder) => folder.to_owned(),
        None => find_modules(path, &version)?,
    };
    let modules = needed_modules(&ModuleTree::open(&tree, &version)?, platforms)?;

    let mut archive = Archive::default();
    archive.program("init", &init);
    archive.folder("modules");
    let file = |module: &Module| format!("{}.ko", module.name);
    let order: String = modules.iter().map(|(module, needs)| order::line(&file(module), needs)).collect();
    archive.file("modules/order", order.as_bytes());
    for (module, _) in &modules {
        archive.file(&format!("modules/{}", file(module)), &module.content);
    }
    Ok(archive.finish())
}

/// The modules that domains on these platforms need, in their order, each with what it is needed for: with nothing, it always is.
fn needed_modules(
    tree: &ModuleTree,
    platforms: &[ImagePlatform],
) -> Result<Vec<(Module, Vec<order::Need>)>, ModulesError> {
    let mut further = vec![(order::Need::Scratch, &SCRATCH_NEEDS[..])];
    further.extend(platforms.iter().filter_map(needs_of));
    let all = tree.resolve(NEEDS.iter().chain(further.iter().flat_map(|(_, needs)| *needs)))?;
    let names = |needs: &[Need]| -> Result<BTreeSet<String>, ModulesError> {
        Ok(tree.resolve(needs)?.into_iter().map(|module| module.name).collect())
    };
    let always = names(&NEEDS)?;
    let further: Vec<_> = further
        .into_iter()
        .map(|(need, needs)| Ok((need, names(needs)?)))
        .collect::<Result<_, ModulesError>>()?;
    let with_needs = |module: Module| {
        let needs = further.iter().filter(|(_, names)| names.contains(&module.name));
        let needs =
            if always.contains(&module.name) { vec![] } else { needs.map(|(need, _)| *need).collect() };
        (module, needs)
    };
    Ok(all.into_iter().map(with_needs).collect())
}

/// What a domain of a platform needs besides.
fn needs_of(platform: &ImagePlatform) -> Option<(order::Need, &'static [Need])> {
    match platform {
        ImagePlatform::Snp => Some((order::Need::Snp, &SNP_NEEDS)),
        ImagePlatform::Tdx => Some((order::Need::Tdx, &TDX_NEEDS)),
        _ => None,
    }
}

/// The domain's init, which is beside this program or in the folder `lib/cofferdam` beside that of this program.
fn init() -> Result<Vec<u8>, InitrdError> {
    let read = |path: &Path, source| InitrdError::Read { path: path.to_owned(), source };
    let own = env::current_exe().map_err(|source| read(Path::new("/proc/self/exe"), source))?;
    let folder = own.parent().unwrap_or(&own);
    let places = [folder.join(INIT), folder.with_file_name("lib").join("cofferdam").join(INIT)];
    for place in &places {
        match fs::read(place) {
            Ok(program) if is_static(&program) => return Ok(program),
            Ok(_) => return Err(InitrdError::NotStatic(place.clone())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(read(place, error)),
        }
    }
    Err(InitrdError::NoInit(places.into()))
}

/// Whether a file is a program for x86-64 that asks for no dynamic linker (System V ABI, 5).
fn is_static(program: &[u8]) -> bool {
    const MACHINE: [u8; 2] = 62_u16.to_le_bytes();
    const INTERPRETER: [u8; 4] = 3_u32.to_le_bytes();
    let number = |range: std::ops::Range<usize>| {
        let bytes = program.get(range)?;
        usize::try_from(bytes.iter().rev().fold(0_u64, |number, byte| number << 8 | u64::from(*byte))).ok()
    };
    let headers = || {
        let (at, size, count) = (number(0x20..0x28)?, number(0x36..0x38)?, number(0x38..0x3a)?);
        program.get(at..at.checked_add(size.checked_mul(count)?)?).map(|table| (table, size.max(4)))
    };
    program.starts_with(b"\x7fELF\x02\x01")
        && program.get(0x12..0x14) == Some(&MACHINE)
        && headers().is_some_and(|(table, size)| {
            !table.is_empty() && table.chunks(size).all(|header| !header.starts_with(&INTERPRETER))
        })
}

/// The version of a kernel, a bzImage (Linux, Documentation/arch/x86/boot.rst, `kernel_version`) or an ELF file.
fn version(kernel: &[u8]) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    let text = if kernel.get(0x202..0x206) == Some(b"HdrS") {
        let offset = u16::from_le_bytes(*kernel.get(0x20e..)?.first_chunk()?);
        kernel.get(usize::from(offset).checked_add(0x200)?..)?
    } else {
        let at = kernel.windows(BANNER.len()).position(|window| window == BANNER)?;
        kernel.get(at..)?.strip_prefix(BANNER)?
    };
    let word = text.split(|byte| *byte == b' ' || *byte == 0).next()?;
    let good = word.len() <= 64 && word.first().is_some_and(u8::is_ascii_digit);
    // It becomes a part of a path.
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b".-+~_".contains(byte);
    (good && word.iter().all(plain)).then(|| String::from_utf8_lossy(word).into_owned())
}

/// Where modules are: beside the kernel as in an unpacked package, or where they are installed.
fn find_modules(kernel: &Path, version: &str) -> Result<PathBuf, InitrdError> {
    let kernel =
        fs::canonicalize(kernel).map_err(|source| InitrdError::Read { path: kernel.to_owned(), source })?;
    let folder = kernel.parent().unwrap_or(&kernel);
    let of_package = |name| folder.with_file_name(name).join(version);
    let searched = [
        folder.to_owned(),
        of_package("lib/modules"),
        of_package("usr/lib/modules"),
        Path::new("/lib/modules").join(version),
    ];
    let found = searched.iter().find(|path| path.join("modules.builtin").is_file());
    found
        .cloned()
        .ok_or_else(|| InitrdError::NoModules { version: version.to_owned(), searched: searched.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_kernels() {
        let mut image = vec![0; 0x400];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
        let text = b"6.12.57+deb12-cloud-amd64 (debian-kernel@lists.debian.org) #1 SMP\0";
        image[0x300..0x300 + text.len()].copy_from_slice(text);
        assert_eq!(version(&image).as_deref(), Some("6.12.57+deb12-cloud-amd64"));
        image[0x300] = b'/';
        assert_eq!(version(&image), None);
        image[0x300..].fill(b'6');
        assert_eq!(version(&image), None, "too long");
        image[0x20e..0x210].fill(0xff);
        assert_eq!(version(&image), None);
        let elf = b"\x7fELF...Linux version 6.12.1 (who@where) #1".to_vec();
        assert_eq!(version(&elf).as_deref(), Some("6.12.1"));
        assert_eq!(version(b"\x7fELF"), None);
        assert_eq!(version(b"Linux version ../../etc"), None);
    }

    #[test]
    fn static_programs() {
        let mut program = vec![0; 0x40];
        program[..6].copy_from_slice(b"\x7fELF\x02\x01");
        program[0x12] = 62;
        program[0x20] = 0x40;
        (program[0x36], program[0x38]) = (56, 2);
        for kind in [1, 2] {
            program.push(kind);
            program.resize(program.len() + 55, 0);
        }
        assert!(is_static(&program));
        let changed = |at: usize, byte: u8| {
            let mut changed = program.clone();
            changed[at] = byte;
            is_static(&changed)
        };
        assert!(!changed(0x40 + 56, 3), "it has an interpreter");
        assert!(!changed(0x12, 183), "for another machine");
        assert!(!changed(0x38, 3), "cut off");
        assert!(!changed(0x38, 0), "nothing is loaded");
        assert!(!is_static(b"#!/bin/sh") && !is_static(&[]));
    }
}
