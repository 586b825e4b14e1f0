//! The header of a vsock packet, written down apart from the device's own (virtio 1.2, 5.10.6).

/// Length of a header, bytes.
pub const HEADER: u64 = 44;

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Default)]
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
    /// Socket type.
    pub kind: u16,
    /// What it asks for.
    pub op: u16,
    /// Flags of that.
    pub flags: u32,
    /// Size of the sender's buffer, bytes.
    pub buf_alloc: u32,
    /// Bytes that have left it.
    pub fwd_cnt: u32,
}

impl Header {
    /// The header as it lies in guest memory.
    pub fn to_bytes(self) -> [u8; HEADER as usize] {
        let mut bytes = [0; HEADER as usize];
        bytes[..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}
