//! The device mapper, by its control node (Linux, include/uapi/linux/dm-ioctl.h): devices with one target each.
#![allow(unsafe_code)] // ioctls

use std::ffi::c_void;
use std::fs::File;
use std::sync::atomic::{Ordering, compiler_fence};

use rustix::io::{Errno, Result};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

/// Size of a sector, the unit of all sizes of the kernel's block layer, in bytes.
pub const SECTOR: u64 = 512;

const CONTROL: &str = "/dev/mapper/control";
/// Size of `struct dm_ioctl`.
const HEADER: usize = 312;
/// Size of `struct dm_target_spec`, which a target's table follows as a string.
const SPEC: usize = 40;
/// Room for an answer.
const ANSWER: usize = 1024;

const CREATE: u8 = 3;
const RESUME: u8 = 6;
const LOAD: u8 = 9;
const STATUS: u8 = 12;

const READ_ONLY: u32 = 1;
const SECURE_DATA: u32 = 1 << 15;

/// What a device is made of.
pub struct Target {
    /// Its type.
    pub kind: &'static str,
    /// Its size, in sectors.
    pub sectors: u64,
    /// Its parameters.
    pub table: String,
    /// Whether nothing can be written to it.
    pub read_only: bool,
    /// Whether there is a key among the parameters, which nobody else keeps.
    pub secret: bool,
}

impl Drop for Target {
    fn drop(&mut self) {
        if self.secret {
            wipe(std::mem::take(&mut self.table).into_bytes());
        }
    }
}

/// A device. It stays when this is dropped.
#[derive(Debug)]
pub struct Device {
    name: String,
    minor: u64,
}

impl Device {
    /// Makes a device, which is ready for use.
    ///
    /// # Errors
    /// If the kernel refuses it.
    pub fn create(name: &str, target: &Target) -> Result<Self> {
        let flags =
            if target.read_only { READ_ONLY } else { 0 } | if target.secret { SECURE_DATA } else { 0 };
        let created = call(CREATE, &Message::new(name, flags, 0, &[]))?;
        let payload = target.spec();
        let loaded = call(LOAD, &Message::new(name, flags, 1, &payload));
        wipe(payload);
        loaded?;
        call(RESUME, &Message::new(name, 0, 0, &[]))?;
        // A number of a device in the form of `huge_encode_dev`; minors of up to 8 bits, which are all that there are here.
        Ok(Self { name: name.to_owned(), minor: created.field(40) & 0xFF })
    }

    /// Its node.
    pub fn node(&self) -> String {
        format!("/dev/dm-{}", self.minor)
    }

    /// What its target says of itself.
    ///
    /// # Errors
    /// If the kernel says nothing.
    pub fn status(&self) -> Result<String> {
        let answer = call(STATUS, &Message::new(&self.name, 0, 0, &[0; ANSWER]))?;
        let start = usize::try_from(answer.field(16) & u64::from(u32::MAX)).map_err(|_| Errno::INVAL)?;
        let text = answer.0.get(start.saturating_add(SPEC)..).unwrap_or_default();
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(String::from_utf8_lossy(text).into_owned())
    }
}

impl Target {
    /// `struct dm_target_spec`, then the parameters.
    fn spec(&self) -> Vec<u8> {
        let size = SPEC.saturating_add(self.table.len()).saturating_add(1).next_multiple_of(8);
        let mut bytes = Vec::with_capacity(size);
        bytes.extend(0_u64.to_le_bytes());
        bytes.extend(self.sectors.to_le_bytes());
        bytes.extend(0_u32.to_le_bytes());
        bytes.extend(u32::try_from(size).unwrap_or(0).to_le_bytes());
        bytes.extend(self.kind.as_bytes());
        bytes.resize(SPEC, 0);
        bytes.extend(self.table.as_bytes());
        bytes.resize(size, 0);
        bytes
    }
}

/// Overwrites what was a secret. The compiler cannot leave that out.
pub fn wipe(mut bytes: Vec<u8>) {
    for byte in &mut bytes {
        // SAFETY: a reference is valid for writes.
        unsafe { std::ptr::write_volatile(byte, 0) };
    }
    compiler_fence(Ordering::SeqCst);
}

/// `struct dm_ioctl`, and what follows it, which is also where the answer comes.
struct Message(Vec<u8>);

impl Message {
    fn new(name: &str, flags: u32, targets: u32, payload: &[u8]) -> Self {
        let size = HEADER.saturating_add(payload.len());
        let mut bytes = Vec::with_capacity(size);
        for word in [4, 0, 0, u32::try_from(size).unwrap_or(0), HEADER as u32, targets, 0, flags, 0, 0, 0, 0]
        {
            bytes.extend(word.to_le_bytes());
        }
        // Names are this program's own, and short.
        bytes.extend(name.as_bytes());
        bytes.resize(HEADER, 0);
        bytes.extend(payload);
        Self(bytes)
    }

    fn field(&self, at: usize) -> u64 {
        let bytes = self.0.get(at..).and_then(|rest| rest.first_chunk());
        bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }
}

fn call(command: u8, message: &Message) -> Result<Message> {
    let control = File::options().read(true).write(true).open(CONTROL);
    let control = control.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    let mut answer = Message(message.0.clone());
    // SAFETY: the memory is as large as its header says, and the kernel writes to it nothing but plain bytes.
    let done = unsafe { ioctl(&control, Call { command, memory: &mut answer.0 }) };
    match done {
        Ok(()) => Ok(answer),
        Err(errno) => Err(errno),
    }
}

struct Call<'a> {
    command: u8,
    memory: &'a mut [u8],
}

// SAFETY: the request is one of the device mapper's, and takes a pointer to `struct dm_ioctl`, whose length is in it.
unsafe impl Ioctl for Call<'_> {
    type Output = ();
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        opcode::from_components(rustix::ioctl::Direction::ReadWrite, 0xFD, self.command, HEADER)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.memory.as_mut_ptr().cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_laid_out_as_the_kernel_has_them() {
        let target =
            Target { kind: "verity", sectors: 8, table: "1 a".into(), read_only: true, secret: false };
        let spec = target.spec();
        assert_eq!(spec.len(), 48);
        assert_eq!((&spec[8..16], &spec[20..24]), (&8_u64.to_le_bytes()[..], &48_u32.to_le_bytes()[..]));
        assert_eq!((&spec[24..31], &spec[40..44]), (&b"verity\0"[..], &b"1 a\0"[..]));
        let message = Message::new("name", READ_ONLY, 1, &spec);
        assert_eq!(message.0.len(), 312 + 48);
        assert_eq!(message.0[12..16], 360_u32.to_le_bytes());
        assert_eq!(message.0[16..20], 312_u32.to_le_bytes());
        assert_eq!((message.0[20], message.0[28]), (1, 1));
        assert_eq!(message.0[48..53], *b"name\0");
    }
}
