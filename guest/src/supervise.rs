//! The container's processes while they run: the process of the manifest, and those of Exec.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use cofferdam_container_manifest::{Manifest, Signal};
use cofferdam_container_protocol::CONTROL_PORT;
use cofferdam_container_protocol::message::{ExecRequest, ProcessState};
use cofferdam_container_protocol::step::{Report, Step};
use rustix::fd::AsFd;
use rustix::io::retry_on_intr;
use rustix::process::{self as kernel, WaitId, WaitIdOptions, pidfd_send_signal, waitid};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::control::{self, Container, Refusal, Service, Usage};
use crate::space::Space;
use crate::spawn::{Program, Started, spawn};
use crate::streams::{self, Outputs, Plumbing, Ports};
use crate::verity::Watch;
use crate::{ports, vsock};

/// Most processes of Exec that run, or whose exit statuses are kept.
const MAX_EXECS: usize = 64;
/// How long output may stand still after the container's end, before nobody is believed to want it.
const PATIENCE: Duration = Duration::from_secs(60);
/// Connections to the control port that wait to be accepted.
const BACKLOG: i32 = 16;
/// Exit status of a process of which the kernel says nothing.
const NO_STATUS: u8 = 255;
/// Microseconds of the unit of processor time in `/proc/stat`, 1/100 s on every x86-64.
const TICK_US: u64 = 10_000;

/// A process that was started.
#[derive(Debug)]
pub struct Process {
    process: Arc<OwnedFd>,
    terminal: Option<OwnedFd>,
    status: Option<u8>,
}

impl Process {
    /// Lets its streams flow. Without descriptors they end at once: it was started, and somebody has to wait for it.
    pub fn new(started: Started, plumbing: Plumbing, outputs: &Arc<Outputs>) -> Self {
        let Started { process, terminal } = started;
        plumbing.run(terminal.as_ref().and_then(|terminal| terminal.try_clone().ok()), outputs);
        let process = Self { process: Arc::new(process), terminal, status: None };
        // Until somebody says how large it is. Without a terminal it says so, and that is well.
        let _ = process.resize(80, 24);
        process
    }

    fn resize(&self, columns: u16, rows: u16) -> Result<(), Refusal> {
        let terminal =
            self.terminal.as_ref().ok_or(Refusal::NotInThisState("the process has no terminal"))?;
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(terminal, size).map_err(|_| Refusal::NotInThisState("the terminal has gone"))
    }
}

/// Waits for a process to end. Its exit status: its exit code, or 128 and the number of the signal that ended it.
fn wait(process: &OwnedFd) -> u8 {
    let ended = retry_on_intr(|| waitid(WaitId::PidFd(process.as_fd()), WaitIdOptions::EXITED));
    let Ok(Some(status)) = ended else { return NO_STATUS };
    let status = status.exit_status().or_else(|| Some(status.terminating_signal()?.saturating_add(128)));
    status.and_then(|status| u8::try_from(status).ok()).unwrap_or(NO_STATUS)
}

/// What is known of the container's processes.
#[derive(Debug)]
struct Table {
    /// By identifier; none: it is being started. The empty one is the container's own.
    processes: BTreeMap<String, Option<Process>>,
    stopping: bool,
}

impl Table {
    fn process(&self, id: &str) -> Result<&Process, Refusal> {
        let process = self.processes.get(id).ok_or(Refusal::NotFound)?;
        process.as_ref().ok_or(Refusal::NotInThisState("the process is being started"))
    }

    /// A place for a process of Exec.
    fn reserve(&mut self, id: &str) -> Result<(), Refusal> {
        let ended =
            |process: &Option<Process>| process.as_ref().is_some_and(|process| process.status.is_some());
        if self.processes.get(id).is_some_and(|process| !ended(process)) {
            return Err(Refusal::AlreadyExists);
        }
        if self.processes.len() > MAX_EXECS {
            let forgotten = self.processes.iter().find(|(id, process)| !id.is_empty() && ended(process));
            let forgotten = forgotten.map(|(id, _)| id.clone()).ok_or(Refusal::TooMany)?;
            self.processes.remove(&forgotten);
        }
        self.processes.insert(id.to_owned(), None);
        Ok(())
    }
}

/// The container.
pub struct Supervisor {
    space: Space,
    manifest: Manifest,
    env: Vec<String>,
    outputs: Arc<Outputs>,
    watch: Mutex<Watch>,
    table: Mutex<Table>,
    ended: Condvar,
}

/// Whatever thread had it, what it guards is whole: no code that holds it panics half-way.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Supervisor {
    /// Supervises the container, whose process is `started`.
    pub fn new(
        space: Space,
        manifest: Manifest,
        env: Vec<String>,
        outputs: Arc<Outputs>,
        started: Process,
        watch: Watch,
    ) -> Arc<Self> {
        let processes = BTreeMap::from([(String::new(), Some(started))]);
        let table = Mutex::new(Table { processes, stopping: false });
        Arc::new(Self {
            space,
            manifest,
            env,
            outputs,
            watch: Mutex::new(watch),
            table,
            ended: Condvar::new(),
        })
    }

    /// Waits for the container's end, and until what it wrote is delivered. Returns its exit status.
    pub fn run(&self) -> u8 {
        let process = lock(&self.table).process("").map(|process| process.process.clone());
        let status = process.map_or(NO_STATUS, |process| self.follow("", &process));
        self.report_stopping();
        self.space.end();
        self.outputs.delivered(PATIENCE);
        self.look(Step::Stopping);
        status
    }

    /// Looks whether a wrong block was read.
    pub fn look(&self, step: Step) {
        lock(&self.watch).look(step);
    }

    /// Waits for a process to end, and tells everybody.
    fn follow(&self, id: &str, process: &Arc<OwnedFd>) -> u8 {
        let status = wait(process);
        if let Some(Some(known)) = lock(&self.table).processes.get_mut(id) {
            known.status = Some(status);
        }
        self.ended.notify_all();
        status
    }

    fn report_stopping(&self) {
        let first = !std::mem::replace(&mut lock(&self.table).stopping, true);
        if first {
            ports::report(Report { step: Step::Stopping, reason: None, object: None, fatal: false });
        }
    }

    fn start(self: &Arc<Self>, request: &ExecRequest) -> Result<Process, Refusal> {
        let program =
            Program::new(&self.manifest.process, &request.args, &self.env).ok_or(Refusal::NotRunnable)?;
        let ports =
            Ports { stdin: request.stdin_port, stdout: request.stdout_port, stderr: request.stderr_port };
        let connected = streams::connect(ports, request.terminal, &self.manifest.host);
        let (streams, plumbing) = connected.map_err(|_| Refusal::NotRunnable)?;
        let started = spawn(&self.space, &program, streams).map_err(|_| Refusal::NotRunnable)?;
        let process = Process::new(started, plumbing, &self.outputs);
        if let (Ok(columns @ 1..), Ok(rows @ 1..), true) =
            (u16::try_from(request.columns), u16::try_from(request.rows), request.terminal)
        {
            let _ = process.resize(columns, rows);
        }
        Ok(process)
    }
}

/// Lets the host ask. Without vsock it cannot, and the container runs all the same.
pub fn listen(supervisor: &Arc<Supervisor>) {
    let Ok(listener) = vsock::listen(CONTROL_PORT, BACKLOG) else { return };
    let service = Arc::new(Service::new(supervisor.manifest.clone(), supervisor.clone()));
    thread::spawn(move || control::serve(|| vsock::accept(&listener), &service));
}

fn number(signal: Signal) -> kernel::Signal {
    match signal {
        Signal::Alrm => kernel::Signal::ALARM,
        Signal::Cont => kernel::Signal::CONT,
        Signal::Hup => kernel::Signal::HUP,
        Signal::Int => kernel::Signal::INT,
        Signal::Kill => kernel::Signal::KILL,
        Signal::Quit => kernel::Signal::QUIT,
        Signal::Stop => kernel::Signal::STOP,
        Signal::Term => kernel::Signal::TERM,
        Signal::Tstp => kernel::Signal::TSTP,
        Signal::Ttin => kernel::Signal::TTIN,
        Signal::Ttou => kernel::Signal::TTOU,
        Signal::Usr1 => kernel::Signal::USR1,
        Signal::Usr2 => kernel::Signal::USR2,
        Signal::Winch => kernel::Signal::WINCH,
    }
}

impl Container for Arc<Supervisor> {
    fn state(&self, id: &str) -> Result<(ProcessState, Option<u8>), Refusal> {
        match lock(&self.table).processes.get(id) {
            None => Err(Refusal::NotFound),
            Some(None) => Ok((ProcessState::Created, None)),
            Some(Some(Process { status: None, .. })) => Ok((ProcessState::Running, None)),
            Some(Some(Process { status, .. })) => Ok((ProcessState::Stopped, *status)),
        }
    }

    fn wait(&self, id: &str, time: Duration) -> Result<Option<u8>, Refusal> {
        let runs = |table: &mut Table| table.process(id).is_ok_and(|process| process.status.is_none());
        let waited = self.ended.wait_timeout_while(lock(&self.table), time, runs);
        let (table, _) = waited.unwrap_or_else(PoisonError::into_inner);
        Ok(table.process(id)?.status)
    }

    fn signal(&self, id: &str, signal: Signal) -> Result<(), Refusal> {
        let table = lock(&self.table);
        let process = table.process(id)?;
        pidfd_send_signal(&process.process, number(signal))
            .map_err(|_| Refusal::NotInThisState("the process has ended"))
    }

    fn exec(&self, request: &ExecRequest) -> Result<(), Refusal> {
        {
            let mut table = lock(&self.table);
            if table.stopping {
                return Err(Refusal::NotInThisState("the container is being stopped"));
            }
            table.reserve(&request.id)?;
        }
        match self.start(request) {
            Ok(started) => {
                let process = started.process.clone();
                lock(&self.table).processes.insert(request.id.clone(), Some(started));
                let (supervisor, id) = (self.clone(), request.id.clone());
                thread::spawn(move || supervisor.follow(&id, &process));
                Ok(())
            }
            Err(refusal) => {
                lock(&self.table).processes.remove(&request.id);
                Err(refusal)
            }
        }
    }

    fn resize(&self, id: &str, columns: u16, rows: u16) -> Result<(), Refusal> {
        lock(&self.table).process(id)?.resize(columns, rows)
    }

    fn usage(&self) -> Usage {
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let (memory_total, available) = (meminfo(&memory, "MemTotal:"), meminfo(&memory, "MemAvailable:"));
        Usage {
            cpu_us: busy(&fs::read_to_string("/proc/stat").unwrap_or_default()),
            memory: memory_total.saturating_sub(available),
            memory_total,
            processes: self.space.processes(),
        }
    }

    fn stop(&self) {
        self.report_stopping();
        let Some(stop) = &self.manifest.host.stop else {
            self.space.kill();
            return;
        };
        if self.signal("", stop.signal).is_err() {
            return;
        }
        let (supervisor, time) = (self.clone(), Duration::from_millis(stop.timeout_ms));
        thread::spawn(move || {
            if let Ok(None) = Container::wait(&supervisor, "", time) {
                supervisor.space.kill();
            }
        });
    }
}

/// A value of `/proc/meminfo`, in bytes.
fn meminfo(text: &str, name: &str) -> u64 {
    let value =
        text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse::<u64>().ok());
    value.unwrap_or(0).saturating_mul(1024)
}

/// Time that all processors were busy, of `/proc/stat`, in microseconds: user, nice, system, and interrupts.
fn busy(text: &str) -> u64 {
    let line = text.lines().next().unwrap_or_default();
    let values = line.split_whitespace().skip(1).map(|value| value.parse::<u64>().unwrap_or(0));
    let ticks = values.enumerate().filter(|(at, _)| matches!(at, 0..=2 | 5 | 6));
    ticks.fold(0_u64, |sum, (_, ticks)| sum.saturating_add(ticks)).saturating_mul(TICK_US)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_of_usage() {
        let text = "MemTotal:         123 kB\nMemFree: 7 kB\nMemAvailable:     23 kB\n";
        assert_eq!((meminfo(text, "MemTotal:"), meminfo(text, "MemAvailable:")), (123 << 10, 23 << 10));
        assert_eq!(busy("cpu  1 2 3 1000 1000 4 5 6 7 8\ncpu0 1"), 15 * TICK_US);
        assert_eq!((busy(""), meminfo("", "MemTotal:")), (0, 0));
    }

    #[test]
    fn ended_processes_make_room_and_running_ones_do_not() {
        let process = |status| {
            let null = fs::File::open("/dev/null").unwrap();
            Some(Process { process: Arc::new(null.into()), terminal: None, status })
        };
        let mut table =
            Table { processes: BTreeMap::from([(String::new(), process(Some(0)))]), stopping: false };
        for at in 0..MAX_EXECS {
            table.reserve(&format!("p{at:02}")).unwrap();
            assert_eq!(table.reserve(&format!("p{at:02}")), Err(Refusal::AlreadyExists));
        }
        assert_eq!(table.reserve("one-more"), Err(Refusal::TooMany));
        table.processes.insert("p07".to_owned(), process(Some(3)));
        table.reserve("one-more").unwrap();
        assert!(table.process("p07").is_err() && table.process("").is_ok());
        table.processes.insert("p08".to_owned(), process(Some(3)));
        table.reserve("p08").unwrap();
    }
}
