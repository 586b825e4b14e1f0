//! `cofferdam image`: makes image files, looks into them, says what hardware will
//! measure of them, and signs them.

mod build;
mod corim;
mod initrd;
mod inspect;
mod measure;
mod realm;
mod reference;
mod sign;
mod signing;

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Subcommand;
use cofferdam_api::hex;
use cofferdam_confidential::digest::cca::CcaError;
use cofferdam_confidential::digest::snp::SnpError;
use cofferdam_confidential::digest::tdx::TdxError;
use cofferdam_confidential::igvm::ReadError;
use cofferdam_confidential::igvm::writer::WriteError;
use cofferdam_confidential::image::compose::ComposeError;
use cofferdam_confidential::image::walk::WalkError;
use cofferdam_firmware::manifest::ManifestError;

use crate::say::{Tone, say};

/// Exit code of a command that failed.
const FAILED: u8 = 125;

/// The commands about image files.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Make one file of a kernel, an initrd and a command line
    Build(build::BuildArgs),
    /// Say what is in an image file, and how many pages hardware would measure
    Inspect(inspect::InspectArgs),
    /// Say what the hardware will measure, and what else a verifier must check
    Measure(measure::MeasureArgs),
    /// Sign an image for SNP: an ID block and its authentication
    Sign(sign::SignArgs),
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The image is no IGVM file that can be used.
    #[error("{}: {source}", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ReadError,
    },
    /// There is no initial RAM disk for containers.
    #[error(transparent)]
    Initrd(#[from] initrd::InitrdError),
    /// There is no image of these files.
    #[error(transparent)]
    Compose(#[from] ComposeError),
    /// The format cannot hold the image.
    #[error(transparent)]
    Format(#[from] WriteError),
    /// The format cannot hold a part of the image.
    #[error(transparent)]
    FormatOfPart(#[from] WalkError<WriteError>),
    /// The manifest of an image of ours is not what the first stage accepts.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// It has no launch digest.
    #[error(transparent)]
    Snp(#[from] WalkError<SnpError>),
    /// It has no launch digest for so many virtual CPUs.
    #[error(transparent)]
    SnpVcpus(#[from] SnpError),
    /// It has no MRTD.
    #[error(transparent)]
    Tdx(#[from] WalkError<TdxError>),
    /// It has no RIM.
    #[error(transparent)]
    Cca(#[from] WalkError<CcaError>),
    /// A key cannot be used.
    #[error(transparent)]
    Key(#[from] signing::KeyError),
    /// Options and image do not go together.
    #[error("{0}")]
    Options(String),
}

/// Runs a command. Returns 0, or 125 after saying why not.
pub fn run(command: &ImageCommand) -> u8 {
    let result = match command {
        ImageCommand::Build(args) => build::build(args),
        ImageCommand::Inspect(args) => inspect::inspect(args),
        ImageCommand::Measure(args) => measure::measure(args),
        ImageCommand::Sign(args) => sign::sign(args),
    };
    match result {
        Ok(text) => {
            // Who closed standard output still gets the exit code.
            let _ = io::stdout().lock().write_all(text.as_bytes());
            0
        }
        Err(error) => {
            say(Tone::Error, &error.to_string(), false);
            FAILED
        }
    }
}

fn read_file(path: &Path) -> Result<Vec<u8>, ImageError> {
    fs::read(path).map_err(|source| ImageError::Read { path: path.to_owned(), source })
}

fn write_file(path: &Path, content: &[u8]) -> Result<(), ImageError> {
    fs::write(path, content).map_err(|source| ImageError::Write { path: path.to_owned(), source })
}

/// Reads `N` bytes in hexadecimal digits.
fn parse_hex<const N: usize>(text: &str) -> Result<[u8; N], String> {
    hex::parse(text).ok_or_else(|| format!("it is {} hexadecimal digits", N.saturating_mul(2)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_digits() {
        assert_eq!(parse_hex("00ffA5"), Ok([0, 0xff, 0xa5]));
        for bad in ["", "00ff", "00ffa", "00ffa5b", "00ffa55a", "0xffa5", "+0ffa5", "00fga5", "00ff\u{e9}5"] {
            assert_eq!(parse_hex::<3>(bad), Err("it is 6 hexadecimal digits".to_owned()), "{bad}");
        }
    }
}
