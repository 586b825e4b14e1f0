//! The first stage as an image brings it: the program of `firmware/stage`, which `build.rs` has built.
//! The same compiler makes the same bytes of it on every machine.

use cofferdam_firmware::layout;

/// Its content, for [`layout::STAGE`]. What follows it up to [`MEMORY`] bytes is zero.
pub const BYTES: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/stage.bin"));
/// Guest-physical address of its first instruction.
pub const ENTRY: u64 = layout::STAGE;
/// Memory from [`layout::STAGE`] on that is its own while it runs, bytes: its content, then its variables and its
/// stack, which need no content.
pub const MEMORY: u64 = include!(concat!(env!("OUT_DIR"), "/stage-memory"));
/// The page for [`layout::TDX_RESET_PAGE`].
pub const TDX_RESET: &[u8; layout::PAGE_SIZE as usize] =
    include_bytes!(concat!(env!("OUT_DIR"), "/tdx-reset.bin"));

const _: () = assert!(BYTES.len() as u64 <= MEMORY && layout::STAGE + MEMORY <= layout::STAGE_END);

/// Part of `build.rs`, which cannot test itself.
#[cfg(test)]
#[path = "../build/stack.rs"]
mod stack;

#[cfg(test)]
mod tests {
    use super::*;

    /// The first instruction clears the interrupt flag; the last 16 bytes of TDX's page are its reset vector.
    #[test]
    fn it_begins_with_its_entry() {
        assert_eq!(BYTES[0], 0xFA);
        assert_ne!(TDX_RESET[0xFF0..], [0; 16]);
    }

    /// What differs between machines would be in it as text.
    #[test]
    fn it_holds_no_path() {
        let text: &[u8] = b".rs";
        assert!(!BYTES.windows(text.len()).any(|window| window == text));
    }
}
