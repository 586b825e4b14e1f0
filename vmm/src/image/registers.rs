//! The registers of vCPUs as an image gives them.

use cofferdam_confidential::digest::vmsa::{self, Vmsa};
use cofferdam_confidential::image::importer::{DescriptorTable, NativeContext, Segment};
use cofferdam_confidential::snp;
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use crate::arch::EntryState;

/// How the vCPUs of an image for plain machines begin: the first one at the processor's reset vector or as the image says, the
/// others as KVM resets them.
#[derive(Clone, Debug, Default)]
pub struct NativeVcpus(Option<Box<NativeContext>>);

impl NativeVcpus {
    /// Takes an image's registers for a vCPU, if it can have some and has none yet.
    pub(super) fn set(&mut self, index: u16, context: &NativeContext) -> bool {
        let takes = index == 0 && self.0.is_none();
        if takes {
            self.0 = Some(Box::new(*context));
        }
        takes
    }
}

impl EntryState for NativeVcpus {
    fn regs(&self, _index: u8) -> Option<kvm_regs> {
        self.0.as_deref().map(native_regs)
    }

    fn sregs(&self, _index: u8, base: kvm_sregs) -> kvm_sregs {
        self.0.as_deref().map_or(base, |context| native_sregs(context, base))
    }
}

/// A vCPU that begins with what the platform measures.
impl EntryState for Vmsa {
    fn is_set(&self, _index: u8) -> bool {
        true
    }

    fn regs(&self, _index: u8) -> Option<kvm_regs> {
        Some(snp::registers::regs(self))
    }

    fn sregs(&self, _index: u8, base: kvm_sregs) -> kvm_sregs {
        snp::registers::sregs(self, &base)
    }
}

fn native_regs(context: &NativeContext) -> kvm_regs {
    let NativeContext { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, rip, rflags, .. } = *context;
    let NativeContext { r8, r9, r10, r11, r12, r13, r14, r15, .. } = *context;
    kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

fn native_sregs(context: &NativeContext, base: kvm_sregs) -> kvm_sregs {
    let data = segment(&context.data);
    kvm_sregs {
        cs: segment(&context.code),
        ds: data,
        es: data,
        fs: data,
        gs: kvm_segment { base: context.gs_base, ..data },
        ss: data,
        gdt: table(&context.gdtr),
        idt: table(&context.idtr),
        cr0: context.cr0,
        cr3: context.cr3,
        cr4: context.cr4,
        efer: context.efer,
        ..base
    }
}

/// A descriptor has AVL, L, D/B and G in bits 12 to 15 of the attributes; a save area, right behind the access rights.
fn segment(segment: &Segment) -> kvm_segment {
    snp::registers::segment(vmsa::Segment {
        selector: segment.selector,
        attributes: segment.attributes & 0xff | segment.attributes >> 4 & 0xf00,
        limit: segment.limit,
        base: segment.base.into(),
    })
}

fn table(table: &DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: table.base, limit: table.limit, ..kvm_dtable::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_those_of_descriptors() {
        let code = segment(&Segment { selector: 0x10, attributes: 0xa09b, base: 7, limit: u32::MAX });
        assert_eq!((code.type_, code.s, code.dpl, code.present), (11, 1, 0, 1));
        assert_eq!((code.avl, code.l, code.db, code.g), (0, 1, 0, 1));
        assert_eq!((code.base, code.limit, code.selector), (7, u32::MAX, 0x10));
        let data = segment(&Segment { attributes: 0xc0f3, ..Segment::default() });
        assert_eq!((data.type_, data.dpl, data.l, data.db), (3, 3, 0, 1));
    }

    #[test]
    fn without_registers_a_vcpu_is_as_it_was_reset() {
        let mut vcpus = NativeVcpus::default();
        assert_eq!(vcpus.regs(0), None);
        let first = NativeContext { rip: 0x1_0000, gs_base: 5, ..NativeContext::default() };
        assert!(!vcpus.set(1, &first), "only the first one has some");
        assert!(vcpus.set(0, &first));
        assert!(!vcpus.set(0, &NativeContext::default()), "the first ones stay");
        assert_eq!(vcpus.regs(0), Some(kvm_regs { rip: 0x1_0000, ..kvm_regs::default() }));
        let base = kvm_sregs { apic_base: 0xfee0_0900, ..kvm_sregs::default() };
        let sregs = vcpus.sregs(0, base);
        assert_eq!((sregs.apic_base, sregs.gs.base, sregs.fs.base), (0xfee0_0900, 5, 0));
        assert!(vcpus.is_set(0) && !vcpus.is_set(1));
    }

    #[test]
    fn all_vcpus_of_an_snp_domain_are_set() {
        let reset = Vmsa::reset();
        assert!(reset.is_set(0) && reset.is_set(31));
        let regs = reset.regs(1).unwrap();
        assert_eq!((regs.rip, regs.rdx, regs.r9), (0xfff0, 0, 0));
        let base = kvm_sregs { cr4: 1, ..kvm_sregs::default() };
        assert_eq!((reset.sregs(1, base).cs.selector, reset.sregs(1, base).cr4), (0xf000, 0));
    }
}
