//! Builds the first stage (`firmware/stage`) for [`stage`](src/stage.rs): a flat file of what an image brings, and how
//! much memory it takes. Its stack has no guard, which would cost pages that are measured: that it is large enough is proven here
//! instead, from what the compiler made.
//!
//! The compiler is called directly. What is measured must not depend on how the rest is built: on the flags, the
//! profile or the target directory of the cargo that runs this. It does depend on the compiler's version, which
//! rust-toolchain.toml names.

use std::error::Error;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use cofferdam_firmware::layout::{PAGE_SIZE, STAGE, TDX_RESET_PAGE};

#[path = "build/stack.rs"]
mod stack;

const TARGET: &str = "x86_64-unknown-none";

/// The first stage's stack, bytes.
const STACK: u64 = PAGE_SIZE;

/// Most pages of any type that a SEV-SNP domain may have before its vCPUs.
const BUDGET: u64 = 12;
/// Pages of a SEV-SNP domain beside the stage's own.
const OTHER_PAGES: [(&str, u64); 5] =
    [("page tables", 2), ("launch manifest", 1), ("parameter page", 1), ("secrets", 1), ("CPUID", 1)];

fn main() -> Result<(), Box<dyn Error>> {
    let variable = |name: &str| env::var_os(name).ok_or_else(|| format!("cargo has not set {name}"));
    let out = PathBuf::from(variable("OUT_DIR")?);
    let package = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let firmware = package.parent().ok_or("the package is the root")?.join("firmware");
    for source in ["src", "stage"] {
        println!("cargo::rerun-if-changed={}", firmware.join(source).display());
    }

    check_compiler(&variable("RUSTC")?, &firmware.with_file_name("rust-toolchain.toml"))?;
    let rustc = Rustc { program: variable("RUSTC")?, firmware, out: out.clone() };
    rustc.run("cofferdam_firmware", "rlib", "src/lib.rs", &["-Cembed-bitcode=yes"])?;
    let script = format!("-Clink-arg=--script={}", rustc.firmware.join("stage/link.ld").display());
    let stack_size = format!("-Clink-arg=--defsym=STACK_SIZE={STACK}");
    let library = format!("--extern=cofferdam_firmware={}", out.join("libcofferdam_firmware.rlib").display());
    rustc.run(
        "cofferdam_stage",
        "bin",
        "stage/src/main.rs",
        &[
            "--emit=link,asm",
            "-Clto=fat",
            "-Cstrip=symbols",
            "-Clink-arg=--no-pie",
            &script,
            &stack_size,
            &library,
        ],
    )?;
    let used = stack::depth(&fs::read_to_string(out.join("cofferdam_stage.s"))?, "stage_main")?;
    if used > STACK {
        return Err(format!("the first stage's stack has {STACK} bytes, and needs {used}").into());
    }

    let elf = fs::read(out.join("cofferdam_stage"))?;
    let segments = load_segments(&elf).ok_or("the linker made no ELF file")?;
    let at = |address| segments.iter().find(|segment| segment.address == address);
    let stage = at(STAGE).ok_or("nothing is linked at layout::STAGE")?;
    let reset = at(TDX_RESET_PAGE).ok_or("nothing is linked at layout::TDX_RESET_PAGE")?;
    fs::write(out.join("stage.bin"), stage.content)?;
    fs::write(out.join("tdx-reset.bin"), reset.content)?;
    fs::write(out.join("stage-memory"), stage.memory.to_string())?;
    let summary = check_budget(stage.content.len() as u64, stage.memory, used)?;
    fs::write(out.join("stage-pages"), format!("{summary}\n"))?;
    println!("{summary}");
    Ok(())
}

/// Warns if the compiler is not that of everybody else, as images and launch digests are not either then.
fn check_compiler(rustc: &OsString, toolchain: &Path) -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={}", toolchain.display());
    let toolchain = fs::read_to_string(toolchain)?;
    let channel = toolchain.lines().find_map(|line| line.strip_prefix("channel = \"")?.strip_suffix('"'));
    let channel = channel.ok_or("rust-toolchain.toml names no channel")?;
    let version = Command::new(rustc).arg("--version").output()?.stdout;
    let version = String::from_utf8_lossy(&version);
    if version.split(' ').nth(1) != Some(channel) {
        println!(
            "cargo::warning=the first stage is built by {}, not by {channel}: launch digests will differ",
            version.trim()
        );
    }
    Ok(())
}

/// The sum of pages that SEV-SNP measures, in words; an error if there are too many.
fn check_budget(content: u64, memory: u64, stack: u64) -> Result<String, Box<dyn Error>> {
    let own = memory.div_ceil(PAGE_SIZE);
    let sum = OTHER_PAGES.iter().fold(own, |sum, (_, pages)| sum + pages);
    let others: Vec<String> = OTHER_PAGES.iter().map(|(name, pages)| format!("{name} {pages}")).collect();
    let summary = format!(
        "first stage: {content} bytes, with its stack, of which it uses at most {stack} bytes, {own} pages; {}; \
         {sum} pages, of at most {BUDGET}",
        others.join(", ")
    );
    if sum > BUDGET { Err(summary.into()) } else { Ok(summary) }
}

/// The compiler.
struct Rustc {
    program: OsString,
    firmware: PathBuf,
    out: PathBuf,
}

impl Rustc {
    /// Compiles a crate.
    fn run(&self, name: &str, kind: &str, source: &str, more: &[&str]) -> Result<(), Box<dyn Error>> {
        let status = Command::new(&self.program)
            // Where its sources are on this machine is nobody's business.
            .current_dir(&self.firmware)
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .args(["--crate-name", name, "--crate-type", kind, "--edition", "2024", "--target", TARGET])
            .args(["-Copt-level=s", "-Cpanic=abort", "-Ccodegen-units=1", "-Crelocation-model=static"])
            .arg(remap(&self.firmware))
            .args(more)
            .arg("--out-dir")
            .arg(&self.out)
            .arg(source)
            .status()?;
        if status.success() {
            Ok(())
        } else {
            Err(format!("{name} does not compile for {TARGET} (`rustup target add {TARGET}`?): {status}")
                .into())
        }
    }
}

fn remap(folder: &Path) -> OsString {
    let mut argument = OsString::from("--remap-path-prefix=");
    argument.push(folder);
    argument.push("=firmware");
    argument
}

/// A segment of an ELF file.
struct Segment<'a> {
    /// Physical address.
    address: u64,
    /// What is in the file.
    content: &'a [u8],
    /// Bytes of memory.
    memory: u64,
}

/// The segments that are loaded.
fn load_segments(elf: &[u8]) -> Option<Vec<Segment<'_>>> {
    const PROGRAM_HEADER: usize = 56;
    const PT_LOAD: u64 = 1;
    let number =
        |bytes: &[u8]| bytes.iter().rev().fold(0, |number: u64, byte| number << 8 | u64::from(*byte));
    let field = |from: &[u8], offset: usize, size: usize| from.get(offset..offset + size).map(number);
    let table = elf.get(usize::try_from(field(elf, 32, 8)?).ok()?..)?;
    let count = usize::try_from(field(elf, 56, 2)?).ok()?;
    let mut segments = Vec::new();
    for header in table.chunks_exact(PROGRAM_HEADER).take(count) {
        if field(header, 0, 4)? == PT_LOAD {
            let offset = usize::try_from(field(header, 8, 8)?).ok()?;
            let size = usize::try_from(field(header, 32, 8)?).ok()?;
            segments.push(Segment {
                address: field(header, 24, 8)?,
                content: elf.get(offset..)?.get(..size)?,
                memory: field(header, 40, 8)?,
            });
        }
    }
    Some(segments)
}
