//! The gate that every vCPU thread passes before it enters its guest.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

const OPEN: u8 = 0;
const CLOSED: u8 = 1;
const ENDED: u8 = 2;

/// Open, closed (paused), or ended for good.
#[derive(Default)]
pub struct Gate {
    state: AtomicU8,
    lock: Mutex<()>,
    changed: Condvar,
}

impl Gate {
    /// Passes the gate: waits while it is closed. `false` means that the domain ends.
    pub fn pass(&self) -> bool {
        match self.state.load(Ordering::Acquire) {
            OPEN => true,
            ENDED => false,
            _ => self.wait(),
        }
    }

    #[cold]
    fn wait(&self) -> bool {
        let mut guard = self.guard();
        while self.state.load(Ordering::Acquire) == CLOSED {
            guard = self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.state.load(Ordering::Acquire) == OPEN
    }

    /// Lets vCPUs run, unless the domain has ended.
    pub fn open(&self) {
        self.change(OPEN);
    }

    /// Holds vCPUs at their next pass. They must be kicked after this.
    pub fn close(&self) {
        self.change(CLOSED);
    }

    /// Ends the domain: no vCPU passes again. They must be kicked after this.
    pub fn end(&self) {
        self.change(ENDED);
    }

    fn change(&self, state: u8) {
        let _guard = self.guard();
        if self.state.load(Ordering::Acquire) != ENDED {
            self.state.store(state, Ordering::Release);
        }
        self.changed.notify_all();
    }

    fn guard(&self) -> MutexGuard<'_, ()> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, mpsc};
    use std::thread;
    use std::time::Duration;

    #[test]
    fn a_closed_gate_holds_until_it_opens() {
        let gate = Arc::new(Gate::default());
        assert!(gate.pass());
        gate.close();
        let (sender, passed) = mpsc::channel();
        let thread = thread::spawn({
            let gate = gate.clone();
            move || sender.send(gate.pass()).unwrap()
        });
        assert!(passed.recv_timeout(Duration::from_millis(50)).is_err());
        gate.open();
        assert!(passed.recv().unwrap());
        thread.join().unwrap();
    }

    #[test]
    fn an_ended_gate_lets_waiters_go_and_never_opens() {
        let gate = Arc::new(Gate::default());
        gate.close();
        let waiter = thread::spawn({
            let gate = gate.clone();
            move || gate.pass()
        });
        gate.end();
        assert!(!waiter.join().unwrap());
        gate.open();
        assert!(!gate.pass());
    }
}
