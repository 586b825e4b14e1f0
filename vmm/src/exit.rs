//! What an exit says beyond its name: the parts of `kvm_run` that kvm-ioctls does not hand out.
#![allow(unsafe_code)] // the union of exits

use cofferdam_devices::bus::Bus;
use kvm_bindings::{
    KVM_EXIT_HYPERCALL, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO, KVM_EXIT_IO_OUT,
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SEV_TERM, KVM_SYSTEM_EVENT_SHUTDOWN, KVM_SYSTEM_EVENT_SUSPEND, KVM_SYSTEM_EVENT_WAKEUP,
};
use kvm_ioctls::VcpuFd;

/// Serves the port access that `vcpu` exited with. A string instruction is as many accesses to one port as it
/// has elements, each no wider than the processor makes it.
pub fn serve_ports(vcpu: &mut VcpuFd, ports: &Bus) {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_IO {
        return;
    }
    // SAFETY: KVM filled this part in with the exit reason.
    let io = unsafe { run.__bindgen_anon_1.io };
    let Ok(offset) = usize::try_from(io.data_offset) else { return };
    let size = usize::from(io.size).max(1);
    let length = size.saturating_mul(io.count as usize);
    // SAFETY: KVM put the data there, in a page of its own behind `kvm_run` in the same mapping.
    let data =
        unsafe { std::slice::from_raw_parts_mut(std::ptr::from_mut(run).cast::<u8>().add(offset), length) };
    for element in data.chunks_exact_mut(size) {
        if u32::from(io.direction) == KVM_EXIT_IO_OUT {
            ports.write(u64::from(io.port), element);
        } else {
            ports.read(u64::from(io.port), element);
        }
    }
}

/// Answers the hypercall that `vcpu` exited with.
pub fn set_hypercall_result(vcpu: &mut VcpuFd, result: u64) {
    let run = vcpu.get_kvm_run();
    if run.exit_reason == KVM_EXIT_HYPERCALL {
        // The part of the union that belongs to the exit reason.
        run.__bindgen_anon_1.hypercall.ret = result;
    }
}

/// What [`set_hypercall_result`] has set.
#[cfg(test)]
pub fn hypercall_result(vcpu: &mut VcpuFd) -> u64 {
    // SAFETY: any bytes are a number.
    unsafe { vcpu.get_kvm_run().__bindgen_anon_1.hypercall.ret }
}

/// The part of `kvm_run` of `KVM_EXIT_SNP_REQ_CERTS` (Linux `Documentation/virt/kvm/api.rst`).
#[derive(Clone, Copy)]
#[repr(C)]
pub struct CertificateRequest {
    /// Guest-physical address of what the guest has set aside for certificates.
    pub gpa: u64,
    /// Number of 4 KiB pages of it; for an answer, what it takes.
    pub pages: u64,
    /// Errno of the answer.
    pub result: u64,
}

/// Number of the exit.
pub const KVM_EXIT_SNP_REQ_CERTS: u32 = 43;

/// What the guest of `vcpu`, which exited with [`KVM_EXIT_SNP_REQ_CERTS`], asks for.
pub fn certificate_request(vcpu: &mut VcpuFd) -> Option<&mut CertificateRequest> {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_SNP_REQ_CERTS {
        return None;
    }
    let union: *mut CertificateRequest = (&raw mut run.__bindgen_anon_1).cast();
    // SAFETY: KVM filled this part in with the exit reason; it is smaller than the union, which is aligned for any number.
    Some(unsafe { &mut *union })
}

/// What KVM says of an internal error, and where the guest is.
pub fn internal_error(vcpu: &mut VcpuFd) -> String {
    let place = match vcpu.get_regs() {
        Ok(regs) => format!("at RIP {:#x}", regs.rip),
        Err(error) => format!("registers unknown: {error}"),
    };
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_INTERNAL_ERROR {
        return place;
    }
    // SAFETY: KVM filled this part in with the exit reason.
    let error = unsafe { run.__bindgen_anon_1.internal };
    let data = error.data.get(..error.ndata as usize).unwrap_or(&error.data);
    let name = match error.suberror {
        KVM_INTERNAL_ERROR_EMULATION => return emulation_failure(data, &place),
        KVM_INTERNAL_ERROR_SIMUL_EX => "an exception while another one was delivered",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit while an event was delivered",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "an exit that it does not know",
        _ => "unknown",
    };
    let data: String = data.iter().map(|word| format!(" {word:#x}")).collect();
    format!("KVM internal error {} ({name}) {place}, data{data}", error.suberror)
}

/// `data` begins with flags, then (of `KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES`) a byte with the
/// number of instruction bytes and 15 of them.
fn emulation_failure(data: &[u64], place: &str) -> String {
    let mut message = format!("KVM cannot emulate the instruction {place}");
    if let [flags, first, second, ..] = data
        && flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0
    {
        let bytes = [first.to_le_bytes(), second.to_le_bytes()].concat();
        if let Some((length, bytes)) = bytes.split_first() {
            let bytes = bytes.get(..usize::from(*length)).unwrap_or(bytes);
            message.push_str(": bytes");
            bytes.iter().for_each(|byte| message.push_str(&format!(" {byte:02x}")));
        }
    }
    message
}

/// Name of a type of system event.
pub fn system_event(kind: u32) -> &'static str {
    match kind {
        KVM_SYSTEM_EVENT_SHUTDOWN => "shutdown",
        KVM_SYSTEM_EVENT_RESET => "reset",
        KVM_SYSTEM_EVENT_CRASH => "crash",
        KVM_SYSTEM_EVENT_WAKEUP => "wake-up",
        KVM_SYSTEM_EVENT_SUSPEND => "suspend",
        KVM_SYSTEM_EVENT_SEV_TERM => "SEV termination",
        _ => "unknown",
    }
}
