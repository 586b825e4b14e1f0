//! DSDT (ACPI 6.4, 5.2.11.1): the devices that cannot be found by probing.
//!
//! Everything is a constant; a virtio-mmio device is a template whose name,
//! number, address and interrupt are filled in for each slot. In ASL:
//!
//! ```text
//! Name (\_S5, Package () { 5, 0, 0, 0 })              soft off
//! Device (\_SB.PWRB) { _HID PNP0C0C }                 power button
//! Device (\_SB.GED)  { _HID ACPI0013                  generic event device
//!     _CRS interrupt; Method (_EVT, 1) { if the button's bit is set, Notify (PWRB, 0x80) } }
//! Device (\_SB.PVPN) { _HID QEMU0001, _CRS port }     pvpanic
//! Device (\_SB.COM1) { _HID PNP0501, _CRS ports, interrupt }
//! Device (\_SB.V000) { _HID LNRO0005, _UID 0, _CCA 1, _CRS memory, interrupt }    ... V063
//! ```

use super::Config;
use super::aml::{
    INTERRUPT_PREFIX, LOCAL0, MEMORY_PREFIX, and, byte, dword_field, eisa_id, if_true, integer, interrupt,
    memory, name, notify, package, port_region, ports, resources, serialized_method_of_one, store, string,
    system_bus_device,
};
use super::table::{HEADER_SIZE, Tables, header};
use crate::bytes::Bytes;
use crate::layout;

/// From revision 2 on, integers have 64 bits.
const REVISION: u8 = 2;
static HEADER: [u8; HEADER_SIZE] = header(b"DSDT", REVISION).array();

/// `Notify` value of a power button that was pressed (5.6.6).
const BUTTON_PRESSED: u8 = 0x80;
/// `_STA`: present, enabled, shown, functioning (6.3.7).
const STATUS_WORKING: u32 = 0xF;

const SOFT_OFF: Bytes = name(b"_S5_", package(&[layout::SLEEP_TYPE_S5, 0, 0, 0]));

const POWER_BUTTON: Bytes = system_bus_device(b"PWRB", name(b"_HID", eisa_id(b"PNP", 0x0C0C)));

/// The generic event device (5.6.9): its interrupt runs `_EVT`, which takes the pending events.
const EVENT_DEVICE: Bytes = system_bus_device(
    b"GED_",
    name(b"_HID", string("ACPI0013"))
        .then(name(b"_UID", integer(0)))
        .then(name(b"_CRS", resources(interrupt(layout::EVENT_PIN))))
        .then(port_region(b"EVTR", layout::EVENT_PORT, 4))
        .then(dword_field(b"EVTR", b"EVTS"))
        .then(serialized_method_of_one(
            b"_EVT",
            store(Bytes::new().slice(b"EVTS"), LOCAL0).then(if_true(
                and(LOCAL0, integer(layout::EVENT_POWER_BUTTON)),
                notify(b"PWRB", BUTTON_PRESSED),
            )),
        )),
);

const PVPANIC: Bytes = system_bus_device(
    b"PVPN",
    name(b"_HID", string("QEMU0001"))
        .then(name(b"_CRS", resources(ports(layout::PVPANIC_PORT, 1))))
        .then(name(b"_STA", integer(STATUS_WORKING))),
);

const FIXED_CODE: Bytes = SOFT_OFF.then(POWER_BUTTON).then(EVENT_DEVICE).then(PVPANIC);
static FIXED: [u8; FIXED_CODE.len()] = FIXED_CODE.array();

const SERIAL_CODE: Bytes = system_bus_device(
    b"COM1",
    name(b"_HID", eisa_id(b"PNP", 0x0501))
        .then(name(b"_UID", integer(0)))
        .then(name(b"_CRS", resources(ports(layout::SERIAL_PORT, 8).then(interrupt(layout::SERIAL_PIN))))),
);
static SERIAL: [u8; SERIAL_CODE.len()] = SERIAL_CODE.array();

const VIRTIO_MMIO_CODE: Bytes = system_bus_device(
    b"V000",
    name(b"_HID", string("LNRO0005"))
        .then(name(b"_UID", byte(0)))
        .then(name(b"_CCA", integer(1)))
        .then(name(b"_CRS", resources(memory(0, layout::VIRTIO_MMIO_STRIDE as u32).then(interrupt(0))))),
);
static VIRTIO_MMIO: [u8; VIRTIO_MMIO_CODE.len()] = VIRTIO_MMIO_CODE.array();

// Where the template is filled in.
const NAME_DIGITS: usize = VIRTIO_MMIO_CODE.offset_after(b"_SB_V0");
const NUMBER: usize = VIRTIO_MMIO_CODE.offset_after(b"_UID\x0A");
const ADDRESS: usize = VIRTIO_MMIO_CODE.offset_after(&MEMORY_PREFIX);
const PIN: usize = VIRTIO_MMIO_CODE.offset_after(&INTERRUPT_PREFIX);

/// Writes the table and returns its address.
pub(super) fn write(tables: &mut Tables<'_>, config: &Config) -> u64 {
    let start = tables.begin(&HEADER);
    tables.put(&FIXED);
    if config.serial {
        tables.put(&SERIAL);
    }
    for slot in 0..config.virtio_mmio_slots {
        let device = tables.put(&VIRTIO_MMIO);
        tables.patch(device + NAME_DIGITS, &[b'0' + slot / 10, b'0' + slot % 10]);
        tables.patch(device + NUMBER, &[slot]);
        tables.patch(device + ADDRESS, &(layout::virtio_mmio_address(slot) as u32).to_le_bytes());
        tables.patch(device + PIN, &[layout::virtio_mmio_pin(slot)]);
    }
    tables.finish(start)
}
