use std::cell::Cell;

use super::*;
use crate::boot::tests::{bz_image, elf, load, patch, vmlinux};
use crate::layout::{LOAD_WINDOW, MIB};
use crate::manifest;

const RAM: u64 = 64 * MIB;
const KERNEL: u64 = LOAD_WINDOW;
const INITRD: u64 = LOAD_WINDOW + 0x20_0000;
const LINE: u64 = LOAD_WINDOW + 0x40_0000;

/// A domain in a vector, and a host that shows a window and may change it at every look.
struct Model {
    ram: Vec<u8>,
    /// Memory that was accepted, of a protected domain.
    accepted: Option<Vec<Range<u64>>>,
    /// Stops accepting after this number of bytes.
    accept_at_most: u64,
    finished: bool,
    manifest: [u8; manifest::SIZE],
    parameters: Vec<u8>,
    window: Vec<(u64, Vec<u8>)>,
    /// Changes the window after this number of reads from it.
    change_after: Option<usize>,
    reads: Cell<usize>,
}

impl Model {
    fn shared(&self, from: u64, length: usize) -> Vec<u8> {
        if from == PARAMETER_PAGE {
            return self.parameters[..length].to_vec();
        }
        self.reads.set(self.reads.get() + 1);
        let (start, bytes) = self
            .window
            .iter()
            .find(|(start, bytes)| (*start..start + bytes.len() as u64).contains(&from))
            .unwrap();
        let mut read = bytes[(from - start) as usize..][..length].to_vec();
        if self.change_after.is_some_and(|reads| self.reads.get() > reads) {
            read[length / 2] ^= 0x10;
        }
        read
    }

    fn at(&self, address: u64, length: usize) -> &[u8] {
        &self.ram[address as usize..][..length]
    }

    /// That private memory may be used.
    fn check(&self, address: u64, length: u64) {
        assert!(!(layout::STAGE..COMMAND_LINE).contains(&address));
        let Some(accepted) = &self.accepted else { return };
        assert!(!accepted.is_empty(), "not started");
        let mut at = address;
        while at < address + length {
            let range = accepted.iter().find(|range| range.contains(&at));
            at = range.unwrap_or_else(|| panic!("{at:#x} is not accepted")).end;
        }
    }

    /// Bytes that were accepted.
    fn sum(&self) -> u64 {
        self.accepted.iter().flatten().map(|range| range.end - range.start).sum()
    }
}

impl Platform for Model {
    fn start(&mut self) -> Result<(), Reason> {
        if let Some(accepted) = &mut self.accepted {
            assert!(accepted.is_empty());
            accepted.push(0..acceptance::UNIT);
        }
        Ok(())
    }
    fn must_accept(&self) -> bool {
        self.accepted.is_some()
    }
    fn accept(&mut self, memory: Range<u64>) -> Result<(), Reason> {
        assert!(!self.finished && memory.start.is_multiple_of(acceptance::UNIT) && !memory.is_empty());
        assert!(memory.end.is_multiple_of(acceptance::UNIT) || memory.end == self.ram.len() as u64);
        let accepted = self.accepted.as_mut().unwrap();
        assert!(accepted.iter().all(|other| memory.end <= other.start || other.end <= memory.start));
        accepted.push(memory);
        if self.sum() > self.accept_at_most { Err(Reason::PageInvalid) } else { Ok(()) }
    }
    fn finish(&mut self) -> Result<u64, Reason> {
        assert!(!self.finished);
        self.finished = true;
        Ok(if self.must_accept() { layout::SNP_CC_NODE } else { 0 })
    }
    fn launch_manifest(&self) -> &[u8; manifest::SIZE] {
        &self.manifest
    }
    fn memory(&mut self, address: u64, length: u64) -> &mut [u8] {
        self.check(address, length);
        &mut self.ram[address as usize..][..length as usize]
    }
    fn copy(&mut self, from: u64, to: u64, length: u64) {
        self.check(to, length);
        if from >= LOAD_WINDOW || from == PARAMETER_PAGE {
            let bytes = self.shared(from, length as usize);
            self.ram[to as usize..][..bytes.len()].copy_from_slice(&bytes);
        } else {
            self.check(from, length);
            for index in 0..length {
                self.ram[(to + index) as usize] = self.ram[(from + index) as usize];
            }
        }
    }
    fn cpuid(&self, _leaf: u32, _subleaf: u32) -> [u32; 4] {
        [0; 4]
    }
    fn console(&mut self, _byte: u8) {}
    fn terminate(&mut self, reason: Reason) -> ! {
        panic!("{reason}")
    }
}

fn item(address: u64, bytes: &[u8]) -> Item {
    match bytes.len() as u64 {
        0 => Item::default(),
        size => Item { address, size, sha256: Method::PORTABLE.digest(bytes) },
    }
}

fn manifest(kernel: &[u8], initrd: &[u8], line: &[u8]) -> Manifest {
    let (format, address) = match Kernel::read(kernel, kernel.len() as u64) {
        Ok(kernel) => (kernel.format(), kernel.copy_address()),
        Err(_) => (KernelFormat::Elf, MIB),
    };
    Manifest {
        kernel: manifest::Kernel { file: item(KERNEL, kernel), format, address },
        initrd: item(INITRD, initrd),
        command_line: item(LINE, line),
        max_vcpus: 4,
        min_memory: 32 * MIB,
        max_memory: 128 * MIB,
        host_data: true,
        accept_all: false,
    }
}

fn parameters() -> Parameters {
    Parameters {
        memory: RAM,
        vcpus: 2,
        virtio_mmio_slots: 1,
        serial: true,
        sha_instructions: false,
        host_data: [5; 32],
    }
}

fn model(kernel: &[u8], initrd: &[u8], line: &[u8]) -> Model {
    Model {
        ram: vec![0xEE; RAM as usize],
        accepted: None,
        accept_at_most: u64::MAX,
        finished: false,
        manifest: manifest(kernel, initrd, line).encode(),
        parameters: parameters().encode().to_vec(),
        window: vec![(KERNEL, kernel.to_vec()), (INITRD, initrd.to_vec()), (LINE, line.to_vec())],
        change_after: None,
        reads: Cell::new(0),
    }
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..][..4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..][..8].try_into().unwrap())
}

#[test]
fn a_bz_image_is_ready_to_run() {
    let initrd = [0x44; 5000];
    let mut model = model(&bz_image(), &initrd, b"console=ttyS0");
    assert_eq!(prepare(&mut model), Ok(0x100_0200));
    assert_eq!(model.at(0x100_0000, 0x1000), [0x33; 0x1000]);
    assert_eq!(model.at(0x100_1000, 1), [0xEE], "a bzImage clears its own memory");
    assert_eq!(model.at(0x3FF_E000, 5000), initrd);
    let line = format!("console=ttyS0 cofferdam.host_data={}\0", "05".repeat(32));
    assert_eq!(model.at(COMMAND_LINE, line.len()), line.as_bytes());

    // The offsets are those of boot.rst and zero-page.rst.
    let params = model.at(BOOT_PARAMS, 4096);
    assert_eq!(u64_at(params, 0x070), ACPI_TABLES);
    assert_eq!((params[0x1e8], params[0x1ef], params[0x1f0]), (5, 0, 0), "e820 entries, sentinel");
    assert_eq!((params[0x1f1], &params[0x202..0x206]), (2, &b"HdrS"[..]));
    assert_eq!((params[0x210], params[0x211]), (0xff, 1));
    assert_eq!((u32_at(params, 0x218), u32_at(params, 0x21c)), (0x3FF_E000, 5000));
    assert_eq!(u32_at(params, 0x228), 0x2_0000);
    assert_eq!(u64_at(params, 0x250), 0, "no setup_data");
    assert_eq!(u64_at(params, 0x258), 0x100_0000, "the rest of the header");
    assert_eq!((params[0x26b], params[0x26c]), (0x77, 0), "to its end, 0x202 + 0x6a, and no further");
    let e820 = [
        (0, 0x9_0000, 1),
        (0x9_0000, 0x5_0000, 2),
        (0xE_0000, 0x1_F000, 3),
        (0xF_F000, 0x1000, 2),
        (MIB, 63 * MIB, 1),
        (0, 0, 0),
    ];
    for (index, (address, size, kind)) in e820.into_iter().enumerate() {
        let entry = &params[0x2d0 + 20 * index..];
        assert_eq!((u64_at(entry, 0), u64_at(entry, 8), u32_at(entry, 16)), (address, size, kind));
    }

    assert_eq!(model.at(RESET_STUB, 10), reset_stub::CODE);
}

#[test]
fn the_tables_are_those_of_the_monitor() {
    let mut model = model(&bz_image(), &[], b"");
    prepare(&mut model).unwrap();
    let mut expected = vec![0xEE; ACPI_TABLES_SIZE as usize];
    let config = acpi::Config { vcpus: 2, virtio_mmio_slots: 1, serial: true };
    acpi::build(&config, ACPI_TABLES, &mut expected).unwrap();
    assert_eq!(model.at(ACPI_TABLES, expected.len()), expected);
}

#[test]
fn an_elf_kernel_is_moved_into_place_and_its_memory_cleared() {
    let mut model = model(&vmlinux(), &[0x44; 1], b"x");
    assert_eq!(prepare(&mut model), Ok(0x100_0100));
    assert_eq!(model.at(0x100_0000, 0x1000), [0x11; 0x1000]);
    assert_eq!(model.at(0x100_1000, 0x800), [0; 0x800]);
    assert_eq!(model.at(0x120_0000, 0x234), [0x22; 0x234]);
    assert_eq!(model.at(0x120_0234, 0x20_0000 - 0x234), vec![0; 0x20_0000 - 0x234]);
    let params = model.at(BOOT_PARAMS, 4096);
    assert_eq!((params[0x1fe], params[0x1ff], u32_at(params, 0x206)), (0x55, 0xaa, 0x20f));
    assert_eq!((u32_at(params, 0x230), u32_at(params, 0x238)), (0x20_0000, 2047));
    assert!(params[0x264..0x2d0].iter().all(|&byte| byte == 0));
}

/// Every segment moves, through the bytes of the others.
#[test]
fn segments_that_overlap_their_own_file_come_out_right() {
    let bytes = |value: u8| (0..0x3000_u32).map(|index| (index % 251) as u8 ^ value).collect::<Vec<u8>>();
    let kernel = elf(
        0x20_0000,
        &[
            load(0x20_0000, &bytes(1), 0x3000),
            load(0x20_3000, &bytes(2), 0x3000),
            load(0x20_6000, &bytes(3), 0x4000),
        ],
    );
    let mut model = model(&kernel, &[], b"");
    prepare(&mut model).unwrap();
    for (number, address) in [0x20_0000, 0x20_3000, 0x20_6000].into_iter().enumerate() {
        assert_eq!(model.at(address, 0x3000), bytes(number as u8 + 1), "{address:#x}");
    }
    assert_eq!(model.at(0x20_9000, 0x1000), [0; 0x1000]);
}

#[test]
fn without_initrd_command_line_and_host_data_there_are_none() {
    let mut model = model(&bz_image(), &[], b"");
    let wants_none = Manifest { host_data: false, ..manifest(&bz_image(), &[], b"") };
    model.manifest = wants_none.encode();
    model.parameters = Parameters { host_data: [0; 32], ..parameters() }.encode().to_vec();
    prepare(&mut model).unwrap();
    let params = model.at(BOOT_PARAMS, 4096);
    assert_eq!((u64_at(params, 0x218), u64_at(params, 0x250)), (0, 0));
    assert_eq!(model.at(COMMAND_LINE, COMMAND_LINE_MAX + 1), vec![0; COMMAND_LINE_MAX + 1]);
}

/// One bit of any item, or of the manifest's hash of it.
#[test]
fn altered_items_are_told_apart() {
    let (kernel, initrd, line) = (bz_image(), vec![0x44; 5000], b"console=ttyS0".to_vec());
    let hashes = [Reason::KernelHash, Reason::InitrdHash, Reason::CommandLineHash];
    for (number, reason) in hashes.into_iter().enumerate() {
        let length = [&kernel, &initrd, &line][number].len();
        for offset in [0, length / 2, length - 1] {
            let mut model = model(&kernel, &initrd, &line);
            model.window[number].1[offset] ^= 1;
            assert_eq!(prepare(&mut model), Err(reason), "byte {offset}");
        }
        let mut model = model(&kernel, &initrd, &line);
        model.manifest[0x20 + 0x40 * number] ^= 0x80;
        assert_eq!(prepare(&mut model), Err(reason));
    }
}

/// The host shows the right bytes to the first looks and others to those that follow. As each byte is read once, it is
/// the first wrong look that counts, and what is run is what was hashed.
#[test]
fn each_byte_of_the_window_is_read_once() {
    let (kernel, initrd, line) = (bz_image(), [0x44; 5000], b"console=ttyS0");
    let reasons = [Reason::KernelHash, Reason::CommandLineHash, Reason::InitrdHash];
    for (reads, reason) in reasons.into_iter().enumerate() {
        let mut model = Model { change_after: Some(reads), ..model(&kernel, &initrd, line) };
        assert_eq!(prepare(&mut model), Err(reason), "changed after {reads} reads");
    }
    let mut model = Model { change_after: Some(3), ..model(&kernel, &initrd, line) };
    assert_eq!(prepare(&mut model), Ok(0x100_0200));
    assert_eq!(model.reads.get(), 3);
}

#[test]
fn parameters_outside_the_policy_are_told_apart() {
    let good = parameters();
    let cases = [
        (Parameters { memory: 31 * MIB, ..good }, Reason::Memory),
        (Parameters { memory: 129 * MIB, ..good }, Reason::Memory),
        (Parameters { memory: RAM + 4096, ..good }, Reason::Memory),
        (Parameters { memory: u64::MAX, ..good }, Reason::Memory),
        (Parameters { vcpus: 5, ..good }, Reason::Vcpus),
        (Parameters { vcpus: 0, ..good }, Reason::Vcpus),
        (Parameters { virtio_mmio_slots: 65, ..good }, Reason::Devices),
    ];
    for (parameters, reason) in cases {
        let mut model = model(&bz_image(), &[], b"");
        model.parameters = parameters.encode().to_vec();
        assert_eq!(prepare(&mut model), Err(reason), "{parameters:?}");
    }
    let mut wants_none = model(&bz_image(), &[], b"");
    wants_none.manifest = Manifest { host_data: false, ..manifest(&bz_image(), &[], b"") }.encode();
    assert_eq!(prepare(&mut wants_none), Err(Reason::HostData));
    let mut unknown = model(&bz_image(), &[], b"");
    unknown.parameters[0] ^= 1;
    assert_eq!(prepare(&mut unknown), Err(Reason::Parameters));
    unknown.manifest[0] ^= 1;
    assert_eq!(prepare(&mut unknown), Err(Reason::Manifest));
}

/// A protected domain with as much memory.
fn protected(manifest: Manifest, memory: u64, initrd: &[u8], line: &[u8]) -> Model {
    Model {
        ram: vec![0xEE; memory as usize],
        accepted: Some(Vec::new()),
        manifest: manifest.encode(),
        parameters: Parameters { memory, ..parameters() }.encode().to_vec(),
        ..model(&bz_image(), initrd, line)
    }
}

fn units_left(model: &Model) -> Vec<u64> {
    let bitmap = model.at(UNACCEPTED_TABLE + 24, u64_at(model.at(UNACCEPTED_TABLE, 24), 16) as usize);
    let units = 0..bitmap.len() as u64 * 8;
    units.filter(|unit| bitmap[(unit / 8) as usize] >> (unit % 8) & 1 != 0).collect()
}

/// The kernel of `bz_image` is copied to below 16 MiB, and owns 4 MiB from there on.
#[test]
fn a_protected_domain_accepts_what_its_kernel_needs_to_start() {
    let (initrd, line) = ([0x44; 5000], b"console=ttyS0");
    let mut model = protected(manifest(&bz_image(), &initrd, line), 65 * MIB, &initrd, line);
    assert_eq!(prepare(&mut model), Ok(0x100_0200));
    assert!(model.finished);
    let accepted = model.accepted.clone().unwrap();
    assert_eq!(accepted, [0..2 * MIB, 64 * MIB..65 * MIB, 14 * MIB..18 * MIB, 18 * MIB..20 * MIB]);
    assert_eq!(units_left(&model), (1..7).chain(10..32).collect::<Vec<_>>());

    let params = model.at(BOOT_PARAMS, 4096);
    let words: Vec<u32> = (0x1c0..0x1e0).step_by(4).map(|offset| u32_at(params, offset)).collect();
    assert_eq!(words, efi::INFO);
    let mut tables = [0; efi::SIZE];
    efi::build(&mut tables);
    assert_eq!(model.at(EFI_TABLES, efi::SIZE), tables);
    assert_eq!(u64_at(params, 0x250), layout::SNP_CC_NODE);
    // The image wants host data, but the report has them.
    assert_eq!(model.at(COMMAND_LINE, 57), b"swiotlb=4096 efi=noruntime kernelcore=54M console=ttyS0\0\0");
}

/// It ends with the RAM, in a unit that is not the kernel's.
#[test]
fn a_protected_domain_accepts_the_place_of_its_initrd() {
    let initrd = [0x44; 5000];
    let mut model = protected(manifest(&bz_image(), &initrd, b""), 64 * MIB, &initrd, b"");
    prepare(&mut model).unwrap();
    assert_eq!(model.accepted.as_ref().unwrap().last(), Some(&(62 * MIB..64 * MIB)));
    assert_eq!(units_left(&model), (1..7).chain(10..31).collect::<Vec<_>>());
}

#[test]
fn a_protected_domain_accepts_all_memory_if_its_kernel_cannot() {
    let line = b"console=ttyS0";
    let all = Manifest { accept_all: true, ..manifest(&bz_image(), &[], line) };
    let mut model = protected(all, 65 * MIB, &[], line);
    assert_eq!(prepare(&mut model), Ok(0x100_0200));
    assert_eq!(model.accepted.clone().unwrap(), [0..2 * MIB, 2 * MIB..65 * MIB]);
    assert_eq!(units_left(&model), []);
    assert_eq!(model.at(BOOT_PARAMS + 0x1c0, 32), [0; 32]);
    assert_eq!(model.at(EFI_TABLES, 4), [0xEE; 4]);
    assert_eq!(model.at(COMMAND_LINE, 27), b"swiotlb=4096 console=ttyS0\0");
}

/// Wherever memory cannot be accepted, the domain ends.
#[test]
fn memory_that_cannot_be_accepted_ends_the_domain() {
    let (initrd, line) = ([0x44; 5000], b"console=ttyS0");
    let manifest = manifest(&bz_image(), &initrd, line);
    for accept_all in [false, true] {
        for units in 0..3 {
            let mut model = protected(Manifest { accept_all, ..manifest }, 64 * MIB, &initrd, line);
            model.accept_at_most = (1 + units) * acceptance::UNIT;
            assert_eq!(prepare(&mut model), Err(Reason::PageInvalid), "{accept_all} {units}");
        }
    }
}

#[test]
fn an_unprotected_domain_has_no_tables_of_memory() {
    let mut model = model(&bz_image(), &[], b"x");
    prepare(&mut model).unwrap();
    assert_eq!(model.at(BOOT_PARAMS + 0x1c0, 32), [0; 32]);
    assert_eq!(model.at(EFI_TABLES, 0x3000), [0xEE; 0x3000]);
    assert!(model.finished);
}

/// With what is put before it.
#[test]
fn a_command_line_must_fit_the_kernel() {
    let before = b"swiotlb=4096 efi=noruntime kernelcore=54M ".len();
    for (room, expected) in [(0, Err(Reason::CommandLine)), (1, Ok(0x100_0200))] {
        let max = (before + room) as u32;
        let kernel = patch(bz_image(), 0x238, &max.to_le_bytes());
        let mut model = protected(manifest(&kernel, &[], b"x"), 64 * MIB, &[], b"x");
        model.window[0].1 = kernel;
        assert_eq!(prepare(&mut model), expected);
    }
}

/// With what is put behind it, which an image without a command line gets too.
#[test]
fn host_data_must_fit_the_kernel() {
    for line in [&b""[..], b"console=ttyS0"] {
        for (room, expected) in [(84, Err(Reason::CommandLine)), (85, Ok(0x100_0200))] {
            let kernel = patch(bz_image(), 0x238, &(line.len() as u32 + room).to_le_bytes());
            let mut model = model(&kernel, &[], line);
            assert_eq!(prepare(&mut model), expected);
            if expected.is_ok() {
                assert_eq!(model.at(COMMAND_LINE, line.len()), line);
                assert_eq!(model.at(COMMAND_LINE + line.len() as u64, 21), b" cofferdam.host_data=");
            }
        }
    }
}

/// What the builder of an image would not do: the manifest is measured, so only a mistake makes these.
#[test]
fn manifests_that_do_not_fit_their_kernel_are_refused() {
    let kernel = bz_image();
    let refused = |manifest: Manifest, kernel: &[u8]| {
        let mut model = model(kernel, &[0x44; 5000], b"console=ttyS0");
        model.manifest = manifest.encode();
        prepare(&mut model).unwrap_err()
    };
    let good = manifest(&kernel, &[0x44; 5000], b"console=ttyS0");
    let at = |address| Manifest { kernel: manifest::Kernel { address, ..good.kernel }, ..good };
    assert_eq!(refused(at(good.kernel.address - 1), &kernel), Reason::KernelPlace, "would have to move up");
    assert_eq!(refused(at(RAM - 0x1000), &kernel), Reason::KernelPlace, "ends behind the RAM");
    assert_eq!(refused(at(128 * MIB), &kernel), Reason::KernelPlace, "begins behind the RAM");
    let elf = manifest::Kernel { format: KernelFormat::Elf, ..good.kernel };
    assert_eq!(refused(Manifest { kernel: elf, ..good }, &kernel), Reason::KernelFormat);
    let text = b"not a kernel".repeat(100);
    assert_eq!(refused(manifest(&text, &[], b""), &text), Reason::KernelFormat);
    let large = patch(kernel.clone(), 0x260, &(60 * MIB as u32).to_le_bytes());
    assert_eq!(refused(manifest(&large, &[], b""), &large), Reason::KernelPlace, "init_size");
    let nearly = patch(kernel.clone(), 0x260, &(47 * MIB as u32 + 0xF_F000).to_le_bytes());
    assert_eq!(refused(manifest(&nearly, &[0x44; 5000], b""), &nearly), Reason::InitrdPlace);
    let short = patch(kernel, 0x238, &5_u32.to_le_bytes());
    assert_eq!(refused(manifest(&short, &[], b"console=ttyS0"), &short), Reason::CommandLine);
}
