//! `test-guest`: what busybox lacks for the domain tests, as one static program.
#![allow(unsafe_code)] // an accepted socket comes as a number; ports and /dev/sev-guest

mod snp;

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, VsockAddr, accept, bind, connect, listen, shutdown,
    socket,
};

/// Context id of the host, and "any".
const HOST: u32 = 2;
const ANY: u32 = u32::MAX;
/// `EV_KEY` and `KEY_POWER` of Linux `input-event-codes.h`.
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

/// Helpers of the domain tests
#[derive(Parser)]
enum Command {
    /// Write the first BYTES of a test stream
    Pattern(Stream),
    /// Check that standard input is the first BYTES of a test stream
    Check(Stream),
    /// Accept one vsock connection and serve it
    Listen(Vsock),
    /// Connect to the host and serve the connection
    Connect(Vsock),
    /// Open COUNT vsock connections to a port of the host, all at once and then one after another; each sends eight
    /// bytes and gets them back
    Storm {
        /// The port
        port: u32,
        /// Connections
        count: u64,
    },
    /// Write zeroes to a part of a block device, as the device does it best
    Zero {
        /// The device
        device: PathBuf,
        /// First byte
        offset: i64,
        /// Bytes
        length: i64,
    },
    /// Write a byte to an I/O port
    Port {
        /// The port
        #[arg(value_parser = hexadecimal)]
        port: u16,
        /// The byte
        value: u8,
    },
    /// Print the attestation report of an SEV-SNP guest, in hexadecimal digits
    SnpReport {
        /// What it shall confirm: up to 64 bytes, in hexadecimal digits
        data: String,
        /// Print the certificates, too, that the host has for it
        #[arg(long)]
        certificates: bool,
    },
    /// Wait until the power button is pressed
    WaitButton {
        /// The input device
        #[arg(default_value = "/dev/input/event0")]
        device: PathBuf,
    },
}

#[derive(clap::Args)]
struct Stream {
    bytes: u64,
    seed: u64,
}

#[derive(clap::Args)]
struct Vsock {
    port: u32,
    #[command(subcommand)]
    service: Service,
}

/// What is done on a connection.
#[derive(Subcommand)]
enum Service {
    /// Send what comes, until it ends
    Echo,
    /// Send a test stream and end
    Send(Stream),
    /// Check that a test stream comes
    Receive(Stream),
}

fn main() -> ExitCode {
    let done = match Command::parse() {
        Command::Pattern(s) => cofferdam_test_guest::write(io::stdout().lock(), s.bytes, s.seed),
        Command::Check(s) => cofferdam_test_guest::check(io::stdin().lock(), s.bytes, s.seed),
        Command::Listen(vsock) => accepted(vsock.port).and_then(|stream| serve(stream, &vsock.service)),
        Command::Connect(vsock) => connected(vsock.port).and_then(|stream| serve(stream, &vsock.service)),
        Command::Storm { port, count } => storm(port, count),
        Command::Zero { device, offset, length } => zero(&device, offset, length),
        Command::Port { port, value } => write_port(port, value),
        Command::SnpReport { data, certificates: false } => {
            snp::report(&data).map(|report| println!("report {report}"))
        }
        Command::SnpReport { data, certificates: true } => {
            let tell = |length| println!("guest: certificates take {length} bytes");
            snp::extended_report(&data, tell).map(|(report, certificates)| {
                println!("report {report}");
                println!("certificates {certificates}");
            })
        }
        Command::WaitButton { device } => wait_for_button(File::open(device)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("test-guest: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A number as in `0x620`.
fn hexadecimal(text: &str) -> Result<u16, std::num::ParseIntError> {
    u16::from_str_radix(text.trim_start_matches("0x"), 16)
}

fn write_port(port: u16, value: u8) -> io::Result<()> {
    // SAFETY: no pointer is passed.
    if unsafe { nix::libc::ioperm(port.into(), 1, 1) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the port is this process's by now, and its device touches no memory of this process.
    unsafe {
        std::arch::asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags))
    };
    Ok(())
}

fn stream_socket() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Vsock, SockType::Stream, SockFlag::empty(), None)?)
}

fn accepted(port: u32) -> io::Result<File> {
    let listener = stream_socket()?;
    bind(listener.as_raw_fd(), &VsockAddr::new(ANY, port))?;
    listen(&listener, Backlog::new(1)?)?;
    println!("listening on {port}");
    let fd = accept(listener.as_raw_fd())?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn connected(port: u32) -> io::Result<File> {
    let stream = stream_socket()?;
    connect(stream.as_raw_fd(), &VsockAddr::new(HOST, port))?;
    Ok(stream.into())
}

fn storm(port: u32, count: u64) -> io::Result<()> {
    let together: Vec<File> = (0..count).map(|_| connected(port)).collect::<io::Result<_>>()?;
    (0..).zip(&together).try_for_each(|(number, stream)| talk(stream, number))?;
    drop(together);
    (0..count).try_for_each(|number| talk(&connected(port)?, number))?;
    println!("{count} connections at once and {count} one after another");
    Ok(())
}

fn talk(mut stream: &File, number: u64) -> io::Result<()> {
    let mut answer = [0; 8];
    stream.write_all(&number.to_le_bytes())?;
    stream.read_exact(&mut answer)?;
    match u64::from_le_bytes(answer) == number {
        true => Ok(()),
        false => Err(io::Error::other(format!("connection {number} gave back {answer:?}"))),
    }
}

fn serve(mut stream: File, service: &Service) -> io::Result<()> {
    match service {
        Service::Echo => {
            let mut buffer = vec![0; 1 << 16];
            loop {
                match stream.read(&mut buffer)? {
                    0 => break,
                    length => stream.write_all(&buffer[..length])?,
                }
            }
        }
        Service::Send(s) => cofferdam_test_guest::write(&stream, s.bytes, s.seed)?,
        Service::Receive(s) => cofferdam_test_guest::check(&stream, s.bytes, s.seed)?,
    }
    let _ = shutdown(stream.as_raw_fd(), Shutdown::Write);
    // Until the peer has read everything and closed, too.
    io::copy(&mut stream, &mut io::sink())?;
    Ok(())
}

/// On a block device this is a write-zeroes request, or a failure.
fn zero(device: &Path, offset: i64, length: i64) -> io::Result<()> {
    let device = OpenOptions::new().write(true).open(device)?;
    fallocate(
        &device,
        FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
        offset,
        length,
    )?;
    device.sync_all()
}

/// `struct input_event`: 16 bytes of time, then type, code and value.
fn wait_for_button(device: io::Result<File>) -> io::Result<()> {
    let mut device = device?;
    println!("waiting for the power button");
    let mut event = [0; 24];
    loop {
        device.read_exact(&mut event)?;
        let field = |at: usize| u16::from_le_bytes([event[at], event[at + 1]]);
        if (field(16), field(18), field(20)) == (EV_KEY, KEY_POWER, 1) {
            return Ok(());
        }
    }
}
