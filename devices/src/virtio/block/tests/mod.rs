//! The whole device, with real files, hand-made queues, and both engines.

mod change;
mod guest;
mod hostile;
mod io;
mod refused;
mod turns;
