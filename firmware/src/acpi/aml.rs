//! The few words of AML (ACPI 6.4, 20) that the DSDT needs, put together by the
//! compiler. A term that contains others starts with its length, which is known
//! because its content is complete before the term is made.

use crate::bytes::Bytes;

const ZERO_OP: u8 = 0x00;
const ONE_OP: u8 = 0x01;
const NAME_OP: u8 = 0x08;
const BYTE_PREFIX: u8 = 0x0A;
const WORD_PREFIX: u8 = 0x0B;
const DWORD_PREFIX: u8 = 0x0C;
const STRING_PREFIX: u8 = 0x0D;
const BUFFER_OP: u8 = 0x11;
const PACKAGE_OP: u8 = 0x12;
const METHOD_OP: u8 = 0x14;
const DUAL_NAME_PREFIX: u8 = 0x2E;
const EXT_OP_PREFIX: u8 = 0x5B;
const STORE_OP: u8 = 0x70;
const AND_OP: u8 = 0x7B;
const NOTIFY_OP: u8 = 0x86;
const IF_OP: u8 = 0xA0;

// After EXT_OP_PREFIX.
const OP_REGION_OP: u8 = 0x80;
const FIELD_OP: u8 = 0x81;
const DEVICE_OP: u8 = 0x82;

/// No target: the result of an operation is only used in place.
const NULL_NAME: u8 = 0;
/// The first local variable of a method.
pub(super) const LOCAL0: Bytes = Bytes::new().u8(0x60);

/// Four characters: a capital letter or `_` first, then those or digits.
pub(super) type NameSeg = [u8; 4];

/// PkgLength (20.2.4) and the content it covers; it counts itself.
const fn package_length(content: Bytes) -> Bytes {
    let one_byte = content.len() + 1;
    if one_byte <= 0x3F {
        return Bytes::new().u8(one_byte as u8).then(content);
    }
    let two_bytes = content.len() + 2;
    assert!(two_bytes <= 0xFFF, "a term is longer than two bytes can say");
    Bytes::new().u8(1 << 6 | (two_bytes & 0xF) as u8).u8((two_bytes >> 4) as u8).then(content)
}

/// An integer in its shortest form.
pub(super) const fn integer(value: u32) -> Bytes {
    match value {
        0 => Bytes::new().u8(ZERO_OP),
        1 => Bytes::new().u8(ONE_OP),
        2..=0xFF => byte(value as u8),
        0x100..=0xFFFF => Bytes::new().u8(WORD_PREFIX).u16(value as u16),
        _ => Bytes::new().u8(DWORD_PREFIX).u32(value),
    }
}

/// An integer that always takes two bytes, the second being its value.
pub(super) const fn byte(value: u8) -> Bytes {
    Bytes::new().u8(BYTE_PREFIX).u8(value)
}

/// A string.
pub(super) const fn string(text: &str) -> Bytes {
    Bytes::new().u8(STRING_PREFIX).slice(text.as_bytes()).u8(0)
}

/// The compressed form of a plug-and-play identifier (19.6.36, `EISAID`), which is three capital
/// letters, of five bits each, and a hexadecimal number of four digits; most significant byte first.
pub(super) const fn eisa_id(letters: &[u8; 3], number: u16) -> Bytes {
    let mut value = 0;
    let mut index = 0;
    while index < letters.len() {
        assert!(letters[index].is_ascii_uppercase(), "not a plug-and-play identifier");
        value = value << 5 | (letters[index] - b'A' + 1) as u32;
        index += 1;
    }
    integer((value << 16 | number as u32).swap_bytes())
}

/// `Package () { elements }`, each element at most 255 and in its shortest form.
pub(super) const fn package(elements: &[u8]) -> Bytes {
    let mut content = Bytes::new().u8(elements.len() as u8);
    let mut index = 0;
    while index < elements.len() {
        content = content.then(integer(elements[index] as u32));
        index += 1;
    }
    Bytes::new().u8(PACKAGE_OP).then(package_length(content))
}

/// `Name (name, object)`.
pub(super) const fn name(name: &NameSeg, object: Bytes) -> Bytes {
    Bytes::new().u8(NAME_OP).slice(name).then(object)
}

/// `Device (_SB.name) { content }`, which must stand at the root of the namespace.
pub(super) const fn system_bus_device(name: &NameSeg, content: Bytes) -> Bytes {
    let path = Bytes::new().u8(DUAL_NAME_PREFIX).slice(b"_SB_").slice(name);
    Bytes::new().u8(EXT_OP_PREFIX).u8(DEVICE_OP).then(package_length(path.then(content)))
}

/// `OperationRegion (name, SystemIO, port, length)`.
pub(super) const fn port_region(name: &NameSeg, port: u16, length: u8) -> Bytes {
    const SYSTEM_IO: u8 = 1;
    Bytes::new()
        .u8(EXT_OP_PREFIX)
        .u8(OP_REGION_OP)
        .slice(name)
        .u8(SYSTEM_IO)
        .then(integer(port as u32))
        .then(integer(length as u32))
}

/// `Field (region, DWordAcc, NoLock, Preserve) { name, 32 }`.
pub(super) const fn dword_field(region: &NameSeg, name: &NameSeg) -> Bytes {
    const DWORD_ACCESS: u8 = 3;
    let content = Bytes::new().slice(region).u8(DWORD_ACCESS).slice(name).u8(32);
    Bytes::new().u8(EXT_OP_PREFIX).u8(FIELD_OP).then(package_length(content))
}

/// `Method (name, 1, Serialized) { content }`.
pub(super) const fn serialized_method_of_one(name: &NameSeg, content: Bytes) -> Bytes {
    const ONE_ARGUMENT: u8 = 1;
    const SERIALIZED: u8 = 1 << 3;
    let head = Bytes::new().slice(name).u8(ONE_ARGUMENT | SERIALIZED);
    Bytes::new().u8(METHOD_OP).then(package_length(head.then(content)))
}

/// `Store (source, target)`.
pub(super) const fn store(source: Bytes, target: Bytes) -> Bytes {
    Bytes::new().u8(STORE_OP).then(source).then(target)
}

/// `And (left, right)`.
pub(super) const fn and(left: Bytes, right: Bytes) -> Bytes {
    Bytes::new().u8(AND_OP).then(left).then(right).u8(NULL_NAME)
}

/// `If (condition) { content }`.
pub(super) const fn if_true(condition: Bytes, content: Bytes) -> Bytes {
    Bytes::new().u8(IF_OP).then(package_length(condition.then(content)))
}

/// `Notify (device, value)`.
pub(super) const fn notify(device: &NameSeg, value: u8) -> Bytes {
    Bytes::new().u8(NOTIFY_OP).slice(device).then(integer(value as u32))
}

/// `ResourceTemplate () { descriptors }`, as a buffer that ends with the end tag (6.4.2.8); a
/// checksum of zero there means that it need not be checked.
pub(super) const fn resources(descriptors: Bytes) -> Bytes {
    const END_TAG: u8 = 0x79;
    let list = descriptors.u8(END_TAG).u8(0);
    let content = integer(list.len() as u32).then(list);
    Bytes::new().u8(BUFFER_OP).then(package_length(content))
}

/// `IO (Decode16, port, port, 1, length)` (6.4.2.5).
pub(super) const fn ports(port: u16, length: u8) -> Bytes {
    const DESCRIPTOR: u8 = 0x47;
    const DECODE_16: u8 = 1;
    Bytes::new().u8(DESCRIPTOR).u8(DECODE_16).u16(port).u16(port).u8(1).u8(length)
}

/// What comes before the address in [`memory`].
pub(super) const MEMORY_PREFIX: [u8; 4] = [0x86, 9, 0, 1];

/// `Memory32Fixed (ReadWrite, address, length)` (6.4.3.4).
pub(super) const fn memory(address: u32, length: u32) -> Bytes {
    Bytes::new().slice(&MEMORY_PREFIX).u32(address).u32(length)
}

/// What comes before the pin in [`interrupt`]: the length, the flags "consumer" and "edge" (hence
/// active high and exclusive), and the number of interrupts.
pub(super) const INTERRUPT_PREFIX: [u8; 5] = [0x89, 6, 0, 0b0011, 1];

/// `Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) { pin }` (6.4.3.6).
pub(super) const fn interrupt(pin: u8) -> Bytes {
    Bytes::new().slice(&INTERRUPT_PREFIX).u32(pin as u32)
}
