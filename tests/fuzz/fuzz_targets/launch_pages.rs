//! The two pages that tell the first stage what it may start and where: the parameter page, which nobody measures, and
//! the launch manifest.
//!
//! Holds: a manifest is refused in words, or is the same when it is written again, with everything in it inside the load
//! window and the bounds of any domain. Parameters are taken exactly if each of their fields is what the manifest allows,
//! by rules that are written here a second time; and then there are ACPI tables and a memory map for them.
#![no_main]

use arbitrary::Arbitrary;
use cofferdam_firmware::layout::{
    ACPI_TABLES, ACPI_TABLES_SIZE, GAP_END, GAP_START, LOAD_WINDOW, LOAD_WINDOW_SIZE, MAX_MEMORY, MAX_VCPUS,
    MIB, MIN_MEMORY, VIRTIO_MMIO_SLOTS,
};
use cofferdam_firmware::manifest::{self, Item, Kernel, KernelFormat, Manifest};
use cofferdam_firmware::parameters::{self, Parameters};
use cofferdam_firmware::{acpi, e820};
use cofferdam_fuzz::pages::{ManifestPatch, ParameterPatch};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    manifest: Vec<ManifestPatch>,
    no_host_data: bool,
    page: Page<'a>,
}

#[derive(Arbitrary, Debug)]
enum Page<'a> {
    Raw(&'a [u8]),
    Patched(Vec<ParameterPatch>),
}

fn good_manifest(host_data: bool) -> Manifest {
    let item = |address, size| Item { address, size, sha256: [0x5A; 32] };
    Manifest {
        kernel: Kernel {
            file: item(LOAD_WINDOW, 14 << 20),
            format: KernelFormat::BzImage,
            address: 16 << 20,
        },
        initrd: item(LOAD_WINDOW + (14 << 20), 5001),
        command_line: item(LOAD_WINDOW + (15 << 20), 43),
        max_vcpus: 8,
        min_memory: 128 * MIB,
        max_memory: 8 << 30,
        host_data,
        accept_all: false,
    }
}

fn check_manifest(page: &[u8; manifest::SIZE], read: &Manifest) {
    assert_eq!(read.encode(), *page);
    let Manifest { kernel, initrd, command_line, .. } = read;
    for item in [&kernel.file, initrd, command_line].into_iter().filter(|item| item.size > 0) {
        assert!(item.address >= LOAD_WINDOW && item.address % 4096 == 0);
        assert!(item.address + item.size <= LOAD_WINDOW + LOAD_WINDOW_SIZE);
    }
    assert!(kernel.file.size > 0 && command_line.size <= 2048);
    assert!(kernel.address >= MIB && kernel.address + kernel.file.size <= GAP_START);
    assert!(read.max_vcpus >= 1 && read.max_vcpus <= MAX_VCPUS);
    assert!(read.min_memory >= MIN_MEMORY && read.max_memory <= MAX_MEMORY);
    assert!(read.min_memory <= read.max_memory && (read.min_memory | read.max_memory) % MIB == 0);
}

/// Whether the manifest allows these parameters.
fn allowed(bytes: &[u8; parameters::SIZE], manifest: &Manifest) -> bool {
    let u32_at = |offset: usize| u32::from_le_bytes(*bytes[offset..].first_chunk().unwrap());
    let memory = u64::from(u32_at(0x10)) | u64::from(u32_at(0x14)) << 32;
    bytes.starts_with(b"COFFERPP")
        && u32_at(8) == 1
        && u32_at(0xC) < 4
        && memory % MIB == 0
        && memory >= manifest.min_memory
        && memory <= manifest.max_memory
        && u32_at(0x18) >= 1
        && u32_at(0x18) <= manifest.max_vcpus.into()
        && u32_at(0x1C) <= VIRTIO_MMIO_SLOTS.into()
        && (manifest.host_data || bytes[0x20..] == [0; 32])
}

/// What the first stage makes of parameters.
fn check_use(parameters: &Parameters) {
    let mut tables = vec![0; ACPI_TABLES_SIZE as usize];
    let config = acpi::Config {
        vcpus: parameters.vcpus,
        virtio_mmio_slots: parameters.virtio_mmio_slots,
        serial: parameters.serial,
    };
    let length = acpi::build(&config, ACPI_TABLES, &mut tables).unwrap();
    assert!(length <= tables.len() && tables.starts_with(b"RSD PTR "));
    let (mut last, mut ram) = (0, 0);
    for range in e820::map(parameters.memory) {
        assert!(range.size > 0 && range.address >= last);
        last = range.address + range.size;
        assert!(last <= GAP_START || range.address >= GAP_END);
        ram += if range.kind == e820::RAM { range.size } else { 0 };
    }
    assert_eq!(ram + 0x7_0000, parameters.memory, "all but the hole below 1 MiB");
}

fuzz_target!(|input: Input| {
    let good = good_manifest(!input.no_host_data);
    let mut page = good.encode();
    input.manifest.iter().for_each(|patch| patch.apply(&mut page));
    let manifest = match Manifest::decode(&page) {
        Ok(manifest) => {
            check_manifest(&page, &manifest);
            manifest
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            good
        }
    };
    let host_data = if manifest.host_data { [1; 32] } else { [0; 32] };
    let mut bytes = Parameters {
        memory: manifest.min_memory,
        vcpus: 1,
        virtio_mmio_slots: 3,
        serial: true,
        sha_instructions: false,
        host_data,
    }
    .encode();
    match input.page {
        Page::Raw(raw) => bytes.iter_mut().zip(raw).for_each(|(to, from)| *to = *from),
        Page::Patched(patches) => patches.iter().for_each(|patch| patch.apply(&mut bytes)),
    }
    let decoded = Parameters::decode(&bytes, &manifest);
    assert_eq!(decoded.is_ok(), allowed(&bytes, &manifest), "{decoded:?}");
    match decoded {
        Ok(parameters) => {
            assert_eq!(parameters.encode(), bytes);
            assert_eq!(parameters.check(&manifest), Ok(()));
            check_use(&parameters);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
