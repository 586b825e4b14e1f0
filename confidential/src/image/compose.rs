//! The image of a kernel, an initrd and a command line.
//!
//! What is private and measured is small and the same for every kernel but for one page, the launch
//! manifest: the first stage, page tables for its entry, and the places for what the host and the platform
//! tell it. Kernel, initrd and command line are shared pages in the load window, and the first stage believes
//! them only after it has hashed its own copy.
//!
//! The items, in measurement order:
//!
//! | item | plain | SNP | TDX |
//! |---|---|---|---|
//! | first stage, with the memory that it needs | measured | measured | measured |
//! | page tables at entry | measured, its own | measured, its own | measured, zeroes |
//! | launch manifest | measured | measured | measured |
//! | parameter page | unmeasured | unmeasured | unmeasured |
//! | secrets page, CPUID page | | by their types | |
//! | reset page | | | measured |
//! | kernel, initrd, command line | shared | shared | shared |
//! | least memory | required | required | required |
//! | first vCPU | registers | VMSA | |

use cofferdam_firmware::boot::{self, Kernel};
use cofferdam_firmware::layout::{self, COMMAND_LINE_MAX, MIB, PAGE_SIZE};
use cofferdam_firmware::manifest::{self, Manifest, ManifestError};
use cofferdam_firmware::{arguments, page_tables, sha256};
use thiserror::Error;
use zerocopy::IntoBytes;

use super::importer::{
    Content, ImagePlatform, Importer, Item, NativeContext, PAGE, PageKind, PageRun, ParameterArea,
    PlatformInfo, Segment, VcpuContext,
};
use super::walk::{Place, Selection, WalkError, begin};
use crate::digest::snp::VMSA_GPA;
use crate::digest::vmsa::{self, Vmsa};
use crate::stage;

/// Bit of plain domains in the masks of our images.
const PLAIN: u32 = 1 << 0;
/// Bit of SEV-SNP domains.
const SNP: u32 = 1 << 1;
/// Bit of TDX domains.
const TDX: u32 = 1 << 2;
/// All of them.
const ALL: u32 = PLAIN | SNP | TDX;

/// The SNP guest policy of an image for which none is named: any number of threads per core (bit 16), and the bit
/// that is always 1 (17). No debugging, no migration, any ABI version.
pub const DEFAULT_SNP_POLICY: u64 = 3 << 16;
/// The TDX policy of an image for which none is named: no debugging, and no #VE for pages that are not accepted
/// (IGVM's bit 1), without which Linux does not start.
pub const DEFAULT_TDX_POLICY: u64 = 1 << 1;

/// A file's content. Whoever composes an image never reads the bytes, so that a file that somebody cuts off while it is
/// mapped does no harm there.
#[derive(Clone, Copy, Debug)]
pub struct Blob<'a> {
    /// The bytes. In a mapped file, whole pages behind the last byte are never looked at.
    pub bytes: &'a [u8],
    /// Their SHA-256.
    pub sha256: [u8; sha256::SIZE],
}

impl<'a> Blob<'a> {
    /// Some bytes, which are read and hashed.
    pub fn of(bytes: &'a [u8]) -> Self {
        Self { bytes, sha256: sha256::Method::detect().digest(bytes) }
    }
}

/// What an image is made of.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// The kernel file.
    pub kernel: Blob<'a>,
    /// A copy of its first [`boot::HEAD`] bytes, or of all there are.
    pub kernel_head: &'a [u8],
    /// The initrd, if there is one.
    pub initrd: Option<Blob<'a>>,
    /// The kernel command line, without a NUL.
    pub command_line: &'a str,
}

/// What an image allows, and for whom it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Plain, SNP or TDX, in any order.
    pub platforms: Vec<ImagePlatform>,
    /// Most vCPUs.
    pub max_vcpus: u8,
    /// Most memory, bytes.
    pub max_memory: u64,
    /// Whether the kernel gets the host's data.
    pub host_data: bool,
    /// Whether a protected domain accepts all its memory before the kernel runs.
    pub accept_all: bool,
    /// Guest policy of SNP (SNP firmware ABI, 4.3).
    pub snp_policy: u64,
    /// IGVM's policy of TDX.
    pub tdx_policy: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            platforms: vec![ImagePlatform::Plain, ImagePlatform::Snp, ImagePlatform::Tdx],
            max_vcpus: layout::MAX_VCPUS,
            max_memory: layout::MAX_MEMORY,
            host_data: false,
            accept_all: false,
            snp_policy: DEFAULT_SNP_POLICY,
            tdx_policy: DEFAULT_TDX_POLICY,
        }
    }
}

/// Why there is no image of something.
#[derive(Debug, Error)]
pub enum ComposeError {
    /// The kernel is none that the first stage can start.
    #[error("kernel: {0}")]
    Kernel(boot::KernelError),
    /// The kernel cannot be given an initrd of this size in any amount of memory.
    #[error("initrd: {0} bytes find no place below 3 GiB, behind the kernel and where it can reach them")]
    Initrd(usize),
    /// The kernel takes no command line of this length, with what the first stage adds to it.
    #[error("command line: {length} bytes long, the kernel takes {max}")]
    CommandLine {
        /// Its length, bytes.
        length: usize,
        /// The limit, bytes.
        max: u64,
    },
    /// A command line ends at its first NUL.
    #[error("command line: has a NUL in it")]
    Nul,
    /// The three do not fit into the load window.
    #[error("kernel, initrd and command line have more than {} MiB together", layout::LOAD_WINDOW_SIZE / MIB)]
    Window,
    /// The kernel and the initrd need more memory than the image may have.
    #[error("kernel and initrd need {} MiB of memory, the image is to have at most {} MiB", .needed / MIB, .max / MIB)]
    Memory {
        /// What they need, bytes.
        needed: u64,
        /// What was allowed, bytes.
        max: u64,
    },
    /// A bound that no domain can have.
    #[error(transparent)]
    Manifest(ManifestError),
    /// An image for nobody.
    #[error("no platform is named")]
    NoPlatform,
    /// A platform that this architecture does not have or the first stage does not know.
    #[error("an image cannot be made for the platform {}", .0.name())]
    Platform(ImagePlatform),
    /// A policy that the platform does not have or KVM does not take.
    #[error("policy of {}: {what} in {value:#x}", .platform.name())]
    Policy {
        /// The platform.
        platform: ImagePlatform,
        /// What is wrong.
        what: &'static str,
        /// The policy.
        value: u64,
    },
}

/// An image in memory.
#[derive(Debug)]
pub struct Composition<'a> {
    platforms: Vec<PlatformInfo>,
    manifest: Manifest,
    manifest_page: [u8; PAGE],
    plain_tables: [[u8; PAGE]; 6],
    snp_tables: [[u8; PAGE]; 2],
    vmsa: Box<Vmsa>,
    kernel: &'a [u8],
    initrd: &'a [u8],
    command_line: &'a [u8],
}

/// The image of `source`.
pub fn compose<'a>(source: &Source<'a>, options: &Options) -> Result<Composition<'a>, ComposeError> {
    let kernel =
        Kernel::read(source.kernel_head, source.kernel.bytes.len() as u64).map_err(ComposeError::Kernel)?;
    check_command_line(source.command_line, kernel.command_line_max, options)?;

    let initrd = source.initrd.filter(|initrd| !initrd.bytes.is_empty());
    let command_line = Some(Blob::of(source.command_line.as_bytes())).filter(|blob| !blob.bytes.is_empty());
    let mut next = layout::LOAD_WINDOW;
    let mut place = |blob: Option<Blob<'a>>| {
        let Some(Blob { bytes, sha256 }) = blob else { return manifest::Item::default() };
        let item = manifest::Item { address: next, size: bytes.len() as u64, sha256 };
        next = next.saturating_add(item.size.next_multiple_of(PAGE_SIZE));
        item
    };
    let (kernel_item, initrd_item, command_line_item) =
        (place(Some(source.kernel)), place(initrd), place(command_line));
    if next > layout::LOAD_WINDOW.saturating_add(layout::LOAD_WINDOW_SIZE) {
        return Err(ComposeError::Window);
    }
    let initrd = initrd.map_or(Default::default(), |initrd| initrd.bytes);
    let needed = kernel.memory_needed(initrd.len() as u64).ok_or(ComposeError::Initrd(initrd.len()))?;
    if needed > options.max_memory {
        return Err(ComposeError::Memory { needed, max: options.max_memory });
    }
    let manifest = Manifest {
        kernel: manifest::Kernel {
            file: kernel_item,
            format: kernel.format(),
            address: kernel.copy_address(),
        },
        initrd: initrd_item,
        command_line: command_line_item,
        max_vcpus: options.max_vcpus,
        min_memory: needed,
        max_memory: options.max_memory,
        host_data: options.host_data,
        accept_all: options.accept_all,
    };
    let manifest_page = manifest.encode();
    Manifest::decode(&manifest_page).map_err(ComposeError::Manifest)?;
    Ok(Composition {
        platforms: platforms(options)?,
        manifest,
        manifest_page,
        plain_tables: page_tables::plain(),
        snp_tables: page_tables::snp(),
        vmsa: Box::new(entry_vmsa()),
        kernel: source.kernel.bytes,
        initrd,
        command_line: source.command_line.as_bytes(),
    })
}

impl<'a> Composition<'a> {
    /// What the first stage will check.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Hands the items to `importer`, as [`walk`](super::walk::walk) does with a file's.
    pub fn walk<'s, I: Importer<'s>>(
        &'s self,
        selection: Selection,
        importer: &mut I,
    ) -> Result<(), WalkError<I::Error>> {
        let chosen = begin(&self.platforms, selection, importer)?;
        for (name, mask, item) in self.items() {
            let mask = mask & chosen;
            if mask != 0 {
                importer
                    .import(mask, &item)
                    .map_err(|source| WalkError::Item { at: Place::Composed(name), source })?;
            }
        }
        Ok(())
    }

    fn items(&self) -> impl Iterator<Item = (&'static str, u32, Item<'_>)> {
        let stage = PageRun {
            gpa: layout::STAGE,
            pages: stage::MEMORY.div_ceil(PAGE_SIZE),
            kind: PageKind::Measured,
            content: Content { bytes: stage::BYTES, file_offset: None },
        };
        let no_tables = PageRun {
            gpa: layout::STAGE_PAGE_TABLES,
            pages: self.snp_tables.len() as u64,
            kind: PageKind::Measured,
            content: Content::ZERO,
        };
        let parameters = ParameterArea {
            gpa: layout::PARAMETER_PAGE,
            pages: 1,
            initial: Content::ZERO,
            values: Vec::new(),
        };
        let filled = |kind, gpa| PageRun { gpa, pages: 1, kind, content: Content::ZERO };
        let window = |item: &manifest::Item, bytes: &'a [u8]| pages(PageKind::Shared, item.address, bytes);
        let snp = self.vmsa.as_bytes().first_chunk().map(|vmsa| VcpuContext::SnpVmsa { gpa: VMSA_GPA, vmsa });
        let plain = VcpuContext::NativeX64(Box::new(entry_context()));

        let items = [
            ("first stage", ALL, Some(Item::Pages(stage))),
            (
                "page tables",
                PLAIN,
                pages(PageKind::Measured, layout::STAGE_PAGE_DIRECTORIES, self.plain_tables.as_flattened()),
            ),
            (
                "page tables",
                SNP,
                pages(PageKind::Measured, layout::STAGE_PAGE_TABLES, self.snp_tables.as_flattened()),
            ),
            ("page tables", TDX, Some(Item::Pages(no_tables))),
            ("launch manifest", ALL, pages(PageKind::Measured, layout::LAUNCH_MANIFEST, &self.manifest_page)),
            ("parameter page", ALL, Some(Item::Parameters(parameters))),
            ("secrets page", SNP, Some(Item::Pages(filled(PageKind::SnpSecrets, layout::SNP_SECRETS)))),
            ("CPUID page", SNP, Some(Item::Pages(filled(PageKind::SnpCpuid, layout::SNP_CPUID)))),
            ("reset page", TDX, pages(PageKind::Measured, layout::TDX_RESET_PAGE, stage::TDX_RESET)),
            ("kernel", ALL, window(&self.manifest.kernel.file, self.kernel)),
            ("initrd", ALL, window(&self.manifest.initrd, self.initrd)),
            ("command line", ALL, window(&self.manifest.command_line, self.command_line)),
            ("required memory", ALL, Some(Item::RequiredMemory { gpa: 0, length: self.manifest.min_memory })),
            ("first vCPU", PLAIN, Some(Item::Vcpu { index: 0, context: plain })),
            ("first vCPU", SNP, snp.map(|context| Item::Vcpu { index: 0, context })),
        ];
        items.into_iter().filter_map(|(name, mask, item)| Some((name, mask, item?)))
    }
}

/// Pages that begin with `bytes`; none, where there are no bytes.
fn pages(kind: PageKind, gpa: u64, bytes: &[u8]) -> Option<Item<'_>> {
    let pages = bytes.len().div_ceil(PAGE) as u64;
    let run = PageRun { gpa, pages, kind, content: Content { bytes, file_offset: None } };
    (pages != 0).then_some(Item::Pages(run))
}

fn check_command_line(text: &str, kernel_max: u64, options: &Options) -> Result<(), ComposeError> {
    // The first stage adds to it.
    let added = |platform: &ImagePlatform| match platform {
        ImagePlatform::Plain if options.host_data => arguments::HOST_DATA_SIZE,
        ImagePlatform::Plain => 0,
        _ => arguments::MAX_SIZE,
    };
    let reserved = options.platforms.iter().map(added).max().unwrap_or(0);
    let max = kernel_max.min(COMMAND_LINE_MAX as u64).saturating_sub(reserved as u64);
    if text.len() as u64 > max {
        return Err(ComposeError::CommandLine { length: text.len(), max });
    }
    if text.contains('\0') { Err(ComposeError::Nul) } else { Ok(()) }
}

/// What the image says of its platforms, in the order of their bits.
fn platforms(options: &Options) -> Result<Vec<PlatformInfo>, ComposeError> {
    check_snp_policy(options.snp_policy)?;
    check_tdx_policy(options.tdx_policy)?;
    let known = [
        (ImagePlatform::Plain, PLAIN, None),
        (ImagePlatform::Snp, SNP, Some(options.snp_policy)),
        (ImagePlatform::Tdx, TDX, Some(options.tdx_policy)),
    ];
    for platform in &options.platforms {
        if !known.iter().any(|(kind, ..)| kind == platform) {
            return Err(ComposeError::Platform(*platform));
        }
    }
    let chosen: Vec<_> = known
        .into_iter()
        .filter(|(platform, ..)| options.platforms.contains(platform))
        .map(|(platform, mask, policy)| PlatformInfo {
            platform,
            mask,
            highest_vtl: 0,
            shared_gpa_boundary: 0,
            policy,
            cca_policy: None,
        })
        .collect();
    if chosen.is_empty() { Err(ComposeError::NoPlatform) } else { Ok(chosen) }
}

/// Refuses an SNP policy that no launch on KVM can have.
pub(crate) fn check_snp_policy(value: u64) -> Result<(), ComposeError> {
    /// Bit 17 is reserved, and 1.
    const ONE: u64 = 1 << 17;
    /// Bit 18: a migration agent, which KVM does not have.
    const MIGRATE_MA: u64 = 1 << 18;
    /// The last bit that means something is 25.
    const KNOWN: u64 = (1 << 26) - 1;
    let wrong = |what| Err(ComposeError::Policy { platform: ImagePlatform::Snp, what, value });
    match value {
        _ if value & ONE == 0 => wrong("bit 17, which must be 1, is 0"),
        _ if value & MIGRATE_MA != 0 => wrong("bit 18, a migration agent, which KVM does not have, is 1"),
        _ if value & !KNOWN != 0 => wrong("a bit above 25 is 1"),
        _ => Ok(()),
    }
}

fn check_tdx_policy(value: u64) -> Result<(), ComposeError> {
    match value {
        0..=3 => Ok(()),
        _ => {
            let what = "a bit above 1, which KVM cannot keep, is 1";
            Err(ComposeError::Policy { platform: ImagePlatform::Tdx, what, value })
        }
    }
}

// The state at the first stage's entry: 64-bit mode, paging by the image's tables.
/// PE, ET, NE, PG.
const CR0: u64 = 0x8000_0031;
/// PAE.
const CR4: u64 = 1 << 5;
/// LME, LMA.
const EFER: u64 = 0x500;
/// The bit that is always 1.
const RFLAGS: u64 = 1 << 1;
/// Selector and attributes of a flat code segment: present, execute and read, accessed, 64-bit.
const CODE: (u16, u16) = (0x10, 0xa09b);
/// Selector and attributes of a flat data segment: present, read and write, accessed, 32-bit.
const DATA: (u16, u16) = (0x18, 0xc093);

fn entry_context() -> NativeContext {
    let segment = |(selector, attributes)| Segment { selector, attributes, base: 0, limit: u32::MAX };
    NativeContext {
        rip: stage::ENTRY,
        rflags: RFLAGS,
        code: segment(CODE),
        data: segment(DATA),
        cr0: CR0,
        cr3: layout::STAGE_PAGE_TABLES,
        cr4: CR4,
        efer: EFER,
        ..NativeContext::default()
    }
}

/// The same for SNP, with what KVM adds to it: the page is what is measured.
fn entry_vmsa() -> Vmsa {
    // A VMSA has bits 12 to 15 of the attributes in bits 8 to 11.
    let segment = |(selector, attributes): (u16, u16)| vmsa::Segment {
        selector,
        attributes: attributes & 0xff | attributes >> 4 & 0xf00,
        base: 0,
        limit: u32::MAX,
    };
    let data = segment(DATA);
    let reset = Vmsa::reset();
    Vmsa {
        cs: segment(CODE),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        rip: stage::ENTRY,
        rflags: RFLAGS,
        cr0: CR0,
        cr3: layout::STAGE_PAGE_TABLES | page_tables::SNP_PRIVATE,
        cr4: reset.cr4 | CR4,
        efer: reset.efer | EFER,
        ..reset
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
