//! The confidential-computing blob, by which a kernel finds the secrets page and the CPUID page (Linux: `struct cc_blob_sev_info` in
//! arch/x86/include/asm/sev.h), and the `setup_data` node that leads to it (`struct cc_setup_data`).

use crate::bytes::Bytes;
use crate::layout::{PAGE_SIZE, SNP_CC_BLOB, SNP_CPUID, SNP_SECRETS};

const MAGIC: u32 = 0x4544_4d41;
const VERSION: u16 = 1;
/// `SETUP_CC_BLOB`.
const NODE_TYPE: u32 = 7;

/// The blob, for [`SNP_CC_BLOB`].
pub static BLOB: [u8; 40] = Bytes::new()
    .u32(MAGIC)
    .u16(VERSION)
    .zeros_to(8)
    .u64(SNP_SECRETS)
    .u64(PAGE_SIZE)
    .u64(SNP_CPUID)
    .u64(PAGE_SIZE)
    .array();

/// The node, for [`SNP_CC_NODE`](crate::layout::SNP_CC_NODE): the last one, its type, and the 4 bytes of the blob's address.
pub static NODE: [u8; 20] = Bytes::new().u64(0).u32(NODE_TYPE).u32(4).u32(SNP_CC_BLOB as u32).array();

#[cfg(test)]
mod tests {
    use super::*;

    fn words(bytes: &[u8]) -> Vec<u32> {
        bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
    }

    #[test]
    fn blob_and_node_are_linux_s() {
        assert_eq!(words(&BLOB), [0x4544_4d41, 1, 0x9_2000, 0, 4096, 0, 0x9_3000, 0, 4096, 0]);
        assert_eq!(words(&NODE), [0, 0, 7, 4, 0x9_1000]);
    }
}
