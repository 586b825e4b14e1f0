//! The monitor's ports: what init has reached, the container's exit status, and the user-space mark.
//!
//! The kernel hands the right to use a port on to children, and through `execve`. So a thread has it only for as long as
//! it writes, and what the container's process is forked from never has it.
#![allow(unsafe_code)] // ports

use cofferdam_container_protocol::step::Report;
use rustix::io::Errno;

/// First port, and how many there are: `cofferdam_firmware::layout` of the monitor has them.
const FIRST: u16 = 0x620;
const COUNT: u16 = 8;
const EXIT_CODE: u16 = 0x620;
const USER_SPACE: u16 = 0x621;
const STEP: u16 = 0x624;

/// Tells the monitor what init has reached.
pub fn report(report: Report) {
    write(|| {
        // SAFETY: the ports are this thread's by now, and their device touches no memory of the guest.
        unsafe {
            std::arch::asm!("out dx, eax", in("dx") STEP, in("eax") report.number(), options(nomem, nostack, preserves_flags));
        }
    });
}

/// Tells the monitor the exit status that counts once the domain powers off.
pub fn exit_code(code: u8) {
    byte(EXIT_CODE, code);
}

/// Tells the monitor that the container's process runs.
pub fn user_space() {
    byte(USER_SPACE, 1);
}

fn byte(port: u16, value: u8) {
    write(|| {
        // SAFETY: as above.
        unsafe {
            std::arch::asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags));
        }
    });
}

/// Without the ports, which another monitor may not have either, nobody is told anything, and all else goes on.
fn write(out: impl FnOnce()) {
    if allow(true).is_ok() {
        out();
        // Taking away what is there cannot fail.
        let _ = allow(false);
    }
}

fn allow(allowed: bool) -> Result<(), Errno> {
    // SAFETY: no pointer is passed.
    let result = unsafe { libc::ioperm(FIRST.into(), COUNT.into(), allowed.into()) };
    if result == 0 { Ok(()) } else { Err(Errno::INVAL) }
}
