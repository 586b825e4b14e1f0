//! The first stage, on a parameter page, a kernel and a launch manifest that somebody made up.
//!
//! The manifest's hashes are right, so that the headers of the kernel are read; everything else in it may be anything.
//! Holds: the domain is refused for a reason, or the kernel's entry is in memory that belongs to it. Whatever is written
//! lies in the RAM of which the parameters speak, and nothing of the first stage or of its image is overwritten. The
//! window is read only where the manifest says, and each item once. The kernel is told of no memory that is not there, and
//! of an initrd that lies in the RAM and not in the kernel. (`launch_pages` and `kernel_headers` look closer at each input
//! alone.)
#![no_main]

use std::cell::RefCell;
use std::ops::Range;

use arbitrary::Arbitrary;
use cofferdam_firmware::acceptance::UNIT;
use cofferdam_firmware::boot;
use cofferdam_firmware::first_stage::{Platform, prepare};
use cofferdam_firmware::layout::{
    BOOT_PARAMS, COMMAND_LINE, GAP_END, GAP_START, LOAD_WINDOW, LOAD_WINDOW_SIZE, MIB, PARAMETER_PAGE, STAGE,
    ram_ranges,
};
use cofferdam_firmware::manifest::{self, Item, Kernel, KernelFormat, Manifest};
use cofferdam_firmware::parameters::{self, Parameters};
use cofferdam_firmware::reason::Reason;
use cofferdam_firmware::sha256::Method;
use cofferdam_fuzz::kernel as file;
use cofferdam_fuzz::pages::{ManifestPatch, ParameterPatch};
use libfuzzer_sys::fuzz_target;

/// RAM of the model. What is beyond is RAM too, if the parameters say so, but holds nothing.
const RAM: u64 = 36 * MIB;
const INITRD: u64 = LOAD_WINDOW + 64 * MIB;
const LINE: u64 = LOAD_WINDOW + 128 * MIB;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    kernel: file::File<'a>,
    /// Added to the place to which the kernel is copied.
    copy: i32,
    other_format: bool,
    protected: bool,
    accept_all: bool,
    initrd: u16,
    line: u16,
    parameters: Vec<ParameterPatch>,
    manifest: Vec<ManifestPatch>,
}

thread_local! {
    static MEMORY: RefCell<Vec<u8>> = RefCell::new(vec![0; RAM as usize]);
}

struct Model<'a> {
    ram: &'a mut [u8],
    manifest: [u8; manifest::SIZE],
    parameters: [u8; parameters::SIZE],
    memory: u64,
    /// Memory that was accepted, of a protected domain.
    accepted: Option<Vec<Range<u64>>>,
    window: [(u64, &'a [u8]); 3],
    /// Addresses and sizes in the window that are yet to be read.
    unread: Vec<(u64, u64)>,
}

impl Model<'_> {
    fn check(&self, address: u64, length: u64) {
        let end = address.checked_add(length).unwrap();
        assert!(
            end <= STAGE || address >= COMMAND_LINE,
            "writes {length:#x} bytes at {address:#x}, which are its own"
        );
        assert!(
            end <= self.memory.min(GAP_START).max(MIB),
            "writes {length:#x} bytes at {address:#x}, where no RAM is"
        );
        let Some(accepted) = &self.accepted else { return };
        let mut at = address;
        while at < end {
            at = accepted.iter().find(|range| range.contains(&at)).expect("writes what is not accepted").end;
        }
    }
}

impl Platform for Model<'_> {
    fn start(&mut self) -> Result<(), Reason> {
        if let Some(accepted) = &mut self.accepted {
            accepted.push(0..UNIT);
        }
        Ok(())
    }

    fn must_accept(&self) -> bool {
        self.accepted.is_some()
    }

    fn accept(&mut self, memory: Range<u64>) -> Result<(), Reason> {
        let ram = ram_ranges(self.memory);
        let inside = ram.iter().any(|(start, length)| *start <= memory.start && memory.end <= start + length);
        assert!(inside && !memory.is_empty(), "accepts {memory:#x?}, which is no RAM");
        let accepted = self.accepted.as_mut().unwrap();
        let again = accepted.iter().any(|other| memory.start < other.end && other.start < memory.end);
        assert!(!again, "accepts {memory:#x?} twice");
        accepted.push(memory);
        Ok(())
    }

    fn finish(&mut self) -> Result<u64, Reason> {
        Ok(0)
    }

    fn launch_manifest(&self) -> &[u8; manifest::SIZE] {
        &self.manifest
    }

    fn memory(&mut self, address: u64, length: u64) -> &mut [u8] {
        self.check(address, length);
        self.ram.get_mut(address as usize..(address + length) as usize).unwrap_or_default()
    }

    fn copy(&mut self, from: u64, to: u64, length: u64) {
        if from == PARAMETER_PAGE {
            self.ram[to as usize..][..length as usize].copy_from_slice(&self.parameters[..length as usize]);
            return;
        }
        self.check(to, length);
        if from < LOAD_WINDOW {
            assert!(to <= from || from + length <= to, "moves up through itself");
            if from + length <= RAM && to + length <= RAM {
                self.ram.copy_within(from as usize..(from + length) as usize, to as usize);
            }
            return;
        }
        assert!(from + length <= LOAD_WINDOW + LOAD_WINDOW_SIZE);
        let item = self.unread.iter().position(|item| *item == (from, length));
        self.unread.remove(item.expect("reads the window where the manifest does not say, or twice"));
        let Some(place) = self.ram.get_mut(to as usize..(to + length) as usize) else { return };
        place.fill(0);
        for (start, bytes) in self.window {
            let offset = from.wrapping_sub(start) as usize;
            if from >= start && offset < bytes.len() {
                let bytes = &bytes[offset..];
                let length = bytes.len().min(place.len());
                place[..length].copy_from_slice(&bytes[..length]);
            }
        }
    }

    fn cpuid(&self, _leaf: u32, _subleaf: u32) -> [u32; 4] {
        [0; 4]
    }

    fn console(&mut self, _byte: u8) {}

    fn terminate(&mut self, reason: Reason) -> ! {
        panic!("nobody asked to be stopped for {reason}")
    }
}

/// What a kernel reads of `boot_params` before anything else.
fn check_boot_params(page: &[u8], memory: u64, kernel: &boot::Kernel, at: u64) {
    let u32_at = |offset: usize| u64::from(u32::from_le_bytes(*page[offset..].first_chunk().unwrap()));
    let u64_at = |offset: usize| u64::from_le_bytes(*page[offset..].first_chunk().unwrap());
    let (initrd, size) = (u32_at(0x218), u32_at(0x21c));
    let end = memory.min(GAP_START);
    assert!(size == 0 || kernel.memory(at).end <= initrd && initrd + size <= end.min(kernel.initrd_limit));
    let mut last = 0;
    for entry in (0x2d0..).step_by(20).take(page[0x1e8].into()) {
        let (start, size) = (u64_at(entry), u64_at(entry + 8));
        let is_ram = start + size <= end || start == GAP_END && size == memory - GAP_START;
        assert!(start >= last && size > 0 && is_ram);
        last = start + size;
    }
    assert!(last >= end);
}

fuzz_target!(|input: Input| {
    let kernel = input.kernel.bytes();
    let headers = boot::Kernel::read(&kernel, kernel.len() as u64);
    if let Err(error) = &headers {
        assert!(!error.to_string().is_empty());
    }
    let address = headers.as_ref().map_or(16 * MIB, boot::Kernel::copy_address);
    let format = headers.as_ref().map_or(KernelFormat::Elf, boot::Kernel::format);
    let format = match (format, input.other_format) {
        (KernelFormat::Elf, false) | (KernelFormat::BzImage, true) => KernelFormat::Elf,
        _ => KernelFormat::BzImage,
    };
    let (initrd, line) =
        (vec![0x44; usize::from(input.initrd) % 0x3000], vec![b'x'; usize::from(input.line) % 2200]);
    let item = |address, bytes: &[u8]| match bytes.len() as u64 {
        0 => Item::default(),
        size => Item { address, size, sha256: Method::detect().digest(bytes) },
    };
    let mut page = Manifest {
        kernel: Kernel {
            file: item(LOAD_WINDOW, &kernel),
            format,
            address: address.wrapping_add_signed(input.copy.into()),
        },
        initrd: item(INITRD, &initrd),
        command_line: item(LINE, &line),
        max_vcpus: 8,
        min_memory: 32 * MIB,
        max_memory: 64 << 30,
        host_data: true,
        accept_all: input.accept_all,
    }
    .encode();
    input.manifest.iter().for_each(|patch| patch.apply(&mut page));
    let mut bytes = Parameters {
        memory: RAM,
        vcpus: 2,
        virtio_mmio_slots: 3,
        serial: true,
        sha_instructions: false,
        host_data: [1; 32],
    }
    .encode();
    input.parameters.iter().for_each(|patch| patch.apply(&mut bytes));
    let memory = u64::from_le_bytes(*bytes[0x10..].first_chunk().unwrap());
    let decoded = Manifest::decode(&page);
    let items = decoded.iter().flat_map(|page| [page.kernel.file, page.initrd, page.command_line]);
    let unread = items.filter(|item| item.size > 0).map(|item| (item.address, item.size)).collect();
    MEMORY.with_borrow_mut(|ram| {
        let window = [(LOAD_WINDOW, &kernel[..]), (INITRD, &initrd), (LINE, &line)];
        let accepted = input.protected.then(Vec::new);
        let mut model = Model { ram, manifest: page, parameters: bytes, memory, accepted, window, unread };
        match prepare(&mut model) {
            Err(reason) => assert_eq!(Reason::from_code(reason.code()), Some(reason)),
            Ok(entry) => {
                let (kernel, manifest) = (headers.unwrap(), decoded.unwrap());
                assert!(kernel.segments().any(|segment| {
                    (segment.address..segment.address + segment.memory_size).contains(&entry)
                }));
                assert!(manifest.memory().contains(&memory) && model.unread.is_empty());
                let page = &model.ram[BOOT_PARAMS as usize..][..0x1000];
                check_boot_params(page, memory, &kernel, manifest.kernel.address);
            }
        }
    });
});
