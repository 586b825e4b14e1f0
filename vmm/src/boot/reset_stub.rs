//! The reset stub. A kernel that knows no better way to reboot jumps to `ffff:0000` in
//! real mode, where a BIOS would take over. Here it finds these instructions.

use cofferdam_firmware::layout::{RESET_PORT, RESET_VALUE};

/// The code for [`RESET_STUB`](cofferdam_firmware::layout::RESET_STUB): it writes
/// [`RESET_VALUE`] to [`RESET_PORT`] and, if that returns, halts for ever.
pub(super) const fn reset_stub() -> [u8; 16] {
    let [port_low, port_high] = RESET_PORT.to_le_bytes();
    [
        0xba,
        port_low,
        port_high, // mov dx, RESET_PORT
        0xb0,
        RESET_VALUE, // mov al, RESET_VALUE
        0xee,        // out dx, al
        0xfa,        // cli
        0xf4,        // hlt
        0xeb,
        0xfd, // jmp to the hlt
        0,
        0,
        0,
        0,
        0,
        0,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jump_goes_back_to_the_halt() {
        let stub = reset_stub();
        let jump = stub.iter().position(|&byte| byte == 0xeb).unwrap();
        let target = (jump + 2).checked_add_signed(isize::from(stub[jump + 1] as i8)).unwrap();
        assert_eq!(stub[target], 0xf4);
    }
}
