//! Registers of a vCPU as KVM takes them, from the save area that the image has for it.
//!
//! Every register that KVM lets us set is set, so that nothing of the host's gets into what is measured.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use crate::digest::vmsa::{Segment, Vmsa};

/// EFER.SVME and CR4.MCE, which KVM adds to what a guest has, and does not take from us.
const EFER_SVME: u64 = 1 << 12;
const CR4_MCE: u64 = 1 << 6;

/// The general registers.
pub fn regs(vmsa: &Vmsa) -> kvm_regs {
    let Vmsa { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, rip, rflags, .. } = *vmsa;
    let Vmsa { r8, r9, r10, r11, r12, r13, r14, r15, .. } = *vmsa;
    kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

/// The system registers; what a save area does not have is that of `base`.
pub fn sregs(vmsa: &Vmsa, base: &kvm_sregs) -> kvm_sregs {
    kvm_sregs {
        cs: segment(vmsa.cs),
        ds: segment(vmsa.ds),
        es: segment(vmsa.es),
        fs: segment(vmsa.fs),
        gs: segment(vmsa.gs),
        ss: segment(vmsa.ss),
        tr: segment(vmsa.tr),
        ldt: segment(vmsa.ldtr),
        gdt: table(vmsa.gdtr),
        idt: table(vmsa.idtr),
        cr0: vmsa.cr0,
        cr2: vmsa.cr2,
        cr3: vmsa.cr3,
        cr4: vmsa.cr4 & !CR4_MCE,
        efer: vmsa.efer & !EFER_SVME,
        ..*base
    }
}

/// A segment as KVM takes it. Bits of the attributes: type 0 to 3, S 4, DPL 5 and 6, P 7, AVL 8, L 9, D/B 10, G 11.
pub fn segment(segment: Segment) -> kvm_segment {
    let bits = |from: u32, count: u32| (segment.attributes >> from) as u8 & ((1_u8 << count).wrapping_sub(1));
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: bits(0, 4),
        s: bits(4, 1),
        dpl: bits(5, 2),
        present: bits(7, 1),
        avl: bits(8, 1),
        l: bits(9, 1),
        db: bits(10, 1),
        g: bits(11, 1),
        ..kvm_segment::default()
    }
}

fn table(table: Segment) -> kvm_dtable {
    kvm_dtable { base: table.base, limit: table.limit as u16, ..kvm_dtable::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_those_of_a_save_area() {
        let code = segment(Segment { selector: 0x10, attributes: 0xa9b, base: 7, limit: u32::MAX });
        assert_eq!((code.type_, code.s, code.dpl, code.present), (11, 1, 0, 1));
        assert_eq!((code.avl, code.l, code.db, code.g), (0, 1, 0, 1));
        assert_eq!((code.base, code.limit, code.selector), (7, u32::MAX, 0x10));
        let data = segment(Segment { attributes: 0xcf3, ..Segment::default() });
        assert_eq!((data.type_, data.dpl, data.l, data.db), (3, 3, 0, 1));
    }

    #[test]
    fn every_register_is_the_save_areas() {
        let vmsa = Vmsa { rip: 1, r15: 2, cr3: 3, rdx: 4, cr2: 5, ..Vmsa::reset() };
        let base = kvm_sregs { apic_base: 0xfee0_0900, cr2: 9, ..kvm_sregs::default() };
        let sregs = sregs(&vmsa, &base);
        assert_eq!((sregs.apic_base, sregs.cr3, sregs.cr2), (0xfee0_0900, 3, 5));
        assert_eq!((sregs.efer, sregs.cr4, sregs.cr0), (0, 0, 0x10));
        assert_eq!((sregs.cs.base, sregs.cs.selector, sregs.idt.limit), (0xffff_0000, 0xf000, 0xffff));
        assert_eq!((sregs.tr.type_, sregs.ldt.type_), (3, 2));
        let regs = regs(&vmsa);
        assert_eq!((regs.rip, regs.r15, regs.rdx, regs.rflags), (1, 2, 4, 2));
    }
}
