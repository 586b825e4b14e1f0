//! The Cofferdam monitor, as a library.
