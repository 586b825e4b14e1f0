//! The map of guest-physical addresses, I/O ports and interrupt pins of an
//! x86-64 domain. This is the only place where it is written down.
//!
//! ```text
//! guest-physical address
//! 0x0000_0000  RAM, up to 3 GiB of it
//!   0x0000_0500    GDT and IDT of the first vCPU at entry
//!   0x0000_6000    PVH start info, memory map and module list
//!   0x0000_7000    boot_params ("zero page")
//!   0x0000_9000    page tables at entry (PML4, PDPT, PD)
//!   0x0001_0000    first stage: code, data, stack
//!   0x0001_7000    plain only: page directories (4)
//!   0x0001_B000    page tables at its entry (PML4, PDPT)
//!   0x0001_E000    launch manifest
//!   0x0001_F000    parameter page
//!   0x0002_0000    kernel command line
//!   0x0002_1000    setup_data of the boot protocol that leads to SEV-SNP's blob
//!   0x0009_0000    end of usable low memory
//!   0x0009_0000    SEV-SNP: the first stage's GHCB, then the confidential-computing blob
//!   0x0009_2000    SEV-SNP: secrets page, then CPUID page
//!   0x0009_4000    EFI tables, for kernels that accept memory themselves
//!   0x0009_5000    unaccepted memory table (2 pages)
//!   0x000E_0000    ACPI tables, RSDP first (a type of its own in the e820 map)
//!   0x000F_F000    reset stub: a BIOS-style jump to ffff:0 becomes a reset
//!   0x0010_0000    kernel (at its preferred address), initrd at the end of
//!                  the RAM below 3 GiB
//! 0xC000_0000  load window: images mapped for the first stage (768 MiB)
//! 0xF000_0000  virtio-mmio devices, 64 slots of 4 KiB
//! 0xF004_0000  the guest's ports 0x620 to 0x627 once more, for kernels without /dev/port
//! 0xFEC0_0000  I/O APIC
//! 0xFEE0_0000  local APICs
//! 0xFFFB_C000  KVM's identity map page and task state segment (4 pages)
//! 0xFFFF_F000  TDX: reset page, where vCPUs start
//! 0x1_0000_0000  the rest of RAM
//!
//! port
//! 0x060, 0x064  i8042 stub: reset only
//! 0x3f8..0x3ff  first serial port, pin 4
//! 0x505         pvpanic
//! 0x600         ACPI sleep control, 0x601 ACPI sleep status
//! 0x602         ACPI reset register
//! 0x604..0x607  generic event device: pending events, cleared by reading
//! 0x620         guest exit code
//! 0x621         "user space reached" mark
//! 0x622         the first stage's reason to stop
//! 0x624..0x627  step of the init of a container's domain
//!
//! I/O APIC pin
//! 4             serial port
//! 5             generic event device
//! 24..87        virtio-mmio slots 0..63
//! ```

/// Bytes in a KiB.
pub const KIB: u64 = 1 << 10;
/// Bytes in a MiB.
pub const MIB: u64 = 1 << 20;
/// Bytes in a GiB.
pub const GIB: u64 = 1 << 30;
/// Size of the smallest page, bytes.
pub const PAGE_SIZE: u64 = 4 * KIB;

/// Smallest guest memory, bytes.
pub const MIN_MEMORY: u64 = 32 * MIB;
/// Largest guest memory, bytes.
pub const MAX_MEMORY: u64 = 64 * GIB;
/// Largest number of vCPUs.
pub const MAX_VCPUS: u8 = 32;

/// Global descriptor table of the first vCPU at entry.
pub const BOOT_GDT: u64 = 0x500;
/// Interrupt descriptor table (empty) of the first vCPU at entry.
pub const BOOT_IDT: u64 = 0x520;
/// PVH start info; the module list and memory map follow in the same page.
pub const PVH_START_INFO: u64 = 0x6000;
/// `struct boot_params` of the Linux boot protocol, one page.
pub const BOOT_PARAMS: u64 = 0x7000;
/// Page tables at entry: PML4, PDPT and one PD, a page each.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// The first stage: its first instruction, then its code, data and stack. Where its bytes go in an image.
pub const STAGE: u64 = 0x1_0000;
/// End of what the first stage may occupy.
pub const STAGE_END: u64 = 0x1_7000;
/// Page directories at the first stage's entry, four pages, in an ordinary virtual machine.
pub const STAGE_PAGE_DIRECTORIES: u64 = 0x1_7000;
/// Page tables at the first stage's entry ([`crate::page_tables`]): PML4 and PDPT, a page each.
pub const STAGE_PAGE_TABLES: u64 = 0x1_B000;
/// The launch manifest ([`crate::manifest`]), one page.
pub const LAUNCH_MANIFEST: u64 = 0x1_E000;
/// The parameter page ([`crate::parameters`]).
pub const PARAMETER_PAGE: u64 = 0x1_F000;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Longest kernel command line, bytes, without the terminating NUL.
pub const COMMAND_LINE_MAX: usize = 2048;
/// The `setup_data` node that leads to [`SNP_CC_BLOB`]. It is in memory that the e820 map calls RAM: there Linux sets such
/// nodes apart itself, while in reserved memory it would read them as shared memory.
pub const SNP_CC_NODE: u64 = 0x2_1000;
/// End of usable low memory; from here to 1 MiB the e820 map says "reserved".
pub const LOW_MEMORY_END: u64 = 0x9_0000;
/// SEV-SNP's GHCB of the first stage: shared with the host while it is in use, and private before the kernel runs.
pub const SNP_GHCB: u64 = 0x9_0000;
/// SEV-SNP's confidential-computing blob ([`crate::snp::cc_blob`]).
pub const SNP_CC_BLOB: u64 = 0x9_1000;
/// SEV-SNP's secrets page.
pub const SNP_SECRETS: u64 = 0x9_2000;
/// SEV-SNP's CPUID page.
pub const SNP_CPUID: u64 = 0x9_3000;
/// The EFI tables that lead to [`UNACCEPTED_TABLE`] ([`crate::efi`]), one page.
pub const EFI_TABLES: u64 = 0x9_4000;
/// The table of the memory that is yet to be accepted ([`crate::acceptance`]).
pub const UNACCEPTED_TABLE: u64 = 0x9_5000;
/// RSDP; the other ACPI tables follow it.
pub const ACPI_TABLES: u64 = 0xE_0000;
/// Space for the ACPI tables, bytes.
pub const ACPI_TABLES_SIZE: u64 = 0x1_F000;
/// The page with the BIOS entry point ffff:0, at its end.
pub const RESET_STUB_PAGE: u64 = 0xF_F000;
/// The BIOS entry point in real mode, `ffff:0000`.
pub const RESET_STUB: u64 = 0xF_FFF0;
/// Start of high memory; kernels are loaded at or above it.
pub const HIGH_MEMORY: u64 = MIB;

/// End of the RAM below 4 GiB, and start of the device gap.
pub const GAP_START: u64 = 3 * GIB;
/// End of the device gap; RAM goes on here.
pub const GAP_END: u64 = 4 * GIB;

/// Shared memory through which the first stage sees the image's files.
pub const LOAD_WINDOW: u64 = GAP_START;
/// Size of the load window, bytes.
pub const LOAD_WINDOW_SIZE: u64 = 768 * MIB;

/// First virtio-mmio device.
pub const VIRTIO_MMIO: u64 = 0xF000_0000;
/// Distance from one virtio-mmio device to the next, bytes.
pub const VIRTIO_MMIO_STRIDE: u64 = 0x1000;
/// Number of virtio-mmio slots.
pub const VIRTIO_MMIO_SLOTS: u8 = 64;

/// The ports from [`EXIT_CODE_PORT`] to [`STEP_PORT`] once more, at the same distances: some kernels (Debian's cloud flavour) have
/// /dev/mem but no /dev/port.
pub const GUEST_PORT_MMIO: u64 = VIRTIO_MMIO + VIRTIO_MMIO_SLOTS as u64 * VIRTIO_MMIO_STRIDE;

/// The I/O APIC.
pub const IO_APIC: u64 = 0xFEC0_0000;
/// Size of the I/O APIC's registers, bytes.
pub const IO_APIC_SIZE: u64 = 0x1000;
/// Most pins of the I/O APIC, which has no more than the domain's devices need; its first global system interrupt is 0.
pub const IO_APIC_PINS: u8 = 88;
/// The local APICs.
pub const LOCAL_APIC: u64 = 0xFEE0_0000;
/// `KVM_SET_IDENTITY_MAP_ADDR`, one page.
pub const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;
/// `KVM_SET_TSS_ADDR`, three pages.
pub const KVM_TSS: u64 = 0xFFFB_D000;

/// The page with the reset vector of TDX, at the end of the first 4 GiB.
pub const TDX_RESET_PAGE: u64 = 0xFFFF_F000;

/// i8042 data port.
pub const I8042_DATA_PORT: u16 = 0x60;
/// i8042 command and status port.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// The i8042 command that resets the machine.
pub const I8042_RESET_COMMAND: u8 = 0xFE;
/// First serial port, 8 ports.
pub const SERIAL_PORT: u16 = 0x3F8;
/// pvpanic event port.
pub const PVPANIC_PORT: u16 = 0x505;
/// ACPI sleep control register (ACPI 6.5, 4.8.3.7).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register (ACPI 6.5, 4.8.3.7).
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI reset register (ACPI 6.5, 4.8.3.6).
pub const RESET_PORT: u16 = 0x602;
/// The value that resets the machine when written to [`RESET_PORT`].
pub const RESET_VALUE: u8 = 0x52;
/// `SLP_TYP` of the S5 (soft off) state.
pub const SLEEP_TYPE_S5: u8 = 5;
/// Pending events of the generic event device: 4 ports, cleared by reading.
pub const EVENT_PORT: u16 = 0x604;
/// The bit of the power button in [`EVENT_PORT`].
pub const EVENT_POWER_BUTTON: u32 = 1;
/// A byte written here is the guest's exit code; it counts when the guest powers off.
pub const EXIT_CODE_PORT: u16 = 0x620;
/// Any byte written here says "user space reached"; the first one counts.
pub const USER_SPACE_PORT: u16 = 0x621;
/// A byte written here stops the domain; it is a [`crate::reason::Reason`] of the first stage.
pub const REFUSAL_PORT: u16 = 0x622;
/// 32 bits written here at once tell how far init of a container's domain has come: a report of the crate
/// `cofferdam-container-protocol`.
pub const STEP_PORT: u16 = 0x624;

/// I/O APIC pin of the serial port.
pub const SERIAL_PIN: u8 = 4;
/// I/O APIC pin of the generic event device.
pub const EVENT_PIN: u8 = 5;
/// I/O APIC pin of the first virtio-mmio slot; the others follow.
pub const VIRTIO_MMIO_FIRST_PIN: u8 = 24;

/// Guest-physical address of virtio-mmio slot `slot`.
pub const fn virtio_mmio_address(slot: u8) -> u64 {
    VIRTIO_MMIO + slot as u64 * VIRTIO_MMIO_STRIDE
}

/// I/O APIC pin of virtio-mmio slot `slot`.
pub const fn virtio_mmio_pin(slot: u8) -> u8 {
    VIRTIO_MMIO_FIRST_PIN + slot
}

/// The end of the RAM of a domain with `memory` bytes.
pub const fn ram_end(memory: u64) -> u64 {
    if memory <= GAP_START { memory } else { GAP_END + (memory - GAP_START) }
}

/// The two ranges of RAM, as (start, length) in bytes; the second is empty up
/// to 3 GiB of memory.
pub const fn ram_ranges(memory: u64) -> [(u64, u64); 2] {
    let low = if memory < GAP_START { memory } else { GAP_START };
    [(0, low), (GAP_END, memory - low)]
}

const _: () = {
    assert!(BOOT_PAGE_TABLES + 3 * PAGE_SIZE <= STAGE && STAGE_END <= STAGE_PAGE_DIRECTORIES);
    assert!(STAGE_PAGE_DIRECTORIES + 4 * PAGE_SIZE == STAGE_PAGE_TABLES);
    assert!(STAGE_PAGE_TABLES + 2 * PAGE_SIZE <= LAUNCH_MANIFEST);
    assert!(PARAMETER_PAGE + PAGE_SIZE <= COMMAND_LINE);
    assert!(COMMAND_LINE + (COMMAND_LINE_MAX as u64) < SNP_CC_NODE && SNP_CC_NODE < LOW_MEMORY_END);
    assert!(
        LOW_MEMORY_END <= SNP_GHCB
            && SNP_GHCB + PAGE_SIZE == SNP_CC_BLOB
            && SNP_CC_BLOB + PAGE_SIZE == SNP_SECRETS
    );
    assert!(SNP_SECRETS + PAGE_SIZE == SNP_CPUID && SNP_CPUID + PAGE_SIZE == EFI_TABLES);
    assert!(EFI_TABLES + PAGE_SIZE == UNACCEPTED_TABLE && UNACCEPTED_TABLE + 2 * PAGE_SIZE <= ACPI_TABLES);
    assert!(ACPI_TABLES + ACPI_TABLES_SIZE <= RESET_STUB_PAGE);
    assert!(LOAD_WINDOW + LOAD_WINDOW_SIZE <= VIRTIO_MMIO);
    assert!(GUEST_PORT_MMIO < IO_APIC);
    assert!(virtio_mmio_pin(VIRTIO_MMIO_SLOTS - 1) < IO_APIC_PINS);
};
