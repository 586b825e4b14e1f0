//! What tests of images are made of.

use super::Composition;
use crate::igvm::writer::Writer;
use crate::image::walk::Selection;

/// A bzImage of `length` bytes that wants to be at 16 MiB.
pub fn kernel(length: usize) -> Vec<u8> {
    let mut file = vec![0x90; length];
    file[..0x400].fill(0);
    let mut put = |offset: usize, bytes: &[u8]| file[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1fe, &0xaa55_u16.to_le_bytes());
    put(0x201, &[0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x20f_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x230, &0x20_0000_u32.to_le_bytes());
    put(0x234, &[1, 0, 1, 0]);
    put(0x238, &2047_u32.to_le_bytes());
    put(0x258, &0x100_0000_u64.to_le_bytes());
    put(0x260, &0x40_0000_u32.to_le_bytes());
    file
}

/// The image as a file.
pub fn written(composition: &Composition<'_>) -> Vec<u8> {
    let mut writer = Writer::default();
    composition.walk(Selection::All, &mut writer).unwrap();
    let mut bytes = Vec::new();
    writer.write(&mut bytes).unwrap();
    bytes
}
