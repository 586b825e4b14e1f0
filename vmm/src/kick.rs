//! Getting a vCPU thread out of `KVM_RUN`, for certain.
//!
//! A kick is a signal to the thread. Its handler sets `immediate_exit` in the
//! thread's own `kvm_run`, so that a signal that arrives just before
//! `KVM_RUN` ends that call too (Linux `Documentation/virt/kvm/api.rst`,
//! "immediate_exit"). Whoever kicks first changes what the thread is to do;
//! the thread clears the flag first and looks second. So no kick is lost.
#![allow(unsafe_code)] // a signal handler that writes through a pointer

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::io;
use std::marker::PhantomData;
use std::ptr::{addr_of_mut, null_mut};
use std::sync::atomic::{Ordering, compiler_fence};
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

thread_local! {
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(null_mut()) };
}

extern "C" fn on_kick(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: `Kickable` points this thread's cell at a live `kvm_run`, and clears it before that goes.
        unsafe { flag.write_volatile(1) };
    }
}

/// Installs the handler, and unblocks its signal on this thread and so on all that it starts: whoever started
/// the monitor may have blocked it. To be called before the first vCPU thread is started.
pub fn install() -> io::Result<()> {
    register_signal_handler(SIGRTMIN(), on_kick)?;
    unblock_signal(SIGRTMIN()).map_err(|error| io::Error::other(format!("{error:?}")))
}

/// Kicks the vCPU of `thread`.
pub fn kick<T>(thread: &JoinHandle<T>) {
    // It fails only for a thread that has ended, which needs no kick.
    let _ = thread.kill(SIGRTMIN());
}

/// A vCPU on its own thread, open to kicks as long as this lives.
pub struct Kickable {
    vcpu: VcpuFd,
    /// The cell that points at `vcpu` is the thread's: so is this.
    _not_send: PhantomData<*mut ()>,
}

impl Kickable {
    /// Takes kicks of this thread for `vcpu`.
    pub fn new(mut vcpu: VcpuFd) -> Self {
        IMMEDIATE_EXIT.set(addr_of_mut!(vcpu.get_kvm_run().immediate_exit));
        Self { vcpu, _not_send: PhantomData }
    }

    /// The vCPU. Its `kvm_run` is a mapping of its own: moving the `VcpuFd` does not move it.
    pub fn vcpu(&mut self) -> &mut VcpuFd {
        &mut self.vcpu
    }

    /// Forgets a kick that has been noticed. What the thread reads after this is not read before.
    pub fn clear(&mut self) {
        self.vcpu.set_kvm_immediate_exit(0);
        // The handler runs on this very thread, so it is enough that the compiler keeps the order.
        compiler_fence(Ordering::SeqCst);
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(null_mut());
    }
}
