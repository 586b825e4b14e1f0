//! Requests of guests for attestation reports with the certificates of whoever signs them.

use std::sync::{Arc, Mutex, PoisonError};

use cofferdam_confidential::private_memory::PrivateMemory;
use cofferdam_confidential::snp::certificates::{Certificates, LockedCertificates};
use cofferdam_firmware::layout::PAGE_SIZE;
use kvm_ioctls::VcpuFd;
use tracing::warn;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::exit::{self, CertificateRequest};

/// What KVM takes for an answer: the report is made; the buffer is too small; ask again later; it failed.
const DONE: u64 = 0;
const TOO_SMALL: u64 = libc::ENOSPC as u64;
const BUSY: u64 = libc::EAGAIN as u64;
const FAILED: u64 = libc::EIO as u64;

/// What answers such requests.
pub struct CertificateRequests {
    memory: Arc<GuestMemoryMmap>,
    private: Arc<PrivateMemory>,
    /// One vCPU at a time: their lock on the file is one.
    state: Mutex<State>,
}

struct State {
    certificates: Certificates,
    /// Whether the last request failed. A guest may ask any number of times, and the log has one line of them.
    failed: bool,
}

impl CertificateRequests {
    /// For a guest with this memory.
    pub fn new(
        certificates: Certificates,
        memory: Arc<GuestMemoryMmap>,
        private: Arc<PrivateMemory>,
    ) -> Self {
        Self { memory, private, state: Mutex::new(State { certificates, failed: false }) }
    }

    /// Answers the request that `vcpu` exited with. KVM sends it to the firmware before it answers the guest, and does not go on
    /// with the guest then: the certificates stay as they are until there is a report that they vouch for. A kick may be
    /// taken for the end of that, so the vCPU has to look at the gate next.
    ///
    /// # Errors
    /// The vCPU cannot go on.
    pub fn serve(&self, vcpu: &mut VcpuFd) -> Result<(), String> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { certificates, failed } = &mut *state;
        let Some(request) = exit::certificate_request(vcpu) else { return Ok(()) };
        let (locked, trouble) = match certificates.lock() {
            Ok(Some(locked)) => {
                let trouble = self.answer(request, &locked).err();
                (Some(locked), trouble)
            }
            Ok(None) => {
                request.result = BUSY;
                (None, None)
            }
            Err(error) => {
                request.result = FAILED;
                (None, Some(error.to_string()))
            }
        };
        if let (Some(trouble), false) = (&trouble, *failed) {
            warn!("the guest gets no certificates with its report: {trouble}");
        }
        *failed = trouble.is_some();
        vcpu.set_kvm_immediate_exit(1);
        let done = match vcpu.run() {
            Err(error) if error.errno() == libc::EINTR => Ok(()),
            Err(error) => Err(format!("KVM_RUN after a request for certificates: {error}")),
            Ok(exit) => Err(format!("KVM_RUN after a request for certificates: unexpected exit {exit:?}")),
        };
        drop(locked);
        done
    }

    /// The error is what the log says.
    fn answer(
        &self,
        request: &mut CertificateRequest,
        locked: &LockedCertificates<'_>,
    ) -> Result<(), String> {
        let CertificateRequest { gpa, pages, .. } = *request;
        let table = locked.table;
        let length = table.len() as u64;
        if length > pages.saturating_mul(PAGE_SIZE) {
            request.pages = length.div_ceil(PAGE_SIZE);
            request.result = TOO_SMALL;
            return Ok(());
        }
        request.result = FAILED;
        if !self.private.is_shared(gpa, length) {
            return Err(format!(
                "the {length:#x} bytes at {gpa:#x} that it names are not memory that it shares"
            ));
        }
        self.memory.write_slice(table, GuestAddress(gpa)).map_err(|error| format!("{gpa:#x}: {error}"))?;
        request.result = DONE;
        Ok(())
    }
}
