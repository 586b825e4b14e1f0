//! Images: what the way through the first stage costs before the kernel's first instruction, and what is measured.

use std::fs;

use cofferdam_confidential::image::compose::{Blob, Options, Source, compose};
use cofferdam_confidential::image::importer::{ImagePlatform, Importer, Item, PageKind, PlatformInfo};
use cofferdam_confidential::image::walk::Selection;
use cofferdam_firmware::boot::HEAD;
use serde_json::json;
use xtask::assets::Assets;

use crate::api::domain;
use crate::report::{Better, Row, Subject};
use crate::start_up::{MEMORY, Monitor, measure};
use crate::{Result, in_turns, progress};

/// Most pages of a SEV-SNP domain with one vCPU.
const MOST_PAGES: f64 = 13.0;

const KERNEL_ENTRY: Subject =
    Subject { name: "start to kernel entry, image", unit: "ms", better: Better::Lower, goal: None };
/// Pages of a launch of Debian's kernel and initial RAM disk.
const PAGES: [(ImagePlatform, Subject); 3] = [
    (ImagePlatform::Snp, pages("pages of an SNP launch, Debian's kernel", Some(1.0))),
    (ImagePlatform::Tdx, pages("the same of a TDX launch", None)),
    (ImagePlatform::Plain, pages("the same of a plain launch", None)),
];

const fn pages(name: &'static str, goal: Option<f64>) -> Subject {
    Subject { name, unit: "pages", better: Better::Lower, goal }
}

/// Starts the payload `first` through an image and directly, `rounds` times in turns, and counts pages.
pub fn run(rounds: usize) -> Result<Vec<Row>> {
    progress(format_args!("{rounds} starts through an image and directly, in turns"));
    let directory = tempfile::tempdir_in("/dev/shm")?;
    let status = directory.path().join("status");
    let monitor = |mode: &str| -> Result<Monitor> {
        let mut config = domain("first", MEMORY);
        config["boot-source"]["boot_mode"] = json!(mode);
        let path = directory.path().join(format!("{mode}.json"));
        fs::write(&path, config.to_string())?;
        Ok(Monitor::new(path, &status))
    };
    let (image, direct) = (monitor("image")?, monitor("direct")?);
    let entry = |monitor: &Monitor| {
        let mark = ["phases", "user_space"];
        measure(monitor.command().arg("--start-time-us=0"), &status, &mark)
            .map(|times| times.first_instruction)
    };
    let (ours, theirs) = in_turns(rounds, || entry(&image), || entry(&direct))?;
    let mut rows = vec![KERNEL_ENTRY.row(&ours, &theirs, "direct boot")];
    rows.extend(count_pages()?);
    Ok(rows)
}

/// Pages of any type that each platform is given one by one for a domain with one vCPU, what is measured of the vCPU
/// included.
fn count_pages() -> Result<Vec<Row>> {
    let assets = Assets::fetch()?;
    let (kernel, initrd) = (fs::read(&assets.guest_kernel)?, fs::read(&assets.guest_initrd)?);
    let source = Source {
        kernel: Blob::of(&kernel),
        kernel_head: kernel.get(..HEAD).unwrap_or(&kernel),
        initrd: Some(Blob::of(&initrd)),
        command_line: "",
    };
    let image = compose(&source, &Options::default())?;
    let count = |(platform, subject): &(ImagePlatform, Subject)| {
        let mut pages = Pages { snp: *platform == ImagePlatform::Snp, count: 0 };
        image.walk(Selection::One(*platform), &mut pages)?;
        Ok(subject.row(&[pages.count as f64], &[MOST_PAGES], "the limit of SNP"))
    };
    PAGES.iter().map(count).collect()
}

/// Counts what is no shared page. Only SNP measures vCPUs as pages.
struct Pages {
    snp: bool,
    count: u64,
}

impl<'a> Importer<'a> for Pages {
    type Error = std::convert::Infallible;

    fn platform(&mut self, _: &PlatformInfo) -> std::result::Result<(), Self::Error> {
        Ok(())
    }

    fn import(&mut self, _: u32, item: &Item<'a>) -> std::result::Result<(), Self::Error> {
        self.count += match item {
            Item::Pages(run) if run.kind != PageKind::Shared => run.pages,
            Item::Parameters(area) => area.pages,
            Item::Vcpu { .. } => self.snp.into(),
            _ => 0,
        };
        Ok(())
    }
}
