//! The compression function by the SHA instructions (Intel SDM, volume 2, SHA256RNDS2 and its neighbours).
//!
//! In assembly, as the first stage is compiled for a target without vector registers.
#![allow(unsafe_code)] // assembly

use core::arch::naked_asm;

use super::{BLOCK, Constants, K};

/// Compresses `blocks` into `state`.
///
/// # Safety
/// The processor has SHA, SSSE3 and SSE4.1, and SSE is enabled.
pub(super) unsafe fn compress(state: &mut [u32; 8], blocks: &[[u8; BLOCK]]) {
    // SAFETY: the caller vouches for the processor; the rest is as the function wants it.
    unsafe { compress_blocks(state, blocks.as_ptr(), blocks.len(), &K) }
}

/// Compresses the `count` blocks at `blocks` into `state`.
///
/// The instructions want the state as (A, B, E, F) in xmm1 and (C, D, G, H) in xmm2, the first named in the highest
/// word. Each turn of the inner loop is four rounds. xmm3 to xmm6 hold 16 words of the message schedule; the four that
/// a turn makes are those of four turns later. The last four turns make some that nobody needs, which costs less than
/// code that does not.
#[unsafe(naked)]
unsafe extern "sysv64" fn compress_blocks(
    state: &mut [u32; 8],
    blocks: *const [u8; BLOCK],
    count: usize,
    constants: &Constants,
) {
    naked_asm!(
        "test rdx, rdx",
        "jz 4f",
        "movdqa xmm8, [rcx + 256]", // byte order of the message
        "movdqu xmm0, [rdi]",
        "movdqu xmm2, [rdi + 16]",
        "pshufd xmm0, xmm0, 0xb1", // C, D, A, B
        "pshufd xmm2, xmm2, 0x1b", // E, F, G, H
        "movdqa xmm1, xmm0",
        "palignr xmm1, xmm2, 8",    // A, B, E, F
        "pblendw xmm2, xmm0, 0xf0", // C, D, G, H
        "2:",
        "movdqa xmm9, xmm1",
        "movdqa xmm10, xmm2",
        "movdqu xmm3, [rsi]",
        "movdqu xmm4, [rsi + 16]",
        "movdqu xmm5, [rsi + 32]",
        "movdqu xmm6, [rsi + 48]",
        "pshufb xmm3, xmm8",
        "pshufb xmm4, xmm8",
        "pshufb xmm5, xmm8",
        "pshufb xmm6, xmm8",
        "xor eax, eax",
        "3:",
        "movdqa xmm0, [rcx + rax]",
        "paddd xmm0, xmm3",
        "sha256rnds2 xmm2, xmm1",
        "pshufd xmm0, xmm0, 0x0e",
        "sha256rnds2 xmm1, xmm2",
        "sha256msg1 xmm3, xmm4",
        "movdqa xmm7, xmm6",
        "palignr xmm7, xmm5, 4",
        "paddd xmm3, xmm7",
        "sha256msg2 xmm3, xmm6",
        "movdqa xmm7, xmm3",
        "movdqa xmm3, xmm4",
        "movdqa xmm4, xmm5",
        "movdqa xmm5, xmm6",
        "movdqa xmm6, xmm7",
        "add eax, 16",
        "cmp eax, 256",
        "jb 3b",
        "paddd xmm1, xmm9",
        "paddd xmm2, xmm10",
        "add rsi, 64",
        "dec rdx",
        "jnz 2b",
        "pshufd xmm1, xmm1, 0x1b", // F, E, B, A
        "pshufd xmm2, xmm2, 0xb1", // D, C, H, G
        "movdqa xmm0, xmm1",
        "pblendw xmm1, xmm2, 0xf0", // D, C, B, A
        "palignr xmm2, xmm0, 8",    // H, G, F, E
        "movdqu [rdi], xmm1",
        "movdqu [rdi + 16], xmm2",
        "4:",
        "ret",
    )
}
