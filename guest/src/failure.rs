//! Why init goes no further: what the host is told by the step port, and what the domain's console is told besides.

use std::fmt;
use std::io;

use cofferdam_container_protocol::step::{Object, Reason};
use rustix::io::Errno;

/// A failure, without anything of what the guest computes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What is wrong.
    pub reason: Reason,
    /// With what.
    pub object: Option<Object>,
    /// What the kernel said.
    pub cause: Option<Errno>,
}

impl Failure {
    /// A failure that is not the kernel's.
    pub fn new(reason: Reason) -> Self {
        Self { reason, object: None, cause: None }
    }

    /// The same, of a thing.
    pub fn of(self, object: Object) -> Self {
        Self { object: Some(object), ..self }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(object) = self.object {
            write!(f, "{object} ")?;
        }
        write!(f, "{}", self.reason)?;
        self.cause.map_or(Ok(()), |cause| write!(f, " ({cause})"))
    }
}

/// Gives what fails in the kernel its reason.
pub trait Reasoned<T> {
    /// The value, or a failure for this reason.
    fn because(self, reason: Reason) -> Result<T, Failure>;
}

impl<T> Reasoned<T> for rustix::io::Result<T> {
    fn because(self, reason: Reason) -> Result<T, Failure> {
        self.map_err(|errno| Failure { cause: Some(errno), ..Failure::new(reason) })
    }
}

impl<T> Reasoned<T> for io::Result<T> {
    fn because(self, reason: Reason) -> Result<T, Failure> {
        self.map_err(|error| Failure { cause: Errno::from_io_error(&error), ..Failure::new(reason) })
    }
}

/// An index in a list that is never long.
pub fn index(at: usize) -> u16 {
    u16::try_from(at).unwrap_or(u16::MAX)
}
