//! The reset stub. A kernel that knows no better way to reboot jumps to `ffff:0000` in
//! real mode, where a BIOS would take over. Here it finds these instructions.

use crate::layout::{RESET_PORT, RESET_VALUE};

const PORT: [u8; 2] = RESET_PORT.to_le_bytes();

/// The code for [`RESET_STUB`](crate::layout::RESET_STUB): it writes [`RESET_VALUE`] to [`RESET_PORT`] and, if that
/// returns, halts for ever.
pub const CODE: [u8; 10] = [
    0xba,
    PORT[0],
    PORT[1], // mov dx, RESET_PORT
    0xb0,
    RESET_VALUE, // mov al, RESET_VALUE
    0xee,        // out dx, al
    0xfa,        // cli
    0xf4,        // hlt
    0xeb,
    0xfd, // jmp to the hlt
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jump_goes_back_to_the_halt() {
        let jump = CODE.iter().position(|&byte| byte == 0xeb).unwrap();
        let target = (jump + 2).checked_add_signed(isize::from(CODE[jump + 1] as i8)).unwrap();
        assert_eq!(CODE[target], 0xf4);
    }
}
