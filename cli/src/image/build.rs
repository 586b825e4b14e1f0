//! `cofferdam image build`: one file of a kernel, an initrd and a command line; with `--init` the image of containers' domains.

use std::path::PathBuf;
use std::{env, fs};

use clap::Args;
use cofferdam_api::config::DEFAULT_COMMAND_LINE;
use cofferdam_confidential::igvm::writer::Writer;
use cofferdam_confidential::image::compose::{Blob, Options, Source, compose};
use cofferdam_confidential::image::importer::ImagePlatform;
use cofferdam_confidential::image::inspect::hex;
use cofferdam_confidential::image::walk::Selection;
use cofferdam_container::image::replace_file;
use cofferdam_firmware::{boot, layout};

use super::{ImageError, initrd, read_file};
use crate::units::{parse_number, parse_size};

/// The kernel's command line of a container's domain: no messages but of what goes wrong, no search for devices that there are
/// not, and no tests of algorithms, which the kernel would make at each start.
const INIT_COMMAND_LINE: &str = "console=ttyS0 quiet reboot=a panic=-1 pci=off 8250.nr_uarts=1 cryptomgr.notests audit=0 rcupdate.rcu_expedited=1";

const EXAMPLES: &str = "\
Examples:
  cofferdam image build --kernel vmlinuz --initrd initrd.img -o domain.igvm

  Only for AMD SEV-SNP, at most 4 CPUs and 2 GiB, with one socket (a guest policy of the SNP firmware ABI):
    cofferdam image build --kernel vmlinuz --initrd initrd.img --max-cpus 4 --max-memory 2G \\
        --platforms snp --policy snp=0x130000 -o domain.igvm

  The image in whose domains containers run, for `cofferdam run --container` to find:
    cofferdam image build --init --kernel /boot/vmlinuz-6.12.57+deb12-cloud-amd64

The same inputs give the same file, byte for byte, on every machine with the same cofferdam.";

/// `cofferdam image build`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct BuildArgs {
    /// The kernel: an ELF vmlinux or a bzImage
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// The initial RAM disk
    #[arg(long, value_name = "FILE", conflicts_with = "init")]
    pub initrd: Option<PathBuf>,
    /// Make the initial RAM disk: the init of containers' domains, and the modules that the kernel needs for them
    ///
    /// The program cofferdam-init is taken from where cofferdam itself is, or from ../lib/cofferdam of there. The image is
    /// given the host's data, as with --policy host-data.
    #[arg(long)]
    pub init: bool,
    /// The kernel's modules, a folder like /lib/modules/VERSION [default: beside the kernel as in its package, or there]
    #[arg(long, value_name = "DIR", requires = "init")]
    pub modules: Option<PathBuf>,
    /// The kernel's command line, at most 2048 bytes [default: one for the console on ttyS0; with --init a quiet one]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// Most CPUs that a domain may have, 1 to 32 [default: 32]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=i64::from(layout::MAX_VCPUS)))]
    pub max_cpus: Option<u8>,
    /// Most memory that a domain may have [default: 64G]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_memory: Option<u64>,
    /// For which platforms: plain, snp, tdx
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', value_parser = parse_platform,
          default_value = "plain,snp,tdx")]
    pub platforms: Vec<ImagePlatform>,
    /// snp=N or tdx=N for a platform's guest policy (IGVM's bits), host-data to give the domain the host's 32 bytes,
    /// accept-all for kernels that cannot accept memory themselves
    ///
    /// accept-all is for Linux without CONFIG_UNACCEPTED_MEMORY (before 6.5): in a protected domain the first stage accepts all
    /// memory before it starts the kernel, which takes the longer the more there is.
    ///
    /// snp=N is POLICY of the SNP firmware ABI, by default 0x30000: threads may share a core, no debugging, no
    /// migration. tdx=N has bit 0 (debugging) and 1 (no #VE for pages that are not accepted), by default 0x2.
    #[arg(long, value_name = "POLICY,…", value_delimiter = ',', value_parser = parse_policy)]
    pub policy: Vec<Policy>,
    /// The image file to write [default with --init: $XDG_DATA_HOME/cofferdam/domain.igvm, ~/.local/share without it]
    #[arg(short, long, value_name = "FILE", required_unless_present = "init")]
    pub output: Option<PathBuf>,
}

/// One policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// The kernel gets the host's data.
    HostData,
    /// All memory is accepted before the kernel runs.
    AcceptAll,
    /// Guest policy of SNP.
    Snp(u64),
    /// IGVM's policy of TDX.
    Tdx(u64),
}

fn parse_platform(text: &str) -> Result<ImagePlatform, String> {
    [ImagePlatform::Plain, ImagePlatform::Snp, ImagePlatform::Tdx]
        .into_iter()
        .find(|platform| platform.name() == text)
        .ok_or_else(|| format!("{text:?} is not plain, snp or tdx"))
}

fn parse_policy(text: &str) -> Result<Policy, String> {
    match text.split_once('=') {
        None if text == "host-data" => Ok(Policy::HostData),
        None if text == "accept-all" => Ok(Policy::AcceptAll),
        Some(("snp", digits)) => parse_number(digits).map(Policy::Snp),
        Some(("tdx", digits)) => parse_number(digits).map(Policy::Tdx),
        _ => Err("not snp=N, tdx=N, host-data or accept-all".to_owned()),
    }
}

impl BuildArgs {
    fn options(&self) -> Options {
        let mut options = Options { platforms: self.platforms.clone(), ..Options::default() };
        options.max_vcpus = self.max_cpus.unwrap_or(options.max_vcpus);
        options.max_memory = self.max_memory.unwrap_or(options.max_memory);
        options.host_data = self.init;
        for policy in &self.policy {
            match *policy {
                Policy::HostData => options.host_data = true,
                Policy::AcceptAll => options.accept_all = true,
                Policy::Snp(value) => options.snp_policy = value,
                Policy::Tdx(value) => options.tdx_policy = value,
            }
        }
        options
    }
}

/// Builds an image. Returns what to print.
pub fn build(args: &BuildArgs) -> Result<String, ImageError> {
    let kernel = read_file(&args.kernel)?;
    let initrd = match &args.initrd {
        _ if args.init => {
            Some(initrd::make(&args.kernel, &kernel, args.modules.as_deref(), &args.platforms)?)
        }
        Some(path) => Some(read_file(path)?),
        None => None,
    };
    let usual = if args.init { INIT_COMMAND_LINE } else { DEFAULT_COMMAND_LINE };
    let source = Source {
        kernel: Blob::of(&kernel),
        kernel_head: kernel.get(..boot::HEAD).unwrap_or(&kernel),
        initrd: initrd.as_deref().map(Blob::of),
        command_line: args.cmdline.as_deref().unwrap_or(usual),
    };
    let composition = compose(&source, &args.options())?;
    let mut writer = Writer::default();
    composition.walk(Selection::All, &mut writer)?;
    let mut image = Vec::new();
    writer.write(&mut image)?;
    let output = output(args)?;
    replace_file(&output, &image).map_err(|source| ImageError::Write { path: output.clone(), source })?;
    Ok(format!("{}: {} bytes, SHA-256 {}\n", output.display(), image.len(), hex(&Blob::of(&image).sha256)))
}

/// Where the image goes. Its folder is made where nobody has chosen it.
fn output(args: &BuildArgs) -> Result<PathBuf, ImageError> {
    if let Some(path) = &args.output {
        return Ok(path.clone());
    }
    let named = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let folder = named("XDG_DATA_HOME")
        .or_else(|| named("HOME").map(|home| home.join(".local/share")))
        .ok_or_else(|| {
            ImageError::Options("neither XDG_DATA_HOME nor HOME is set: say where with --output".to_owned())
        })?
        .join("cofferdam");
    let path = folder.join("domain.igvm");
    fs::create_dir_all(&folder).map_err(|source| ImageError::Write { path: path.clone(), source })?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies() {
        assert_eq!(parse_policy("host-data"), Ok(Policy::HostData));
        assert_eq!(parse_policy("accept-all"), Ok(Policy::AcceptAll));
        assert_eq!(parse_policy("snp=0x30000"), Ok(Policy::Snp(0x30000)));
        assert_eq!(parse_policy("tdx=3"), Ok(Policy::Tdx(3)));
        for bad in [
            "",
            "snp",
            "snp=",
            "snp=0x",
            "snp=-1",
            "plain=1",
            "host-data=1",
            "accept-all=1",
            "snp=0x10000000000000000",
        ] {
            assert!(parse_policy(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn platforms() {
        assert_eq!(parse_platform("snp"), Ok(ImagePlatform::Snp));
        assert!(parse_platform("cca").is_err());
    }
}
