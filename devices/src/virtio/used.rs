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
