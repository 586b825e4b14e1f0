//! The gate that every vCPU thread passes before it enters its guest.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const OPEN: u8 = 0;
const CLOSED: u8 = 1;
const ENDED: u8 = 2;

/// Open, closed (paused), or ended for good.
#[derive(Default)]
pub struct Gate {
    state: AtomicU8,
    /// Number of threads that stand at the gate, or have left it for good.
    held: Mutex<usize>,
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
        *guard = guard.saturating_add(1);
        self.changed.notify_all();
        while self.state.load(Ordering::Acquire) == CLOSED {
            guard = self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        *guard = guard.saturating_sub(1);
        self.state.load(Ordering::Acquire) == OPEN
    }

    /// Whether the domain has ended.
    pub fn has_ended(&self) -> bool {
        self.state.load(Ordering::Acquire) == ENDED
    }

    /// The calling thread never comes back.
    pub fn leave(&self) {
        let mut guard = self.guard();
        *guard = guard.saturating_add(1);
        self.changed.notify_all();
    }

    /// Waits until `count` threads stand at the closed gate or have left. `false` means that they did not in
    /// that time.
    pub fn wait_held(&self, count: usize, time: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(self.guard(), time, |held| *held < count);
        let (guard, _) = waited.unwrap_or_else(PoisonError::into_inner);
        *guard >= count
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
        let guard = self.guard();
        if self.state.load(Ordering::Acquire) != ENDED {
            self.state.store(state, Ordering::Release);
        }
        // Whoever is woken need not wait for the lock.
        drop(guard);
        self.changed.notify_all();
    }

    fn guard(&self) -> MutexGuard<'_, usize> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
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
        assert!(!gate.wait_held(1, Duration::ZERO));
        let (sender, passed) = mpsc::channel();
        let thread = thread::spawn({
            let gate = gate.clone();
            move || sender.send(gate.pass()).unwrap()
        });
        assert!(passed.recv_timeout(Duration::from_millis(50)).is_err());
        assert!(gate.wait_held(1, Duration::from_secs(60)));
        assert!(!gate.wait_held(2, Duration::ZERO));
        gate.open();
        assert!(passed.recv().unwrap());
        thread.join().unwrap();
        assert!(!gate.wait_held(1, Duration::ZERO));
        gate.leave();
        assert!(gate.wait_held(1, Duration::ZERO));
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
