//! How a device raises its interrupt.

use std::io;

/// One pin of the interrupt controller, edge-triggered.
pub trait InterruptLine: Send + Sync {
    /// Raises one edge. An edge on a masked pin is kept until it is unmasked.
    fn trigger(&self) -> io::Result<()>;
}
