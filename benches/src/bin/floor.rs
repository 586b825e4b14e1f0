//! `floor KERNEL STATUS_FILE`: the least that a monitor can do. It makes the KVM calls that a guest of one vCPU and
//! 128 MiB needs, in the cheapest order, runs a payload to its end, and writes when it began itself and when the
//! payload marked user space, in microseconds of `CLOCK_MONOTONIC`, as a line of JSON.
//!
//! | call | why no guest does without |
//! |---|---|
//! | `KVM_CREATE_VM`, `KVM_SET_USER_MEMORY_REGION` | a machine with memory |
//! | `KVM_ENABLE_CAP` of a split irqchip, `KVM_CREATE_VCPU` | a CPU with its local APIC |
//! | `KVM_GET_SUPPORTED_CPUID`, `KVM_SET_CPUID2` | without, the CPU has no features: not even `EFER.LME` can be set |
//! | `KVM_GET_SREGS`, `KVM_SET_SREGS`, `KVM_SET_REGS` | the entry point: flat 32-bit mode, as PVH has it |
//! | `KVM_RUN` | |
//!
//! It has no devices, threads, event loop, checks or options.
#![allow(unsafe_code)] // guest memory and its slot are raw addresses

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::{env, fs, slice};

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use rustix::time::{ClockId, clock_gettime};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const MEMORY: usize = 128 << 20;
/// Two of the ports of `firmware/src/layout.rs`.
const USER_SPACE_PORT: u16 = 0x621;
const SLEEP_CONTROL_PORT: u16 = 0x600;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("floor: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let start = now();
    let mut arguments = env::args_os().skip(1);
    let (Some(kernel), Some(status)) = (arguments.next(), arguments.next()) else {
        return Err("usage: floor KERNEL STATUS_FILE".into());
    };
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    let flags = MapFlags::SHARED | MapFlags::NORESERVE;
    // SAFETY: a new mapping where the kernel likes.
    let memory =
        unsafe { mmap_anonymous(std::ptr::null_mut(), MEMORY, ProtFlags::READ | ProtFlags::WRITE, flags) }?;
    let region = kvm_userspace_memory_region {
        memory_size: MEMORY as u64,
        userspace_addr: memory as u64,
        ..Default::default()
    };
    // SAFETY: the mapping stays as long as the process.
    unsafe { vm.set_user_memory_region(region) }?;
    let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    split.args = [24, 0, 0, 0];
    vm.enable_cap(&split)?;
    let mut vcpu = vm.create_vcpu(0)?;
    // SAFETY: nobody else has the mapping yet.
    let entry = load(&File::open(kernel)?, unsafe { slice::from_raw_parts_mut(memory.cast(), MEMORY) })?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    enter_at(&vcpu, entry)?;
    let user_space = run_guest(&mut vcpu)?;
    fs::write(status, format!("{{\"start\":{start},\"user_space\":{user_space}}}\n"))?;
    Ok(())
}

/// Copies the segments of an ELF file to where they belong; returns the entry point.
fn load(file: &File, memory: &mut [u8]) -> Result<u64> {
    const PT_LOAD: u64 = 1;
    let mut headers = [0; 4096];
    let length = file.read_at(&mut headers, 0)?;
    let field = |at: u64, size: usize| {
        let at = usize::try_from(at).ok()?;
        let bytes = headers.get(..length)?.get(at..at.checked_add(size)?)?;
        Some(bytes.iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte)))
    };
    let word = |at, size| field(at, size).ok_or("the ELF headers are not in the first page");
    let (entry, table) = (word(24, 8)?, word(32, 8)?);
    let (size, count) = (word(54, 2)?, word(56, 2)?);
    for header in (0..count).map(|index| table.saturating_add(index * size)) {
        if word(header, 4)? != PT_LOAD {
            continue;
        }
        let (offset, address, length) = (word(header + 8, 8)?, word(header + 24, 8)?, word(header + 32, 8)?);
        let target = usize::try_from(address).ok().zip(usize::try_from(address.saturating_add(length)).ok());
        let target = target.and_then(|(start, end)| memory.get_mut(start..end));
        file.read_exact_at(target.ok_or("a segment lies outside memory")?, offset)?;
    }
    Ok(entry)
}

fn enter_at(vcpu: &VcpuFd, entry: u64) -> Result<()> {
    let segment = |type_, selector| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let mut sregs = vcpu.get_sregs()?;
    let data = segment(3, 0x18);
    sregs.cs = segment(11, 0x10);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr0 |= 1;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rflags) = (entry, 2);
    vcpu.set_regs(&regs)?;
    Ok(())
}

/// Runs the guest until it powers off; returns when it marked user space.
fn run_guest(vcpu: &mut VcpuFd) -> Result<i64> {
    let mut user_space = None;
    loop {
        match vcpu.run()? {
            VcpuExit::IoOut(USER_SPACE_PORT, _) => user_space = user_space.or(Some(now())),
            VcpuExit::IoOut(SLEEP_CONTROL_PORT, _) => {
                return user_space.ok_or("the guest never marked user space".into());
            }
            exit => return Err(format!("unexpected {exit:?}").into()),
        }
    }
}

/// `CLOCK_MONOTONIC`, microseconds.
fn now() -> i64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec * 1_000_000 + time.tv_nsec / 1000
}
