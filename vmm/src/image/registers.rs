//! The registers of the first vCPU as an image gives them.

use cofferdam_confidential::image::importer::{DescriptorTable, NativeContext, Segment};
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use crate::arch::EntryState;

/// How the first vCPU of an image begins: at the processor's reset vector, or as the image says.
#[derive(Clone, Debug, Default)]
pub struct FirstVcpu(Option<Box<NativeContext>>);

impl FirstVcpu {
    /// Takes an image's registers, if there are none yet.
    pub(super) fn set(&mut self, context: &NativeContext) -> bool {
        let first = self.0.is_none();
        self.0.get_or_insert_with(|| Box::new(*context));
        first
    }
}

impl EntryState for FirstVcpu {
    fn regs(&self) -> Option<kvm_regs> {
        let context = self.0.as_ref()?;
        let NativeContext { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, rip, rflags, .. } = **context;
        let NativeContext { r8, r9, r10, r11, r12, r13, r14, r15, .. } = **context;
        Some(kvm_regs {
            rax,
            rbx,
            rcx,
            rdx,
            rsi,
            rdi,
            rsp,
            rbp,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rip,
            rflags,
        })
    }

    fn sregs(&self, base: kvm_sregs) -> kvm_sregs {
        let Some(context) = &self.0 else { return base };
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
}

/// Bits of the attributes: type 0 to 3, S 4, DPL 5 and 6, P 7, AVL 12, L 13, D/B 14, G 15.
fn segment(segment: &Segment) -> kvm_segment {
    let bits = |from: u32, count: u32| (segment.attributes >> from) as u8 & ((1_u8 << count).wrapping_sub(1));
    kvm_segment {
        base: segment.base.into(),
        limit: segment.limit,
        selector: segment.selector,
        type_: bits(0, 4),
        s: bits(4, 1),
        dpl: bits(5, 2),
        present: bits(7, 1),
        avl: bits(12, 1),
        l: bits(13, 1),
        db: bits(14, 1),
        g: bits(15, 1),
        ..kvm_segment::default()
    }
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
        let mut vcpu = FirstVcpu::default();
        assert_eq!(vcpu.regs(), None);
        assert!(vcpu.set(&NativeContext { rip: 0x1_0000, gs_base: 5, ..NativeContext::default() }));
        assert!(!vcpu.set(&NativeContext::default()), "the first ones stay");
        assert_eq!(vcpu.regs(), Some(kvm_regs { rip: 0x1_0000, ..kvm_regs::default() }));
        let base = kvm_sregs { apic_base: 0xfee0_0900, ..kvm_sregs::default() };
        let sregs = vcpu.sregs(base);
        assert_eq!((sregs.apic_base, sregs.gs.base, sregs.fs.base), (0xfee0_0900, 5, 0));
    }
}
