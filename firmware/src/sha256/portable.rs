//! The compression function in portable code (FIPS 180-4, 6.2.2).

use super::{BLOCK, K};

/// Compresses `blocks` into `state`.
pub(super) fn compress(state: &mut [u32; 8], blocks: &[[u8; BLOCK]]) {
    for block in blocks {
        let mut window = [0; 16];
        let (words, _) = block.as_chunks();
        for (word, bytes) in window.iter_mut().zip(words) {
            *word = u32::from_be_bytes(*bytes);
        }
        compress_block(state, window);
    }
}

/// The 16 words of `window` move on along the message schedule, a word each round.
fn compress_block(state: &mut [u32; 8], mut window: [u32; 16]) {
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
    for (round, constant) in K.rounds.iter().enumerate() {
        let word = window[round % 16];
        let sum_1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let choice = (e & f) ^ (!e & g);
        let first = h.wrapping_add(sum_1).wrapping_add(choice).wrapping_add(*constant).wrapping_add(word);
        let sum_0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
        let majority = (a & b) ^ (a & c) ^ (b & c);
        let second = sum_0.wrapping_add(majority);
        (h, g, f, e) = (g, f, e, d.wrapping_add(first));
        (d, c, b, a) = (c, b, a, first.wrapping_add(second));

        let (low, high) = (window[(round + 1) % 16], window[(round + 14) % 16]);
        let sigma_0 = low.rotate_right(7) ^ low.rotate_right(18) ^ low >> 3;
        let sigma_1 = high.rotate_right(17) ^ high.rotate_right(19) ^ high >> 10;
        window[round % 16] =
            word.wrapping_add(sigma_0).wrapping_add(window[(round + 9) % 16]).wrapping_add(sigma_1);
    }
    for (word, change) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
        *word = word.wrapping_add(change);
    }
}
