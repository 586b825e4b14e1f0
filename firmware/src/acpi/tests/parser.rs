//! Reads tables as a guest does, from the RSDP on, independently of the code
//! that writes them. Whatever does not fit its format panics, i.e. fails the test.

use std::collections::BTreeMap;

/// Guest memory with tables in it.
pub struct Memory<'a> {
    pub base: u64,
    pub bytes: &'a [u8],
}

/// The tables found, each complete with its header.
pub struct Parsed<'a> {
    pub fadt: &'a [u8],
    pub madt: &'a [u8],
    pub dsdt: &'a [u8],
}

pub fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(bytes[offset..offset + 2].try_into().unwrap())
}

pub fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

pub fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

fn assert_sums_to_zero(bytes: &[u8]) {
    assert_eq!(bytes.iter().map(|&byte| u64::from(byte)).sum::<u64>() % 256, 0, "checksum");
}

impl<'a> Memory<'a> {
    fn at(&self, address: u64) -> &'a [u8] {
        &self.bytes[usize::try_from(address.checked_sub(self.base).unwrap()).unwrap()..]
    }

    /// The table at `address`, whose signature, length and checksum must be right.
    fn table(&self, address: u64, signature: &[u8; 4]) -> &'a [u8] {
        assert_eq!(address % 4, 0);
        let rest = self.at(address);
        assert_eq!(&rest[..4], signature);
        let table = &rest[..u32_at(rest, 4) as usize];
        assert_sums_to_zero(table);
        table
    }

    pub fn parse(&self) -> Parsed<'a> {
        let rsdp = self.at(self.base);
        assert_eq!((&rsdp[..8], self.base % 16), (&b"RSD PTR "[..], 0));
        assert_sums_to_zero(&rsdp[..20]);
        let (revision, rsdt, length) = (rsdp[15], u32_at(rsdp, 16), u32_at(rsdp, 20));
        assert_eq!((revision, rsdt, length, &rsdp[33..36]), (2, 0, 36, &[0; 3][..]));
        assert_sums_to_zero(&rsdp[..36]);

        let xsdt = self.table(u64_at(rsdp, 24), b"XSDT");
        assert_eq!((xsdt[8], xsdt.len()), (1, 36 + 2 * 8));
        let fadt = self.table(u64_at(xsdt, 36), b"FACP");
        let madt = self.table(u64_at(xsdt, 44), b"APIC");
        assert_eq!(u64::from(u32_at(fadt, 40)), u64_at(fadt, 140), "the two addresses of the DSDT");
        let dsdt = self.table(u64_at(fadt, 140), b"DSDT");
        Parsed { fadt, madt, dsdt }
    }
}

/// An object of the namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    Integer(u64),
    Text(String),
    Buffer(Vec<u8>),
    Package(Vec<Object>),
    Device,
    Ports { first: u64, length: u64 },
    Field { region: String, flags: u8, bits: u8 },
    Method { flags: u8, code: Vec<u8> },
}

/// Absolute path, such as `\_SB_.V000._CRS`, to the object there.
pub type Namespace = BTreeMap<String, Object>;

/// The namespace that the definition block `aml` (without its header) makes.
pub fn namespace(aml: &[u8]) -> Namespace {
    let mut namespace = Namespace::new();
    Reader(aml).terms("\\", &mut namespace);
    namespace
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(length);
        self.0 = rest;
        taken
    }

    fn byte(&mut self) -> u8 {
        self.take(1)[0]
    }

    /// PkgLength, and what it covers.
    fn package(&mut self) -> Self {
        let whole = self.0.len();
        let first = usize::from(self.byte());
        let further = first >> 6;
        let mut length = if further == 0 { first } else { first & 0xF };
        for index in 0..further {
            length |= usize::from(self.byte()) << (4 + 8 * index);
        }
        let used = whole - self.0.len();
        Self(self.take(length - used))
    }

    fn segment(&mut self) -> String {
        let name = self.take(4);
        assert!(name[0].is_ascii_uppercase() || name[0] == b'_', "{name:?}");
        assert!(name.iter().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || *c == b'_'), "{name:?}");
        String::from_utf8(name.to_vec()).unwrap()
    }

    /// A name, made absolute by the `scope` in which it stands.
    fn path(&mut self, scope: &str) -> String {
        let mut path = scope.to_string();
        if self.0[0] == b'\\' {
            self.byte();
            path = "\\".to_string();
        }
        let segments = if self.0[0] == 0x2E { self.take(1).len() + 1 } else { 1 };
        for _ in 0..segments {
            if path != "\\" {
                path.push('.');
            }
            path.push_str(&self.segment());
        }
        path
    }

    fn terms(&mut self, scope: &str, namespace: &mut Namespace) {
        while !self.0.is_empty() {
            let (path, object) = match self.byte() {
                0x08 => (self.path(scope), self.data()),
                0x14 => {
                    let mut inner = self.package();
                    let path = inner.path(scope);
                    (path, Object::Method { flags: inner.byte(), code: inner.0.to_vec() })
                }
                0x5B => self.extended_term(scope, namespace),
                other => panic!("term {other:#x} in {scope}"),
            };
            assert_eq!(namespace.insert(path.clone(), object), None, "{path} twice");
        }
    }

    fn extended_term(&mut self, scope: &str, namespace: &mut Namespace) -> (String, Object) {
        match self.byte() {
            0x80 => {
                let path = self.path(scope);
                assert_eq!(self.byte(), 1, "the region is not in I/O space");
                (path, Object::Ports { first: self.integer(), length: self.integer() })
            }
            0x81 => {
                let mut inner = self.package();
                let region = inner.path(scope);
                let flags = inner.byte();
                let path = inner.path(scope);
                let bits = inner.byte();
                assert!(bits < 64 && inner.0.is_empty(), "more than one short field");
                (path, Object::Field { region, flags, bits })
            }
            0x82 => {
                let mut inner = self.package();
                let path = inner.path(scope);
                inner.terms(&path, namespace);
                (path, Object::Device)
            }
            other => panic!("extended term {other:#x} in {scope}"),
        }
    }

    fn integer(&mut self) -> u64 {
        match self.data() {
            Object::Integer(value) => value,
            other => panic!("{other:?} is no integer"),
        }
    }

    fn data(&mut self) -> Object {
        match self.byte() {
            value @ 0..=1 => Object::Integer(value.into()),
            0x0A => Object::Integer(self.byte().into()),
            0x0B => Object::Integer(u16_at(self.take(2), 0).into()),
            0x0C => Object::Integer(u32_at(self.take(4), 0).into()),
            0x0D => {
                let length = self.0.iter().position(|&byte| byte == 0).unwrap();
                let text = String::from_utf8(self.take(length).to_vec()).unwrap();
                self.byte();
                Object::Text(text)
            }
            0x11 => {
                let mut inner = self.package();
                assert_eq!(inner.integer(), inner.0.len() as u64, "buffer size");
                Object::Buffer(inner.0.to_vec())
            }
            0x12 => {
                let mut inner = self.package();
                let count = inner.byte();
                let elements = (0..count).map(|_| inner.data()).collect();
                assert!(inner.0.is_empty(), "package longer than its elements");
                Object::Package(elements)
            }
            other => panic!("data {other:#x}"),
        }
    }
}

/// A resource that a device uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    Ports { first: u16, last_first: u16, alignment: u8, length: u8 },
    Memory { address: u32, length: u32, writable: bool },
    Interrupt { number: u32, flags: u8 },
}

/// The resources in the buffer of a `_CRS`.
pub fn resources(object: &Object) -> Vec<Resource> {
    let Object::Buffer(buffer) = object else { panic!("{object:?} is no resource template") };
    let mut reader = Reader(buffer);
    let mut found = Vec::new();
    loop {
        found.push(match reader.byte() {
            0x47 => {
                let data = reader.take(7);
                assert_eq!(data[0], 1, "16-bit decoding");
                let (first, last_first) = (u16_at(data, 1), u16_at(data, 3));
                Resource::Ports { first, last_first, alignment: data[5], length: data[6] }
            }
            0x79 => {
                reader.byte();
                assert!(reader.0.is_empty(), "something behind the end tag");
                return found;
            }
            0x86 => {
                let data = reader.take(2 + 9);
                assert_eq!(u16_at(data, 0), 9);
                let writable = data[2] == 1;
                Resource::Memory { address: u32_at(data, 3), length: u32_at(data, 7), writable }
            }
            0x89 => {
                let data = reader.take(2 + 6);
                assert_eq!((u16_at(data, 0), data[3]), (6, 1));
                Resource::Interrupt { number: u32_at(data, 4), flags: data[2] }
            }
            other => panic!("resource descriptor {other:#x}"),
        });
    }
}
