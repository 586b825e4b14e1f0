//! The first stage, on a parameter page, a kernel and a launch manifest that somebody made up.
//!
//! The manifest's hashes are right, so that the headers of the kernel are read; everything else in it may be anything.
//! Holds: the domain is refused for a reason, or the kernel's entry is in memory that belongs to it. Whatever is written
//! lies in the RAM of which the parameters speak, and nothing of the first stage or of its image is overwritten. The
//! window is read only where the manifest says, and each byte once.
#![no_main]

use std::cell::RefCell;
use std::ops::Range;

use arbitrary::Arbitrary;
use cofferdam_firmware::acceptance::UNIT;
use cofferdam_firmware::boot;
use cofferdam_firmware::first_stage::{Platform, prepare};
use cofferdam_firmware::layout::{
    COMMAND_LINE, GAP_START, LOAD_WINDOW, LOAD_WINDOW_SIZE, MIB, PARAMETER_PAGE, STAGE, ram_ranges,
};
use cofferdam_firmware::manifest::{self, Item, Kernel, KernelFormat, Manifest};
use cofferdam_firmware::parameters::{self, Parameters};
use cofferdam_firmware::reason::Reason;
use cofferdam_firmware::sha256::Method;
use cofferdam_fuzz::kernel::{bz_image, vmlinux};
use libfuzzer_sys::fuzz_target;

/// RAM of the model. What is beyond is RAM too, if the parameters say so, but holds nothing.
const RAM: u64 = 36 * MIB;
const INITRD: u64 = LOAD_WINDOW + 64 * MIB;
const LINE: u64 = LOAD_WINDOW + 128 * MIB;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    base: Base<'a>,
    patches: Vec<(u16, u64, u8)>,
    keep: Option<u16>,
    /// Added to the place to which the kernel is copied.
    copy: i32,
    other_format: bool,
    protected: bool,
    accept_all: bool,
    initrd: u16,
    line: u16,
    parameters: Vec<(u8, u64)>,
    manifest: Vec<(u8, u64)>,
}

#[derive(Arbitrary, Debug)]
enum Base<'a> {
    Raw(&'a [u8]),
    Elf,
    BzImage,
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
    read: Vec<(u64, u64)>,
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
        assert!(!self.read.contains(&(from, length)), "reads the window twice");
        self.read.push((from, length));
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

fn patch(bytes: &mut [u8], offset: usize, value: u64, size: usize) {
    for (place, byte) in bytes.iter_mut().skip(offset).zip(&value.to_le_bytes()[..size]) {
        *place = *byte;
    }
}

fuzz_target!(|input: Input| {
    let mut kernel = match input.base {
        Base::Raw(bytes) => bytes.to_vec(),
        Base::Elf => vmlinux(),
        Base::BzImage => bz_image(),
    };
    for &(offset, value, size) in &input.patches {
        patch(&mut kernel, usize::from(offset % 0x300), value, 1 << (size % 4));
    }
    kernel.truncate(input.keep.map_or(usize::MAX, usize::from));
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
    let (initrd, line) = (vec![0x44; input.initrd.into()], vec![b'x'; usize::from(input.line) % 2200]);
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
    for &(offset, value) in &input.manifest {
        patch(&mut page, offset.into(), value, 8);
    }
    let mut bytes = Parameters {
        memory: RAM,
        vcpus: 2,
        virtio_mmio_slots: 3,
        serial: true,
        sha_instructions: false,
        host_data: [1; 32],
    }
    .encode();
    for &(offset, value) in &input.parameters {
        patch(&mut bytes, usize::from(offset) % parameters::SIZE, value, 8);
    }
    let memory = u64::from_le_bytes(*bytes[0x10..].first_chunk().unwrap());
    MEMORY.with_borrow_mut(|ram| {
        let window = [(LOAD_WINDOW, &kernel[..]), (INITRD, &initrd), (LINE, &line)];
        let accepted = input.protected.then(Vec::new);
        let mut model = Model { ram, manifest: page, parameters: bytes, memory, accepted, window, read: Vec::new() };
        match prepare(&mut model) {
            Err(reason) => assert_eq!(Reason::from_code(reason.code()), Some(reason)),
            Ok(entry) => {
                let kernel = headers.unwrap();
                assert!(kernel.segments().any(|segment| {
                    (segment.address..segment.address + segment.memory_size).contains(&entry)
                }));
            }
        }
    });
});
