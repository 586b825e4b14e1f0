//! The end of a monitor one of whose threads made a forbidden system call.
//!
//! The kernel does not make the call, and has the thread run the handler here instead (`SECCOMP_RET_TRAP`, a
//! `SIGSYS`). It writes one line to standard error, and to the log if that goes elsewhere, and ends the process with
//! [`EXIT_CODE`]. Where it cannot be run, as in a thread that blocks the signal, the kernel kills the process.
//!
//! The handler may interrupt anything, so it takes no lock, allocates nothing and makes only calls that every
//! policy allows: `ppoll`, `write`, `exit_group`. For the same reason it finds the log's descriptor in a static.
#![allow(unsafe_code)] // a signal handler

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::fmt::{self, Write};
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicI32, Ordering};

use syscalls::Sysno;
use vmm_sys_util::signal::register_signal_handler;

use super::{SeccompError, Thread};

/// Exit status of a monitor that made a forbidden system call: Firecracker's.
pub const EXIT_CODE: c_int = 148;

/// `si_code` of a signal that seccomp sends (Linux `include/uapi/asm-generic/siginfo.h`).
const SYS_SECCOMP: c_int = 1;

thread_local! {
    static THREAD: Cell<Option<Thread>> = const { Cell::new(None) };
}

/// Descriptors of the log, by its format; negative where there is none beside standard error.
static TEXT_LOG: AtomicI32 = AtomicI32::new(-1);
static JSON_LOG: AtomicI32 = AtomicI32::new(-1);

/// What a `siginfo_t` holds for `SIGSYS` (Linux `include/uapi/asm-generic/siginfo.h`), on 64-bit machines.
#[repr(C)]
struct SigSys {
    signal: c_int,
    errno: c_int,
    code: c_int,
    _padding: c_int,
    call_address: *mut c_void,
    system_call: c_int,
    architecture: u32,
}

/// Installs the handler, for all threads. To be called before the first policy is installed.
pub fn install() -> Result<(), SeccompError> {
    register_signal_handler(libc::SIGSYS, on_violation)
        .map_err(|error| SeccompError::Handler(io::Error::from_raw_os_error(error.errno())))
}

/// Says where the log goes, so that a violation is told there too. Of JSON the line is an object.
pub fn set_log(descriptor: RawFd, is_json: bool) {
    TEXT_LOG.store(if is_json { -1 } else { descriptor }, Ordering::Relaxed);
    JSON_LOG.store(if is_json { descriptor } else { -1 }, Ordering::Relaxed);
}

/// Says which thread the calling one is.
pub(super) fn set_thread(thread: Thread) {
    THREAD.set(Some(thread));
}

extern "C" fn on_violation(_: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the handler is installed with SA_SIGINFO, so the kernel passes both, and for this signal the
    // information is of this form.
    let (info, context) = unsafe { (&*info.cast::<SigSys>(), &*context.cast::<libc::ucontext_t>()) };
    let mut message = Line::default();
    // It fails only when the line is full, and then says enough.
    let _ = describe(&mut message, info, context);
    let text = message.between("", "\n");
    report(libc::STDERR_FILENO, &text);
    report(TEXT_LOG.load(Ordering::Relaxed), &text);
    // Nothing in the message would have to be escaped.
    report(JSON_LOG.load(Ordering::Relaxed), &message.between(r#"{"level":"ERROR","message":""#, "\"}\n"));
    // SAFETY: it ends the process, and runs nothing of it.
    unsafe { libc::_exit(EXIT_CODE) }
}

fn describe(line: &mut Line, info: &SigSys, context: &libc::ucontext_t) -> fmt::Result {
    if info.code != SYS_SECCOMP {
        return line.write_str("cofferdam-vmm: ended by a SIGSYS that is not seccomp's");
    }
    line.write_str("cofferdam-vmm: thread ")?;
    match THREAD.get() {
        Some(thread) => write!(line, "{thread}")?,
        None => line.write_str("unknown")?,
    }
    line.write_str(" made a system call that its seccomp policy forbids: ")?;
    match usize::try_from(info.system_call).ok().and_then(Sysno::new) {
        Some(name) => line.write_str(name.name())?,
        None => write!(line, "number {}", info.system_call)?,
    }
    // The order of arguments (x86-64 psABI, A.2.1).
    let order = [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX, libc::REG_R10, libc::REG_R8, libc::REG_R9];
    let registers = &context.uc_mcontext.gregs;
    let mut separator = '(';
    for register in order {
        let value = usize::try_from(register).ok().and_then(|register| registers.get(register));
        write!(line, "{separator}{:#x}", value.copied().unwrap_or_default())?;
        separator = ',';
    }
    line.write_char(')')
}

/// Writes the line to `descriptor`, if that is one, unless nobody reads there and it would wait.
fn report(descriptor: RawFd, line: &Line) {
    // Of a negative one there is nothing to be told.
    let mut descriptor = libc::pollfd { fd: descriptor, events: libc::POLLOUT, revents: 0 };
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: it is told of one descriptor, and there is one.
    let ready = unsafe { libc::ppoll(&raw mut descriptor, 1, &raw const now, std::ptr::null()) };
    if ready == 1 && descriptor.revents & libc::POLLOUT != 0 {
        // SAFETY: these bytes of the line are written.
        unsafe { libc::write(descriptor.fd, line.bytes.as_ptr().cast(), line.length) };
    }
}

/// A line without memory of its own. What does not fit is cut off.
struct Line {
    bytes: [u8; 320],
    length: usize,
}

impl Line {
    /// This one, `before` and `after`.
    fn between(&self, before: &str, after: &str) -> Self {
        let mut line = Self::default();
        let own = self.bytes.iter().take(self.length);
        for (to, from) in
            line.bytes.iter_mut().zip(before.as_bytes().iter().chain(own).chain(after.as_bytes()))
        {
            *to = *from;
            line.length = line.length.saturating_add(1);
        }
        line
    }
}

impl Default for Line {
    fn default() -> Self {
        Self { bytes: [0; 320], length: 0 }
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            *self.bytes.get_mut(self.length).ok_or(fmt::Error)? = byte;
            self.length = self.length.saturating_add(1);
        }
        Ok(())
    }
}
