//! The save area of an SEV-ES or SNP virtual CPU (VMSA), and what KVM makes of it.
//!
//! The first 0x670 bytes are the *State Save Area for SEV-ES* of the *AMD64
//! Architecture Programmer's Manual*, volume 2 (24593 revision 3.42), table B-4;
//! names are those of Linux' `struct sev_es_save_area`.
//!
//! An image brings such a page for its first virtual CPU, but KVM does not load
//! it: KVM builds one of its own from the registers that the monitor has set
//! through `KVM_SET_REGS` and `KVM_SET_SREGS` and from its own reset state
//! (`sev_es_sync_vmsa` and `init_vmcb` in Linux' `arch/x86/kvm/svm`). So only
//! what those registers hold can be chosen. [`Vmsa::as_kvm_builds`] computes
//! what is measured, and refuses by its name everything that would be lost.

use std::mem::{offset_of, size_of};
use std::ops::Range;

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::image::importer::PAGE;

/// A segment register, or a descriptor table register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub struct Segment {
    /// Selector; 0 for a descriptor table.
    pub selector: u16,
    /// Bits 0 to 7: bits 40 to 47 of the descriptor; bits 8 to 11: its bits 52 to 55.
    pub attributes: u16,
    /// Limit, bytes.
    pub limit: u32,
    /// Linear address.
    pub base: u64,
}

/// A page with the state of one virtual CPU.
#[derive(Clone, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
#[expect(missing_docs, reason = "the fields have the names of the manual and of Linux")]
pub struct Vmsa {
    pub es: Segment,
    pub cs: Segment,
    pub ss: Segment,
    pub ds: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub gdtr: Segment,
    pub ldtr: Segment,
    pub idtr: Segment,
    pub tr: Segment,
    pub pl0_ssp: u64,
    pub pl1_ssp: u64,
    pub pl2_ssp: u64,
    pub pl3_ssp: u64,
    pub u_cet: u64,
    pub reserved_0xc8: [u8; 2],
    pub vmpl: u8,
    pub cpl: u8,
    pub reserved_0xcc: [u8; 4],
    pub efer: u64,
    pub reserved_0xd8: [u8; 104],
    pub xss: u64,
    pub cr4: u64,
    pub cr3: u64,
    pub cr0: u64,
    pub dr7: u64,
    pub dr6: u64,
    pub rflags: u64,
    pub rip: u64,
    pub dr0: u64,
    pub dr1: u64,
    pub dr2: u64,
    pub dr3: u64,
    pub dr0_addr_mask: u64,
    pub dr1_addr_mask: u64,
    pub dr2_addr_mask: u64,
    pub dr3_addr_mask: u64,
    pub reserved_0x1c0: [u8; 24],
    pub rsp: u64,
    pub s_cet: u64,
    pub ssp: u64,
    pub isst_addr: u64,
    pub rax: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub cr2: u64,
    pub reserved_0x248: [u8; 32],
    pub g_pat: u64,
    pub dbgctl: u64,
    pub br_from: u64,
    pub br_to: u64,
    pub last_excp_from: u64,
    pub last_excp_to: u64,
    pub reserved_0x298: [u8; 80],
    pub pkru: u32,
    pub tsc_aux: u32,
    pub tsc_scale: u64,
    pub tsc_offset: u64,
    pub reserved_0x300: [u8; 8],
    pub rcx: u64,
    pub rdx: u64,
    pub rbx: u64,
    pub reserved_0x320: u64,
    pub rbp: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub reserved_0x380: [u8; 16],
    pub guest_exit_info_1: u64,
    pub guest_exit_info_2: u64,
    pub guest_exit_int_info: u64,
    pub guest_nrip: u64,
    pub sev_features: u64,
    pub vintr_ctrl: u64,
    pub guest_exit_code: u64,
    pub virtual_tom: u64,
    pub tlb_id: u64,
    pub pcpu_id: u64,
    pub event_inj: u64,
    pub xcr0: u64,
    pub reserved_0x3f0: [u8; 16],
    pub x87_dp: u64,
    pub mxcsr: u32,
    pub x87_ftw: u16,
    pub x87_fsw: u16,
    pub x87_fcw: u16,
    pub x87_fop: u16,
    pub x87_ds: u16,
    pub x87_cs: u16,
    pub x87_rip: u64,
    pub fpreg_x87: [u8; 80],
    pub fpreg_xmm: [u8; 256],
    pub fpreg_ymm: [u8; 256],
    pub reserved_0x670: [u8; PAGE - 0x670],
}

/// EFER bit 12, secure virtual machine enable: KVM sets it in every VMCB.
const EFER_SVME: u64 = 1 << 12;
/// CR4 bit 6, machine check enable: KVM takes it from the host, where it is always set.
const CR4_MCE: u64 = 1 << 6;
/// CR0 bits 29 and 30, not write-through and cache disable: KVM clears them.
const CR0_NW_CD: u64 = 3 << 29;
/// RFLAGS bit 1 is always set.
const RFLAGS_FIXED: u64 = 1 << 1;
/// SEV_FEATURES bit 0, SNP active: KVM sets it, and nothing else unless asked to.
const SEV_FEATURES_SNP_ACTIVE: u64 = 1;
/// A segment's attributes have twelve bits.
const ATTRIBUTES: u16 = 0xfff;
/// Bits 5 and 6 of the attributes: descriptor privilege level.
const DPL_SHIFT: u16 = 5;

/// A state that KVM cannot start a virtual CPU in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("VMSA field {field} (offset {offset:#x}) is {found}, and {built} in what KVM builds and measures")]
pub struct VmsaError {
    /// The field.
    pub field: String,
    /// Where it begins, bytes.
    pub offset: usize,
    /// What the image has, hexadecimal.
    pub found: String,
    /// What KVM would make of it, hexadecimal.
    pub built: String,
}

impl Vmsa {
    /// The state in a page.
    pub fn from_page(page: &[u8; PAGE]) -> Self {
        zerocopy::transmute!(*page)
    }

    /// A virtual CPU that nothing was set in but general registers, to 0: KVM's
    /// reset state, which differs from that of other monitors' (data segments
    /// and CS without the accessed bit, no processor signature in RDX).
    pub fn reset() -> Self {
        let system = |attributes| Segment { attributes, limit: 0xffff, ..Segment::default() };
        let data = system(0x92);
        let mut vmsa = Self::new_zeroed();
        for segment in [&mut vmsa.es, &mut vmsa.ss, &mut vmsa.ds, &mut vmsa.fs, &mut vmsa.gs] {
            *segment = data;
        }
        vmsa.cs = Segment { selector: 0xf000, attributes: 0x9a, limit: 0xffff, base: 0xffff_0000 };
        vmsa.gdtr = system(0);
        vmsa.idtr = system(0);
        vmsa.ldtr = system(0x82);
        vmsa.tr = system(0x83);
        vmsa.efer = EFER_SVME;
        vmsa.cr0 = 0x10;
        vmsa.cr4 = CR4_MCE;
        vmsa.dr6 = 0xffff_0ff0;
        vmsa.dr7 = 0x400;
        vmsa.rflags = RFLAGS_FIXED;
        vmsa.rip = 0xfff0;
        vmsa.g_pat = 0x0007_0406_0007_0406;
        vmsa.sev_features = SEV_FEATURES_SNP_ACTIVE;
        vmsa.xcr0 = 1;
        vmsa.mxcsr = 0x1f80;
        vmsa.x87_fcw = 0x37f;
        vmsa
    }

    /// What KVM builds and measures for a virtual CPU that an image gives this state.
    ///
    /// An image may leave three bits to KVM: EFER.SVME, CR4.MCE and the fixed
    /// bit of RFLAGS. Everything else must come out as it went in.
    ///
    /// # Errors
    /// The first field that would not.
    pub fn as_kvm_builds(&self) -> Result<Self, VmsaError> {
        let mut wanted = self.clone();
        wanted.efer |= EFER_SVME;
        wanted.cr4 |= CR4_MCE;
        wanted.rflags |= RFLAGS_FIXED;

        let segment = |from: Segment| Segment { attributes: from.attributes & ATTRIBUTES, ..from };
        let table = |from: Segment| Segment {
            selector: 0,
            attributes: 0,
            limit: from.limit & 0xffff,
            base: from.base,
        };
        let built = Self {
            es: segment(wanted.es),
            cs: segment(wanted.cs),
            ss: segment(wanted.ss),
            ds: segment(wanted.ds),
            fs: segment(wanted.fs),
            gs: segment(wanted.gs),
            gdtr: table(wanted.gdtr),
            ldtr: segment(wanted.ldtr),
            idtr: table(wanted.idtr),
            tr: segment(wanted.tr),
            // KVM takes the privilege level from SS. (Two bits: the cast loses nothing.)
            cpl: (wanted.ss.attributes >> DPL_SHIFT & 3) as u8,
            efer: wanted.efer,
            cr0: wanted.cr0 & !CR0_NW_CD,
            cr2: wanted.cr2,
            cr3: wanted.cr3,
            cr4: wanted.cr4,
            rflags: wanted.rflags,
            rip: wanted.rip,
            rax: wanted.rax,
            rcx: wanted.rcx,
            rdx: wanted.rdx,
            rbx: wanted.rbx,
            rsp: wanted.rsp,
            rbp: wanted.rbp,
            rsi: wanted.rsi,
            rdi: wanted.rdi,
            r8: wanted.r8,
            r9: wanted.r9,
            r10: wanted.r10,
            r11: wanted.r11,
            r12: wanted.r12,
            r13: wanted.r13,
            r14: wanted.r14,
            r15: wanted.r15,
            ..Self::reset()
        };
        match first_difference(wanted.as_bytes(), built.as_bytes()) {
            None => Ok(built),
            Some(offset) => Err(error_at(offset, wanted.as_bytes(), built.as_bytes())),
        }
    }
}

fn first_difference(left: &[u8], right: &[u8]) -> Option<usize> {
    left.iter().zip(right).position(|(left, right)| left != right)
}

fn error_at(offset: usize, found: &[u8], built: &[u8]) -> VmsaError {
    let (field, range) = field_at(offset);
    VmsaError {
        field,
        offset: range.start,
        found: hexadecimal(found, range.clone()),
        built: hexadecimal(built, range),
    }
}

/// A field of at most eight bytes as a number.
fn hexadecimal(vmsa: &[u8], range: Range<usize>) -> String {
    let mut number = [0; 8];
    for (to, from) in number.iter_mut().zip(vmsa.get(range).unwrap_or_default()) {
        *to = *from;
    }
    format!("{:#x}", u64::from_le_bytes(number))
}

/// The name and place of the field that the byte at `offset` belongs to. Of a
/// field of more than eight bytes, only the byte itself.
fn field_at(offset: usize) -> (String, Range<usize>) {
    let next = FIELDS.partition_point(|(_, start)| *start <= offset);
    let (name, start) = next.checked_sub(1).and_then(|index| FIELDS.get(index)).copied().unwrap_or_default();
    let end = FIELDS.get(next).map_or(PAGE, |(_, start)| *start);
    if end <= offset_of!(Vmsa, pl0_ssp) {
        let inner = offset.saturating_sub(start);
        for (part, range) in SEGMENT_FIELDS {
            if range.contains(&inner) {
                let place = start.saturating_add(range.start)..start.saturating_add(range.end);
                return (format!("{name}.{part}"), place);
            }
        }
    }
    let place = if end.saturating_sub(start) <= size_of::<u64>() {
        start..end
    } else {
        offset..offset.saturating_add(1)
    };
    (name.to_owned(), place)
}

const SEGMENT_FIELDS: [(&str, Range<usize>); 4] =
    [("selector", 0..2), ("attributes", 2..4), ("limit", 4..8), ("base", 8..16)];

macro_rules! fields {
    ($($field:ident)*) => { &[$((stringify!($field), offset_of!(Vmsa, $field))),*] };
}

/// All fields and where they begin, in their order.
const FIELDS: &[(&str, usize)] = fields! {
    es cs ss ds fs gs gdtr ldtr idtr tr pl0_ssp pl1_ssp pl2_ssp pl3_ssp u_cet reserved_0xc8 vmpl cpl reserved_0xcc
    efer reserved_0xd8 xss cr4 cr3 cr0 dr7 dr6 rflags rip dr0 dr1 dr2 dr3 dr0_addr_mask dr1_addr_mask
    dr2_addr_mask dr3_addr_mask reserved_0x1c0 rsp s_cet ssp isst_addr rax star lstar cstar sfmask kernel_gs_base
    sysenter_cs sysenter_esp sysenter_eip cr2 reserved_0x248 g_pat dbgctl br_from br_to last_excp_from
    last_excp_to reserved_0x298 pkru tsc_aux tsc_scale tsc_offset reserved_0x300 rcx rdx rbx reserved_0x320 rbp rsi
    rdi r8 r9 r10 r11 r12 r13 r14 r15 reserved_0x380 guest_exit_info_1 guest_exit_info_2 guest_exit_int_info
    guest_nrip sev_features vintr_ctrl guest_exit_code virtual_tom tlb_id pcpu_id event_inj xcr0 reserved_0x3f0
    x87_dp mxcsr x87_ftw x87_fsw x87_fcw x87_fop x87_ds x87_cs x87_rip fpreg_x87 fpreg_xmm fpreg_ymm reserved_0x670
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_of_the_manual() {
        assert_eq!(size_of::<Vmsa>(), PAGE);
        assert_eq!(size_of::<Segment>(), 16);
        // APM volume 2, table B-4.
        let offsets = [
            ("es", 0x000),
            ("cs", 0x010),
            ("gdtr", 0x060),
            ("ldtr", 0x070),
            ("idtr", 0x080),
            ("tr", 0x090),
            ("pl0_ssp", 0x0a0),
            ("u_cet", 0x0c0),
            ("vmpl", 0x0ca),
            ("cpl", 0x0cb),
            ("efer", 0x0d0),
            ("xss", 0x140),
            ("cr4", 0x148),
            ("cr3", 0x150),
            ("cr0", 0x158),
            ("dr7", 0x160),
            ("dr6", 0x168),
            ("rflags", 0x170),
            ("rip", 0x178),
            ("dr0", 0x180),
            ("dr0_addr_mask", 0x1a0),
            ("rsp", 0x1d8),
            ("s_cet", 0x1e0),
            ("rax", 0x1f8),
            ("star", 0x200),
            ("kernel_gs_base", 0x220),
            ("sysenter_eip", 0x238),
            ("cr2", 0x240),
            ("g_pat", 0x268),
            ("dbgctl", 0x270),
            ("last_excp_to", 0x290),
            ("pkru", 0x2e8),
            ("tsc_aux", 0x2ec),
            ("tsc_offset", 0x2f8),
            ("rcx", 0x308),
            ("rbx", 0x318),
            ("rbp", 0x328),
            ("r8", 0x340),
            ("r15", 0x378),
            ("guest_exit_info_1", 0x390),
            ("sev_features", 0x3b0),
            ("vintr_ctrl", 0x3b8),
            ("virtual_tom", 0x3c8),
            ("event_inj", 0x3e0),
            ("xcr0", 0x3e8),
            ("x87_dp", 0x400),
            ("mxcsr", 0x408),
            ("x87_fcw", 0x410),
            ("x87_rip", 0x418),
            ("fpreg_x87", 0x420),
            ("fpreg_xmm", 0x470),
            ("fpreg_ymm", 0x570),
            ("reserved_0x670", 0x670),
        ];
        for (name, offset) in offsets {
            assert!(FIELDS.contains(&(name, offset)), "{name}");
        }
        for (name, offset) in FIELDS {
            if let Some(number) = name.strip_prefix("reserved_0x") {
                assert_eq!(usize::from_str_radix(number, 16), Ok(*offset));
            }
        }
        assert!(FIELDS.is_sorted_by_key(|(_, offset)| offset));
    }

    /// What the first stage is entered with.
    fn entry() -> Vmsa {
        let data = Segment { selector: 0x18, attributes: 0xc93, limit: u32::MAX, base: 0 };
        Vmsa {
            cs: Segment { selector: 0x10, attributes: 0xa9b, limit: u32::MAX, base: 0 },
            es: data,
            ss: data,
            ds: data,
            fs: data,
            gs: data,
            efer: 0x1500,
            cr0: 0x8000_0031,
            cr3: 0x0008_0000_0001_b000,
            cr4: 0x60,
            rip: 0x10000,
            ..Vmsa::reset()
        }
    }

    #[test]
    fn what_kvm_represents_comes_out_as_it_went_in() {
        let mut vmsa = entry();
        assert_eq!(vmsa.as_kvm_builds(), Ok(vmsa.clone()));
        assert_eq!(Vmsa::reset().as_kvm_builds(), Ok(Vmsa::reset()));
        // Every bit that can be chosen, and the bits that KVM adds.
        vmsa.efer = 0x500;
        vmsa.cr4 = 0x20;
        vmsa.rflags = 0;
        vmsa.ss.attributes = 0xcf3;
        vmsa.cpl = 3;
        vmsa.gdtr = Segment { base: 0x1000, limit: 0x17, ..Segment::default() };
        let built = vmsa.as_kvm_builds().unwrap();
        assert_eq!((built.efer, built.cr4, built.rflags), (0x1500, 0x60, 2));
        assert_eq!((built.ss, built.cpl, built.gdtr), (vmsa.ss, 3, vmsa.gdtr));
    }

    /// One bit of any byte that KVM does not take from a register is refused, by the field's name.
    #[test]
    fn every_other_bit_is_refused_by_name() {
        let settable = |name: &str| {
            let registers =
                ["efer", "cr2", "cr3", "cr4", "rflags", "rip", "rax", "rcx", "rdx", "rbx", "rsp", "rbp"];
            let general = ["rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
            registers.contains(&name) || general.contains(&name)
        };
        for (index, (name, start)) in FIELDS.iter().enumerate() {
            let end = FIELDS.get(index + 1).map_or(PAGE, |field| field.1);
            if *start < 0xa0 || *name == "cr0" || settable(name) {
                continue;
            }
            for offset in *start..end {
                let mut page: [u8; PAGE] = entry().as_bytes().try_into().unwrap();
                page[offset] ^= 0x10;
                let error = Vmsa::read_from_bytes(&page).unwrap().as_kvm_builds().unwrap_err();
                assert_eq!(error.field, *name, "{error}");
                assert!((*start..=offset).contains(&error.offset), "{error}");
            }
        }
    }

    #[test]
    fn lost_parts_of_registers_are_refused() {
        type Change = fn(&mut Vmsa);
        let cases: [(&str, Change); 8] = [
            ("cr0", |vmsa| vmsa.cr0 |= 1 << 30),
            ("cr0", |vmsa| vmsa.cr0 |= 1 << 29),
            ("cs.attributes", |vmsa| vmsa.cs.attributes |= 1 << 12),
            ("tr.attributes", |vmsa| vmsa.tr.attributes |= 1 << 15),
            ("gdtr.selector", |vmsa| vmsa.gdtr.selector = 8),
            ("gdtr.attributes", |vmsa| vmsa.gdtr.attributes = 1),
            ("idtr.limit", |vmsa| vmsa.idtr.limit = 0x10000),
            ("cpl", |vmsa| vmsa.ss.attributes |= 0x60),
        ];
        for (field, change) in cases {
            let mut vmsa = entry();
            change(&mut vmsa);
            assert_eq!(vmsa.as_kvm_builds().unwrap_err().field, field);
        }
        let mut vmsa = entry();
        vmsa.mxcsr = 0;
        let error = vmsa.as_kvm_builds().unwrap_err();
        assert_eq!(
            error.to_string(),
            "VMSA field mxcsr (offset 0x408) is 0x0, and 0x1f80 in what KVM builds and measures"
        );
    }
}
