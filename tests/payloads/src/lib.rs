//! Payload library.
#![no_std]
