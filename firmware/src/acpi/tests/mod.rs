//! Tests of the tables as a whole: read back by an independent parser, compared
//! with what the `acpi_tables` crate makes, and compiled by Intel's `iasl`.

mod parser;
mod reference;

use std::fs;
use std::process::Command;

use proptest::prelude::*;

use super::*;
use crate::layout::*;
use parser::{Memory, Object, Parsed, Resource, u16_at, u32_at, u64_at};

const LARGEST: Config = Config { vcpus: MAX_VCPUS, virtio_mmio_slots: VIRTIO_MMIO_SLOTS, serial: true };

fn built(config: &Config, base: u64) -> Vec<u8> {
    let mut out = vec![0xAA; ACPI_TABLES_SIZE as usize];
    let length = build(config, base, &mut out).unwrap();
    assert!(out[length..].iter().all(|&byte| byte == 0xAA), "something was written behind the tables");
    out.truncate(length);
    out
}

fn parsed(bytes: &[u8]) -> Parsed<'_> {
    Memory { base: ACPI_TABLES, bytes }.parse()
}

/// An 8-bit register in I/O space, as a generic address structure.
fn register(port: u16) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![1, 8, 0, 1, low, high, 0, 0, 0, 0, 0, 0]
}

#[test]
fn the_fadt_names_the_reset_and_sleep_registers() {
    let bytes = built(&LARGEST, ACPI_TABLES);
    let fadt = parsed(&bytes).fadt;
    assert_eq!((fadt.len(), fadt[8], fadt[131]), (276, 6, 4), "length and revision");
    assert_eq!((u32_at(fadt, 36), u64_at(fadt, 132)), (0, 0), "no FACS");
    assert_eq!(u16_at(fadt, 109), 0x24, "no VGA, no CMOS clock, no keyboard controller");
    let flags = u32_at(fadt, 112);
    for (bit, name) in
        [(20, "hardware-reduced"), (10, "reset register"), (4, "power button is a device"), (0, "wbinvd")]
    {
        assert_ne!(flags & 1 << bit, 0, "{name}");
    }
    assert_eq!((&fadt[116..128], fadt[128]), (&register(0x602)[..], 0x52));
    assert_eq!(fadt[244..256], register(0x600), "sleep control");
    assert_eq!(fadt[256..268], register(0x601), "sleep status");
    assert_eq!(fadt[268..276], *b"COFFERDM");
    assert_eq!(fadt[148..244], [0; 96], "no event, control, timer or GPE blocks");
}

#[test]
fn the_madt_has_an_apic_per_vcpu() {
    for vcpus in [1, 2, 31, 32] {
        let bytes = built(&Config { vcpus, ..LARGEST }, ACPI_TABLES);
        let madt = parsed(&bytes).madt;
        assert_eq!((u32_at(madt, 36), u32_at(madt, 40)), (0xFEE0_0000, 0), "address and flags");
        assert_eq!(madt[44..56], [1, 12, 0, 0, 0, 0, 0xC0, 0xFE, 0, 0, 0, 0], "I/O APIC");
        let expected: Vec<u8> = (0..vcpus).flat_map(|index| [0, 8, index, index, 1, 0, 0, 0]).collect();
        assert_eq!(madt[56..], expected);
    }
}

#[test]
fn the_dsdt_describes_the_fixed_devices() {
    let bytes = built(&Config { vcpus: 1, virtio_mmio_slots: 0, serial: true }, ACPI_TABLES);
    let dsdt = parsed(&bytes).dsdt;
    assert_eq!(dsdt[8], 2, "revision");
    let namespace = parser::namespace(&dsdt[36..]);
    let text = |text: &str| Object::Text(text.to_string());
    let edge = |number| Resource::Interrupt { number, flags: 0b0011 };
    let ports = |first, length| Resource::Ports { first, last_first: first, alignment: 1, length };

    assert_eq!(namespace["\\_S5_"], Object::Package([5, 0, 0, 0].map(Object::Integer).to_vec()));
    assert_eq!(namespace["\\_SB_.PWRB._HID"], Object::Integer(0x0C0C_D041));
    assert_eq!(namespace["\\_SB_.GED_._HID"], text("ACPI0013"));
    assert_eq!(parser::resources(&namespace["\\_SB_.GED_._CRS"]), [edge(5)]);
    assert_eq!(namespace["\\_SB_.GED_.EVTR"], Object::Ports { first: 0x604, length: 4 });
    let field = Object::Field { region: "\\_SB_.GED_.EVTR".to_string(), flags: 3, bits: 32 };
    assert_eq!(namespace["\\_SB_.GED_.EVTS"], field);
    let code = [b"\x70EVTS\x60".as_slice(), b"\xA0\x0C\x7B\x60\x01\x00\x86PWRB\x0A\x80"].concat();
    assert_eq!(namespace["\\_SB_.GED_._EVT"], Object::Method { flags: 0b1001, code });
    assert_eq!(namespace["\\_SB_.PVPN._HID"], text("QEMU0001"));
    assert_eq!(namespace["\\_SB_.PVPN._STA"], Object::Integer(0xF));
    assert_eq!(parser::resources(&namespace["\\_SB_.PVPN._CRS"]), [ports(0x505, 1)]);
    assert_eq!(namespace["\\_SB_.COM1._HID"], Object::Integer(0x0105_D041));
    assert_eq!(parser::resources(&namespace["\\_SB_.COM1._CRS"]), [ports(0x3F8, 8), edge(4)]);
    let devices = namespace.values().filter(|object| **object == Object::Device).count();
    assert_eq!(devices, 4);
}

#[test]
fn the_dsdt_describes_each_virtio_mmio_slot() {
    for slots in [0, 1, 10, 64] {
        let bytes = built(&Config { vcpus: 1, virtio_mmio_slots: slots, serial: false }, ACPI_TABLES);
        let namespace = parser::namespace(&parsed(&bytes).dsdt[36..]);
        for slot in 0..u32::from(slots) {
            let object = |name: &str| &namespace[&format!("\\_SB_.V{slot:03}.{name}")];
            assert_eq!(*object("_HID"), Object::Text("LNRO0005".to_string()));
            assert_eq!(*object("_UID"), Object::Integer(slot.into()));
            assert_eq!(*object("_CCA"), Object::Integer(1));
            let address = 0xF000_0000 + slot * 0x1000;
            let expected = [
                Resource::Memory { address, length: 0x1000, writable: true },
                Resource::Interrupt { number: 24 + slot, flags: 0b0011 },
            ];
            assert_eq!(parser::resources(object("_CRS")), expected);
        }
        assert_eq!(namespace.keys().filter(|path| path.ends_with("_CCA")).count(), usize::from(slots));
        assert!(!namespace.contains_key("\\_SB_.COM1"), "a serial port that is not there");
    }
}

#[test]
fn values_out_of_range_are_refused() {
    let mut out = [0; 0x2000];
    for vcpus in [0, 33, 255] {
        let error = build(&Config { vcpus, ..LARGEST }, ACPI_TABLES, &mut out).unwrap_err();
        assert_eq!(error, AcpiError::Vcpus { given: vcpus });
        assert_eq!(error.to_string(), format!("ACPI tables describe 1 to 32 vCPUs, not {vcpus}"));
    }
    for slots in [65, 255] {
        let config = Config { virtio_mmio_slots: slots, ..LARGEST };
        let error = build(&config, ACPI_TABLES, &mut out).unwrap_err();
        assert_eq!(error, AcpiError::VirtioMmioSlots { given: slots });
        assert_eq!(
            error.to_string(),
            format!("ACPI tables describe at most 64 virtio-mmio slots, not {slots}")
        );
    }
    for base in [8, ACPI_TABLES + 1, 4 * GIB - ACPI_TABLES_SIZE + 16, 4 * GIB, u64::MAX - 15] {
        assert_eq!(build(&LARGEST, base, &mut out), Err(AcpiError::Base { base }));
    }
    for base in [0, ACPI_TABLES, 4 * GIB - ACPI_TABLES_SIZE] {
        Memory { base, bytes: &built(&LARGEST, base) }.parse();
    }
}

#[test]
fn a_buffer_that_is_too_small_is_refused_at_every_length() {
    let needed = built(&LARGEST, ACPI_TABLES).len();
    assert_eq!(needed, MAX_SIZE);
    let mut out = vec![0; needed];
    for given in 0..needed {
        let result = build(&LARGEST, ACPI_TABLES, &mut out[..given]);
        assert_eq!(result, Err(AcpiError::BufferTooSmall { needed, given }));
    }
    assert_eq!(build(&LARGEST, ACPI_TABLES, &mut out), Ok(needed));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_configuration_is_built_or_refused(
        vcpus: u8, virtio_mmio_slots: u8, serial: bool, base: u64, given in 0_usize..0x2000,
    ) {
        let mut out = vec![0; given];
        let config = Config { vcpus, virtio_mmio_slots, serial };
        let _ = build(&config, base, &mut out);
        match build(&config, ACPI_TABLES, &mut out) {
            Ok(length) => prop_assert!(length <= given),
            Err(AcpiError::Vcpus { .. }) => prop_assert!(!(1..=32).contains(&vcpus)),
            Err(AcpiError::VirtioMmioSlots { .. }) => prop_assert!(virtio_mmio_slots > 64),
            Err(AcpiError::BufferTooSmall { needed, .. }) => {
                prop_assert!(given < needed);
                prop_assert_eq!(needed, built(&config, ACPI_TABLES).len());
            }
            Err(AcpiError::Base { .. }) => prop_assert!(false, "the base is good"),
        }
    }

    #[test]
    fn the_tables_are_those_of_the_reference(
        vcpus in 1..=MAX_VCPUS, virtio_mmio_slots in 0..=VIRTIO_MMIO_SLOTS, serial: bool,
    ) {
        let config = Config { vcpus, virtio_mmio_slots, serial };
        let bytes = built(&config, ACPI_TABLES);
        let tables = parsed(&bytes);
        prop_assert_eq!(&tables.dsdt[36..], reference::dsdt_code(&config));
        prop_assert_eq!(&tables.madt[36..], &reference::madt(vcpus)[36..]);
        prop_assert_eq!(tables.fadt, reference::fadt(u64_at(tables.fadt, 140)));
    }
}

/// Intel's compiler reads each table and, from the source it made of it, compiles
/// the same table again, without a single remark.
///
/// `apt-get install acpica-tools && cargo test -p cofferdam-firmware -- --ignored iasl`
#[test]
#[ignore = "needs iasl, of Debian's acpica-tools"]
fn iasl_takes_the_tables_apart_and_puts_them_together_again() {
    let directory = tempfile::tempdir().unwrap();
    let iasl = |arguments: &[&str]| {
        let output = Command::new("iasl").args(arguments).current_dir(&directory).output().unwrap();
        let text =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}");
        text
    };
    for config in [LARGEST, Config { vcpus: 1, virtio_mmio_slots: 0, serial: false }] {
        let bytes = built(&config, ACPI_TABLES);
        let tables = parsed(&bytes);
        for (name, table) in [("fadt", tables.fadt), ("madt", tables.madt), ("dsdt", tables.dsdt)] {
            let file = format!("{name}.dat");
            fs::write(directory.path().join(&file), table).unwrap();
            let text = iasl(&["-d", &file]);
            assert!(!text.contains("Warning") && !text.contains("Error"), "{text}");
            // -oi: as written, without shorter integers.
            let text = iasl(&["-oi", "-p", "again", &format!("{name}.dsl")]);
            let remarks = ["Error ", "Warning ", "Remark "].iter().any(|kind| text.contains(kind));
            assert!(!remarks, "{text}");
            let again = fs::read(directory.path().join("again.aml")).unwrap();
            assert!(again[36..] == table[36..], "{name} is not the same again");
        }
    }
}
