//! vCPU threads on the KVM of this machine, with guests of a few real-mode instructions.

use super::*;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cofferdam_confidential::plain::Plain;
use cofferdam_confidential::{Launch, host};
use cofferdam_devices::bus::BusDevice;
use kvm_bindings::{KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::signal::SIGRTMIN;

use crate::memory;
use crate::phases::PhaseClock;
use crate::signals::tests::raise;

const CODE: u64 = 0x1000;
const DATA: u64 = 0x2000;
/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(240);

/// `inc dword [0x2000]`, for ever.
const COUNT: &[u8] = &[0x66, 0xff, 0x06, 0x00, 0x20, 0xeb, 0xf9];
/// `jmp $`
const SPIN: &[u8] = &[0xeb, 0xfe];

/// A VM that has not run.
fn vm(code: &[u8], count: u8) -> (Vec<VcpuFd>, Arc<GuestMemoryMmap>) {
    let kvm = host::require(Path::new("/dev/kvm")).unwrap();
    let memory = memory::map(32 << 20).unwrap();
    memory.write_slice(code, GuestAddress(CODE)).unwrap();
    let launch = Launch::new(&kvm, Box::new(Plain)).unwrap().add_memory(memory.clone()).unwrap();
    let launched = launch.create_vcpus(count, 24).unwrap().finish().unwrap();
    let first = &launched.vcpus[0];
    let mut sregs = first.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector, sregs.idt.limit) = (0, 0, 0);
    first.set_sregs(&sregs).unwrap();
    first.set_regs(&kvm_bindings::kvm_regs { rip: CODE, rflags: 2, ..Default::default() }).unwrap();
    (launched.vcpus, memory)
}

struct Guest {
    vcpus: Vcpus,
    control: Arc<Control>,
    memory: Arc<GuestMemoryMmap>,
    /// These tests look for threads by name.
    _alone: MutexGuard<'static, ()>,
}

impl Guest {
    fn new(code: &[u8], count: u8, buses: Buses) -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let (vcpus, memory) = vm(code, count);
        let control = Arc::new(Control::new(Arc::new(PhaseClock::new(None))).unwrap());
        let shared = Shared {
            buses,
            page_state: None,
            certificates: None,
            control: control.clone(),
            gate: Gate::default(),
            metrics: Vec::new(),
            policies: Arc::new(Policies::none()),
        };
        let vcpus = Vcpus::start(vcpus, Arc::new(shared)).unwrap();
        Self { vcpus, control, memory, _alone: alone }
    }

    fn counter(&self) -> u32 {
        self.memory.read_obj(GuestAddress(DATA)).unwrap()
    }

    fn wait_until_it_counts(&self) {
        let before = self.counter();
        wait_for(|| self.counter() != before);
    }

    /// Ends the threads, and fails if they do not end.
    fn end(mut self) {
        within_patience(move || self.vcpus.end());
    }
}

fn wait_for(mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "it does not come");
        thread::sleep(Duration::from_millis(1));
    }
}

fn within_patience<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, done) = mpsc::channel();
    thread::spawn(move || sender.send(what()));
    done.recv_timeout(PATIENCE).expect("it ends")
}

#[test]
fn a_guest_runs_only_between_resume_and_pause() {
    let guest = Guest::new(COUNT, 1, Buses::default());
    thread::sleep(Duration::from_millis(20));
    assert_eq!(guest.counter(), 0, "it has not been let go");
    for _ in 0..3 {
        guest.vcpus.resume();
        guest.wait_until_it_counts();
        guest.vcpus.pause();
        assert!(guest.vcpus.wait_held(PATIENCE));
        let last = guest.counter();
        thread::sleep(Duration::from_millis(50));
        assert_eq!(guest.counter(), last);
    }
    guest.end();
}

#[test]
fn no_kick_of_a_storm_is_lost() {
    for round in 0..100_u64 {
        let guest = Guest::new(COUNT, 2, Buses::default());
        for step in 0..round % 10 {
            guest.vcpus.resume();
            thread::sleep(Duration::from_micros((round * 7 + step * 13) % 50));
            guest.vcpus.pause();
        }
        guest.vcpus.resume();
        thread::sleep(Duration::from_micros(round * 3));
        guest.end();
    }
}

#[test]
fn a_kick_before_the_guest_is_entered_counts() {
    kick::install().unwrap();
    let (mut vcpus, _memory) = vm(SPIN, 1);
    let vcpu = vcpus.remove(0);
    within_patience(move || {
        let mut vcpu = Kickable::new(vcpu);
        for _ in 0..3 {
            raise(SIGRTMIN());
            assert_eq!(vcpu.vcpu().run().map(|_| ()).unwrap_err().errno(), libc::EINTR);
            vcpu.clear();
            assert_eq!(vcpu.vcpu().get_kvm_run().immediate_exit, 0);
        }
    });
}

#[test]
fn a_kick_counts_where_its_signal_was_blocked_by_whoever_started_us() {
    vmm_sys_util::signal::block_signal(SIGRTMIN()).unwrap();
    let guest = Guest::new(COUNT, 1, Buses::default());
    guest.vcpus.resume();
    guest.wait_until_it_counts();
    guest.end();
}

/// This process's thread `name`. A new one takes a moment to name itself, and one that has ended to go.
fn task(name: &str) -> PathBuf {
    let mut found = Vec::new();
    wait_for(|| {
        let tasks = fs::read_dir("/proc/self/task").unwrap().flatten().map(|task| task.path());
        let is_called =
            |task: &PathBuf| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == name);
        found = tasks.filter(is_called).collect();
        found.len() == 1
    });
    found.remove(0)
}

/// CPU time of a thread, nanoseconds.
fn cpu_time(task: &Path) -> u64 {
    fs::read_to_string(task.join("schedstat")).unwrap().split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_vcpu_that_was_not_started_takes_no_time() {
    let guest = Guest::new(COUNT, 2, Buses::default());
    guest.vcpus.resume();
    guest.wait_until_it_counts();
    let (busy, idle) = (task("vcpu0"), task("vcpu1"));
    let before = [cpu_time(&busy), cpu_time(&idle)];
    wait_for(|| cpu_time(&busy) - before[0] > 100_000_000);
    assert!(cpu_time(&idle) - before[1] < 10_000_000);
    guest.end();
}

/// Offset and data.
type Write = (u64, Vec<u8>);

/// Counts up at each read, and hands over each write.
struct Device {
    reads: Mutex<Vec<usize>>,
    writes: mpsc::Sender<Write>,
}

impl BusDevice for Device {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        let mut reads = self.reads.lock().unwrap();
        reads.push(data.len());
        data.fill(reads.len() as u8);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.writes.send((offset, data.to_vec())).unwrap();
    }
}

fn device_at(base: u64) -> (Buses, Arc<Device>, Receiver<Write>) {
    let (writes, written) = mpsc::channel();
    let device = Arc::new(Device { reads: Mutex::default(), writes });
    let mut buses = Buses::default();
    buses.ports.add(base, 4, device.clone()).unwrap();
    (buses, device, written)
}

#[test]
fn every_element_of_a_string_instruction_goes_to_the_same_port() {
    let code = [
        0xba, 0x10, 0x00, // mov dx, 0x10
        0xbf, 0x00, 0x20, // mov di, 0x2000
        0xb9, 0x06, 0x00, // mov cx, 6
        0xf3, 0x6c, // rep insb
        0xb9, 0x02, 0x00, // mov cx, 2
        0xf3, 0x6d, // rep insw
        0xba, 0x11, 0x00, // mov dx, 0x11
        0xbe, 0x04, 0x20, // mov si, 0x2004
        0xb9, 0x03, 0x00, // mov cx, 3
        0xf3, 0x6f, // rep outsw
        0xeb, 0xfe, // jmp $
    ];
    let (buses, device, written) = device_at(0x10);
    let guest = Guest::new(&code, 1, buses);
    guest.vcpus.resume();
    let writes: Vec<_> = (0..3).map(|_| written.recv_timeout(PATIENCE).unwrap()).collect();
    assert_eq!(*device.reads.lock().unwrap(), [1, 1, 1, 1, 1, 1, 2, 2]);
    let mut data = [0; 10];
    guest.memory.read_slice(&mut data, GuestAddress(DATA)).unwrap();
    assert_eq!(data, [1, 2, 3, 4, 5, 6, 7, 7, 8, 8]);
    assert_eq!(writes, [(1, vec![5, 6]), (1, vec![7, 7]), (1, vec![8, 8])]);
    guest.end();
}

#[test]
fn a_guest_that_cannot_go_on_says_why_and_its_thread_ends() {
    let code = [
        0x0f, 0x20, 0xc0, // mov eax, cr0
        0x0c, 0x01, // or al, 1: protected mode, whose table of interrupts is empty
        0x0f, 0x22, 0xc0, // mov cr0, eax
        0x0f, 0x0b, // ud2
    ];
    let guest = Guest::new(&code, 1, Buses::default());
    guest.vcpus.resume();
    wait_for(|| guest.control.notes().end.is_some());
    let (reason, message) = guest.control.notes().end.unwrap();
    assert_eq!((reason, &*message), (ExitReason::TripleFault, "vCPU 0: triple fault"));
    wait_for(|| guest.vcpus.threads[0].is_finished());
    guest.end();
}

#[test]
fn an_internal_error_is_told_in_full() {
    let (mut vcpus, _memory) = vm(SPIN, 1);
    let vcpu = &mut vcpus[0];
    let mut tell = |suberror, data: &[u64]| {
        let run = vcpu.get_kvm_run();
        run.exit_reason = KVM_EXIT_INTERNAL_ERROR;
        let mut internal = kvm_bindings::kvm_run__bindgen_ty_1__bindgen_ty_13 {
            suberror,
            ndata: data.len() as u32,
            ..Default::default()
        };
        let length = data.len().min(16);
        internal.data[..length].copy_from_slice(&data[..length]);
        run.__bindgen_anon_1.internal = internal;
        exit::internal_error(vcpu)
    };
    let bytes = 2 | 0x0f << 8 | 0xaa << 16;
    assert_eq!(
        tell(KVM_INTERNAL_ERROR_EMULATION, &[1, bytes, 0]),
        "KVM cannot emulate the instruction at RIP 0x1000: bytes 0f aa"
    );
    assert_eq!(
        tell(KVM_INTERNAL_ERROR_EMULATION, &[0, bytes, 0]),
        "KVM cannot emulate the instruction at RIP 0x1000"
    );
    assert!(tell(KVM_INTERNAL_ERROR_EMULATION, &[1, u64::MAX, u64::MAX]).ends_with(&" ff".repeat(15)));
    assert_eq!(
        tell(KVM_INTERNAL_ERROR_DELIVERY_EV, &[0x30, 2]),
        "KVM internal error 3 (an exit while an event was delivered) at RIP 0x1000, data 0x30 0x2"
    );
    assert!(tell(99, &[7; 1000]).len() < 200);
}
