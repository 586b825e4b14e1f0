//! Bad input, as a user meets it: the shipped commands are given it, row by row, and every row has to be refused before
//! anything starts, with a message that names the file, field or option and the reason. Each row stands for a check in
//! the product, and fails without it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests fail by panicking

mod confidential;
mod config_file;
mod drives;
mod host;
mod kernel;
mod machine;
mod table;
mod vsock;
