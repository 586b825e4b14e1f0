//! `bench-guest`: the guest's side of the benchmarks (crate `benches`). The host names a measurement, which runs for a
//! while and becomes one line on standard output: `bench NAME VALUE`. So the host can let two guests take turns.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, VsockAddr, connect, shutdown, socket};

const KIB: usize = 1 << 10;
const MIB: f64 = (1 << 20) as f64;
/// Context id of the host.
const HOST: u32 = 2;
/// `O_DIRECT` of x86-64.
const O_DIRECT: i32 = 0o40000;

/// Measure a guest's devices: each line of standard input names a measurement
#[derive(Parser)]
struct Arguments {
    /// How long each measurement takes, milliseconds
    #[arg(long, default_value_t = 500)]
    time: u64,
    /// A disk, which is overwritten
    disk: PathBuf,
    /// PORT of the host takes bytes, PORT+1 gives bytes, PORT+2 sends back
    port: u32,
}

fn main() -> ExitCode {
    match serve(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-guest: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(arguments: &Arguments) -> io::Result<()> {
    report("start", uptime()?);
    for name in io::stdin().lines() {
        let name = name?;
        if name == "end" {
            break;
        }
        report(&name, measure(&name, arguments)?);
    }
    report("end", uptime()?);
    Ok(())
}

fn report(name: &str, value: f64) {
    println!("bench {name} {value:.3}");
}

/// Seconds since the kernel's start.
fn uptime() -> io::Result<f64> {
    let text = fs::read_to_string("/proc/uptime")?;
    let seconds = text.split(' ').next().and_then(|word| word.parse().ok());
    seconds.ok_or_else(|| io::Error::other("/proc/uptime has no number"))
}

fn measure(name: &str, arguments: &Arguments) -> io::Result<f64> {
    let time = Duration::from_millis(arguments.time);
    let random = Load { size: 4 * KIB, depth: 8, random: true, write: false };
    let sequential = Load { size: 256 * KIB, depth: 4, random: false, write: false };
    let requests = |load| requests_per_second(&arguments.disk, load, time);
    let bytes = |load: Load| Ok(requests(load)? * load.size as f64 / MIB);
    match name {
        "random_read" => requests(random),
        "random_write" => requests(Load { write: true, ..random }),
        "sequential_read" => bytes(sequential),
        "sequential_write" => bytes(Load { write: true, ..sequential }),
        "vsock_send" => Ok(send(arguments.port, time)? / MIB),
        "vsock_receive" => Ok(receive(arguments.port + 1, time)? / MIB),
        "vsock_round_trip" => Ok(round_trip(arguments.port + 2, time)? * 1e6),
        _ => Err(io::Error::other(format!("no measurement is called {name}"))),
    }
}

/// What is done to a disk.
#[derive(Clone, Copy)]
struct Load {
    /// Bytes per request.
    size: usize,
    /// Requests that are in flight at once, a thread each.
    depth: usize,
    random: bool,
    write: bool,
}

fn requests_per_second(device: &Path, load: Load, time: Duration) -> io::Result<f64> {
    let start = Instant::now();
    let workers: Vec<_> = (0..load.depth)
        .map(|index| {
            let device = device.to_owned();
            thread::spawn(move || work(&device, load, index as u64, start + time))
        })
        .collect();
    let mut requests = 0;
    for worker in workers {
        requests += worker.join().map_err(|_| io::Error::other("a worker panicked"))??;
    }
    Ok(requests as f64 / start.elapsed().as_secs_f64())
}

/// Reads or writes in one share of the disk until `end`; returns the number of requests.
fn work(device: &Path, load: Load, index: u64, end: Instant) -> io::Result<u64> {
    let mut disk = OpenOptions::new().read(true).write(load.write).custom_flags(O_DIRECT).open(device)?;
    let slots = disk.seek(SeekFrom::End(0))? / load.size as u64 / load.depth as u64;
    let mut memory = vec![0xA5_u8; load.size + 4 * KIB];
    let aligned = memory.as_ptr().align_offset(4 * KIB);
    let buffer = &mut memory[aligned..aligned + load.size];
    let mut random = index + 1;
    let mut requests = 0;
    while Instant::now() < end {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let slot = if load.random { random % slots } else { requests % slots };
        let offset = (index * slots + slot) * load.size as u64;
        if load.write {
            disk.write_all_at(buffer, offset)?;
        } else {
            disk.read_exact_at(buffer, offset)?;
        }
        requests += 1;
    }
    Ok(requests)
}

fn connected(port: u32) -> io::Result<File> {
    let stream: OwnedFd = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::empty(), None)?;
    connect(stream.as_raw_fd(), &VsockAddr::new(HOST, port))?;
    Ok(stream.into())
}

/// Bytes per second until the host has read them all.
fn send(port: u32, time: Duration) -> io::Result<f64> {
    let mut stream = connected(port)?;
    let buffer = vec![0x5A; 64 * KIB];
    let start = Instant::now();
    let mut bytes = 0_u64;
    while start.elapsed() < time {
        stream.write_all(&buffer)?;
        bytes += buffer.len() as u64;
    }
    shutdown(stream.as_raw_fd(), Shutdown::Write)?;
    let mut counted = [0; 8];
    stream.read_exact(&mut counted)?;
    if u64::from_le_bytes(counted) != bytes {
        return Err(io::Error::other("the host counted other bytes than were sent"));
    }
    Ok(bytes as f64 / start.elapsed().as_secs_f64())
}

/// Bytes per second that come from the host.
fn receive(port: u32, time: Duration) -> io::Result<f64> {
    let mut stream = connected(port)?;
    let mut buffer = vec![0; 64 * KIB];
    let start = Instant::now();
    let mut bytes = 0_u64;
    while start.elapsed() < time {
        match stream.read(&mut buffer)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            length => bytes += length as u64,
        }
    }
    Ok(bytes as f64 / start.elapsed().as_secs_f64())
}

/// Seconds that a message of 64 bytes takes to the host and back.
fn round_trip(port: u32, time: Duration) -> io::Result<f64> {
    let mut stream = connected(port)?;
    let mut message = [7; 64];
    let start = Instant::now();
    let mut turns = 0;
    while start.elapsed() < time {
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
        turns += 1;
    }
    Ok(start.elapsed().as_secs_f64() / f64::from(turns))
}
