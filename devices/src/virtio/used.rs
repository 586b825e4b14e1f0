//! The device's side of a queue's way back: used ring and notifications.
//!
//! A device adds chains as it finishes them ([`add`]) and calls [`notify`] once per
//! batch, which interrupts the driver only if it wants to hear of it: by the
//! `NO_INTERRUPT` flag, or by `used_event` where `EVENT_IDX` was negotiated
//! (virtio 1.2, 2.7.7). Before it waits, [`rearm`] asks the driver for the next
//! notification.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::VirtioInterrupt;
use super::chain::ChainError;

/// Gives the chain that starts at `head` back to the driver, with `written` bytes written by the device.
pub fn add(queue: &mut Queue, memory: &GuestMemoryMmap, head: u16, written: u32) -> Result<(), ChainError> {
    if head >= queue.size() {
        return Err(ChainError::Index { index: head, size: queue.size() });
    }
    queue
        .add_used(memory, head, written)
        .map_err(|_| ChainError::Memory { address: queue.used_ring(), length: 4 })
}

/// Interrupts the driver for the chains that were added since the last call, if it wants that. To be called
/// only if there are any.
pub fn notify(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    interrupt: &VirtioInterrupt,
) -> Result<(), ChainError> {
    if wants_interrupt(queue, memory)? {
        interrupt.used();
    }
    Ok(())
}

/// Asks the driver to notify when it makes the next chain available. `Ok(true)` if there already is one: the
/// device must look again, since no notification will come for it.
pub fn rearm(queue: &mut Queue, memory: &GuestMemoryMmap) -> Result<bool, ChainError> {
    if !queue.ready() {
        return Ok(false);
    }
    queue
        .enable_notification(memory)
        .map_err(|_| ChainError::Memory { address: queue.used_ring(), length: 4 })
}

fn wants_interrupt(queue: &mut Queue, memory: &GuestMemoryMmap) -> Result<bool, ChainError> {
    let ring = queue.avail_ring();
    let outside = |_| ChainError::Memory { address: ring, length: 2 };
    if queue.event_idx_enabled() {
        return queue.needs_notification(memory).map_err(outside);
    }
    // The used index must be visible before the flag is read (2.7.7.2).
    fence(Ordering::SeqCst);
    let flags: u16 = memory
        .load(GuestAddress(ring), Ordering::Relaxed)
        .map_err(|_| ChainError::Memory { address: ring, length: 2 })?;
    Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
}

#[cfg(test)]
mod tests {
    //! A driver and a device on two CPUs, each of which sleeps whenever it may.

    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
    use std::thread;
    use std::time::Duration;

    use vm_memory::GuestMemoryMmap;

    use super::*;
    use crate::interrupt::InterruptLine;
    use crate::virtio::chain::Chain;
    use crate::virtio::testing::{self, Ring};

    const BASE: u64 = 0x1000;
    const SIZE: u16 = 8;
    const CHAINS: u32 = 50_000;
    /// Time in which everything comes that is not lost.
    const PATIENCE: Duration = Duration::from_secs(300);

    /// Wakes the other side, which may be awake.
    struct Bell(SyncSender<()>);

    impl InterruptLine for Bell {
        fn trigger(&self) -> std::io::Result<()> {
            let _ = self.0.try_send(());
            Ok(())
        }
    }

    /// A driver's way to work (virtio 1.2, 2.7.13): it makes chains available as long as there is room, and sleeps until
    /// the device has answered.
    struct Driver {
        ring: Ring,
        memory: Arc<GuestMemoryMmap>,
        event_idx: bool,
        offered: u16,
        taken_back: u16,
    }

    impl Driver {
        fn load(&self, address: u64) -> u16 {
            self.memory.load(GuestAddress(address), Ordering::Acquire).unwrap()
        }

        fn store(&self, value: u16, address: u64) {
            self.memory.store(value, GuestAddress(address), Ordering::Release).unwrap();
        }

        /// Makes one more chain available; returns whether the device asked to be told.
        fn offer(&mut self) -> bool {
            let slot = u64::from(self.offered % SIZE);
            self.store(self.offered % SIZE, self.ring.available() + 4 + slot * 2);
            self.offered = self.offered.wrapping_add(1);
            self.store(self.offered, self.ring.available() + 2);
            fence(Ordering::SeqCst);
            if self.event_idx {
                self.load(self.ring.used() + 4 + u64::from(SIZE) * 8) == self.offered.wrapping_sub(1)
            } else {
                self.load(self.ring.used()) == 0
            }
        }

        /// Takes back what is answered; sleeps first if nothing is.
        fn take_back(&mut self, interrupts: &Receiver<()>) -> u32 {
            loop {
                let answered = self.load(self.ring.used() + 2);
                let count = answered.wrapping_sub(self.taken_back);
                self.taken_back = answered;
                if count > 0 {
                    return count.into();
                }
                self.store(answered, self.ring.available() + 4 + u64::from(SIZE) * 2);
                fence(Ordering::SeqCst);
                if self.load(self.ring.used() + 2) == answered {
                    interrupts.recv_timeout(PATIENCE).expect("an interrupt was lost");
                }
            }
        }
    }

    #[test]
    fn no_notification_and_no_interrupt_is_lost() {
        for event_idx in [false, true] {
            let memory = testing::memory(&[(0, 0x10000)]);
            let ring = Ring::new(&memory, BASE, SIZE);
            for index in 0..SIZE {
                ring.describe(index, 0x8000, 1, testing::WRITE, 0);
            }
            let (bell, interrupts) = sync_channel(1);
            let (notify, notifications) = sync_channel(1);
            let mut queue = ring.queue(event_idx);
            let device = thread::spawn({
                let memory = memory.clone();
                move || serve(&mut queue, &memory, VirtioInterrupt::new(Arc::new(Bell(bell))), &notifications)
            });
            let mut driver = Driver { ring, memory, event_idx, offered: 0, taken_back: 0 };
            let (mut offered, mut answered) = (0_u32, 0_u32);
            while answered < CHAINS {
                // Now one, now a ring full.
                let room = 1 + offered % u32::from(SIZE);
                while offered < CHAINS && offered - answered < room {
                    offered += 1;
                    if driver.offer() {
                        let _ = notify.try_send(());
                    }
                }
                answered += driver.take_back(&interrupts);
            }
            drop(notify);
            assert_eq!(device.join().unwrap(), CHAINS);
        }
    }

    /// Works as a device does, until nobody can notify it any more; returns how many chains it has answered.
    fn serve(
        queue: &mut Queue,
        memory: &Arc<GuestMemoryMmap>,
        interrupt: VirtioInterrupt,
        notifications: &Receiver<()>,
    ) -> u32 {
        let mut chain = Chain::new(0);
        let mut answered = 0;
        loop {
            loop {
                queue.disable_notification(&**memory).unwrap();
                let before = answered;
                while chain.pop(queue, memory).unwrap() {
                    add(queue, memory, chain.head, 1).unwrap();
                    answered += 1;
                }
                if answered != before {
                    notify(queue, memory, &interrupt).unwrap();
                }
                if !rearm(queue, memory).unwrap() {
                    break;
                }
            }
            if notifications.recv().is_err() {
                return answered;
            }
        }
    }
}
