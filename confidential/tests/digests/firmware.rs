//! OVMF as far as a launch measures it: what a VMM reads of the table at its end.

use cofferdam_confidential::digest::snp::LaunchPage;
use cofferdam_confidential::image::importer::PAGE;

const FOUR_GIB: u64 = 1 << 32;
/// From the end of a firmware to the end of its table of GUIDs.
const AFTER_TABLE: usize = 32;

const TABLE: [u8; 16] = guid(0x96b5_82de_1fb2_45f7_baea_a366_c55a_082d);
const SEV_METADATA: [u8; 16] = guid(0xdc88_6566_984a_4798_a75e_5585_a7bf_67cc);
const SEV_ES_RESET: [u8; 16] = guid(0x00f7_71de_1a7e_4fcb_890e_68c7_7e2f_b44e);

/// A GUID's bytes: three little-endian fields, then eight bytes as they are.
const fn guid(number: u128) -> [u8; 16] {
    let [a, b, c, d, e, f, g, h, rest @ ..] = number.to_be_bytes();
    let [i, j, k, l, m, n, o, p] = rest;
    [d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p]
}

/// What is measured of a firmware.
pub struct Firmware<'a> {
    image: &'a [u8],
    /// Where virtual CPUs but the first begin.
    pub ap_reset: u32,
    /// Address, length and type of each section, as in the table.
    sections: Vec<(u32, u32, u32)>,
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

impl<'a> Firmware<'a> {
    /// Reads the table at the end of `image`.
    pub fn parse(image: &'a [u8]) -> Self {
        let mut end = image.len() - AFTER_TABLE;
        let mut table_start = 0;
        let (mut ap_reset, mut metadata) = (None, None);
        while end > table_start {
            let (size, guid) = image[end - 18..end].split_at(2);
            let size = usize::from(u16::from_le_bytes(size.try_into().unwrap()));
            if guid == TABLE {
                // The table's own entry is its footer: its size is that of all of them.
                table_start = end - size;
                end -= 18;
                continue;
            }
            let data = &image[end - size..];
            if guid == SEV_ES_RESET {
                ap_reset = Some(u32_at(data, 0));
            } else if guid == SEV_METADATA {
                metadata = Some(image.len() - u32_at(data, 0) as usize);
            }
            end -= size;
        }
        let metadata = &image[metadata.expect("no SEV metadata")..];
        assert_eq!(&metadata[..4], b"ASEV");
        let sections = (0..u32_at(metadata, 12) as usize).map(|index| {
            let section = &metadata[16 + 12 * index..];
            (u32_at(section, 0), u32_at(section, 4), u32_at(section, 8))
        });
        Self { image, ap_reset: ap_reset.expect("no reset vector"), sections: sections.collect() }
    }

    /// The pages in the order in which a VMM hands them over, as far as this
    /// project's launch has their type.
    pub fn pages(&self) -> impl Iterator<Item = (u64, LaunchPage<'a>)> {
        let start = FOUR_GIB - self.image.len() as u64;
        let image = self.image.as_chunks::<PAGE>().0.iter().map(LaunchPage::Normal);
        let sections = self.sections.iter().flat_map(|(gpa, length, kind)| {
            let page = match kind {
                2 => LaunchPage::Secrets,
                3 => LaunchPage::Cpuid,
                _ => LaunchPage::Zero,
            };
            (u64::from(*gpa)..).step_by(PAGE).take(*length as usize / PAGE).map(move |gpa| (gpa, page))
        });
        (start..).step_by(PAGE).zip(image).chain(sections)
    }
}

/// A firmware of four pages with sections of all types.
pub fn small() -> Vec<u8> {
    const SIZE: usize = 4 * PAGE;
    const METADATA: usize = 0x400;
    let mut image: Vec<u8> = (0..SIZE).map(|index| (index * 11 % 253) as u8).collect();
    let sections: [[u32; 3]; 5] = [
        [0x80_0000, 0x9000, 1],
        [0x80_d000, 0x1000, 2],
        [0x80_e000, 0x1000, 3],
        [0x80_f000, 0x1000, 4],
        [0x81_0000, 0x2000, 1],
    ];
    let mut metadata = b"ASEV".to_vec();
    for word in
        [16 + 12 * sections.len() as u32, 1, sections.len() as u32].iter().chain(sections.as_flattened())
    {
        metadata.extend(word.to_le_bytes());
    }
    image[SIZE - METADATA..][..metadata.len()].copy_from_slice(&metadata);

    let mut table = Vec::new();
    for (guid, data) in [(SEV_ES_RESET, 0x0080_b004_u32), (SEV_METADATA, METADATA as u32)] {
        table.extend(data.to_le_bytes());
        table.extend(22_u16.to_le_bytes());
        table.extend(guid);
    }
    table.extend((table.len() as u16 + 18).to_le_bytes());
    table.extend(TABLE);
    image[SIZE - AFTER_TABLE - table.len()..][..table.len()].copy_from_slice(&table);
    image
}
