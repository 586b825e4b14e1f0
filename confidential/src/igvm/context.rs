//! The state of a vCPU, in the form that its platform has in the file data.

use igvm_defs as defs;

use super::error::Problem;
use super::header::{Header, SMALL_PAGE, Surroundings, aligned, read, read_padded, reserved};
use crate::image::importer::{DescriptorTable, ImagePlatform, NativeContext, PAGE, Segment};

/// A vCPU's registers in the form of a platform.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VpContext<'a> {
    /// Plain and SEV.
    NativeX64(Box<NativeContext>),
    /// SNP and SEV-ES.
    Vmsa(&'a [u8; PAGE]),
    /// CCA.
    Cca {
        /// x0 to x7.
        x: [u64; 8],
        /// The program counter.
        pc: u64,
        /// Flags of the REC.
        flags: u64,
    },
    /// Registers of Hyper-V's isolation, 32 bytes each.
    Vbs(&'a [u8]),
}

/// Reads a `VP_CONTEXT` and the registers that it points at.
pub(super) fn vp_context<'a>(
    raw: &defs::IGVM_VHS_VP_CONTEXT,
    around: &Surroundings<'a, '_>,
) -> Result<Header<'a>, Problem> {
    reserved(raw.reserved == 0, "the last field")?;
    let gpa = raw.gpa.get();
    aligned("gpa", gpa, SMALL_PAGE)?;
    let mask = raw.compatibility_mask;
    let mut named = around.platforms.iter().filter(|(bit, _)| bit & mask != 0);
    let (Some((_, platform)), None) = (named.next(), named.next()) else {
        return Err(Problem::NotOnePlatform(mask));
    };
    let context = match platform {
        ImagePlatform::Plain | ImagePlatform::Sev => {
            native_context(read_padded(around.page(raw.file_offset)?)?)?
        }
        ImagePlatform::Snp | ImagePlatform::SevEs => VpContext::Vmsa(around.page(raw.file_offset)?),
        ImagePlatform::Cca => {
            let raw: defs::IgvmVpContextAArch64Cca = read_padded(around.page(raw.file_offset)?)?;
            let x = [raw.x0, raw.x1, raw.x2, raw.x3, raw.x4, raw.x5, raw.x6, raw.x7];
            VpContext::Cca { x, pc: raw.pc, flags: raw.flags }
        }
        ImagePlatform::Vsm => VpContext::Vbs(vbs_registers(raw.file_offset, around)?),
        ImagePlatform::Tdx => return Err(Problem::NotOnPlatform(*platform)),
    };
    Ok(Header::VpContext { mask, gpa, index: raw.vp_index, context })
}

fn native_context<'a>(raw: defs::IgvmNativeVpContextX64) -> Result<VpContext<'a>, Problem> {
    reserved(raw.reserved == [0; 2], "a field of the context")?;
    Ok(VpContext::NativeX64(Box::new(NativeContext {
        rax: raw.rax,
        rcx: raw.rcx,
        rdx: raw.rdx,
        rbx: raw.rbx,
        rsp: raw.rsp,
        rbp: raw.rbp,
        rsi: raw.rsi,
        rdi: raw.rdi,
        r8: raw.r8,
        r9: raw.r9,
        r10: raw.r10,
        r11: raw.r11,
        r12: raw.r12,
        r13: raw.r13,
        r14: raw.r14,
        r15: raw.r15,
        rip: raw.rip,
        rflags: raw.rflags,
        idtr: DescriptorTable { base: raw.idtr_base, limit: raw.idtr_limit },
        gdtr: DescriptorTable { base: raw.gdtr_base, limit: raw.gdtr_limit },
        code: Segment {
            selector: raw.code_selector,
            attributes: raw.code_attributes,
            base: raw.code_base,
            limit: raw.code_limit,
        },
        data: Segment {
            selector: raw.data_selector,
            attributes: raw.data_attributes,
            base: raw.data_base,
            limit: raw.data_limit,
        },
        gs_base: raw.gs_base,
        cr0: raw.cr0,
        cr3: raw.cr3,
        cr4: raw.cr4,
        efer: raw.efer,
    })))
}

/// The registers of a Hyper-V context: a count, then that many entries.
fn vbs_registers<'a>(offset: u32, around: &Surroundings<'a, '_>) -> Result<&'a [u8], Problem> {
    const COUNT: u64 = size_of::<defs::VbsVpContextHeader>() as u64;
    const ENTRY: u64 = size_of::<defs::VbsVpContextRegister>() as u64;
    let header: defs::VbsVpContextHeader = read(around.data(offset, COUNT)?.bytes)?;
    if header.register_count == 0 {
        return Err(Problem::Empty("register_count"));
    }
    let length = u64::from(header.register_count).saturating_mul(ENTRY);
    let all = around.data(offset, length.saturating_add(COUNT))?.bytes;
    let registers = all.get(size_of::<defs::VbsVpContextHeader>()..).unwrap_or_default();
    let mut first_vtl = None;
    for (number, bytes) in (0..).zip(registers.chunks_exact(size_of::<defs::VbsVpContextRegister>())) {
        let register: defs::VbsVpContextRegister = read(bytes)?;
        if *first_vtl.get_or_insert(register.vtl) != register.vtl || register.mbz != [0; 11] {
            return Err(Problem::VbsRegister(number));
        }
    }
    Ok(registers)
}
