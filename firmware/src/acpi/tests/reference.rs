//! The same tables as the `acpi_tables` crate of rust-vmm makes them.

use acpi_tables::aml::*;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::{Aml, AmlSink};

use super::Config;
use crate::layout::*;

const OEM_ID: [u8; 6] = *b"COFFER";
const OEM_TABLE_ID: [u8; 8] = *b"COFFERDM";

/// An integer in two bytes, where the crate would take the shortest form.
struct TwoByteInteger(u8);

impl Aml for TwoByteInteger {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.byte(0x0A);
        sink.byte(self.0);
    }
}

fn interrupt(pin: u8) -> Interrupt {
    Interrupt::new(true, true, false, false, pin.into())
}

/// The DSDT without its header.
pub fn dsdt_code(config: &Config) -> Vec<u8> {
    let mut code = Vec::new();
    Name::new("_S5_".into(), &Package::new(vec![&5_u8, &ZERO, &ZERO, &ZERO])).to_aml_bytes(&mut code);
    let id = Name::new("_HID".into(), &EISAName::new("PNP0C0C"));
    Device::new("_SB_.PWRB".into(), vec![&id]).to_aml_bytes(&mut code);
    event_device(&mut code);
    Device::new(
        "_SB_.PVPN".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&IO::new(0x505, 0x505, 1, 1)])),
            &Name::new("_STA".into(), &0xF_u8),
        ],
    )
    .to_aml_bytes(&mut code);
    if config.serial {
        serial(&mut code);
    }
    for slot in 0..config.virtio_mmio_slots {
        virtio_mmio(slot, &mut code);
    }
    code
}

fn event_device(code: &mut Vec<u8>) {
    let entries = vec![FieldEntry::Named(*b"EVTS", 32)];
    let field = Field::new(
        "EVTR".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        entries,
    );
    Device::new(
        "_SB_.GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt(EVENT_PIN)])),
            &OpRegion::new("EVTR".into(), OpRegionSpace::SystemIO, &EVENT_PORT, &4_u8),
            &field,
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    // The crate writes the source first, as the term is encoded.
                    &Store::new(&Local(0), &Path::new("EVTS")),
                    &If::new(
                        &And::new(&ZERO, &Local(0), &ONE),
                        vec![&Notify::new(&Path::new("PWRB"), &0x80_u8)],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(code);
}

fn serial(code: &mut Vec<u8>) {
    let ports = IO::new(SERIAL_PORT, SERIAL_PORT, 1, 8);
    Device::new(
        "_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt(SERIAL_PIN)])),
        ],
    )
    .to_aml_bytes(code);
}

fn virtio_mmio(slot: u8, code: &mut Vec<u8>) {
    let memory = Memory32Fixed::new(
        true,
        u32::try_from(virtio_mmio_address(slot)).unwrap(),
        VIRTIO_MMIO_STRIDE as u32,
    );
    Device::new(
        format!("_SB_.V{slot:03}").as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &TwoByteInteger(slot)),
            &Name::new("_CCA".into(), &ONE),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&memory, &interrupt(virtio_mmio_pin(slot))]),
            ),
        ],
    )
    .to_aml_bytes(code);
}

/// The whole MADT; its header is the crate's own.
pub fn madt(vcpus: u8) -> Vec<u8> {
    let address = LocalInterruptController::Address(LOCAL_APIC as u32);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, 1, address);
    madt.add_structure(IoApic::new(0, IO_APIC as u32, 0));
    for index in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(index, index, EnabledStatus::Enabled));
    }
    let mut table = Vec::new();
    madt.to_aml_bytes(&mut table);
    table
}

/// The whole FADT, for a DSDT at `dsdt`.
pub fn fadt(dsdt: u64) -> Vec<u8> {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, 1)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::HwReducedAcpi);
    fadt.fadt_minor_version = 4;
    fadt.creator_id = *b"CFDM";
    fadt.creator_revision = [1, 0, 0, 0];
    fadt.dsdt = u32::try_from(dsdt).unwrap().into();
    fadt.x_dsdt = dsdt.into();
    fadt.iapc_boot_arch = 0x24.into();
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE_ID).into();
    let mut table = Vec::new();
    fadt.finalize().to_aml_bytes(&mut table);
    table
}
