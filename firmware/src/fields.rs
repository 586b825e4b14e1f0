//! Little-endian fields one after another, read and written without a way to panic.

/// The fields that are yet to be read.
pub(crate) struct Fields<'a>(pub &'a [u8]);

impl Fields<'_> {
    /// The next `N` bytes; zeros when there are not so many, which every format here refuses by its magic.
    pub fn bytes<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk() {
            Some((field, rest)) => {
                self.0 = rest;
                *field
            }
            None => [0; N],
        }
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }

    /// Whether all that is left is zero.
    pub fn rest_is_zero(&self) -> bool {
        is_zero(self.0)
    }
}

/// Whether all bytes are zero. (Two arrays would be compared by a function of half a KiB.)
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == 0)
}

/// The place of the fields that are yet to be written.
pub(crate) struct Place<'a>(pub &'a mut [u8]);

impl Place<'_> {
    /// Writes `field`, as far as there is room.
    #[inline(never)]
    pub fn put(&mut self, field: &[u8]) {
        let (here, rest) = core::mem::take(&mut self.0).split_at_mut_checked(field.len()).unwrap_or_default();
        here.copy_from_slice(field.get(..here.len()).unwrap_or_default());
        self.0 = rest;
    }
}
