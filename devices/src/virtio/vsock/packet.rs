//! The packet header (virtio 1.2, 5.10.6), which precedes every payload in both directions.

/// Length of a header, bytes.
pub const HEADER_LEN: u32 = 44;
/// Longest payload that is accepted or sent in one packet, bytes: the limit of Linux.
pub const MAX_PAYLOAD: u32 = 64 * 1024;
/// Context identifier of the host.
pub const HOST_CID: u64 = 2;
/// Socket type: stream, the only one offered.
pub const TYPE_STREAM: u16 = 1;
/// `VMADDR_PORT_ANY`, which no connection can have as a port.
pub const PORT_ANY: u32 = u32::MAX;

/// `SHUTDOWN` flag: the sender of the packet will receive no more data.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// `SHUTDOWN` flag: the sender of the packet will send no more data.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both flags.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Accepts one.
    Response = 2,
    /// Refuses or ends one.
    Reset = 3,
    /// Announces that data will no longer be sent, received, or both.
    Shutdown = 4,
    /// Carries data.
    ReadWrite = 5,
    /// Tells the sender's free buffer space.
    CreditUpdate = 6,
    /// Asks for it.
    CreditRequest = 7,
}

impl Op {
    /// Every operation, for tables in tests.
    #[cfg(test)]
    pub const ALL: [Self; 7] = [
        Self::Request,
        Self::Response,
        Self::Reset,
        Self::Shutdown,
        Self::ReadWrite,
        Self::CreditUpdate,
        Self::CreditRequest,
    ];

    /// The operation of a header's `op` field.
    pub fn from_field(op: u16) -> Option<Self> {
        Some(match op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::ReadWrite,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// The two ports that identify a connection: there is one host and one guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    /// The port on the host's side.
    pub host: u32,
    /// The port on the guest's side.
    pub guest: u32,
}

/// `struct virtio_vsock_hdr`, little-endian and packed in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Context identifier of the sender.
    pub src_cid: u64,
    /// Context identifier of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Length of the payload, bytes.
    pub len: u32,
    /// Socket type (`type` in the specification).
    pub kind: u16,
    /// Operation; see [`Op`].
    pub op: u16,
    /// Flags of the operation.
    pub flags: u32,
    /// Size of the sender's buffer for this connection, bytes.
    pub buf_alloc: u32,
    /// Bytes that have left that buffer so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header. Every pattern of bytes is one; whether it makes sense is for others to judge.
    pub fn parse(bytes: &[u8; HEADER_LEN as usize]) -> Self {
        let mut fields = Fields(bytes);
        Self {
            src_cid: u64::from_le_bytes(fields.take()),
            dst_cid: u64::from_le_bytes(fields.take()),
            src_port: u32::from_le_bytes(fields.take()),
            dst_port: u32::from_le_bytes(fields.take()),
            len: u32::from_le_bytes(fields.take()),
            kind: u16::from_le_bytes(fields.take()),
            op: u16::from_le_bytes(fields.take()),
            flags: u32::from_le_bytes(fields.take()),
            buf_alloc: u32::from_le_bytes(fields.take()),
            fwd_cnt: u32::from_le_bytes(fields.take()),
        }
    }

    /// The header as it lies in guest memory.
    pub fn to_bytes(self) -> [u8; HEADER_LEN as usize] {
        let mut bytes = [0; HEADER_LEN as usize];
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        for (to, from) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
            *to = *from;
        }
        bytes
    }

    /// A packet from the host to the guest on a connection.
    pub fn to_guest(guest_cid: u64, ports: Ports, op: Op) -> Self {
        Self {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            kind: TYPE_STREAM,
            op: op as u16,
            ..Self::default()
        }
    }

    /// The connection of a packet that the guest sent.
    pub fn ports(&self) -> Ports {
        Ports { host: self.dst_port, guest: self.src_port }
    }
}

/// Little-endian fields one after the other.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk() {
            Some((field, rest)) => {
                self.0 = rest;
                *field
            }
            None => [0; N],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fields_lie_where_the_specification_says() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 0x1112_1314,
            dst_port: 0x2122_2324,
            len: 0x3132_3334,
            kind: 0x4142,
            op: 0x5152,
            flags: 0x6162_6364,
            buf_alloc: 0x7172_7374,
            fwd_cnt: 0x8182_8384,
        };
        let bytes = header.to_bytes();
        for (offset, expected) in [
            (0, &[8, 7, 6, 5, 4, 3, 2, 1][..]),
            (8, &[2, 0, 0, 0, 0, 0, 0, 0]),
            (16, &[0x14, 0x13, 0x12, 0x11]),
            (20, &[0x24, 0x23, 0x22, 0x21]),
            (24, &[0x34, 0x33, 0x32, 0x31]),
            (28, &[0x42, 0x41]),
            (30, &[0x52, 0x51]),
            (32, &[0x64, 0x63, 0x62, 0x61]),
            (36, &[0x74, 0x73, 0x72, 0x71]),
            (40, &[0x84, 0x83, 0x82, 0x81]),
        ] {
            assert_eq!(&bytes[offset..offset + expected.len()], expected, "offset {offset}");
        }
    }

    #[test]
    fn operations_are_numbered_from_one_to_seven() {
        for (op, number) in Op::ALL.into_iter().zip(1..) {
            assert_eq!((op as u16, Op::from_field(number)), (number, Some(op)));
        }
        assert_eq!((Op::from_field(0), Op::from_field(8), Op::from_field(u16::MAX)), (None, None, None));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_bytes_survive_a_round_trip(bytes in any::<[[u8; 11]; 4]>()) {
            let bytes: [u8; 44] = bytes.concat().try_into().unwrap();
            prop_assert_eq!(Header::parse(&bytes).to_bytes(), bytes);
        }
    }
}
