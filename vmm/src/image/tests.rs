use std::path::Path;
use std::sync::Arc;

use cofferdam_confidential::host;
use cofferdam_confidential::image::importer::{
    Content, Importer, Item, PAGE, PageKind, PageRun, Parameter, ParameterArea, ParameterKind, VcpuContext,
};
use cofferdam_confidential::plain::Plain;
use cofferdam_firmware::layout::{LOAD_WINDOW, MIB, PARAMETER_PAGE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::live::{Import, LiveImporter, Machine};
use super::*;
use crate::boot::testing::file;

const SIZE: u64 = 2 * MIB;

fn parameters() -> Parameters {
    Parameters {
        memory: SIZE,
        vcpus: 3,
        virtio_mmio_slots: 0,
        serial: true,
        sha_instructions: false,
        host_data: [9; 32],
    }
}

/// What becomes of `items` in a domain of 2 MiB and 3 vCPUs.
fn import(
    items: &[Item<'_>],
    mapped: &[Range<usize>],
) -> (Arc<GuestMemoryMmap>, Result<Import, ImportError>) {
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), SIZE as usize)]).unwrap());
    let kvm = host::require(Path::new("/dev/kvm")).unwrap();
    let launch = Launch::new(&kvm, Box::new(Plain)).unwrap();
    let mut launch = launch.add_memory(memory.clone()).unwrap();
    let (parameters, mut cpuid) = (parameters(), CpuTemplate::new(&kvm, 3).unwrap());
    let machine = Machine { memory: SIZE, vcpus: 3 };
    let mut live = LiveImporter::new(&mut launch, machine, &mut cpuid, mapped, None, Some(&parameters));
    let result = items.iter().try_for_each(|item| live.import(1, item));
    let import = result.map(|()| live.finish());
    (memory, import)
}

fn refusal(item: Item<'_>) -> String {
    match import(&[item], &[]).1 {
        Ok(_) => panic!("taken"),
        Err(error) => error.to_string(),
    }
}

fn run(gpa: u64, pages: u64, kind: PageKind, bytes: &[u8]) -> Item<'_> {
    Item::Pages(PageRun { gpa, pages, kind, content: Content { bytes, file_offset: None } })
}

fn area(gpa: u64, kind: ParameterKind, offset: u32) -> Item<'static> {
    let values = vec![Parameter { kind, offset }];
    Item::Parameters(ParameterArea {
        gpa,
        pages: 1,
        initial: Content { bytes: &[7; 8], file_offset: None },
        values,
    })
}

#[test]
fn private_pages_are_copied_to_ram() {
    let last = SIZE - 4096;
    let items = [run(0x1_0000, 2, PageKind::Measured, &[5; 5000]), run(last, 1, PageKind::Unmeasured, &[6])];
    let (memory, import) = import(&items, &[]);
    assert!(import.unwrap().slots.is_empty());
    let read = |address| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
    assert_eq!([read(0x1_0000), read(0x1_1387), read(0x1_1388), read(last)], [5, 5, 0, 6]);
}

#[test]
fn what_has_no_memory_is_refused() {
    for (gpa, pages) in [(SIZE, 1), (SIZE - 4096, 2), (1 << 32, 1), (u64::MAX - 4095, 1), (0, u64::MAX >> 12)]
    {
        let message = refusal(run(gpa, pages, PageKind::Measured, &[]));
        assert!(message.ends_with("there is no memory in a domain of 2 MiB"), "{message}");
        let required = refusal(Item::RequiredMemory { gpa, length: pages << 12 });
        assert!(required.contains("there is no memory"), "{required}");
    }
    // The window is for shared pages.
    assert!(refusal(run(LOAD_WINDOW, 1, PageKind::Measured, &[])).contains("there is no memory"));
    assert!(refusal(run(LOAD_WINDOW - 4096, 2, PageKind::Shared, &[])).contains("there is no memory"));
    let (_, good) = import(&[Item::RequiredMemory { gpa: 0, length: SIZE }], &[]);
    assert!(good.is_ok());
}

#[test]
fn the_window_is_on_the_mapped_file_where_that_is_possible() {
    let image = file(&[3; 3 * PAGE + 5]);
    let mapped = MappedFile::new(&ImageFile::open(image.path().into()).unwrap()).unwrap();
    let (bytes, start) = (mapped.bytes(), mapped.range().start as u64);
    let slot = |bytes: &[u8], pages| {
        let (_, import) = import(&[run(LOAD_WINDOW, pages, PageKind::Shared, bytes)], &[mapped.range()]);
        let import = import?;
        assert!(import.slots[0].read_only && import.slots[0].length == pages << 12);
        Ok::<_, ImportError>((import.slots[0].host_address, import.copies.len()))
    };
    assert_eq!(slot(bytes, 4).unwrap(), (start, 0));
    assert_eq!(slot(&bytes[PAGE..2 * PAGE], 1).unwrap(), (start + 4096, 0));
    // Not whole pages, not aligned, longer than the file: these would have to be copied, and nobody looks into a mapping.
    for (bytes, pages) in [(&bytes[..100], 1), (&bytes[8..PAGE + 8], 1), (bytes, 5)] {
        assert!(slot(bytes, pages).unwrap_err().to_string().starts_with("a copy of what is to be mapped"));
    }
    let (address, copies) = slot(b"quiet", 1).unwrap();
    assert!(copies == 1 && address != start);
    let large = vec![0; 17 << 20];
    assert!(slot(&large, 17 << 8).unwrap_err().to_string().contains("too many to be copied"));
}

#[test]
fn firmware_of_others_gets_memory_below_4_gib() {
    let (_, import) = import(&[run(0xFFC0_0000, 1024, PageKind::Measured, &[1; PAGE])], &[]);
    let import = import.unwrap();
    assert_eq!((import.slots[0].guest_address, import.slots[0].length), (0xFFC0_0000, 4 << 20));
    assert!(!import.slots[0].read_only && import.copies.len() == 1);
}

#[test]
fn our_parameter_page_says_what_the_domain_is() {
    let (memory, import) = import(&[area(PARAMETER_PAGE, ParameterKind::VcpuCount, 256)], &[]);
    import.unwrap();
    let mut page = [0; 260];
    memory.read_slice(&mut page, GuestAddress(PARAMETER_PAGE)).unwrap();
    assert_eq!(page[..64], parameters().encode());
    assert_eq!(page[256..], [3, 0, 0, 0]);
}

#[test]
fn the_memory_map_of_others_ends_with_an_empty_entry() {
    let (memory, import) = import(&[area(0x1000, ParameterKind::MemoryMap, 0)], &[]);
    import.unwrap();
    let word = |offset: u64| memory.read_obj::<u64>(GuestAddress(0x1000 + offset)).unwrap();
    let entries = [0, 24, 48, 72, 96, 120].map(|entry| (word(entry), word(entry + 8), word(entry + 16)));
    let expected =
        [(0, 0x90, 0), (0x90, 0x50, 1), (0xe0, 0x1f, 1), (0xff, 1, 1), (0x100, 0x100, 0), (0, 0, 0)];
    assert_eq!(entries, expected);
}

#[test]
fn parameters_that_are_not_offered_or_do_not_fit_are_named() {
    let madt = refusal(area(0x1000, ParameterKind::Madt, 0));
    assert_eq!(madt, "the parameter madt is not offered by this monitor");
    let place = refusal(area(0x1000, ParameterKind::VcpuCount, 4093));
    assert_eq!(place, "the parameter vcpu_count at offset 0xffd does not fit into its area at 0x1000");
}

#[test]
fn the_first_vcpu_has_registers_once() {
    let context = || VcpuContext::NativeX64(Box::default());
    let vcpu = |index| Item::Vcpu { index, context: context() };
    assert!(import(&[vcpu(0)], &[]).1.is_ok());
    assert!(refusal(vcpu(1)).contains("vCPU 1"));
    assert!(import(&[vcpu(0), vcpu(0)], &[]).1.is_err());
    let vmsa = VcpuContext::SnpVmsa { gpa: 0, vmsa: &[0; PAGE] };
    assert_eq!(
        refusal(Item::Vcpu { index: 0, context: vmsa }),
        "a vCPU of another platform in a plain domain"
    );
    assert_eq!(refusal(run(0x1000, 1, PageKind::SnpSecrets, &[])), "a page of SEV-SNP in a plain domain");
}
