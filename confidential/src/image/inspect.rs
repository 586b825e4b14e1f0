//! What is in an image file, for people and for programs.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt::Write as _;

use cofferdam_firmware::manifest::{self, KernelFormat, Manifest};
use cofferdam_firmware::sha256::Method;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::importer::{ImagePlatform, Importer, Item, PAGE, PageKind, PageRun, PlatformInfo, VcpuContext};
use super::manifest::ManifestFinder;
use super::walk::{Selection, walk};
use crate::igvm::reader::{Architecture, Igvm};
use crate::igvm::{Header, HeaderError};

/// What is in an image file. As JSON it is what `cofferdam image inspect --json` prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// SHA-256 of the file, hexadecimal.
    pub sha256: String,
    /// Size of the file, bytes.
    pub size: u64,
    /// Version of the IGVM format.
    pub format_version: u32,
    /// `x86_64` or `aarch64`.
    pub architecture: &'static str,
    /// Number of variable headers.
    pub headers: u64,
    /// The version that the file's maker gave it.
    pub version_string: Option<String>,
    /// The platforms, in the file's order.
    pub platforms: Vec<PlatformReport>,
    /// Platform → number of 4 KiB pages that a launch gives to the platform one by one, whatever their type, vCPU contexts
    /// included (on SNP one for the first vCPU, further vCPUs have one each). Shared pages do not count.
    pub measured_pages: BTreeMap<&'static str, u64>,
    /// What a launch does, in measurement order.
    pub items: Vec<ItemReport>,
    /// Why the file cannot be loaded, and `items` ends there.
    pub problem: Option<String>,
    /// The launch manifest, if the image is one of Cofferdam's.
    pub manifest: Option<ManifestReport>,
}

/// What the file says of a platform.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PlatformReport {
    /// Name of the platform.
    pub platform: &'static str,
    /// Its bit in IGVM's compatibility masks.
    pub mask: u32,
    /// The highest virtual trust level.
    pub highest_vtl: u8,
    /// Guest-physical address from which on memory is shared, or 0.
    pub shared_gpa_boundary: u64,
    /// The guest policy, hexadecimal.
    pub policy: Option<String>,
}

/// A step of a launch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ItemReport {
    /// Names of the platforms that it is for.
    pub platforms: Vec<&'static str>,
    /// What it is: `measured`, `unmeasured`, `shared`, `snp_secrets`, `snp_cpuid`, `snp_cpuid_xf` for pages;
    /// `parameters`, `vcpu`, `required_memory` or `snp_id_block`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Guest-physical address, if it has one.
    pub gpa: Option<u64>,
    /// Size in memory, bytes; 0 for what takes none.
    pub size: u64,
    /// Where its content begins in the file; null for zeroes, and where it does not lie in one piece.
    pub file_offset: Option<u64>,
    /// Bytes of content in the file.
    pub file_size: u64,
    /// SHA-256 of all of its memory, hexadecimal; null for zeroes.
    pub sha256: Option<String>,
    /// What more there is to say.
    pub note: Option<String>,
}

/// The launch manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ManifestReport {
    /// SHA-256 of the manifest's page, hexadecimal: a domain's `manifest_hash`.
    pub sha256: String,
    /// The kernel.
    pub kernel: FileReport,
    /// `bzimage` or `elf`.
    pub kernel_format: &'static str,
    /// The initrd.
    pub initrd: Option<FileReport>,
    /// The command line.
    pub command_line: Option<FileReport>,
    /// Its text, as far as it is UTF-8.
    pub command_line_text: Option<String>,
    /// Most vCPUs.
    pub max_cpus: u8,
    /// Least memory, bytes.
    pub min_memory: u64,
    /// Most memory, bytes.
    pub max_memory: u64,
    /// Whether the kernel gets the host's data.
    pub host_data: bool,
    /// Whether a protected domain accepts all its memory before the kernel runs.
    pub accept_all: bool,
}

/// A file that the first stage checks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FileReport {
    /// Guest-physical address in the load window.
    pub gpa: u64,
    /// Size, bytes.
    pub size: u64,
    /// The SHA-256 that the manifest demands, hexadecimal.
    pub sha256: String,
    /// Whether the content in the image has it.
    pub intact: bool,
    /// Where it lies in the image file.
    pub file_offset: Option<u64>,
}

/// Looks at everything in `file`, which is read from beginning to end.
///
/// # Errors
/// If the file changes meanwhile.
pub fn inspect(file: &[u8], image: &Igvm<'_>) -> Result<Report, HeaderError> {
    let mut headers = 0_u64;
    let mut version_string = None;
    for entry in image.headers() {
        headers = headers.saturating_add(1);
        if let Header::VersionString(text) = entry?.header {
            version_string = Some(text.to_owned());
        }
    }
    let mut collector = Collector::default();
    let problem = walk(image, Selection::All, &mut collector).err().map(|error| error.to_string());
    collector.flush();
    let mut measured_pages = BTreeMap::new();
    for info in image.platforms() {
        measured_pages.insert(info.platform.name(), collector.measured_pages(info));
    }
    let (manifest, problem) = match collector.finder.manifest() {
        Ok(manifest) => (manifest.map(|manifest| manifest_report(&manifest, &collector)), problem),
        Err(error) => (None, problem.or_else(|| Some(error.to_string()))),
    };
    Ok(Report {
        sha256: hex(&Method::detect().digest(file)),
        size: file.len() as u64,
        format_version: image.version(),
        architecture: match image.architecture() {
            Architecture::X64 => "x86_64",
            Architecture::Aarch64 => "aarch64",
        },
        headers,
        version_string,
        platforms: image.platforms().iter().map(platform_report).collect(),
        measured_pages,
        manifest,
        items: collector.items.into_iter().map(|(.., report)| report).collect(),
        problem,
    })
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn platform_report(info: &PlatformInfo) -> PlatformReport {
    PlatformReport {
        platform: info.platform.name(),
        mask: info.mask,
        highest_vtl: info.highest_vtl,
        shared_gpa_boundary: info.shared_gpa_boundary,
        policy: info.policy.map(|policy| format!("{policy:#x}")),
    }
}

/// What a platform is given one by one of an item.
#[derive(Clone, Copy, Default)]
struct Given {
    pages: u64,
    contexts: u64,
}

impl Given {
    fn of(item: &Item<'_>) -> Self {
        match item {
            Item::Pages(run) if run.kind != PageKind::Shared => Self { pages: run.pages, contexts: 0 },
            Item::Parameters(area) => Self { pages: area.pages, contexts: 0 },
            Item::Vcpu { .. } => Self { pages: 0, contexts: 1 },
            Item::Pages(_) | Item::RequiredMemory { .. } | Item::SnpIdBlock(_) => Self::default(),
        }
    }
}

/// Pages of one kind that follow each other in memory, wherever their content lies.
struct OpenRun {
    mask: u32,
    kind: PageKind,
    given: Given,
    hasher: Sha256,
    report: ItemReport,
    /// Whether any page has content.
    content: bool,
}

impl OpenRun {
    fn new(mask: u32, platforms: Vec<&'static str>, run: &PageRun<'_>) -> Self {
        let mut open = Self {
            mask,
            kind: run.kind,
            given: Given::default(),
            hasher: Sha256::new(),
            report: ItemReport {
                platforms,
                kind: page_kind(run.kind),
                gpa: Some(run.gpa),
                file_offset: run.content.file_offset,
                ..ItemReport::default()
            },
            content: false,
        };
        open.add(run);
        open
    }

    /// Adds `run`, if it goes on where this one ends.
    fn extend(&mut self, mask: u32, run: &PageRun<'_>) -> bool {
        let end = self.report.gpa.and_then(|gpa| gpa.checked_add(self.report.size));
        let follows = (self.mask, self.kind, end) == (mask, run.kind, Some(run.gpa));
        if follows {
            if !run.content.bytes.is_empty() {
                // Were it the next piece of the file, the walk had not parted it.
                self.report.file_offset = None;
                self.report.note = Some("not in one piece in the file".to_owned());
            }
            self.add(run);
        }
        follows
    }

    fn add(&mut self, run: &PageRun<'_>) {
        let given = Given::of(&Item::Pages(*run));
        self.given.pages = self.given.pages.saturating_add(given.pages);
        self.content |= !run.content.bytes.is_empty();
        self.report.size = self.report.size.saturating_add(run.length());
        self.report.file_size = self.report.file_size.saturating_add(run.content.bytes.len() as u64);
        self.hasher.update(run.content.bytes);
        let mut zeroes = run.length().saturating_sub(run.content.bytes.len() as u64);
        while zeroes != 0 {
            let part = zeroes.min(PAGE as u64);
            self.hasher.update([0; PAGE].get(..part as usize).unwrap_or_default());
            zeroes = zeroes.saturating_sub(part);
        }
    }

    fn close(self) -> (u32, Given, ItemReport) {
        let sha256 = self.content.then(|| hex(&self.hasher.finalize()));
        (self.mask, self.given, ItemReport { sha256, ..self.report })
    }
}

/// Collects what a walk gives.
#[derive(Default)]
struct Collector<'a> {
    platforms: Vec<PlatformInfo>,
    items: Vec<(u32, Given, ItemReport)>,
    /// Pages that the next ones may extend.
    open: Option<OpenRun>,
    /// Shared content, by guest-physical address.
    shared: Vec<(u64, &'a [u8], Option<u64>)>,
    finder: ManifestFinder,
}

impl<'a> Importer<'a> for Collector<'a> {
    type Error = Infallible;

    fn platform(&mut self, platform: &PlatformInfo) -> Result<(), Infallible> {
        self.platforms.push(*platform);
        Ok(())
    }

    fn import(&mut self, mask: u32, item: &Item<'a>) -> Result<(), Infallible> {
        self.finder.import(mask, item)?;
        let platforms =
            self.platforms.iter().filter(|info| info.mask & mask != 0).map(|info| info.platform.name());
        let platforms = platforms.collect();
        let Item::Pages(run) = item else {
            self.flush();
            self.items.push((mask, Given::of(item), ItemReport { platforms, ..item_report(item) }));
            return Ok(());
        };
        if run.kind == PageKind::Shared {
            self.shared.push((run.gpa, run.content.bytes, run.content.file_offset));
        }
        if !self.open.as_mut().is_some_and(|open| open.extend(mask, run)) {
            self.flush();
            self.open = Some(OpenRun::new(mask, platforms, run));
        }
        Ok(())
    }
}

impl<'a> Collector<'a> {
    fn flush(&mut self) {
        if let Some(open) = self.open.take() {
            self.items.push(open.close());
        }
    }

    fn measured_pages(&self, info: &PlatformInfo) -> u64 {
        let mut sum = Given::default();
        for (_, given, _) in self.items.iter().filter(|(mask, ..)| mask & info.mask != 0) {
            sum.pages = sum.pages.saturating_add(given.pages);
            sum.contexts = sum.contexts.saturating_add(given.contexts);
        }
        match info.platform {
            // KVM measures one for each vCPU, whether the image brings it or not.
            ImagePlatform::Snp => sum.pages.saturating_add(sum.contexts.max(1)),
            ImagePlatform::SevEs | ImagePlatform::Cca => sum.pages.saturating_add(sum.contexts),
            _ => sum.pages,
        }
    }

    /// Shared content of `size` bytes at `gpa`, and where it lies in the file.
    fn content(&self, gpa: u64, size: u64) -> Option<(&'a [u8], Option<u64>)> {
        self.shared.iter().find_map(|(start, bytes, file_offset)| {
            let offset = gpa.checked_sub(*start)?;
            let begin = usize::try_from(offset).ok()?;
            let end = begin.checked_add(usize::try_from(size).ok()?)?;
            let file_offset = file_offset.and_then(|start| start.checked_add(offset));
            Some((bytes.get(begin..end)?, file_offset))
        })
    }
}

fn page_kind(kind: PageKind) -> &'static str {
    match kind {
        PageKind::Measured => "measured",
        PageKind::Unmeasured => "unmeasured",
        PageKind::Shared => "shared",
        PageKind::SnpSecrets => "snp_secrets",
        PageKind::SnpCpuid => "snp_cpuid",
        PageKind::SnpCpuidXf => "snp_cpuid_xf",
    }
}

/// An item, whatever its platforms.
fn item_report(item: &Item<'_>) -> ItemReport {
    match item {
        Item::Pages(run) => OpenRun::new(0, Vec::new(), run).close().2,
        Item::Parameters(area) => {
            let values: Vec<String> =
                area.values.iter().map(|it| format!("{} at {:#x}", it.kind.name(), it.offset)).collect();
            ItemReport {
                kind: "parameters",
                gpa: Some(area.gpa),
                size: area.length(),
                file_offset: area.initial.file_offset,
                file_size: area.initial.bytes.len() as u64,
                note: (!values.is_empty()).then(|| values.join(", ")),
                ..ItemReport::default()
            }
        }
        Item::Vcpu { index, context } => {
            let (gpa, what) = match context {
                VcpuContext::NativeX64(registers) => {
                    (None, format!("begins at {:#x}, CR0 {:#x}", registers.rip, registers.cr0))
                }
                VcpuContext::SnpVmsa { gpa, .. } => (Some(*gpa), "VMSA".to_owned()),
                VcpuContext::Cca { pc, .. } => (None, format!("begins at {pc:#x}")),
            };
            ItemReport {
                kind: "vcpu",
                gpa,
                note: Some(format!("vCPU {index}: {what}")),
                ..ItemReport::default()
            }
        }
        Item::RequiredMemory { gpa, length } => {
            ItemReport { kind: "required_memory", gpa: Some(*gpa), size: *length, ..ItemReport::default() }
        }
        Item::SnpIdBlock(block) => {
            let note = format!("for the launch digest {}", hex(&block.launch_digest));
            ItemReport { kind: "snp_id_block", note: Some(note), ..ItemReport::default() }
        }
    }
}

fn manifest_report(manifest: &Manifest, collector: &Collector<'_>) -> ManifestReport {
    let content = |item: &manifest::Item| collector.content(item.address, item.size);
    let file = |item: &manifest::Item| FileReport {
        gpa: item.address,
        size: item.size,
        sha256: hex(&item.sha256),
        intact: content(item).is_some_and(|it| Method::detect().digest(it.0) == item.sha256),
        file_offset: content(item).and_then(|it| it.1),
    };
    let there = |item: &manifest::Item| (!item.is_empty()).then(|| file(item));
    ManifestReport {
        sha256: hex(&Method::detect().digest(&manifest.encode())),
        kernel: file(&manifest.kernel.file),
        kernel_format: match manifest.kernel.format {
            KernelFormat::BzImage => "bzimage",
            KernelFormat::Elf => "elf",
        },
        initrd: there(&manifest.initrd),
        command_line: there(&manifest.command_line),
        command_line_text: content(&manifest.command_line)
            .filter(|it| !it.0.is_empty())
            .map(|it| String::from_utf8_lossy(it.0).into_owned()),
        max_cpus: manifest.max_vcpus,
        min_memory: manifest.min_memory,
        max_memory: manifest.max_memory,
        host_data: manifest.host_data,
        accept_all: manifest.accept_all,
    }
}

#[cfg(test)]
mod tests {
    use cofferdam_firmware::layout::LAUNCH_MANIFEST;

    use super::*;
    use crate::image::compose::{Blob, Options, Source, compose, testing};
    use crate::image::importer::{Parameter, ParameterKind};
    use crate::image::testing::{file, pages, parameters, platform};

    fn report(file: &[u8]) -> Report {
        inspect(file, &Igvm::new(file).unwrap()).unwrap()
    }

    fn ours() -> (Vec<u8>, Vec<u8>) {
        let kernel = testing::kernel(70_001);
        let source = Source {
            kernel: Blob::of(&kernel),
            kernel_head: &kernel[..4096],
            initrd: None,
            command_line: "console=ttyS0",
        };
        let composition = compose(&source, &Options::default()).unwrap();
        let file = testing::written(&composition);
        (kernel, file)
    }

    #[test]
    fn an_image_of_ours() {
        let (kernel, file) = ours();
        let report = report(&file);
        assert_eq!((report.size, report.format_version), (file.len() as u64, 2));
        assert_eq!(report.sha256, hex(&Method::PORTABLE.digest(&file)));
        assert_eq!(report.problem, None);
        let names: Vec<_> = report.platforms.iter().map(|it| (it.platform, it.policy.as_deref())).collect();
        assert_eq!(names, [("plain", None), ("snp", Some("0x30000")), ("tdx", Some("0x2"))]);
        let pages = &report.measured_pages;
        assert!(pages["snp"] <= 13);
        // The VMSA, the secrets and the CPUID page are SNP's, four page directories plain's, a reset page TDX's.
        assert_eq!((pages["plain"], pages["tdx"]), (pages["snp"] - 3 + 4, pages["snp"] - 3 + 1));

        let manifest = report.manifest.unwrap();
        assert_eq!(manifest.command_line_text.as_deref(), Some("console=ttyS0"));
        let page = report.items.iter().find(|item| item.gpa == Some(LAUNCH_MANIFEST)).unwrap();
        assert_eq!(Some(manifest.sha256), page.sha256);
        assert_eq!((manifest.kernel_format, manifest.initrd), ("bzimage", None));
        assert!(manifest.kernel.intact && manifest.command_line.unwrap().intact);
        // What a person does with dd and sha256sum.
        let start = manifest.kernel.file_offset.unwrap() as usize;
        assert_eq!(&file[start..start + manifest.kernel.size as usize], kernel);
        let shared = report.items.iter().find(|item| item.kind == "shared").unwrap();
        assert_eq!(shared.platforms, ["plain", "snp", "tdx"]);
        let content = &file[shared.file_offset.unwrap() as usize..][..shared.file_size as usize];
        assert_eq!(shared.sha256, Some(hex(&Method::PORTABLE.digest(content))));
        let vcpus = report.items.iter().filter(|item| item.kind == "vcpu");
        assert_eq!(vcpus.map(|item| item.platforms.clone()).collect::<Vec<_>>(), [["plain"], ["snp"]]);
    }

    #[test]
    fn an_altered_kernel_is_seen() {
        let (_, mut file) = ours();
        let start = report(&file).manifest.unwrap().kernel.file_offset.unwrap() as usize;
        file[start + 70_000] ^= 1;
        let report = report(&file);
        let manifest = report.manifest.unwrap();
        assert_eq!((manifest.kernel.intact, manifest.command_line.unwrap().intact), (false, true));
    }

    #[test]
    fn an_image_of_others() {
        let page = vec![1; 4096];
        let values = vec![Parameter { kind: ParameterKind::MemoryMap, offset: 256 }];
        let bytes = file(
            &[platform(ImagePlatform::Snp, 1)],
            &[
                (1, pages(PageKind::Measured, 0x1000, 3, &page)),
                (1, parameters(0x8000, 2, &[], values)),
                (1, pages(PageKind::Shared, 0x10000, 1, &page)),
            ],
        );
        let report = report(&bytes);
        // No VMSA: KVM has one all the same.
        assert_eq!(report.measured_pages["snp"], 3 + 2 + 1);
        assert_eq!(report.manifest, None);
        assert_eq!(report.items[1].note.as_deref(), Some("memory_map at 0x100"));
        assert_eq!((report.items[0].size, report.items[0].file_size), (3 * 4096, 4096));
    }

    #[test]
    fn pages_that_are_neighbours_in_memory_are_one_run() {
        let bytes = [[1; PAGE], [2; PAGE], [1; PAGE]].concat();
        let (first, rest) = bytes.split_at(PAGE);
        let bytes = file(
            &[platform(ImagePlatform::Snp, 1)],
            &[
                (1, pages(PageKind::Measured, 0x1000, 1, first)),
                (1, pages(PageKind::Unmeasured, 0x8000, 1, first)),
                (1, pages(PageKind::Measured, 0x2000, 2, rest)),
                (1, pages(PageKind::Measured, 0x4000, 1, &[])),
                (1, pages(PageKind::Measured, 0x5000, 1, first)),
            ],
        );
        let report = report(&bytes);
        let runs: Vec<_> = report.items.iter().map(|item| (item.gpa, item.size, item.file_size)).collect();
        assert_eq!(
            runs,
            [(Some(0x1000), 0x1000, 0x1000), (Some(0x8000), 0x1000, 0x1000), (Some(0x2000), 0x4000, 0x3000)]
        );
        let last = &report.items[2];
        let memory = [rest, &[0; PAGE], first].concat();
        assert_eq!(last.sha256, Some(hex(&Method::PORTABLE.digest(&memory))));
        assert_eq!((last.file_offset, last.note.is_some()), (None, true));
        assert_eq!(report.measured_pages["snp"], 7);
    }

    #[test]
    fn a_broken_manifest_is_a_problem() {
        let mut page = [0; 4096];
        page[..8].copy_from_slice(&manifest::MAGIC);
        let gpa = LAUNCH_MANIFEST;
        let bytes =
            file(&[platform(ImagePlatform::Plain, 1)], &[(1, pages(PageKind::Measured, gpa, 1, &page))]);
        assert_eq!(report(&bytes).problem.as_deref(), Some("launch manifest: version 0, not 1"));
    }
}
