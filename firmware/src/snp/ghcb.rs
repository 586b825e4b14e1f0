//! The page by which a domain asks the hypervisor (GHCB specification, table 3): where its fields are, and the bits of some in the
//! two words that say which are valid.

/// Field RAX.
pub const RAX: u64 = 0x1F8;
/// `SW_EXITCODE`.
pub const EXIT_CODE: u64 = 0x390;
/// `SW_EXITINFO1`.
pub const EXIT_INFO_1: u64 = 0x398;
/// `SW_EXITINFO2`.
pub const EXIT_INFO_2: u64 = 0x3A0;
/// `SW_SCRATCH`.
pub const SCRATCH: u64 = 0x3A8;
/// The lower half of the bitmap of valid fields.
pub const VALID_LOWER: u64 = 0x3F0;
/// Its upper half.
pub const VALID_UPPER: u64 = 0x3F8;
/// [`RAX`] in the lower half.
pub const RAX_VALID: u64 = 1 << (RAX / 8);
/// [`EXIT_CODE`] to [`SCRATCH`], which every exit here uses, in the upper half.
pub const EXIT_VALID: u64 = 0xF << (EXIT_CODE / 8 - 64);
/// The shared buffer.
pub const BUFFER: u64 = 0x800;
/// Version of the protocol in bits 16 to 31, and usage 0 (a page of this layout) in the upper half.
pub const VERSION_AND_USAGE: u64 = 0xFF8;
/// The version that is used, 2, there.
pub const VERSION: u64 = 2 << 16;
