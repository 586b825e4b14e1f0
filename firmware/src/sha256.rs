//! SHA-256 (FIPS 180-4): by the processor's SHA instructions where it has them, else
//! in portable code. Made to be small, as the first stage is measured page by page:
//! each variant is one loop that is not unrolled, and both share the table of constants.

#[cfg(target_arch = "x86_64")]
mod ni;
mod portable;

/// Bytes of a hash.
pub const SIZE: usize = 32;
/// Bytes that are compressed at a time.
pub const BLOCK: usize = 64;
/// Bytes of the message's length, at the end of the last block.
const LENGTH: usize = 8;

/// The initial hash value (5.3.3).
const INITIAL: [u32; 8] =
    [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];

/// What both variants read.
#[repr(C, align(16))]
struct Constants {
    /// The round constants (4.2.2).
    rounds: [u32; 64],
    /// Which byte of 16 goes where, so that big-endian words become the processor's own.
    byte_order: [u8; 16],
}

#[rustfmt::skip]
static K: Constants = Constants { rounds: [
    0x428a_2f98,
    0x7137_4491,
    0xb5c0_fbcf,
    0xe9b5_dba5,
    0x3956_c25b,
    0x59f1_11f1,
    0x923f_82a4,
    0xab1c_5ed5,
    0xd807_aa98,
    0x1283_5b01,
    0x2431_85be,
    0x550c_7dc3,
    0x72be_5d74,
    0x80de_b1fe,
    0x9bdc_06a7,
    0xc19b_f174,
    0xe49b_69c1,
    0xefbe_4786,
    0x0fc1_9dc6,
    0x240c_a1cc,
    0x2de9_2c6f,
    0x4a74_84aa,
    0x5cb0_a9dc,
    0x76f9_88da,
    0x983e_5152,
    0xa831_c66d,
    0xb003_27c8,
    0xbf59_7fc7,
    0xc6e0_0bf3,
    0xd5a7_9147,
    0x06ca_6351,
    0x1429_2967,
    0x27b7_0a85,
    0x2e1b_2138,
    0x4d2c_6dfc,
    0x5338_0d13,
    0x650a_7354,
    0x766a_0abb,
    0x81c2_c92e,
    0x9272_2c85,
    0xa2bf_e8a1,
    0xa81a_664b,
    0xc24b_8b70,
    0xc76c_51a3,
    0xd192_e819,
    0xd699_0624,
    0xf40e_3585,
    0x106a_a070,
    0x19a4_c116,
    0x1e37_6c08,
    0x2748_774c,
    0x34b0_bcb5,
    0x391c_0cb3,
    0x4ed8_aa4a,
    0x5b9c_ca4f,
    0x682e_6ff3,
    0x748f_82ee,
    0x78a5_636f,
    0x84c8_7814,
    0x8cc7_0208,
    0x90be_fffa,
    0xa450_6ceb,
    0xbef9_a3f7,
    0xc671_78f2,
], byte_order: [3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12] };

/// How to compress a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Ni,
}

impl Method {
    /// Without any special instruction.
    pub const PORTABLE: Self = Self(Kind::Portable);

    /// The fastest one for a processor with these values of CPUID leaf 1, ECX, and leaf 7.0, EBX.
    ///
    /// # Safety
    /// The values must be those of this processor, and SSE must be enabled (CR4.OSFXSR), as every operating system
    /// has it.
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    pub const unsafe fn for_processor(leaf_1_ecx: u32, leaf_7_ebx: u32) -> Self {
        const SSSE3: u32 = 1 << 9;
        const SSE4_1: u32 = 1 << 19;
        const SHA: u32 = 1 << 29;
        if leaf_1_ecx & (SSSE3 | SSE4_1) == SSSE3 | SSE4_1 && leaf_7_ebx & SHA != 0 {
            Self(Kind::Ni)
        } else {
            Self::PORTABLE
        }
    }

    /// The fastest one for the processor that this program runs on, under an operating system.
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    pub fn detect() -> Self {
        use core::arch::x86_64::{__cpuid, __cpuid_count};
        const EXTENDED_FEATURES: u32 = 7;
        let leaf_7_ebx =
            if __cpuid(0).eax < EXTENDED_FEATURES { 0 } else { __cpuid_count(EXTENDED_FEATURES, 0).ebx };
        // SAFETY: they are this processor's.
        unsafe { Self::for_processor(__cpuid(1).ecx, leaf_7_ebx) }
    }

    /// The fastest one for the processor that this program runs on, under an operating system.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn detect() -> Self {
        Self::PORTABLE
    }

    /// The hash of `message`.
    pub fn digest(self, message: &[u8]) -> [u8; SIZE] {
        let (blocks, rest) = message.as_chunks();
        let mut hash = self.begin();
        hash.blocks(blocks);
        hash.finish(rest)
    }

    /// The hash of a message that comes piece by piece.
    pub const fn begin(self) -> Hash {
        Hash { method: self, state: INITIAL, blocks: 0 }
    }

    fn compress(self, state: &mut [u32; 8], blocks: &[[u8; BLOCK]]) {
        match self.0 {
            Kind::Portable => portable::compress(state, blocks),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `for_processor` made this method for a processor that has the instructions.
            #[allow(unsafe_code)]
            Kind::Ni => unsafe { ni::compress(state, blocks) },
        }
    }
}

/// The hash of a message of which the beginning has been seen.
#[derive(Clone, Debug)]
pub struct Hash {
    method: Method,
    state: [u32; 8],
    /// How many blocks that was.
    blocks: u64,
}

impl Hash {
    /// The message goes on with these blocks.
    pub fn blocks(&mut self, blocks: &[[u8; BLOCK]]) {
        self.method.compress(&mut self.state, blocks);
        self.blocks = self.blocks.wrapping_add(blocks.len() as u64);
    }

    /// The message ends with these bytes, which are less than a block. (Of more, the rest would not count.)
    pub fn finish(mut self, rest: &[u8]) -> [u8; SIZE] {
        // Padding (5.1.1): a one, zeros, and the length in bits, in one block or two.
        let mut padded = [[0; BLOCK]; 2];
        for (to, from) in padded.as_flattened_mut().iter_mut().zip(rest.iter().chain(&[0x80])) {
            *to = *from;
        }
        let [first, second] = &mut padded;
        let one_block = rest.len() < BLOCK - LENGTH;
        let last = if one_block { &mut *first } else { &mut *second };
        if let Some(length) = last.last_chunk_mut::<LENGTH>() {
            let bytes = self.blocks.wrapping_mul(BLOCK as u64).wrapping_add(rest.len() as u64);
            *length = bytes.wrapping_mul(8).to_be_bytes();
        }
        self.method.compress(&mut self.state, core::slice::from_ref(first));
        if !one_block {
            self.method.compress(&mut self.state, core::slice::from_ref(second));
        }

        let mut hash = [0; SIZE];
        let (words, _) = hash.as_chunks_mut();
        for (to, word) in words.iter_mut().zip(self.state) {
            *to = word.to_be_bytes();
        }
        hash
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sha2::{Digest, Sha256};

    use super::*;

    fn hex(hash: [u8; SIZE]) -> String {
        hash.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn methods() -> [Method; 2] {
        [Method::PORTABLE, Method::detect()]
    }

    /// The examples of FIPS 180-4's companion pages, and the million times "a" of FIPS 180-2.
    #[test]
    fn published_vectors() {
        let million = vec![b'a'; 1_000_000];
        let vectors: [(&[u8], &str); 4] = [
            (b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
            (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
            (
                b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
                "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
            ),
            (&million, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
        ];
        for method in methods() {
            for (message, hash) in vectors {
                assert_eq!(hex(method.digest(message)), hash, "{method:?} of {} bytes", message.len());
            }
        }
    }

    #[test]
    fn every_length_of_the_last_block_is_padded_right() {
        let message: Vec<u8> = (0..=255).collect();
        for length in 0..=message.len() {
            let message = &message[..length];
            let expected: [u8; SIZE] = Sha256::digest(message).into();
            for method in methods() {
                assert_eq!(method.digest(message), expected, "{method:?} of {length} bytes");
            }
        }
    }

    /// Where the processor has the instructions, the tests run them: else only one method would be tested.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_instructions_are_used_where_there_are_some() {
        let has = std::is_x86_feature_detected!("sha") && std::is_x86_feature_detected!("sse4.1");
        assert_eq!(Method::detect() == Method::PORTABLE, !has);
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    fn all_of_the_instructions_are_asked_for() {
        let all = [1 << 9 | 1 << 19, 1 << 29];
        for (ecx, ebx) in [(all[0], 0), (1 << 9, all[1]), (1 << 19, all[1]), (0, 0)] {
            // SAFETY: nothing is computed by it.
            assert_eq!(unsafe { Method::for_processor(ecx, ebx) }, Method::PORTABLE);
        }
        // SAFETY: as above.
        assert_ne!(unsafe { Method::for_processor(all[0], all[1]) }, Method::PORTABLE);
    }

    proptest! {
        #[test]
        fn any_message_has_the_hash_of_another_implementation(message in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let expected: [u8; SIZE] = Sha256::digest(&message).into();
            for method in methods() {
                prop_assert_eq!(method.digest(&message), expected);
                let mut pieces = method.begin();
                let (blocks, rest) = message.as_chunks();
                blocks.iter().for_each(|block| pieces.blocks(&[*block]));
                prop_assert_eq!(pieces.finish(rest), expected);
            }
        }
    }
}
