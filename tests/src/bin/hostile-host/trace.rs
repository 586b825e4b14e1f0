//! ptrace(2): threads that stop at some of their system calls, and calls that they are made to make.
#![allow(unsafe_code)] // ptrace, waitpid, a filter of system calls, and registers as the kernel has them

use std::fs::File;
use std::io;
use std::mem::{MaybeUninit, zeroed};
use std::os::unix::fs::FileExt;
use std::ptr::{from_mut, from_ref, null_mut};

use libc::{c_int, c_long, c_void, pid_t, user_regs_struct};

/// What traced threads stop at, their children too.
const OPTIONS: c_int = libc::PTRACE_O_TRACESECCOMP
    | libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACEEXEC
    | libc::PTRACE_O_EXITKILL;

/// The number of no system call: the kernel makes none.
const NO_CALL: u64 = u64::MAX;

fn result(value: c_long) -> io::Result<c_long> {
    if value == -1 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

/// Why a thread has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// At one of the calls of [`trace_ioctls`].
    Call,
    /// Because of [`Thread::interrupt`].
    Interrupt,
    /// For this signal, which it is yet to get.
    Signal(c_int),
    /// Like all threads of its process, until somebody lets them go on.
    Group,
    /// For something else.
    Other,
}

/// Waits until a traced thread stops, or ends; with `block` false, only looks for one.
///
/// # Errors
/// There is none any more.
pub fn wait(block: bool) -> io::Result<Option<(Thread, Option<Stop>)>> {
    let mut status = 0;
    let flags = if block { libc::__WALL } else { libc::__WALL | libc::WNOHANG };
    // SAFETY: the status is written to a number that is there.
    match unsafe { libc::waitpid(-1, &raw mut status, flags) } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        id => Ok(Some((Thread(id), stop(status)))),
    }
}

/// Of a thread's status; nothing if it has ended.
fn stop(status: c_int) -> Option<Stop> {
    if !libc::WIFSTOPPED(status) {
        return None;
    }
    let signal = libc::WSTOPSIG(status);
    Some(match (status >> 16, signal) {
        (libc::PTRACE_EVENT_SECCOMP, _) => Stop::Call,
        (libc::PTRACE_EVENT_STOP, libc::SIGTRAP) => Stop::Interrupt,
        (libc::PTRACE_EVENT_STOP, _) => Stop::Group,
        (0, signal) if signal & 0x80 == 0 => Stop::Signal(signal),
        _ => Stop::Other,
    })
}

/// A traced thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thread(pub pid_t);

impl Thread {
    /// Begins to trace it.
    pub fn seize(self) -> io::Result<()> {
        // SAFETY: the options are a number.
        result(unsafe { libc::ptrace(libc::PTRACE_SEIZE, self.0, 0, c_long::from(OPTIONS)) }).map(drop)
    }

    /// Lets it go on, with a signal unless that is 0.
    pub fn go_on(self, signal: c_int) -> io::Result<()> {
        // SAFETY: the signal is a number.
        result(unsafe { libc::ptrace(libc::PTRACE_CONT, self.0, 0, c_long::from(signal)) }).map(drop)
    }

    /// Leaves it stopped with its process.
    pub fn stay(self) -> io::Result<()> {
        // SAFETY: there are no arguments.
        result(unsafe { libc::ptrace(libc::PTRACE_LISTEN, self.0, 0, 0) }).map(drop)
    }

    /// Has it stop.
    pub fn interrupt(self) -> io::Result<()> {
        // SAFETY: there are no arguments.
        result(unsafe { libc::ptrace(libc::PTRACE_INTERRUPT, self.0, 0, 0) }).map(drop)
    }

    /// Its registers.
    pub fn registers(self) -> io::Result<user_regs_struct> {
        let mut registers = MaybeUninit::uninit();
        // SAFETY: the kernel fills all of them in.
        unsafe {
            result(libc::ptrace(libc::PTRACE_GETREGS, self.0, 0, registers.as_mut_ptr()))?;
            Ok(registers.assume_init())
        }
    }

    fn set_registers(self, registers: &user_regs_struct) -> io::Result<()> {
        // SAFETY: the kernel reads them.
        result(unsafe { libc::ptrace(libc::PTRACE_SETREGS, self.0, 0, from_ref(registers)) }).map(drop)
    }

    /// Has the call at which it has stopped not be made, and return 0, or fail with this errno.
    pub fn skip_call(self, errno: i32) -> io::Result<()> {
        let mut registers = self.registers()?;
        registers.orig_rax = NO_CALL;
        registers.rax = i64::from(-errno).cast_unsigned();
        self.set_registers(&registers)
    }

    /// Has it go on to the next beginning or end of a system call; signals come later.
    pub fn to_next_call_stop(self) -> io::Result<()> {
        let mut held = Vec::new();
        loop {
            // SAFETY: there are no arguments.
            result(unsafe { libc::ptrace(libc::PTRACE_SYSCALL, self.0, 0, 0) })?;
            let mut status = 0;
            // SAFETY: the status is written to a number that is there.
            result(c_long::from(unsafe { libc::waitpid(self.0, &raw mut status, libc::__WALL) }))?;
            match stop(status) {
                None => return Err(io::Error::other("the thread has ended")),
                Some(Stop::Signal(signal)) => held.push(signal),
                Some(Stop::Other) if libc::WSTOPSIG(status) == libc::SIGTRAP | 0x80 => break,
                Some(_) => {}
            }
        }
        for signal in held {
            // SAFETY: signals of its own that come once more.
            unsafe { libc::syscall(libc::SYS_tgkill, self.process()?, self.0, signal) };
        }
        Ok(())
    }

    /// Has it make a system call by the instruction at `site`, whatever its seccomp policy says, and returns what that
    /// gave. It is at the end of a call, or was interrupted, and is as it was afterwards.
    pub fn call(self, site: u64, number: c_long, arguments: [u64; 3]) -> io::Result<u64> {
        let before = self.registers()?;
        self.set_options(OPTIONS | libc::PTRACE_O_SUSPEND_SECCOMP)?;
        let [rdi, rsi, rdx] = arguments;
        let number = number.cast_unsigned();
        self.set_registers(&user_regs_struct {
            rip: site,
            rax: number,
            orig_rax: NO_CALL,
            rdi,
            rsi,
            rdx,
            ..before
        })?;
        self.to_next_call_stop()?;
        self.to_next_call_stop()?;
        let value = self.registers()?.rax.cast_signed();
        self.set_registers(&before)?;
        self.set_options(OPTIONS)?;
        if (-4095..0).contains(&value) {
            // Fits.
            return Err(io::Error::from_raw_os_error(-value as i32));
        }
        Ok(value.cast_unsigned())
    }

    fn set_options(self, options: c_int) -> io::Result<()> {
        // SAFETY: the options are a number.
        result(unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, self.0, 0, c_long::from(options)) }).map(drop)
    }

    /// Its process.
    pub fn process(self) -> io::Result<pid_t> {
        let status = self.text("status")?;
        let id = status.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok());
        id.ok_or_else(|| io::Error::other("no Tgid in /proc"))
    }

    /// Its name.
    pub fn name(self) -> io::Result<String> {
        Ok(self.text("comm")?.trim().to_owned())
    }

    /// A file of /proc about it.
    pub fn text(self, name: &str) -> io::Result<String> {
        std::fs::read_to_string(format!("/proc/{}/{name}", self.0))
    }

    /// Reads its memory.
    pub fn read<T: Plain>(self, address: u64) -> io::Result<T> {
        let memory = File::open(format!("/proc/{}/mem", self.0))?;
        // SAFETY: all bytes are zero, which `Plain` allows.
        let mut value: T = unsafe { zeroed() };
        // SAFETY: the bytes of a value that allows any.
        let bytes = unsafe { std::slice::from_raw_parts_mut(from_mut(&mut value).cast(), size_of::<T>()) };
        memory.read_exact_at(bytes, address)?;
        Ok(value)
    }

    /// Writes its memory.
    pub fn write<T: Plain>(self, address: u64, value: &T) -> io::Result<()> {
        let memory = File::options().write(true).open(format!("/proc/{}/mem", self.0))?;
        // SAFETY: the bytes of a value without padding.
        let bytes = unsafe { std::slice::from_raw_parts(from_ref(value).cast(), size_of::<T>()) };
        memory.write_all_at(bytes, address)
    }
}

/// Structures of the kernel that may be of any bytes, and have no padding.
///
/// # Safety
/// It is so.
pub unsafe trait Plain: Copy {}
// SAFETY: arrays of numbers.
unsafe impl<const N: usize> Plain for [u64; N] {}
// SAFETY: as above.
unsafe impl<const N: usize> Plain for [u32; N] {}

/// Has this process, and whatever it starts, stop for its tracer at ioctls with these requests.
pub fn trace_ioctls(requests: &[u32]) -> io::Result<()> {
    // Offsets in `struct seccomp_data`.
    const NUMBER: u32 = 0;
    const SECOND_ARGUMENT: u32 = 24;
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const JUMP: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    let line = |code: u32, k, jt, jf| libc::sock_filter { code: code as u16, jt, jf, k };
    let count = requests.len() as u8;
    let mut program = vec![
        line(LOAD, NUMBER, 0, 0),
        line(JUMP, libc::SYS_ioctl as u32, 0, count + 1),
        line(LOAD, SECOND_ARGUMENT, 0, 0),
    ];
    let jumps = (0..).zip(requests).map(|(index, request)| line(JUMP, *request, count - index, 0));
    program.extend(jumps);
    program.push(line(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0));
    program.push(line(RETURN, libc::SECCOMP_RET_TRACE, 0, 0));
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the filter is as long as it says; root needs no PR_SET_NO_NEW_PRIVS.
    let set =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const filter) };
    result(set).map(drop)
}

/// Makes a child that is nobody's, and returns true in it.
pub fn split_off() -> io::Result<bool> {
    // SAFETY: this program has one thread.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // SAFETY: as above; the first child is gone at once, so that nobody waits for the second.
            match unsafe { libc::fork() } {
                0 => Ok(true),
                // SAFETY: nothing of this process has to be undone.
                _ => unsafe { libc::_exit(0) },
            }
        }
        child => {
            // SAFETY: nobody wants to know its status.
            unsafe { libc::waitpid(child, null_mut::<c_void>().cast(), 0) };
            Ok(false)
        }
    }
}
