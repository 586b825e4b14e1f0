//! What the first stage adds to the kernel's command line: before that of a protected domain what follows, and behind that of
//! an unprotected one the host's data, if the image wants them. (A protected one has them in its report.)
//!
//! A kernel takes the last of several arguments of one name, so whatever the image's own command line says of these wins.
//!
//! - `swiotlb=`: devices reach shared memory only, so their drivers copy through a buffer, which Linux makes at least
//!   64 MiB large. It is accepted and then shared page by page.
//! - `kernelcore=`, for a kernel that accepts memory itself: while it starts, Linux accepts 4 MiB for *each* allocation of a
//!   page, half a GiB in all, but only in the zones from which it allocates for itself. This keeps the rest of the memory in the zone of
//!   movable pages, from which it takes memory for programs and files, when they need it.
//! - `efi=noruntime`, for the same: there is no EFI beyond the tables of [`crate::efi`].

use crate::fields::Place;
use crate::layout::MIB;

/// Most bytes that are put before a command line.
pub const MAX_SIZE: usize = 64;

/// What comes before the digits of the host's data.
const HOST_DATA: &[u8] = b" cofferdam.host_data=";
/// Bytes that [`write_host_data`] writes.
pub const HOST_DATA_SIZE: usize = HOST_DATA.len() + 64;

/// Blocks of 2 KiB of the buffer for devices: 8 MiB.
const SHARED_BLOCKS: u64 = 4096;
/// What the kernel has for itself beside what it occupies when it starts, in any domain, MiB.
const KERNEL_BASE: u64 = 32;
/// The part of the domain's memory that the kernel has for itself beside that.
const KERNEL_PART: u64 = 32;

/// The memory that the kernel can use for itself (slabs, page tables, stacks, network buffers), MiB: all below
/// `kernel_end`, where what it occupies ends, 32 MiB, and a 32nd of the domain's `memory`.
pub const fn kernel_memory(memory: u64, kernel_end: u64) -> u64 {
    kernel_end.div_ceil(MIB) + KERNEL_BASE + memory / KERNEL_PART / MIB
}

/// Writes the arguments to `place`, each with a blank behind it, and returns their length, bytes. `lazy`
/// says whether the kernel accepts memory itself.
pub(crate) fn write(place: &mut [u8], lazy: bool, memory: u64, kernel_end: u64) -> usize {
    let size = place.len();
    let mut place = Place(place);
    place.put(b"swiotlb=");
    put_decimal(&mut place, SHARED_BLOCKS);
    if lazy {
        place.put(b" efi=noruntime kernelcore=");
        put_decimal(&mut place, kernel_memory(memory, kernel_end));
        place.put(b"M");
    }
    place.put(b" ");
    size.wrapping_sub(place.0.len())
}

/// Writes the host's data to `place` in hexadecimal digits, as an argument with a blank before it.
pub(crate) fn write_host_data(place: &mut [u8], host_data: &[u8; 32]) {
    let mut place = Place(place);
    place.put(HOST_DATA);
    for byte in host_data {
        let digit = |value: u8| if value < 10 { b'0' + value } else { b'a' - 10 + value };
        place.put(&[digit(byte >> 4), digit(byte & 0xF)]);
    }
}

fn put_decimal(place: &mut Place<'_>, mut number: u64) {
    let mut digits = [b'0'; 20];
    let mut start = digits.len();
    for (index, digit) in digits.iter_mut().enumerate().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
        start = index;
        if number == 0 {
            break;
        }
    }
    place.put(digits.get(start..).unwrap_or_default());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{GAP_START, GIB, MAX_MEMORY};

    fn arguments(lazy: bool, memory: u64, kernel_end: u64) -> String {
        let mut place = [0xEE; MAX_SIZE];
        let length = write(&mut place, lazy, memory, kernel_end);
        assert!(place[length..].iter().all(|&byte| byte == 0xEE));
        String::from_utf8(place[..length].to_vec()).unwrap()
    }

    #[test]
    fn they_follow_from_memory_and_kernel() {
        assert_eq!(arguments(false, 128 * MIB, 72 * MIB), "swiotlb=4096 ");
        assert_eq!(arguments(true, 128 * MIB, 72 * MIB), "swiotlb=4096 efi=noruntime kernelcore=108M ");
        assert_eq!(arguments(true, 2 * GIB, 71 * MIB + 1), "swiotlb=4096 efi=noruntime kernelcore=168M ");
    }

    #[test]
    fn the_longest_are_as_long_as_said() {
        let longest = arguments(true, MAX_MEMORY, GAP_START);
        assert_eq!(longest, "swiotlb=4096 efi=noruntime kernelcore=5152M ");
        assert!(longest.len() <= MAX_SIZE);
    }

    #[test]
    fn host_data_are_hexadecimal() {
        let mut place = [0xEE; HOST_DATA_SIZE + 1];
        write_host_data(&mut place, &std::array::from_fn(|index| (index as u8).wrapping_mul(9)));
        let expected =
            " cofferdam.host_data=0009121b242d363f48515a636c757e879099a2abb4bdc6cfd8e1eaf3fc050e17\u{ee}";
        assert_eq!(place.map(char::from).into_iter().collect::<String>(), expected);
    }

    #[test]
    fn numbers_are_decimal() {
        for (number, text) in
            [(0, "0"), (7, "7"), (10, "10"), (1009, "1009"), (u64::MAX, "18446744073709551615")]
        {
            let mut digits = [0; 20];
            put_decimal(&mut Place(&mut digits), number);
            assert_eq!(&digits[..text.len()], text.as_bytes());
        }
    }
}
