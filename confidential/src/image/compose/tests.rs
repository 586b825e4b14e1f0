use cofferdam_firmware::layout::GAP_START;
use cofferdam_firmware::manifest::KernelFormat;
use igvm::IgvmFile;

use super::testing::{kernel, written};
use super::*;
use crate::igvm::reader::{Igvm, length_of_headers};
use crate::image::testing::{Recorder, flat, record};
use crate::image::walk::walk;

fn source<'a>(kernel: &'a [u8], initrd: &'a [u8], command_line: &'a str) -> Source<'a> {
    Source {
        kernel: Blob::of(kernel),
        kernel_head: &kernel[..boot::HEAD.min(kernel.len())],
        initrd: Some(Blob::of(initrd)),
        command_line,
    }
}

#[test]
fn a_file_gives_the_items_that_were_composed() {
    let (kernel, initrd) = (kernel(70_001), vec![3; 10_000]);
    let composition = compose(&source(&kernel, &initrd, "console=ttyS0"), &Options::default()).unwrap();
    let file = written(&composition);
    let platforms = [ImagePlatform::Plain, ImagePlatform::Snp, ImagePlatform::Tdx];
    for selection in platforms.map(Selection::One).into_iter().chain([Selection::All]) {
        let mut composed = Recorder::default();
        composition.walk(selection, &mut composed).unwrap();
        let read = record(&file, selection).unwrap();
        assert_eq!(read.platforms, composed.platforms);
        assert_eq!(flat(&read.items), flat(&composed.items), "{selection:?}");
    }
    assert_eq!(file, written(&composition));
    let oracle = IgvmFile::new_from_binary(&file, None).unwrap();
    assert_eq!(oracle.platforms().len(), 3);
}

#[test]
fn the_load_window_is_one_aligned_run_of_the_file() {
    let (kernel, initrd) = (kernel(70_001), vec![3; 10_000]);
    let composition = compose(&source(&kernel, &initrd, "quiet"), &Options::default()).unwrap();
    let file = written(&composition);
    let manifest = composition.manifest();
    for selection in [Selection::One(ImagePlatform::Plain), Selection::One(ImagePlatform::Snp)] {
        let read = record(&file, selection).unwrap();
        let shared: Vec<&PageRun<'_>> = read
            .items
            .iter()
            .filter_map(|(_, item)| match item {
                Item::Pages(run) if run.kind == PageKind::Shared => Some(run),
                _ => None,
            })
            .collect();
        let [run] = shared.as_slice() else { panic!("{shared:?}") };
        assert_eq!((run.gpa, run.pages), (layout::LOAD_WINDOW, 18 + 3 + 1));
        let start = run.content.file_offset.unwrap() as usize;
        assert!(start.is_multiple_of(PAGE));
        // It ends the file, and is what the manifest says.
        assert_eq!(start + run.pages as usize * PAGE, file.len());
        for (item, content) in [
            (manifest.kernel.file, kernel.as_slice()),
            (manifest.initrd, initrd.as_slice()),
            (manifest.command_line, b"quiet".as_slice()),
        ] {
            let offset = (item.address - layout::LOAD_WINDOW) as usize;
            assert_eq!(&run.content.bytes[offset..][..content.len()], content);
            assert_eq!(item.size, content.len() as u64);
            assert_eq!(item.sha256, sha256::Method::PORTABLE.digest(content));
        }
    }
}

/// As if the mapped file had been emptied after its beginning was copied.
#[test]
fn all_but_the_load_window_can_be_read_from_a_copy_of_the_beginning() {
    let (kernel, initrd) = (kernel(70_001), vec![3; 10_000]);
    let composition = compose(&source(&kernel, &initrd, "quiet"), &Options::default()).unwrap();
    let file = written(&composition);
    let headers = length_of_headers(&file[..32]).unwrap() as usize;
    let head = &file[..headers + 20 * PAGE];
    let emptied = vec![0; file.len()];
    let image = Igvm::with_head(head, &emptied).unwrap();
    let mut copied = Recorder::default();
    walk(&image, Selection::One(ImagePlatform::Snp), &mut copied).unwrap();
    let whole = record(&file, Selection::One(ImagePlatform::Snp)).unwrap();
    assert_eq!(copied.items.len(), whole.items.len());
    for (copied, whole) in copied.items.iter().zip(&whole.items) {
        match &copied.1 {
            Item::Pages(run) if run.kind == PageKind::Shared => {
                assert!(emptied.as_ptr_range().contains(&run.content.bytes.as_ptr()));
            }
            _ => assert_eq!(copied, whole),
        }
    }
}

#[test]
fn the_manifest_says_what_was_asked_for() {
    let kernel = kernel(70_001);
    let options = Options {
        max_vcpus: 3,
        max_memory: 512 * MIB,
        host_data: true,
        accept_all: true,
        platforms: vec![ImagePlatform::Tdx, ImagePlatform::Plain],
        ..Options::default()
    };
    let composition = compose(&source(&kernel, &[], ""), &options).unwrap();
    let manifest = composition.manifest();
    assert_eq!(manifest.kernel.format, KernelFormat::BzImage);
    assert!((manifest.initrd.is_empty(), manifest.command_line.is_empty()) == (true, true));
    assert_eq!((manifest.max_vcpus, manifest.max_memory, manifest.host_data), (3, 512 * MIB, true));
    assert!(manifest.accept_all);
    assert_eq!(manifest.min_memory, layout::MIN_MEMORY);
    let mut recorder = Recorder::default();
    composition.walk(Selection::All, &mut recorder).unwrap();
    let names: Vec<_> = recorder.platforms.iter().map(|it| (it.platform, it.mask, it.policy)).collect();
    assert_eq!(names, [(ImagePlatform::Plain, 1, None), (ImagePlatform::Tdx, 4, Some(2))]);
    assert!(recorder.items.iter().all(|(mask, _)| mask & 2 == 0));
    let page = recorder.items.iter().find_map(|(_, item)| match item {
        Item::Pages(run) if run.gpa == layout::LAUNCH_MANIFEST => run.content.bytes.first_chunk(),
        _ => None,
    });
    assert_eq!(Manifest::decode(page.unwrap()), Ok(*manifest));
    let error = composition.walk(Selection::One(ImagePlatform::Snp), &mut Recorder::default());
    assert_eq!(error.unwrap_err().to_string(), "the image is not for the platform snp, it is for plain, tdx");
}

/// Pages that a platform is given one by one, and vCPU contexts.
fn private_pages(composition: &Composition<'_>, platform: ImagePlatform) -> (u64, usize) {
    let mut recorder = Recorder::default();
    composition.walk(Selection::One(platform), &mut recorder).unwrap();
    let pages = recorder.items.iter().map(|(_, item)| match item {
        Item::Pages(run) if run.kind != PageKind::Shared => run.pages,
        Item::Parameters(area) => area.pages,
        _ => 0,
    });
    let contexts = recorder.items.iter().filter(|(_, item)| matches!(item, Item::Vcpu { .. })).count();
    (pages.sum(), contexts)
}

#[test]
fn little_is_measured_whatever_the_kernel() {
    for length in [5_000, 3_000_000] {
        let (kernel, initrd) = (kernel(length), vec![3; length]);
        let composition = compose(&source(&kernel, &initrd, "quiet"), &Options::default()).unwrap();
        let (snp, contexts) = private_pages(&composition, ImagePlatform::Snp);
        assert!(snp <= 12, "{snp}");
        assert_eq!(contexts, 1);
        assert_eq!(private_pages(&composition, ImagePlatform::Tdx), (snp - 1, 0));
        // No secrets and no CPUID page, but four page directories.
        assert_eq!(private_pages(&composition, ImagePlatform::Plain), (snp + 2, 1));
    }
}

#[test]
fn the_entry_state_is_one_that_kvm_can_have() {
    let vmsa = entry_vmsa();
    assert_eq!(vmsa.as_kvm_builds(), Ok(vmsa.clone()));
    assert_eq!((vmsa.cr3, vmsa.rip), (0x0008_0000_0001_b000, 0x10000));
    assert_eq!((vmsa.cs.attributes, vmsa.ss.attributes), (0xa9b, 0xc93));
    let plain = entry_context();
    assert_eq!((plain.cr0, plain.cr3, plain.cr4, plain.efer), (vmsa.cr0, 0x1b000, 0x20, 0x500));
    // IGVM: "bits 11:8 must be zero".
    assert_eq!((plain.code.attributes | plain.data.attributes) & 0xf00, 0);
}

#[test]
fn what_no_image_can_be_made_of() {
    let good = kernel(70_001);
    let refused = |source: &Source<'_>, change: fn(&mut Options)| {
        let mut options = Options::default();
        change(&mut options);
        compose(source, &options).unwrap_err().to_string()
    };
    let with = |command_line| refused(&source(&good, &[], command_line), |_| ());
    let option = |change| refused(&source(&good, &[], ""), change);

    let text = vec![b'x'; 70_000];
    assert_eq!(refused(&source(&text, &[], ""), |_| ()), "kernel: neither ELF nor bzImage");
    let long = "x".repeat(2048);
    assert_eq!(
        with(&long),
        "command line: 2048 bytes long, the kernel takes 1983",
        "64 are the first stage's"
    );
    let plain = |it: &mut Options| it.platforms = vec![ImagePlatform::Plain];
    let for_plain = refused(&source(&good, &[], &long), plain);
    assert_eq!(for_plain, "command line: 2048 bytes long, the kernel takes 2047");
    let with_host_data = |it: &mut Options| it.host_data = true;
    assert_eq!(
        refused(&source(&good, &[], &long), with_host_data),
        "command line: 2048 bytes long, the kernel takes 1962",
        "85 are the host data's on plain, where the 64 are not"
    );
    let for_snp = |it: &mut Options| (it.host_data, it.platforms) = (true, vec![ImagePlatform::Snp]);
    assert!(refused(&source(&good, &[], &long), for_snp).ends_with("takes 1983"), "the report has them");
    assert_eq!(with("a\0b"), "command line: has a NUL in it");
    assert_eq!(option(|it| it.platforms.clear()), "no platform is named");
    assert_eq!(
        option(|it| it.platforms.push(ImagePlatform::Cca)),
        "an image cannot be made for the platform cca"
    );
    assert_eq!(option(|it| it.max_vcpus = 0), "launch manifest: up to 0 vCPUs, not 1 to 32");
    assert_eq!(option(|it| it.max_vcpus = 33), "launch manifest: up to 33 vCPUs, not 1 to 32");
    assert_eq!(
        option(|it| it.max_memory = 31 * MIB),
        "kernel and initrd need 32 MiB of memory, the image is to have at most 31 MiB"
    );
    assert_eq!(
        option(|it| it.max_memory += MIB),
        "launch manifest: memory from 33554432 to 68720525312 bytes is no range of whole MiB that a domain can have"
    );
    assert_eq!(
        option(|it| it.snp_policy = 1 << 16),
        "policy of snp: bit 17, which must be 1, is 0 in 0x10000"
    );
    assert!(option(|it| it.snp_policy |= 1 << 18).contains("migration agent"));
    assert_eq!(option(|it| it.snp_policy |= 1 << 26), "policy of snp: a bit above 25 is 1 in 0x4030000");
    assert_eq!(
        option(|it| it.tdx_policy = 4),
        "policy of tdx: a bit above 1, which KVM cannot keep, is 1 in 0x4"
    );
}

/// Content is never read, so any bytes do for something large.
#[test]
fn sizes_are_bounded() {
    let good = kernel(70_001);
    let zeroes = vec![0; layout::LOAD_WINDOW_SIZE as usize + 1];
    let refused = |initrd: &[u8], kernel: &[u8]| {
        let initrd = Blob { bytes: initrd, sha256: [0; 32] };
        let source = Source {
            kernel: Blob { bytes: kernel, sha256: [0; 32] },
            kernel_head: &good[..boot::HEAD],
            initrd: Some(initrd),
            command_line: "",
        };
        compose(&source, &Options::default()).map(|it| it.manifest().min_memory)
    };
    let window = layout::LOAD_WINDOW_SIZE as usize;
    let message = "kernel, initrd and command line have more than 768 MiB together";
    for (initrd, kernel) in [(window - 70_000, 70_001), (usize::MAX, 70_001), (0, window + 1)] {
        let initrd = &zeroes[..initrd.min(zeroes.len())];
        assert_eq!(refused(initrd, &zeroes[..kernel]).unwrap_err().to_string(), message);
    }
    // 18 pages of kernel, all the rest initrd.
    let needed = refused(&zeroes[..window - 18 * PAGE], &zeroes[..70_001]).unwrap();
    assert!(needed > layout::LOAD_WINDOW_SIZE && needed < GAP_START);
}
