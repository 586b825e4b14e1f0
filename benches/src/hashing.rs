//! How fast the first stage copies and hashes what it starts, against the same code under the operating system of its
//! host: what is lost by running in a domain, page by page of fresh memory.
//!
//! The first stage cannot tell the time. So a domain is started with a large initial RAM disk and one with a small
//! one, and the difference of their times from the first `KVM_RUN` to the kernel's first instruction is that of
//! the difference of the sizes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use cofferdam_firmware::sha256::Method;
use serde_json::json;

use crate::inside::Plan;
use crate::start_up::{last_line, milliseconds};
use crate::{Result, in_turns, progress};

const MIB: usize = 1 << 20;
/// Size of the large initial RAM disk, MiB.
const LARGE: usize = 64;
/// Memory of the domain, MiB.
const MEMORY: usize = 256;

/// MiB/s of the first stage and of the host, `plan.hash_rounds` of each in turns. What is needed is written below
/// `directory`.
pub fn measure(plan: &Plan, directory: &Path) -> Result<(Vec<f64>, Vec<f64>)> {
    progress(format_args!("{} hashes of the first stage and of its host, in turns", plan.hash_rounds));
    let content: Vec<u8> = (0..LARGE * MIB).map(|index| (index * 7 % 251) as u8).collect();
    let config = |name: &str, initrd: &[u8]| -> Result<PathBuf> {
        let (initrd_path, path) = (directory.join(name), directory.join(format!("{name}.json")));
        fs::write(&initrd_path, initrd)?;
        let config = json!({
            "boot-source": {"kernel_image_path": plan.payload, "initrd_path": initrd_path, "boot_mode": "image"},
            "machine-config": {"vcpu_count": 1, "mem_size_mib": MEMORY},
            "serial": {"mode": "None"},
        });
        fs::write(&path, config.to_string())?;
        Ok(path)
    };
    let (large, small) = (config("large", &content)?, config("small", &[0])?);
    let status = directory.join("hash-status");
    let time = |config: &Path| -> Result<f64> {
        let mut command = Command::new(&plan.cofferdam);
        command.args(["--level", "error", "--config-file"]).arg(config).arg("--status-file").arg(&status);
        let _ = fs::remove_file(&status);
        let code = command.status()?;
        let last = last_line(&status)?;
        if !code.success() {
            return Err(format!("{command:?}: {code}: {last}").into());
        }
        Ok(milliseconds(&last, &["phases", "user_space"])? - milliseconds(&last, &["phases", "running"])?)
    };
    let ours = || {
        let (large, small) = (time(&large)?, time(&small)?);
        Ok(LARGE as f64 / (large - small) * 1e3)
    };
    let theirs = || {
        let start = Instant::now();
        // Fresh memory, as a domain's is.
        let copy = std::hint::black_box(content.clone());
        std::hint::black_box(Method::detect().digest(&copy));
        Ok(LARGE as f64 / start.elapsed().as_secs_f64())
    };
    in_turns(plan.hash_rounds, ours, theirs)
}
