//! Images and the real first stage, with tiny kernels, on this machine's own `/dev/kvm`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests fail by panicking

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use cofferdam_api::status::{ExitReason, Identity};
use cofferdam_confidential::image::compose::Options;
use cofferdam_confidential::image::importer::ImagePlatform;
use cofferdam_firmware::layout::{GIB, MIB};
use cofferdam_firmware::parameters::Parameters;
use cofferdam_firmware::sha256::Method;
use cofferdam_tests::image::{Image, bz_image, bz_image_of_command_line};
use cofferdam_tests::{Finished, Run, hex, place};
use tempfile::TempDir;

/// The kernel takes its exit code from here.
const INITRD: [u8; 5000] = [42; 5000];
const COMMAND_LINE: &str = "quiet";

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }

    fn image(&self, image: &Image<'_>) -> PathBuf {
        image.write(&self.path("domain.igvm"));
        self.path("domain.igvm")
    }
}

fn good() -> Image<'static> {
    Image { initrd: &INITRD, command_line: COMMAND_LINE, ..Image::of(bz_image()) }
}

fn run(image: PathBuf) -> Run {
    Run::image(image).with("memory", "32M")
}

fn refused(done: &Finished, reason: &str) {
    assert_eq!(done.outcome().exit_reason, ExitReason::RefusedByGuest, "{reason}: {done}");
    assert_eq!(done.code(), 120, "{reason}: {done}");
    assert_eq!(done.outcome().message, format!("the first stage stopped the domain: {reason}"), "{done}");
    assert!(done.console().contains(&format!("first stage: {reason}\n")), "{done}");
}

fn not_started(done: &Finished, message: &str) {
    assert_eq!(done.outcome().exit_reason, ExitReason::Config, "{done}");
    assert_eq!(done.code(), 125, "{done}");
    assert!(done.outcome().message.contains(message), "no {message:?} in {done}");
    assert!(!done.outcome().phases.contains_key("vm_created"), "{done}");
}

/// Where `needle` is in the file, which must be once.
fn offset_of(file: &[u8], needle: &[u8]) -> usize {
    let mut places = file.windows(needle.len()).enumerate().filter(|(_, window)| *window == needle);
    let (offset, _) = places.next().unwrap();
    assert!(places.next().is_none());
    offset
}

#[test]
fn a_file_and_loose_files_are_the_same_domain() {
    let folder = Folder::new();
    let from_file = run(folder.image(&good())).finish();
    assert_eq!(from_file.code(), 42, "{from_file}");
    let from_files = Run::verified(folder.file("vmlinuz", &bz_image()))
        .with("initrd", folder.file("initrd", &INITRD))
        .with("cmdline", COMMAND_LINE)
        .with("memory", "64M")
        .finish();
    assert_eq!(from_files.code(), 42, "{from_files}");
    let identity = from_file.outcome().identity;
    let bytes = fs::read(folder.path("domain.igvm")).unwrap();
    let hash = hex(&Method::detect().digest(&bytes));
    assert_eq!(identity.image_hash.as_ref(), Some(&hash));
    let without_file = Identity { image_hash: None, ..identity.clone() };
    assert_eq!(without_file, from_files.outcome().identity, "whatever the memory");
    assert_eq!(identity.manifest_hash.unwrap().len(), 64);
    assert_eq!(identity.predicted_digests.keys().collect::<Vec<_>>(), ["snp", "tdx"]);
    assert_eq!(identity.digest, None, "nothing was measured");
}

#[test]
fn the_vcpu_count_changes_the_digest_where_the_platform_measures_it() {
    let folder = Folder::new();
    let image = folder.image(&good());
    let digests = |cpus: &str| {
        let done = run(image.clone()).with("cpus", cpus).finish();
        assert_eq!(done.code(), 42, "{done}");
        let digests = done.outcome().identity.predicted_digests;
        (digests["snp"].clone(), digests["tdx"].clone())
    };
    let (one, two) = (digests("1"), digests("2"));
    assert_ne!(one.0, two.0);
    assert_eq!(one.1, two.1);
}

/// Behind the image's own, and only if it wants them. Without any they are zeroes.
#[test]
fn host_data_are_at_the_end_of_the_command_line() {
    let folder = Folder::new();
    let byte_of = |byte, host_data, given: Option<&str>| {
        let options = Options { host_data, ..Options::default() };
        let kernel = bz_image_of_command_line(byte);
        let image = folder.image(&Image { command_line: COMMAND_LINE, options, ..Image::of(kernel) });
        let run = run(image);
        let done = match given {
            Some(data) => run.with("host-data", data),
            None => run,
        };
        done.finish().code() as u8
    };
    let data = format!("{}e7", "00".repeat(31));
    let line = format!("quiet cofferdam.host_data={data}");
    for byte in [0, 4, 5, 6, 25, 26, 87, 88, 89] {
        assert_eq!(byte_of(byte as u8, true, Some(&data)), line.as_bytes()[byte], "byte {byte}");
    }
    assert_eq!(byte_of(90, true, Some(&data)), 0, "it ends there");
    assert_eq!(byte_of(89, true, None), b'0');
    assert_eq!(byte_of(5, false, None), 0, "the image does not want them");
}

#[test]
fn elf_kernels_are_moved_into_place_and_the_other_cpus_start() {
    let run = Run::verified(place::payload("smp")).with("cmdline", "cpus=2");
    let done = run.with("cpus", "2").with("memory", "32M").finish();
    assert_eq!(done.code(), 0, "{done}");
}

#[test]
fn the_window_is_there_for_the_first_stage_and_empty_for_the_kernel() {
    let done = Run::verified(place::payload("window")).with("memory", "32M").finish();
    assert_eq!(done.code(), 42, "{done}");
}

#[test]
fn what_was_altered_after_the_image_was_built_is_named() {
    let folder = Folder::new();
    let image = folder.image(&good());
    let bytes = fs::read(&image).unwrap();
    let kernel = offset_of(&bytes, &bz_image());
    let items = [
        ("kernel hash mismatch", [kernel, kernel + 0x600, kernel + 0x7FF]),
        ("initrd hash mismatch", [0, 2500, 4999].map(|byte| offset_of(&bytes, &INITRD) + byte)),
        ("command line hash mismatch", [0, 2, 4].map(|byte| offset_of(&bytes, b"quiet") + byte)),
    ];
    for (reason, offsets) in items {
        for offset in offsets {
            let mut altered = bytes.clone();
            altered[offset] ^= 0x10;
            refused(&run(folder.file("altered.igvm", &altered)).finish(), reason);
        }
    }
}

/// What the monitor would not say, but a hostile one can.
#[test]
fn a_parameter_page_that_lies_is_refused_by_name() {
    let folder = Folder::new();
    let truth = Parameters {
        memory: 32 * MIB,
        vcpus: 1,
        virtio_mmio_slots: 0,
        serial: true,
        sha_instructions: false,
        host_data: [0; 32],
    };
    let with = |change: fn(&mut Parameters)| {
        let mut lie = truth;
        change(&mut lie);
        lie.encode().to_vec()
    };
    let patched = |offset: usize, byte: u8| {
        let mut page = truth.encode().to_vec();
        page[offset] = byte;
        page
    };
    let cases = [
        ("more than allowed", with(|p| p.memory = 256 * MIB), "memory map outside policy"),
        ("less than needed", with(|p| p.memory = 16 * MIB), "memory map outside policy"),
        ("a hole at the end", with(|p| p.memory = 33 * MIB + 4096), "memory map outside policy"),
        ("overflow", with(|p| p.memory = u64::MAX - MIB + 1), "memory map outside policy"),
        ("nothing", with(|p| p.memory = 0), "memory map outside policy"),
        // The initrd would lie behind the RAM: there is nothing to be read there.
        ("more than there is", with(|p| p.memory = 128 * MIB), "initrd hash mismatch"),
        ("too many CPUs", with(|p| p.vcpus = 5), "vCPU count outside policy"),
        ("no CPU", with(|p| p.vcpus = 0), "vCPU count outside policy"),
        ("4 billion CPUs", patched(0x1B, 0xFF), "vCPU count outside policy"),
        ("too many devices", with(|p| p.virtio_mmio_slots = 65), "more devices than slots"),
        ("host data", with(|p| p.host_data[31] = 1), "host data outside policy"),
        ("another version", patched(8, 2), "parameter page not valid"),
        ("unknown flags", patched(0xF, 0x80), "parameter page not valid"),
        ("nothing at all", vec![0; 64], "parameter page not valid"),
    ];
    let options = Options { max_vcpus: 4, max_memory: 128 * MIB, ..Options::default() };
    let honest = Image { parameters: Some(truth.encode().to_vec()), options, ..good() };
    assert_eq!(run(folder.image(&honest)).finish().code(), 42);
    for (what, page, reason) in cases {
        println!("{what}");
        let image = Image { parameters: Some(page), options: honest.options.clone(), ..good() };
        refused(&run(folder.image(&image)).finish(), reason);
    }
}

#[test]
fn what_the_image_does_not_allow_is_refused_before_anything_starts() {
    let folder = Folder::new();
    let options = Options { max_vcpus: 2, max_memory: GIB, ..Options::default() };
    let image = folder.image(&Image { options, ..good() });
    let many = Run::image(&image).with("cpus", "3").finish();
    not_started(&many, "machine-config.vcpu_count: the image takes 1 to 2 vCPUs, not 3");
    let large = Run::image(&image).with("memory", "1025M").finish();
    not_started(
        &large,
        "machine-config.mem_size_mib: the image takes 32 to 1024 MiB of memory, not 1025 MiB",
    );
    let initrd = vec![42; 40 << 20];
    let needs = folder.image(&Image { initrd: &initrd, ..good() });
    let small = Run::image(&needs).with("memory", "56M").finish();
    not_started(&small, "machine-config.mem_size_mib: the image takes 57 to 65536 MiB of memory, not 56 MiB");
}

#[test]
fn an_image_for_others_lists_them() {
    let folder = Folder::new();
    let options = Options { platforms: vec![ImagePlatform::Snp, ImagePlatform::Tdx], ..Options::default() };
    let image = folder.image(&Image { options, ..good() });
    not_started(&run(image).finish(), "the image is not for the platform plain, it is for snp, tdx");
}

#[test]
fn files_that_are_no_images_are_refused() {
    let folder = Folder::new();
    let good = fs::read(folder.image(&good())).unwrap();
    not_started(&run(folder.path("nowhere")).finish(), "cannot be opened: No such file or directory");
    not_started(&run(folder.file("text", &[b'x'; 8192])).finish(), "boot-source.image_path: image ");
    for length in [1, 23, 24, 100, 4096, good.len() - 1] {
        let done = run(folder.file("cut.igvm", &good[..length])).finish();
        not_started(&done, "boot-source.image_path: image ");
    }
}

/// While the first stage copies and hashes, somebody writes to the file that the window maps. Either it was seen as it
/// was built, or it is refused: never does another kernel run. (One that did would exit with 13.)
#[test]
fn a_kernel_that_changes_meanwhile_never_runs() {
    let folder = Folder::new();
    let path = folder.image(&good());
    let bytes = fs::read(&path).unwrap();
    let offset = (offset_of(&bytes, &bz_image()) + 0x600) as u64;
    // mov al, 13 and two nops, in place of the load of ramdisk_image and of its byte
    let evil = [0xb0, 13, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90];
    let right = &bytes[offset as usize..][..evil.len()];
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let file = File::options().write(true).open(&path).unwrap();
            while !stop.load(Ordering::Relaxed) {
                file.write_all_at(&evil, offset).unwrap();
                file.write_all_at(right, offset).unwrap();
            }
        });
        for _ in 0..12 {
            let done = run(path.clone()).finish();
            match done.code() {
                42 => {}
                _ => refused(&done, "kernel hash mismatch"),
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}
