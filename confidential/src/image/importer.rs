//! The trait that carries an image into whatever is made of it.
//!
//! An image is a sequence of items. A *walk* hands them, one after the other, to an
//! [`Importer`], and there are three of those: the live domain, which gives them to
//! KVM; the image file, which writes them down; and the launch digest, which computes
//! what the hardware would measure. That the three see the same items in the same order
//! is what makes a digest predictable.
//!
//! # Order
//!
//! 1. [`Importer::platform`], once for each platform of the walk: one for a live domain
//!    or a digest, all that the image names for a file.
//! 2. [`Importer::import`] for each item, in *measurement order*: that of the directives
//!    in an image file. It is not sorted, and nothing may sort it: two files with the
//!    same pages in another order have other digests. Within a [`PageRun`] or a
//!    [`ParameterArea`] the pages follow each other in ascending guest-physical order, and
//!    are measured in that order. That directives were merged into one run changes nothing.
//!
//! A platform may have an order of its own for things that are no pages: KVM measures the
//! vCPU contexts of an SNP domain after all pages, wherever they stand in the image.
//!
//! # What a walk has checked
//!
//! Addresses and lengths are multiples of 4 KiB, no run is empty or wraps around the end
//! of the address space, and for one platform no two items lie on the same page. Whether
//! there is memory at an address, and whether a platform takes a context or a policy, is
//! for the importer to say.

use cofferdam_firmware::layout::PAGE_SIZE;

/// Bytes of a page, as a length of slices.
pub const PAGE: usize = 4096;

const _: () = assert!(PAGE as u64 == PAGE_SIZE);

/// What takes the items of an image.
///
/// `'a` is the life of the image's content, so that an importer can map or keep it without a copy.
pub trait Importer<'a> {
    /// Why an item was refused.
    type Error;

    /// What the image says of a platform.
    fn platform(&mut self, platform: &PlatformInfo) -> Result<(), Self::Error>;

    /// Takes the next item. `mask` has the [`PlatformInfo::mask`] bits of the platforms it is for,
    /// among those of the walk: where the walk is for one platform, it is that one's.
    fn import(&mut self, mask: u32, item: &Item<'a>) -> Result<(), Self::Error>;
}

/// A platform that an image may be made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ImagePlatform {
    /// An ordinary virtual machine (IGVM: native).
    Plain,
    /// Hyper-V's isolation by virtual secure mode.
    Vsm,
    /// AMD SEV-SNP.
    Snp,
    /// Intel TDX.
    Tdx,
    /// AMD SEV.
    Sev,
    /// AMD SEV-ES.
    SevEs,
    /// Arm CCA.
    Cca,
}

impl ImagePlatform {
    /// Its name in options, JSON and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Vsm => "vsm",
            Self::Snp => "snp",
            Self::Tdx => "tdx",
            Self::Sev => "sev",
            Self::SevEs => "sev-es",
            Self::Cca => "cca",
        }
    }
}

/// What an image says of a platform.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlatformInfo {
    /// Which one.
    pub platform: ImagePlatform,
    /// Its bit in the masks of items (IGVM's compatibility mask): exactly one.
    pub mask: u32,
    /// The highest virtual trust level in use: 0, or 2 for a paravisor.
    pub highest_vtl: u8,
    /// Guest-physical address from which on memory is shared with the host; 0: none,
    /// the guest shares pages by asking.
    pub shared_gpa_boundary: u64,
    /// The guest policy, if the image has one. SNP: `POLICY` of the SNP firmware ABI, 4.3. TDX: IGVM's
    /// bits (0: debug, 1: SEPT_VE_DISABLE, 2: migratable), which are not those of ATTRIBUTES.
    pub policy: Option<u64>,
    /// The realm policy of a CCA platform, if the image has one.
    pub cca_policy: Option<CcaPolicy>,
}

/// IGVM's `CCA_POLICY`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CcaPolicy {
    /// Attributes that must be 0.
    pub required_zeroes: u64,
    /// Attributes that must be 1 (bit 0: debug, bit 1: shared memory encryption context).
    pub required_ones: u64,
    /// Hash algorithm of the measurements: 0 SHA-256, 1 SHA-512, 2 SHA-384.
    pub hash_algorithm: u8,
    /// Policy for live firmware activation.
    pub lfa_policy: u8,
}

/// One thing in an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item<'a> {
    /// Pages with content.
    Pages(PageRun<'a>),
    /// Unmeasured pages with values that the host fills in.
    Parameters(ParameterArea<'a>),
    /// The state of a vCPU at entry.
    Vcpu {
        /// Index of the vCPU; 0 is the first.
        index: u16,
        /// Its registers.
        context: VcpuContext<'a>,
    },
    /// Memory that must exist. It is not measured, and on SNP and TDX not accepted either.
    RequiredMemory {
        /// Guest-physical address.
        gpa: u64,
        /// Length, bytes.
        length: u64,
    },
    /// The ID block of an SNP domain and its signatures.
    SnpIdBlock(Box<SnpIdBlock>),
}

/// Pages of one kind with consecutive addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun<'a> {
    /// Guest-physical address of the first page.
    pub gpa: u64,
    /// Number of 4 KiB pages, at least 1.
    pub pages: u64,
    /// What they are.
    pub kind: PageKind,
    /// What is in them.
    pub content: Content<'a>,
}

/// What a page is to the platform.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PageKind {
    /// Private, its content in the launch digest.
    Measured,
    /// Private, its content not in the digest. (On SNP its address is.)
    Unmeasured,
    /// Shared with the host, in no digest.
    Shared,
    /// The page for the secrets of an SNP guest: the firmware fills it.
    SnpSecrets,
    /// The page for an SNP guest's CPUID values: the host fills it, the firmware checks it.
    SnpCpuid,
    /// A page for the values of CPUID leaf 0xD, as [`Self::SnpCpuid`]; no platform of ours has it.
    SnpCpuidXf,
}

/// What is in a run of pages: some bytes, and zeroes up to the end of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content<'a> {
    /// The bytes, not more than the run. None at all: pages of zeroes, which are measured as such
    /// (on SNP as NORMAL pages, not by the hardware's ZERO type).
    ///
    /// In an image that is mapped from a file and aligned in it, the slice is page-aligned,
    /// and is what a live domain can map.
    pub bytes: &'a [u8],
    /// Where the bytes lie in the image file, if they come from one.
    pub file_offset: Option<u64>,
}

impl Content<'static> {
    /// Nothing but zeroes.
    pub const ZERO: Self = Self { bytes: &[], file_offset: None };
}

impl<'a> PageRun<'a> {
    /// Length, bytes. A walk has checked that it fits.
    pub const fn length(&self) -> u64 {
        self.pages.saturating_mul(PAGE_SIZE)
    }

    /// Guest-physical address of each page, and its content.
    pub fn each_page(&self) -> impl Iterator<Item = (u64, PageContent<'a>)> + use<'a> {
        each_page(self.gpa, self.pages, self.content.bytes)
    }
}

/// The content of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageContent<'a> {
    /// All of it.
    Whole(&'a [u8; PAGE]),
    /// Its beginning (shorter than a page, or nothing); the rest is zero.
    Padded(&'a [u8]),
}

impl PageContent<'_> {
    /// The page's bytes. `buffer` is used where they do not lie together.
    pub fn bytes<'b>(&'b self, buffer: &'b mut [u8; PAGE]) -> &'b [u8; PAGE] {
        match self {
            Self::Whole(page) => page,
            Self::Padded(start) => {
                buffer.fill(0);
                for (to, from) in buffer.iter_mut().zip(*start) {
                    *to = *from;
                }
                buffer
            }
        }
    }
}

/// Pages that are imported unmeasured once the host's values are in them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParameterArea<'a> {
    /// Guest-physical address of the first page.
    pub gpa: u64,
    /// Number of 4 KiB pages, at least 1.
    pub pages: u64,
    /// What is in them where no value is written.
    pub initial: Content<'a>,
    /// The values, in the order in which they are written.
    pub values: Vec<Parameter>,
}

impl<'a> ParameterArea<'a> {
    /// Length, bytes. A walk has checked that it fits.
    pub const fn length(&self) -> u64 {
        self.pages.saturating_mul(PAGE_SIZE)
    }

    /// Guest-physical address of each page, and its initial content.
    pub fn each_page(&self) -> impl Iterator<Item = (u64, PageContent<'a>)> + use<'a> {
        each_page(self.gpa, self.pages, self.initial.bytes)
    }
}

/// A value that the host writes into a parameter area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Which one.
    pub kind: ParameterKind,
    /// Where in the area, bytes; inside it. That the value fits is for the importer to check.
    pub offset: u32,
}

/// The values that an image may ask of the host. The format of each is IGVM's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ParameterKind {
    /// Number of vCPUs, u32.
    VcpuCount,
    /// u32; bit 0: memory is shared until it is accepted.
    EnvironmentInfo,
    /// The kernel command line, ASCII, with a NUL at its end.
    CommandLine,
    /// Memory map: `IGVM_VHS_MEMORY_MAP_ENTRY`s, the last one with no pages.
    MemoryMap,
    /// Two ranges for devices.
    MmioRanges,
    /// ACPI SRAT.
    Srat,
    /// ACPI MADT.
    Madt,
    /// ACPI SLIT.
    Slit,
    /// ACPI PPTT.
    Pptt,
    /// A flattened device tree.
    DeviceTree,
}

impl ParameterKind {
    /// Its name in messages and in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::VcpuCount => "vcpu_count",
            Self::EnvironmentInfo => "environment_info",
            Self::CommandLine => "command_line",
            Self::MemoryMap => "memory_map",
            Self::MmioRanges => "mmio_ranges",
            Self::Srat => "srat",
            Self::Madt => "madt",
            Self::Slit => "slit",
            Self::Pptt => "pptt",
            Self::DeviceTree => "device_tree",
        }
    }
}

/// The state of a vCPU at entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VcpuContext<'a> {
    /// Registers of an ordinary x86-64 vCPU. A domain without one begins at the reset vector.
    NativeX64(Box<NativeContext>),
    /// The VMSA of an SNP vCPU (AMD APM volume 2, table B-4).
    SnpVmsa {
        /// Where the image wants it. KVM has a place of its own for it, 0xFFFFFFFFF000.
        gpa: u64,
        /// The page.
        vmsa: &'a [u8; PAGE],
    },
    /// The first registers of a CCA vCPU: x0 to x7, and the program counter.
    Cca {
        /// x0 to x7.
        x: [u64; 8],
        /// The program counter.
        pc: u64,
        /// `flags` of the REC parameters.
        flags: u64,
    },
}

/// Registers of an ordinary x86-64 vCPU (IGVM's `IgvmNativeVpContextX64`).
/// What is not here has its architectural reset value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the registers have their architectural names")]
pub struct NativeContext {
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rbx: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
    pub idtr: DescriptorTable,
    pub gdtr: DescriptorTable,
    /// CS.
    pub code: Segment,
    /// DS, ES, FS, GS and SS alike, GS but for its base.
    pub data: Segment,
    pub gs_base: u64,
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescriptorTable {
    /// Linear address.
    pub base: u64,
    /// Limit, bytes less one.
    pub limit: u16,
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// Attributes as in a descriptor: bits 0 to 7 are its bits 40 to 47, bits 12 to 15 its bits 52 to 55.
    pub attributes: u16,
    /// Base address.
    pub base: u32,
    /// Limit, bytes less one.
    pub limit: u32,
}

/// IGVM's `SNP_ID_BLOCK`: what the firmware's ID block and ID authentication are made of
/// (SNP firmware ABI, 8.17). Key and signature components are little-endian.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnpIdBlock {
    /// The launch digest that the block vouches for.
    pub launch_digest: [u8; 48],
    /// Family of the image.
    pub family_id: [u8; 16],
    /// The image.
    pub image_id: [u8; 16],
    /// Version of the block.
    pub version: u32,
    /// Security version of the guest.
    pub guest_svn: u32,
    /// Algorithm of the ID key: 1 is ECDSA P-384 with SHA-384.
    pub id_key_algorithm: u32,
    /// Algorithm of the author key.
    pub author_key_algorithm: u32,
    /// Signature of the ID block by the ID key.
    pub id_signature: Signature,
    /// The ID key.
    pub id_key: PublicKey,
    /// Signature of the ID key by the author key, and that key, where there is one.
    pub author: Option<(Signature, PublicKey)>,
}

/// An ECDSA signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signature {
    /// r.
    pub r: [u8; 72],
    /// s.
    pub s: [u8; 72],
}

/// An ECDSA public key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublicKey {
    /// Curve: 2 is P-384.
    pub curve: u32,
    /// x.
    pub x: [u8; 72],
    /// y.
    pub y: [u8; 72],
}

fn each_page(gpa: u64, pages: u64, bytes: &[u8]) -> impl Iterator<Item = (u64, PageContent<'_>)> {
    let (whole, rest) = bytes.as_chunks::<PAGE>();
    let content = whole.iter().map(PageContent::Whole).chain([PageContent::Padded(rest)]);
    let zeroes = std::iter::repeat(PageContent::Padded(&[]));
    (0..pages)
        .zip(content.chain(zeroes))
        .map(move |(page, content)| (gpa.saturating_add(page.saturating_mul(PAGE_SIZE)), content))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages_of(run: &PageRun<'_>) -> Vec<(u64, [u8; PAGE])> {
        let mut buffer = [0xee; PAGE];
        run.each_page().map(|(gpa, content)| (gpa, *content.bytes(&mut buffer))).collect()
    }

    fn run(pages: u64, bytes: &[u8]) -> PageRun<'_> {
        let content = Content { bytes, file_offset: None };
        PageRun { gpa: 0x10000, pages, kind: PageKind::Measured, content }
    }

    #[test]
    fn pages_ascend_and_end_in_zeroes() {
        let bytes: Vec<u8> = (0..2 * PAGE + 3).map(|index| (index % 251) as u8 + 1).collect();
        let pages = pages_of(&run(4, &bytes));
        let addresses: Vec<u64> = pages.iter().map(|page| page.0).collect();
        assert_eq!(addresses, [0x10000, 0x11000, 0x12000, 0x13000]);
        let mut padded = bytes.clone();
        padded.resize(4 * PAGE, 0);
        let content: Vec<u8> = pages.iter().flat_map(|page| page.1).collect();
        assert_eq!(content, padded);
    }

    #[test]
    fn whole_pages_are_not_copied() {
        let bytes = vec![7; 2 * PAGE];
        let run = run(2, &bytes);
        let contents: Vec<_> = run.each_page().map(|page| page.1).collect();
        assert!(matches!(contents[..], [PageContent::Whole(_), PageContent::Whole(_)]));
    }

    #[test]
    fn no_bytes_are_zeroes() {
        let run = run(2, &[]);
        assert_eq!(pages_of(&run), [(0x10000, [0; PAGE]), (0x11000, [0; PAGE])]);
        assert_eq!(run.length(), 8192);
    }
}
