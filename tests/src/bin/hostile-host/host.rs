//! What a plan's host does at which call of the monitor.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use cofferdam_tests::tamper::{Event, Plan, Side, What, When};
use libc::{pid_t, user_regs_struct};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::trace::Thread;

// Requests of KVM, and what is in their structures (Linux, include/uapi/linux/kvm.h).
const SET_USER_MEMORY_REGION2: u32 = 0x40A0_AE49;
const SET_MEMORY_ATTRIBUTES: u32 = 0x4020_AED2;
const MEMORY_ENCRYPT_OP: u32 = 0xC008_AEBA;
const GET_SUPPORTED_CPUID: u32 = 0xC008_AE05;
const RUN: u32 = 0xAE80;
/// `KVM_MEMORY_ATTRIBUTE_PRIVATE`.
const PRIVATE: u64 = 1 << 3;
/// `KVM_MEM_GUEST_MEMFD`.
const GUEST_MEMFD: u64 = 1 << 2;
/// `KVM_SEV_SNP_LAUNCH_UPDATE`.
const LAUNCH_UPDATE: u64 = 101;
/// `KVM_SEV_SNP_LAUNCH_FINISH`.
const LAUNCH_FINISH: u64 = 102;
/// Where `struct kvm_run` says why the vCPU has left the guest, and has the answer to a hypercall.
const EXIT_REASON: u64 = 8;
const HYPERCALL_RESULT: u64 = 88;
/// `KVM_EXIT_HYPERCALL`.
const HYPERCALL: u64 = 3;

/// The calls at which the monitor is stopped.
pub const TRACED: [u32; 4] =
    [GET_SUPPORTED_CPUID, SET_USER_MEMORY_REGION2, SET_MEMORY_ATTRIBUTES, MEMORY_ENCRYPT_OP];

/// A number of a memory slot that no monitor uses.
const FREE_SLOT: u64 = 1000;
/// Below a thread's stack, and what the compiler may use there without saying so.
const SCRATCH: u64 = 4096;
/// How often the same change comes in a row until that is noted instead.
const INSISTENCE: u32 = 50;

/// `struct kvm_userspace_memory_region2`, as far as it is filled in.
#[derive(Clone, Copy)]
struct Slot([u64; 20]);

impl Slot {
    /// A slot of guest-private memory; the descriptor and the flags are those of `self`.
    fn piece(&self, number: u64, gpa: u64, length: u64, offset: u64) -> Self {
        let Self(mut fields) = *self;
        let within = offset.wrapping_sub(fields[4]);
        fields[0] = number | GUEST_MEMFD << 32;
        (fields[1], fields[2], fields[4]) = (gpa, length, offset);
        fields[3] = fields[3].wrapping_add(within);
        Self(fields)
    }

    fn range(&self) -> Range<u64> {
        self.0[1]..self.0[1].saturating_add(self.0[2])
    }
}

/// The thread that makes calls for the host, and where in its program.
#[derive(Clone, Copy)]
struct Caller {
    thread: Thread,
    /// The instruction that makes a system call.
    site: u64,
    /// The descriptor of the virtual machine.
    vm: u64,
}

/// A host with a plan.
pub struct Host {
    plan: Plan,
    log: File,
    /// Which rules are done with.
    done: Vec<bool>,
    launched: bool,
    told: bool,
    slots: Vec<Slot>,
    withheld: Vec<Range<u64>>,
    /// How often pages were handed over, by the address of the first.
    handed_over: BTreeMap<u64, u32>,
    /// The last change of sides, and how often it came in a row.
    last: Option<(Side, Range<u64>)>,
    repeated: u32,
    /// That of the last call.
    caller: Option<Caller>,
}

impl Host {
    /// At the start.
    pub fn new(plan: Plan) -> io::Result<Self> {
        let log = File::options().append(true).open(&plan.log)?;
        let done = vec![false; plan.rules.len()];
        Ok(Self {
            plan,
            log,
            done,
            launched: false,
            told: false,
            slots: Vec::new(),
            withheld: Vec::new(),
            handed_over: BTreeMap::new(),
            last: None,
            repeated: 0,
            caller: None,
        })
    }

    /// Whether the plan's file is not there yet, and matters.
    pub fn waits_for_word(&self) -> bool {
        let waits = |when: &When| matches!(when, When::Told(_) | When::Now);
        !self.told && self.plan.rules.iter().any(|rule| waits(&rule.when))
    }

    /// Looks whether it is there. If so, the vCPU is stopped where something is to be done at once.
    pub fn look_for_word(&mut self) {
        self.told = self.plan.told.exists();
        if self.told
            && self.plan.rules.iter().any(|rule| matches!(rule.when, When::Now))
            && let Some(thread) = self.caller.and_then(|caller| vcpu(caller.thread))
        {
            // It may have ended.
            let _ = thread.interrupt();
        }
    }

    /// A thread was interrupted. A new one stops in the same way, for nothing.
    pub fn interrupted(&mut self, thread: Thread) -> io::Result<()> {
        let Some(caller) = self.caller.filter(|_| self.told) else { return Ok(()) };
        self.follow(Caller { thread, ..caller }, |when| matches!(when, When::Now))
    }

    /// A thread has stopped at a call of [`TRACED`].
    pub fn call(&mut self, thread: Thread) -> io::Result<()> {
        let registers = thread.registers()?;
        // Requests have 32 bits.
        match registers.rsi as u32 {
            GET_SUPPORTED_CPUID => self.cpuid(thread, &registers),
            SET_USER_MEMORY_REGION2 => self.slot(thread, &registers),
            MEMORY_ENCRYPT_OP => self.command(thread, &registers),
            SET_MEMORY_ATTRIBUTES => self.change(thread, &registers),
            _ => Ok(()),
        }
    }

    fn slot(&mut self, thread: Thread, registers: &user_regs_struct) -> io::Result<()> {
        let slot = Slot(thread.read(registers.rdx)?);
        if slot.0[0] >> 32 & GUEST_MEMFD != 0 && slot.0[2] != 0 {
            self.slots.push(slot);
        }
        Ok(())
    }

    fn command(&mut self, thread: Thread, registers: &user_regs_struct) -> io::Result<()> {
        let [id, parameters, _]: [u64; 3] = thread.read(registers.rdx)?;
        match id & u64::from(u32::MAX) {
            LAUNCH_UPDATE => return self.hand_over(thread, parameters),
            LAUNCH_FINISH => {}
            _ => return Ok(()),
        }
        thread.to_next_call_stop()?;
        if thread.registers()?.rax == 0 {
            self.launched = true;
            self.note(&Event::Launched)?;
            self.follow(caller(thread, registers), |when| matches!(when, When::Launched))?;
        }
        Ok(())
    }

    /// KVM is asked what CPUID it supports.
    fn cpuid(&mut self, thread: Thread, registers: &user_regs_struct) -> io::Result<()> {
        thread.to_next_call_stop()?;
        let table = registers.rdx;
        for (number, what) in self.due(|when| matches!(when, When::Supported)) {
            let result = match what {
                // `struct kvm_cpuid2`.
                What::Cpuid { leaf, register, value } => {
                    let [count]: [u32; 1] = thread.read(table)?;
                    set_cpuid(
                        thread,
                        Entries { start: table + 8, count, size: 40, registers: 12 },
                        leaf,
                        register,
                        value,
                    )
                }
                _ => Err(io::Error::other("not here")),
            };
            self.followed(number, result)?;
        }
        Ok(())
    }

    /// Pages are to be handed over, as `struct kvm_sev_snp_launch_update` at `parameters` says.
    fn hand_over(&mut self, thread: Thread, parameters: u64) -> io::Result<()> {
        let [frame, address, length]: [u64; 3] = thread.read(parameters)?;
        let gpa = frame << 12;
        self.note(&Event::HandOver(gpa..gpa.saturating_add(length)))?;
        let times = self.handed_over.entry(gpa).or_default();
        let now = *times;
        *times += 1;
        let length_at = parameters + 16;
        for (number, what) in
            self.due(|when| matches!(when, When::HandOver(page, time) if (*page, *time) == (gpa, now)))
        {
            let result = match what {
                // The page is of the SNP firmware's format.
                What::Cpuid { leaf, register, value } => {
                    let [count]: [u32; 1] = thread.read(address)?;
                    set_cpuid(
                        thread,
                        Entries { start: address + 16, count, size: 48, registers: 24 },
                        leaf,
                        register,
                        value,
                    )
                }
                What::HandOverPart(part) => {
                    thread.write(length_at, &[part])?;
                    thread.to_next_call_stop()?;
                    let [left]: [u64; 1] = thread.read(length_at)?;
                    thread.write(length_at, &[left + length - part])
                }
                What::ClaimLeft(left) => {
                    thread.to_next_call_stop()?;
                    thread.write(length_at, &[left])
                }
                What::Fail(errno) => thread.skip_call(errno),
                _ => Err(io::Error::other("not here")),
            };
            self.followed(number, result)?;
        }
        Ok(())
    }

    /// The rules whose time has come, which are followed with this.
    fn due(&mut self, applies: impl Fn(&When) -> bool) -> Vec<(usize, What)> {
        let rules = self.plan.rules.iter().enumerate().zip(&mut self.done);
        let due = rules.filter(|((_, rule), done)| !**done && applies(&rule.when));
        due.map(|((number, rule), done)| {
            *done = true;
            (number, rule.what.clone())
        })
        .collect()
    }

    fn followed(&mut self, number: usize, result: io::Result<()>) -> io::Result<()> {
        self.note(&Event::Followed(number, result.err().map(|error| error.to_string())))
    }

    /// Pages are to change sides.
    fn change(&mut self, thread: Thread, registers: &user_regs_struct) -> io::Result<()> {
        if !self.launched {
            return Ok(());
        }
        let caller = caller(thread, registers);
        self.caller = Some(caller);
        let [address, length, attributes, _]: [u64; 4] = thread.read(registers.rdx)?;
        let side = if attributes & PRIVATE != 0 { Side::Private } else { Side::Shared };
        let range = address..address.saturating_add(length);
        self.note_change(side, &range)?;
        if self.withheld.iter().any(|withheld| withheld.start < range.end && range.start < withheld.end) {
            return thread.skip_call(0);
        }
        let told = self.told || (self.waits_for_word() && self.plan.told.exists());
        let applies = |when: &When| match when {
            When::Change(wanted, page) => *wanted == side && range.contains(page),
            When::Told(wanted) => told && *wanted == side,
            _ => false,
        };
        let mut rules = self.plan.rules.iter().zip(&self.done);
        if !rules.any(|(rule, done)| !done && applies(&rule.when)) {
            return Ok(());
        }
        let withholds = |what: &What| matches!(what, What::Withhold);
        let mut rules = self.plan.rules.iter().zip(&self.done);
        if rules.any(|(rule, done)| !done && applies(&rule.when) && withholds(&rule.what)) {
            self.withheld.push(range.clone());
            thread.skip_call(0)?;
        }
        thread.to_next_call_stop()?;
        self.follow(caller, applies)
    }

    /// Notes a change, and that it comes again and again instead of doing so for ever.
    fn note_change(&mut self, side: Side, range: &Range<u64>) -> io::Result<()> {
        let change = Some((side, range.clone()));
        self.repeated = if self.last == change { self.repeated.saturating_add(1) } else { 0 };
        self.last = change;
        match self.repeated {
            0..INSISTENCE => self.note(&Event::Change(side, range.clone())),
            INSISTENCE => self.note(&Event::Insists),
            _ => Ok(()),
        }
    }

    /// Follows the rules whose time has come. The caller is at the end of a call, or was interrupted.
    fn follow(&mut self, caller: Caller, applies: impl Fn(&When) -> bool) -> io::Result<()> {
        for (number, what) in self.due(applies) {
            let result = self.act(caller, &what);
            self.followed(number, result)?;
        }
        Ok(())
    }

    fn act(&self, caller: Caller, what: &What) -> io::Result<()> {
        let process = caller.thread.process()?;
        match what {
            What::Note | What::Withhold => Ok(()),
            What::Cpuid { .. } | What::HandOverPart(_) | What::ClaimLeft(_) | What::Fail(_) => {
                Err(io::Error::other("not here"))
            }
            What::Refuse => refuse(caller.thread),
            What::WriteFile(path, offset, byte) => {
                File::options().write(true).open(path)?.write_all_at(&[*byte], *offset)
            }
            What::TakeAway(range) => punch(&descriptor(process, "kvm-gmem")?, range),
            What::Convert(range, side) => {
                caller.set_side(range, *side)?;
                let left_behind = match side {
                    Side::Private => "memfd:cofferdam-guest",
                    Side::Shared => "kvm-gmem",
                };
                punch(&descriptor(process, left_behind)?, range)
            }
            What::Exchange(first, second, length) => {
                let slot = self.slot_of(*first)?;
                let (first, second) = (*first..first + length, *second..second + length);
                caller.replace(
                    slot,
                    &[
                        (slot.range().start..first.start, slot.range().start),
                        (first.clone(), second.start),
                        (first.end..second.start, first.end),
                        (second.clone(), first.start),
                        (second.end..slot.range().end, second.end),
                    ],
                )
            }
            What::Double(first, second, length) => {
                let slot = self.slot_of(*first)?;
                let second = *second..second + length;
                caller.replace(
                    slot,
                    &[
                        (slot.range().start..second.start, slot.range().start),
                        (second.clone(), *first),
                        (second.end..slot.range().end, second.end),
                    ],
                )
            }
            What::Fill(range, byte) => {
                let memory = File::from(descriptor(process, "memfd:cofferdam-guest")?);
                let bytes = vec![*byte; 1 << 20];
                let mut at = range.start;
                while at < range.end {
                    let length = bytes.len().min(usize::try_from(range.end - at).unwrap_or(usize::MAX));
                    memory.write_all_at(&bytes[..length], at)?;
                    at += length as u64;
                }
                Ok(())
            }
        }
    }

    /// The slot of RAM with this address. Its backings begin at its start.
    fn slot_of(&self, gpa: u64) -> io::Result<&Slot> {
        self.slots
            .iter()
            .find(|slot| slot.range().contains(&gpa))
            .ok_or_else(|| io::Error::other("no such RAM"))
    }

    fn note(&mut self, event: &Event) -> io::Result<()> {
        let line = format!("{}\n", serde_json::to_string(event)?);
        self.log.write_all(line.as_bytes())
    }
}

fn caller(thread: Thread, registers: &user_regs_struct) -> Caller {
    // The instruction has two bytes.
    Caller { thread, site: registers.rip - 2, vm: registers.rdi }
}

impl Caller {
    /// Has the thread make a call to KVM with a structure.
    fn ioctl<const N: usize>(self, request: u32, structure: [u64; N]) -> io::Result<()> {
        let address = (self.thread.registers()?.rsp - SCRATCH) & !15;
        let before: [u64; N] = self.thread.read(address)?;
        self.thread.write(address, &structure)?;
        let result = self.thread.call(self.site, libc::SYS_ioctl, [self.vm, request.into(), address]);
        self.thread.write(address, &before)?;
        result.map(drop)
    }

    fn set_side(self, range: &Range<u64>, side: Side) -> io::Result<()> {
        let attributes = if side == Side::Private { PRIVATE } else { 0 };
        self.ioctl(SET_MEMORY_ATTRIBUTES, [range.start, range.end - range.start, attributes, 0])
    }

    /// Takes a slot away, and puts others in its place: their addresses, and where in the slot's backing each begins.
    fn replace(self, slot: &Slot, pieces: &[(Range<u64>, u64)]) -> io::Result<()> {
        let Slot(mut gone) = *slot;
        gone[2] = 0;
        self.ioctl(SET_USER_MEMORY_REGION2, gone)?;
        let pieces = pieces.iter().filter(|(range, _)| !range.is_empty());
        for (number, (range, address)) in (FREE_SLOT..).zip(pieces) {
            let offset = slot.0[4] + (address - slot.range().start);
            let piece = slot.piece(number, range.start, range.end - range.start, offset);
            self.ioctl(SET_USER_MEMORY_REGION2, piece.0)?;
        }
        Ok(())
    }
}

/// A table of functions of CPUID in the monitor. An entry begins with the number of the function.
struct Entries {
    start: u64,
    count: u32,
    /// Bytes of an entry.
    size: u64,
    /// Where the registers begin in it.
    registers: u64,
}

fn set_cpuid(thread: Thread, entries: Entries, leaf: u32, register: usize, value: u32) -> io::Result<()> {
    let mut places = (0..u64::from(entries.count)).map(|number| entries.start + number * entries.size);
    let is_it = |place: &u64| thread.read::<[u32; 1]>(*place).is_ok_and(|[number]| number == leaf);
    let place = places.find(is_it).ok_or_else(|| io::Error::other("no such function"))?;
    thread.write(place + entries.registers + 4 * register as u64, &[value])
}

/// Lets the thread of a vCPU go on to where it enters the guest again, and changes its answer to the guest's hypercall.
fn refuse(thread: Thread) -> io::Result<()> {
    loop {
        thread.to_next_call_stop()?;
        let registers = thread.registers()?;
        if registers.orig_rax == libc::SYS_ioctl.cast_unsigned() && registers.rsi as u32 == RUN {
            break;
        }
    }
    let index = thread.name()?.trim_start_matches("vcpu").to_owned();
    let maps = thread.text("maps")?;
    let line = maps.lines().find(|line| line.ends_with(&format!("kvm-vcpu:{index}")));
    let start = line.and_then(|line| u64::from_str_radix(line.split('-').next()?, 16).ok());
    let run = start.ok_or_else(|| io::Error::other("no mapped vCPU"))?;
    let [reason]: [u64; 1] = thread.read(run + EXIT_REASON)?;
    if reason & u64::from(u32::MAX) != HYPERCALL {
        return Err(io::Error::other("the guest did not ask by a hypercall"));
    }
    thread.write(run + HYPERCALL_RESULT, &[libc::EINVAL as u64])
}

/// The first vCPU's thread of a thread's process.
fn vcpu(thread: Thread) -> Option<Thread> {
    let folder = format!("/proc/{}/task", thread.process().ok()?);
    let threads = fs::read_dir(folder).ok()?.flatten();
    let mut threads = threads.filter_map(|entry| entry.file_name().to_str()?.parse().ok().map(Thread));
    threads.find(|thread| thread.name().is_ok_and(|name| name == "vcpu0"))
}

fn punch(file: &OwnedFd, range: &Range<u64>) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(fallocate(file, flags, range.start, range.end - range.start)?)
}

/// A copy of the first descriptor of a process that is of a file with `name` in its own.
fn descriptor(process: pid_t, name: &str) -> io::Result<OwnedFd> {
    let is_it = |link: &PathBuf| link.to_string_lossy().contains(name);
    let mut entries = fs::read_dir(format!("/proc/{process}/fd"))?.flatten();
    let entry = entries.find(|entry| fs::read_link(entry.path()).is_ok_and(|link| is_it(&link)));
    let number = entry.and_then(|entry| entry.file_name().to_str()?.parse().ok());
    let number = number.ok_or_else(|| io::Error::other(format!("the monitor has no {name}")))?;
    let process = Pid::from_raw(process).ok_or_else(|| io::Error::other("no process"))?;
    let pidfd = pidfd_open(process, PidfdFlags::empty())?;
    Ok(pidfd_getfd(pidfd, number, PidfdGetfdFlags::empty())?)
}
