//! What the first stage does between its entry and the kernel's, on any platform.
//!
//! 1. Read the launch manifest, which is measured, and a copy of the parameter page,
//!    which is not; refuse parameters that the manifest does not allow.
//! 2. Where memory must be accepted: keep the books of it ([`acceptance`]), and accept whatever the next steps write to, or, if
//!    the manifest says so, all of it.
//! 3. Copy the command line, the kernel and the initrd from the load window into private
//!    memory, each to its final place, and compare the hash of *the copy* with the
//!    manifest's. The window is shared with the host and may change at any time, so each
//!    byte is read from it once, and nothing in it is ever looked into. All addresses and
//!    sizes are the manifest's.
//! 4. Read the headers of the kernel that was found good, put its segments in place.
//! 5. Write what a kernel expects: `boot_params` with the memory map, the ACPI tables, and the EFI tables by which it
//!    accepts the rest of the memory itself.
//!
//! The order of 3 matters for the sizes: nothing is copied before it is known to end
//! inside the RAM, below what comes next.

use core::ops::Range;

use crate::boot::Kernel;
use crate::layout::{
    ACPI_TABLES, ACPI_TABLES_SIZE, BOOT_PARAMS, COMMAND_LINE, COMMAND_LINE_MAX, EFI_TABLES, HIGH_MEMORY,
    PARAMETER_PAGE, RESET_STUB, UNACCEPTED_TABLE,
};
use crate::manifest::{self, Item, KernelFormat, Manifest};
use crate::parameters::{Parameters, ParametersError};
use crate::reason::Reason;
use crate::sha256::Method;
use crate::{acceptance, acpi, arguments, boot_params, efi, layout, parameters, reset_stub};

/// What differs from one platform to another, and the memory of the domain. Errors are the reason why the domain must end.
pub trait Platform {
    /// Comes first: from here on the first unit of [`acceptance`] can be used.
    fn start(&mut self) -> Result<(), Reason>;

    /// Whether the rest of the RAM must be accepted before it can be used.
    fn must_accept(&self) -> bool;

    /// Accepts RAM, which was not accepted before: it begins with a unit of [`acceptance`], and ends with one or with the RAM.
    fn accept(&mut self, memory: Range<u64>) -> Result<(), Reason>;

    /// Comes last: undoes what only the first stage needs, and writes what the kernel needs of the platform. Returns the address
    /// of a `setup_data` node, or 0.
    fn finish(&mut self) -> Result<u64, Reason>;

    /// The launch manifest, which the image brought.
    fn launch_manifest(&self) -> &[u8; manifest::SIZE];

    /// `length` bytes of private memory at the guest-physical address `address`; none if they are not all RAM below
    /// 3 GiB, or are the first stage's own.
    fn memory(&mut self, address: u64, length: u64) -> &mut [u8];

    /// Copies `length` bytes from `from` to the private memory at `to`, by rising address. `from` is private memory, or
    /// shared memory that the host may be changing; each byte of it is read once. Copies nothing where
    /// [`Self::memory`] would give none.
    fn copy(&mut self, from: u64, to: u64, length: u64);

    /// EAX, EBX, ECX and EDX of a CPUID leaf of this processor.
    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4];

    /// Writes a byte to the console, if there is one.
    fn console(&mut self, byte: u8);

    /// Stops the domain, and tells the monitor why.
    fn terminate(&mut self, reason: Reason) -> !;
}

/// Stops the domain, after some words on its console.
pub fn refuse(platform: &mut dyn Platform, reason: Reason) -> ! {
    for text in ["\nfirst stage: ", reason.words(), "\n"] {
        text.bytes().for_each(|byte| platform.console(byte));
    }
    platform.terminate(reason)
}

/// Prepares the domain's memory for its kernel, whose `boot_params` are then at [`BOOT_PARAMS`]. Returns the
/// guest-physical address of the kernel's first instruction. SSE must be enabled.
///
/// # Errors
/// Why the kernel must not run.
pub fn prepare(platform: &mut dyn Platform) -> Result<u64, Reason> {
    platform.start()?;
    let manifest = Manifest::decode(platform.launch_manifest()).map_err(|_| Reason::Manifest)?;
    let parameters = read_parameters(platform, &manifest)?;
    let memory = parameters.memory;
    // Whether the kernel is going to accept memory itself.
    let lazy = platform.must_accept() && !manifest.accept_all;
    if platform.must_accept() {
        acceptance::begin(platform.memory(UNACCEPTED_TABLE, acceptance::SIZE as u64), memory);
        let first = if lazy { acceptance::remainder(memory) } else { 0..layout::ram_end(memory) };
        accept(platform, first, memory)?;
    }

    let method = if parameters.sha_instructions { hash_method(platform) } else { Method::PORTABLE };
    let kernel = load_kernel(platform, method, &manifest, memory)?;
    load_command_line(platform, method, &manifest, &kernel, &parameters)?;
    let initrd = load_initrd(platform, method, &manifest, &kernel, memory)?;
    if lazy {
        efi::build(platform.memory(EFI_TABLES, efi::SIZE as u64));
    }
    let setup_data = platform.finish()?;
    let params = platform.memory(BOOT_PARAMS, boot_params::SIZE as u64);
    boot_params::complete(params, memory, initrd, setup_data, lazy);
    let tables = acpi::Config {
        vcpus: parameters.vcpus,
        virtio_mmio_slots: parameters.virtio_mmio_slots,
        serial: parameters.serial,
    };
    acpi::build(&tables, ACPI_TABLES, platform.memory(ACPI_TABLES, ACPI_TABLES_SIZE))
        .map_err(|_| Reason::AcpiTables)?;
    let stub = reset_stub::CODE;
    platform.memory(RESET_STUB, stub.len() as u64).iter_mut().zip(stub).for_each(|(to, from)| *to = from);
    Ok(kernel.entry)
}

fn read_parameters(platform: &mut dyn Platform, manifest: &Manifest) -> Result<Parameters, Reason> {
    // Where the command line will be: the parameters are needed no longer by then.
    platform.copy(PARAMETER_PAGE, COMMAND_LINE, parameters::SIZE as u64);
    let copy = platform.memory(COMMAND_LINE, parameters::SIZE as u64).first_chunk();
    Parameters::decode(copy.ok_or(Reason::Parameters)?, manifest).map_err(|error| match error {
        ParametersError::Magic | ParametersError::Version { .. } | ParametersError::Flags { .. } => {
            Reason::Parameters
        }
        ParametersError::Memory { .. } => Reason::Memory,
        ParametersError::Vcpus { .. } => Reason::Vcpus,
        ParametersError::VirtioMmioSlots { .. } => Reason::Devices,
        ParametersError::HostData => Reason::HostData,
    })
}

/// Accepts what of `range` is RAM and was not accepted before.
fn accept(platform: &mut dyn Platform, range: Range<u64>, memory: u64) -> Result<(), Reason> {
    if platform.must_accept() {
        loop {
            let table = platform.memory(UNACCEPTED_TABLE, acceptance::SIZE as u64);
            let Some(units) = acceptance::take(table, &range, memory) else { break };
            platform.accept(units)?;
        }
    }
    Ok(())
}

/// Copies an item to private memory, and checks the copy.
fn fetch(
    platform: &mut dyn Platform,
    method: Method,
    item: &Item,
    to: u64,
    mismatch: Reason,
) -> Result<(), Reason> {
    platform.copy(item.address, to, item.size);
    let copy = platform.memory(to, item.size);
    // Two arrays would be compared by a function of half a KiB.
    let same = method.digest(copy).iter().zip(&item.sha256).all(|(is, should)| is == should);
    if copy.len() as u64 == item.size && same { Ok(()) } else { Err(mismatch) }
}

/// The fastest method of this processor.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
fn hash_method(platform: &dyn Platform) -> Method {
    let [_, _, ecx, _] = platform.cpuid(1, 0);
    let [last_leaf, ..] = platform.cpuid(0, 0);
    let ebx = if last_leaf < 7 { 0 } else { platform.cpuid(7, 0)[1] };
    // SAFETY: they are this processor's; `prepare` asks for SSE.
    unsafe { Method::for_processor(ecx, ebx) }
}

#[cfg(not(target_arch = "x86_64"))]
fn hash_method(_platform: &dyn Platform) -> Method {
    Method::PORTABLE
}

/// Loads the kernel, and begins `boot_params` with what it brings for them.
fn load_kernel(
    platform: &mut dyn Platform,
    method: Method,
    manifest: &Manifest,
    memory: u64,
) -> Result<Kernel, Reason> {
    let [(_, low), _] = layout::ram_ranges(memory);
    let (file, at) = (&manifest.kernel.file, manifest.kernel.address);
    if at < HIGH_MEMORY || at > low || file.size > low - at {
        return Err(Reason::KernelPlace);
    }
    accept(platform, at..at.wrapping_add(file.size), memory)?;
    fetch(platform, method, file, at, Reason::KernelHash)?;
    let kernel = Kernel::read(platform.memory(at, file.size), file.size).map_err(|_| Reason::KernelFormat)?;
    if kernel.format() != manifest.kernel.format {
        return Err(Reason::KernelFormat);
    }
    if !kernel.can_be_copied_to(at) || kernel.memory(at).end > low {
        return Err(Reason::KernelPlace);
    }
    accept(platform, kernel.memory(at), memory)?;
    // Before the file is moved, as a segment may come to lie on its header.
    match kernel.format() {
        KernelFormat::BzImage => {
            platform.copy(at, BOOT_PARAMS, boot_params::SIZE as u64);
            boot_params::begin_from_header(platform.memory(BOOT_PARAMS, boot_params::SIZE as u64));
        }
        KernelFormat::Elf => {
            boot_params::begin_for_elf(platform.memory(BOOT_PARAMS, boot_params::SIZE as u64));
        }
    }
    for segment in kernel.segments() {
        let from = at.wrapping_add(segment.offset);
        if from != segment.address {
            platform.copy(from, segment.address, segment.file_size);
        }
        if kernel.clears_memory() {
            let end = segment.address.wrapping_add(segment.file_size);
            platform.memory(end, segment.memory_size.wrapping_sub(segment.file_size)).fill(0);
        }
    }
    Ok(kernel)
}

fn load_command_line(
    platform: &mut dyn Platform,
    method: Method,
    manifest: &Manifest,
    kernel: &Kernel,
    parameters: &Parameters,
) -> Result<(), Reason> {
    let line = &manifest.command_line;
    let place = platform.memory(COMMAND_LINE, COMMAND_LINE_MAX as u64 + 1);
    place.fill(0);
    let (mut before, mut after) = (0, 0);
    if platform.must_accept() {
        let kernel_end = kernel.memory(manifest.kernel.address).end;
        let place = platform.memory(COMMAND_LINE, arguments::MAX_SIZE as u64);
        before = arguments::write(place, !manifest.accept_all, parameters.memory, kernel_end) as u64;
    } else if manifest.host_data {
        after = arguments::HOST_DATA_SIZE as u64;
    }
    let end = before.saturating_add(line.size);
    if end.saturating_add(after) > kernel.command_line_max {
        return Err(Reason::CommandLine);
    }
    if !line.is_empty() {
        fetch(platform, method, line, COMMAND_LINE.wrapping_add(before), Reason::CommandLineHash)?;
    }
    if after != 0 {
        let place = platform.memory(COMMAND_LINE.wrapping_add(end), after);
        arguments::write_host_data(place, &parameters.host_data);
    }
    Ok(())
}

fn load_initrd(
    platform: &mut dyn Platform,
    method: Method,
    manifest: &Manifest,
    kernel: &Kernel,
    memory: u64,
) -> Result<Range<u64>, Reason> {
    let item = &manifest.initrd;
    if item.is_empty() {
        return Ok(0..0);
    }
    let place = kernel.place_initrd(manifest.kernel.address, item.size, memory).ok_or(Reason::InitrdPlace)?;
    accept(platform, place.clone(), memory)?;
    fetch(platform, method, item, place.start, Reason::InitrdHash)?;
    Ok(place)
}

#[cfg(test)]
mod tests;
