//! What happens to a domain with which somebody tampered before its launch. What its host may do later is in `hostile`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use cofferdam_api::status::ExitReason;
use cofferdam_confidential::igvm::reader::Igvm;
use cofferdam_confidential::igvm::writer::{WriteError, Writer};
use cofferdam_confidential::image::importer::{
    Content, ImagePlatform, Importer, Item, PageKind, PageRun, PlatformInfo,
};
use cofferdam_confidential::image::walk::{Selection, walk};
use cofferdam_firmware::layout::{LAUNCH_MANIFEST, MIB, PAGE_SIZE, STAGE, STAGE_PAGE_TABLES};
use cofferdam_tests::Finished;
use cofferdam_tests::image::{Image, bz_image};
use serde_json::Value;
use tempfile::TempDir;

use crate::domain::{flipped, inspected, measured, run, signed};

/// `SINGLE_SOCKET` of POLICY.
const SINGLE_SOCKET: u64 = 1 << 20;

/// An image with a kernel so small that it is read at once. (It cannot run with SNP: it would need a handler for #VC.)
pub fn small_image(folder: &TempDir) -> PathBuf {
    let path = folder.path().join("domain.igvm");
    Image { initrd: &[42; 5000], command_line: "quiet", ..Image::of(bz_image()) }.write(&path);
    path
}

/// Where in the file the content of an address lies.
fn offset(report: &Value, gpa: u64) -> u64 {
    let items = report["items"].as_array().unwrap();
    let is_for_snp = |item: &Value| item["platforms"].as_array().unwrap().iter().any(|name| name == "snp");
    let item = items.iter().find(|item| item["gpa"] == gpa && is_for_snp(item)).unwrap();
    item["file_offset"].as_u64().unwrap()
}

/// Checks that the firmware refused to finish the launch, for this reason of its own.
fn launch_refused(done: &Finished, reason: &str) {
    let outcome = done.outcome();
    assert_eq!(outcome.exit_reason, ExitReason::LaunchRefused, "{done}");
    assert_eq!(done.code(), 123, "{done}");
    assert!(!outcome.protected, "{done}");
    assert!(outcome.message.contains(reason), "no {reason:?} in {done}");
}

/// Checks that the first stage stopped the domain, for this reason.
pub fn refused(done: &Finished, reason: &str) {
    let outcome = done.outcome();
    assert_eq!(outcome.exit_reason, ExitReason::RefusedByGuest, "{done}");
    assert_eq!(done.code(), 120, "{done}");
    assert!(outcome.message.contains(reason), "no {reason:?} in {done}");
}

/// Runs `tampered` with the ID block of `image`, which says what `image` is.
fn run_as(tampered: &Path, image: &Path) -> Finished {
    let (block, authentication) = signed(image, 1);
    let run = run(tampered, 1).with("memory", "64M");
    run.with("snp-id-block", block).with("snp-id-auth", authentication).finish()
}

#[test]
fn a_bit_of_what_is_measured_gives_another_digest_and_the_id_block_refuses_it() {
    let folder = tempfile::tempdir().unwrap();
    let image = small_image(&folder);
    let report = inspected(&image);
    for (what, gpa) in
        [("first stage", STAGE), ("page tables", STAGE_PAGE_TABLES), ("manifest", LAUNCH_MANIFEST)]
    {
        println!("{what}");
        // In the manifest, the first bytes of the kernel's hash.
        let within = if gpa == LAUNCH_MANIFEST { hash_in_manifest(&image, &report) } else { 8 };
        let tampered = flipped(&image, offset(&report, gpa) + within);
        assert_ne!(measured(&tampered, 1), measured(&image, 1));
        launch_refused(&run_as(&tampered, &image), "BAD_MEASUREMENT");
    }
}

/// Where in the manifest the kernel's hash is.
fn hash_in_manifest(image: &Path, report: &Value) -> u64 {
    let hash = report["manifest"]["kernel"]["sha256"].as_str().unwrap();
    let first = u8::from_str_radix(&hash[..2], 16).unwrap();
    let second = u8::from_str_radix(&hash[2..4], 16).unwrap();
    let bytes = fs::read(image).unwrap();
    let page = &bytes[usize::try_from(offset(report, LAUNCH_MANIFEST)).unwrap()..][..4096];
    page.windows(2).position(|window| window == [first, second]).unwrap() as u64
}

/// The contents of the CPUID page are the host's, and not in the digest; its address is.
#[test]
fn a_cpuid_page_elsewhere_gives_another_digest_and_the_id_block_refuses_it() {
    let folder = tempfile::tempdir().unwrap();
    let image = small_image(&folder);
    let tampered = altered(&image, |item| {
        if let Item::Pages(run) = item
            && run.kind == PageKind::SnpCpuid
        {
            run.gpa ^= 1 << 14;
        }
    });
    assert_ne!(measured(&tampered, 1), measured(&image, 1));
    launch_refused(&run_as(&tampered, &image), "BAD_MEASUREMENT");
}

/// The policy is not in the digest; the firmware compares it with the ID block's.
#[test]
fn another_policy_is_refused_by_the_id_block() {
    let folder = tempfile::tempdir().unwrap();
    let image = small_image(&folder);
    let tampered = with_policy(&image, 0x30000 | SINGLE_SOCKET);
    assert_eq!(measured(&tampered, 1), measured(&image, 1));
    launch_refused(&run_as(&tampered, &image), "POLICY_FAILURE");
}

#[test]
fn what_is_read_from_the_window_is_refused_by_name_if_a_bit_of_it_was_flipped() {
    let folder = tempfile::tempdir().unwrap();
    let image = small_image(&folder);
    let manifest = &inspected(&image)["manifest"];
    for (name, reason) in [
        ("kernel", "kernel hash mismatch"),
        ("initrd", "initrd hash mismatch"),
        ("command_line", "command line hash mismatch"),
    ] {
        let offset = manifest[name]["file_offset"].as_u64().unwrap();
        let tampered = flipped(&image, offset + manifest[name]["size"].as_u64().unwrap() - 1);
        assert_eq!(measured(&tampered, 1), measured(&image, 1));
        refused(&run(&tampered, 1).with("memory", "64M").finish(), reason);
    }
}

/// The host may say of pages that the image does not have that they are valid: then their content is the host's. It gives another
/// digest; and the first stage does not take them for its own.
#[test]
fn a_page_that_is_valid_before_the_first_stage_asks_for_it_stops_the_domain() {
    let folder = tempfile::tempdir().unwrap();
    let image = small_image(&folder);
    // The kernel's memory, and the last of the pages that are validated together.
    for gpa in [16 * MIB, 18 * MIB - PAGE_SIZE] {
        let tampered = with_page(&image, gpa);
        assert_ne!(measured(&tampered, 1), measured(&image, 1));
        refused(&run(&tampered, 1).with("memory", "64M").finish(), "page validated before");
    }
}

/// A copy of an image with its items changed by `change`.
fn altered(image: &Path, change: impl Fn(&mut Item<'_>)) -> PathBuf {
    rewritten(image, Alteration { writer: Writer::default(), policy: None, page: None, change })
}

/// A copy of an image with another policy for SNP.
fn with_policy(image: &Path, policy: u64) -> PathBuf {
    let change = |_: &mut Item<'_>| ();
    rewritten(image, Alteration { writer: Writer::default(), policy: Some(policy), page: None, change })
}

/// A copy of an image with one more page.
fn with_page(image: &Path, gpa: u64) -> PathBuf {
    let change = |_: &mut Item<'_>| ();
    rewritten(image, Alteration { writer: Writer::default(), policy: None, page: Some(gpa), change })
}

fn rewritten<'a, C: Fn(&mut Item<'_>)>(image: &Path, mut alteration: Alteration<'a, C>) -> PathBuf {
    // Tests are short-lived; the writer keeps references into the file.
    let bytes: &'static [u8] = fs::read(image).unwrap().leak();
    walk(&Igvm::new(bytes).unwrap(), Selection::All, &mut alteration).unwrap();
    let path = image.with_extension("altered");
    alteration.writer.write(File::create(&path).unwrap()).unwrap();
    path
}

/// Writes an image as it was, but for one thing.
struct Alteration<'a, C> {
    writer: Writer<'a>,
    policy: Option<u64>,
    /// Added behind the launch manifest.
    page: Option<u64>,
    change: C,
}

impl<'a, C: Fn(&mut Item<'_>)> Importer<'a> for Alteration<'a, C> {
    type Error = WriteError;

    fn platform(&mut self, platform: &PlatformInfo) -> Result<(), WriteError> {
        let mut platform = *platform;
        if platform.platform == ImagePlatform::Snp && self.policy.is_some() {
            platform.policy = self.policy;
        }
        self.writer.platform(&platform)
    }

    fn import(&mut self, mask: u32, item: &Item<'a>) -> Result<(), WriteError> {
        let mut item = item.clone();
        (self.change)(&mut item);
        self.writer.import(mask, &item)?;
        match (&item, self.page) {
            (Item::Pages(run), Some(gpa)) if run.gpa == LAUNCH_MANIFEST => {
                let content = Content { bytes: &[], file_offset: None };
                let page = PageRun { gpa, pages: 1, kind: PageKind::Unmeasured, content };
                self.writer.import(mask, &Item::Pages(page))
            }
            _ => Ok(()),
        }
    }
}
