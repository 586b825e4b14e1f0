//! Byte strings put together by the compiler, so that tables are data in
//! the program and no code that writes them.

/// Longest byte string, bytes.
const CAPACITY: usize = 320;

/// A byte string under construction in a constant; too long a one does not compile.
#[derive(Clone, Copy)]
pub(crate) struct Bytes {
    bytes: [u8; CAPACITY],
    length: usize,
}

impl Bytes {
    /// No bytes.
    pub const fn new() -> Self {
        Self { bytes: [0; CAPACITY], length: 0 }
    }

    /// Number of bytes.
    pub const fn len(&self) -> usize {
        self.length
    }

    /// Appends the bytes of `part`.
    pub const fn slice(mut self, part: &[u8]) -> Self {
        let mut index = 0;
        while index < part.len() {
            self.bytes[self.length] = part[index];
            self.length += 1;
            index += 1;
        }
        self
    }

    /// Appends another byte string.
    pub const fn then(self, part: Self) -> Self {
        self.slice(part.bytes.split_at(part.length).0)
    }

    /// Appends a byte.
    pub const fn u8(self, value: u8) -> Self {
        self.slice(&[value])
    }

    /// Appends a 16-bit number, little-endian.
    pub const fn u16(self, value: u16) -> Self {
        self.slice(&value.to_le_bytes())
    }

    /// Appends a 32-bit number, little-endian.
    pub const fn u32(self, value: u32) -> Self {
        self.slice(&value.to_le_bytes())
    }

    /// Appends a 64-bit number, little-endian.
    pub const fn u64(self, value: u64) -> Self {
        self.slice(&value.to_le_bytes())
    }

    /// Appends zeros up to `offset`, which must not lie behind the end.
    pub const fn zeros_to(mut self, offset: usize) -> Self {
        assert!(self.length <= offset && offset <= CAPACITY, "a field starts inside the one before it");
        self.length = offset;
        self
    }

    /// The finished array; `N` is [`Self::len`].
    pub const fn array<const N: usize>(&self) -> [u8; N] {
        assert!(N == self.length, "the array is not as long as its bytes");
        let mut array = [0; N];
        let mut index = 0;
        while index < N {
            array[index] = self.bytes[index];
            index += 1;
        }
        array
    }

    /// The offset just after `needle`, which must occur exactly once.
    pub const fn offset_after(&self, needle: &[u8]) -> usize {
        let mut found = 0;
        let mut occurrences = 0;
        let mut start = 0;
        while start + needle.len() <= self.length {
            let mut matching = 0;
            while matching < needle.len() && self.bytes[start + matching] == needle[matching] {
                matching += 1;
            }
            if matching == needle.len() {
                found = start + needle.len();
                occurrences += 1;
            }
            start += 1;
        }
        assert!(occurrences == 1, "the needle does not occur exactly once");
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_little_endian_and_gaps_are_zero() {
        let bytes = Bytes::new().u8(1).u16(0x0302).zeros_to(5).u32(0x0706_0504).u64(8).slice(b"x");
        assert_eq!(bytes.array::<18>(), [1, 2, 3, 0, 0, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, b'x']);
        assert_eq!(Bytes::new().u8(9).then(bytes).len(), 19);
    }

    #[test]
    fn the_offset_after_a_needle() {
        let bytes = Bytes::new().slice(b"abcabd");
        assert_eq!(bytes.offset_after(b"abd"), 6);
        assert_eq!(bytes.offset_after(b"c"), 3);
    }

    #[test]
    #[should_panic(expected = "exactly once")]
    fn an_ambiguous_needle_is_refused() {
        Bytes::new().slice(b"abcabd").offset_after(b"ab");
    }

    #[test]
    #[should_panic(expected = "exactly once")]
    fn a_missing_needle_is_refused() {
        Bytes::new().slice(b"abc").offset_after(b"abcd");
    }

    #[test]
    #[should_panic(expected = "starts inside")]
    fn overlapping_fields_are_refused() {
        let _ = Bytes::new().u32(0).zeros_to(3);
    }
}
