//! The options of `cofferdam run`, and the configuration that they describe.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, ValueEnum};
use cofferdam_api::config::{
    BootMode, BootProtocol, BootSource, Confidential, DomainConfig, HostData, MachineConfig, PlatformChoice,
    Serial, SerialMode, SnpConfig, Vsock,
};
use cofferdam_api::validate::{ConfigError, VCPU_COUNT, check_id};

use super::Place;
use crate::container::args::ContainerArgs;
use crate::container::start::InDomain;
use crate::drive::DriveArg;
use crate::units::{parse_number, parse_size, parse_time};

const RUN_EXAMPLES: &str = "\
Examples:
  Boot a kernel with an initial RAM disk:
    cofferdam run --kernel vmlinuz --initrd initrd.img

  Two CPUs, 1 GiB, a root disk, a read-only data disk limited to 10 MiB/s, vsock:
    cofferdam run --kernel vmlinuz --initrd initrd.img --cpus 2 --memory 1G \\
        --drive path=root.img,root --drive path=data.img,ro,id=data,bandwidth=10M \\
        --vsock domain.sock

  For scripts, the console in a file and the result as JSON:
    cofferdam run --kernel vmlinuz --initrd initrd.img --console file=console.log --json

  A container in a domain of its own, whose streams, signals and exit code are the container's:
    cofferdam run --container DIR -- python3 -c 'print(1)'
    gzip -d < data.gz | cofferdam run --container DIR -i --env A=1 --user 1000 -- sort

On a terminal, Ctrl-A x stops the domain at once and Ctrl-A Ctrl-A sends a Ctrl-A.
SIGTERM, SIGINT, SIGHUP and SIGQUIT press its power button; a second one stops it at once.
A container gets them itself, SIGUSR1 and SIGUSR2 too, as its manifest allows; the second one
that asks for an end stops its domain in order, the third at once.

Exit codes (exit_reason in the JSON):
  0 or the guest's own code   the guest powered off (power_off)
  120  the guest's own checks stopped it (refused_by_guest)
  121  reboot, panic
  122  triple_fault, vcpu_error
  123  launch_refused
  124  monitor_error
  125  bad configuration or host, nothing was started (config)
  143  stopped by a signal or the API (stopped)";

/// `cofferdam run`.
#[derive(Debug, Args)]
#[command(after_help = RUN_EXAMPLES)]
pub struct RunArgs {
    /// The kernel: an ELF vmlinux or a bzImage
    #[arg(long, value_name = "FILE", required_unless_present_any = ["image", "container"])]
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, at most 2048 bytes, 64 less in an image [default: "console=ttyS0 reboot=a panic=-1 pci=off"]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// An image (IGVM) with kernel, initrd and command line, in place of these
    ///
    /// For a container it is by default the one that is installed: ../share/cofferdam/domain.igvm of this program, else
    /// domain.igvm in $XDG_DATA_HOME/cofferdam or ~/.local/share/cofferdam.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "initrd", "cmdline", "boot", "boot_protocol"])]
    pub image: Option<PathBuf>,
    /// Who loads the kernel [default: image, or direct with --boot-protocol]
    #[arg(long, value_enum, value_name = "MODE")]
    pub boot: Option<BootModeArg>,
    /// How an ELF kernel is entered when the monitor loads it; a bzImage always takes the 64-bit protocol
    #[arg(long, value_enum, value_name = "PROTOCOL")]
    pub boot_protocol: Option<BootProtocolArg>,
    /// Number of CPUs, 1 to 32
    #[arg(long, value_name = "N", default_value_t = 1, allow_negative_numbers = true)]
    pub cpus: u64,
    /// Memory, 32M to 64G
    #[arg(long, value_name = "SIZE", default_value = "128M", value_parser = parse_size)]
    pub memory: u64,
    /// A disk: path=FILE[,ro][,root][,id=NAME][,iops=N][,bandwidth=N][,engine=NAME]; may be given several times
    ///
    /// A raw image or a block device. `ro` forbids writing, `root` makes it the root file system, `iops`
    /// and `bandwidth` limit requests and bytes per second, `engine` is auto, sync or async. A comma in FILE is written twice.
    #[arg(long = "drive", value_name = "SPEC", value_parser = DriveArg::parse)]
    pub drives: Vec<DriveArg>,
    /// Unix socket on which the host reaches the guest's vsock; the guest reaches SOCKET_<port>
    #[arg(long, value_name = "SOCKET")]
    pub vsock: Option<PathBuf>,
    /// Vsock context id of the guest, 3 or more
    #[arg(long, value_name = "CID", default_value_t = 3, requires = "vsock")]
    pub guest_cid: u32,
    /// The serial console: stdio, none, or file=FILE [default: stdio; for a container kept for `cofferdam logs`]
    #[arg(long, value_name = "WHERE", value_parser = Console::parse)]
    pub console: Option<Console>,
    /// How the domain is protected
    #[arg(long, value_enum, value_name = "PLATFORM", default_value_t = PlatformArg::Auto)]
    pub platform: PlatformArg,
    /// Start nothing that is not protected
    #[arg(long)]
    pub require_protected: bool,
    /// 32 bytes that attestation reports show, and that the kernel gets of images which want them
    #[arg(long, value_name = "HEX", value_parser = HostData::from_str)]
    pub host_data: Option<HostData>,
    /// Guest policy of SEV-SNP [default: the image's]
    #[arg(long, value_name = "N", value_parser = parse_number)]
    pub snp_policy: Option<u64>,
    /// ID block (96 bytes), in place of the image's
    #[arg(long, value_name = "FILE", requires = "snp_id_auth")]
    pub snp_id_block: Option<PathBuf>,
    /// Authentication of the ID block (4096 bytes)
    #[arg(long, value_name = "FILE", requires = "snp_id_block")]
    pub snp_id_auth: Option<PathBuf>,
    /// Certificates for the guest's attestation reports: a table of GUIDs and what it names
    #[arg(long, value_name = "FILE")]
    pub snp_certs: Option<PathBuf>,
    /// Name of the domain [default: domain-<process id>]
    #[arg(long, value_name = "NAME")]
    pub id: Option<String>,
    /// Return when the domain runs, or its container, and print its name; `cofferdam logs` shows what it prints
    #[arg(short, long, conflicts_with = "json")]
    pub detach: bool,
    /// Time between a press of the power button and a hard stop: 10s, 500ms, 2m [default: 10s, or a container's own time and 5s]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub stop_timeout: Option<Duration>,
    /// The monitor's program [default: cofferdam-vmm beside this one, else in PATH]
    #[arg(long, value_name = "FILE")]
    pub vmm: Option<PathBuf>,
    /// End standard output with one line of JSON: how the domain ended
    #[arg(long)]
    pub json: bool,
    /// Say nothing but warnings and errors
    #[arg(short, long)]
    pub quiet: bool,
    /// Where the domain is entered while it runs.
    #[command(flatten)]
    pub place: Place,
    /// The container in it.
    #[command(flatten)]
    pub container: ContainerArgs,
}

/// Time between a press of the power button and a hard stop, if nobody says another, milliseconds.
const DEFAULT_STOP_MS: u64 = 10_000;

/// Where the console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Console {
    /// Standard input and output.
    Stdio,
    /// Nowhere.
    None,
    /// Appended to a file.
    File(PathBuf),
}

impl Console {
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "stdio" => Ok(Self::Stdio),
            "none" => Ok(Self::None),
            _ => text
                .strip_prefix("file=")
                .map(|file| Self::File(file.into()))
                .ok_or_else(|| "it is stdio, none or file=FILE".to_owned()),
        }
    }

    fn serial(&self) -> Serial {
        match self {
            Self::Stdio => Serial::default(),
            Self::None => Serial { mode: SerialMode::None, ..Serial::default() },
            Self::File(file) => {
                Serial { mode: SerialMode::File, serial_out_path: Some(file.clone()), ..Serial::default() }
            }
        }
    }
}

/// The value of `--platform`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PlatformArg {
    /// The best that host and image offer
    Auto,
    /// An ordinary virtual machine: the host can read and change everything in it
    Plain,
    /// AMD SEV-SNP
    Snp,
}

/// The value of `--boot`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BootModeArg {
    /// The first stage in the guest, once it has verified the kernel, from an image that is composed in memory
    Image,
    /// The monitor, straight into the guest's memory
    Direct,
}

/// The value of `--boot-protocol`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BootProtocolArg {
    /// PVH if the kernel offers it, else the 64-bit protocol
    Auto,
    /// Xen's x86/HVM direct boot
    Pvh,
    /// The 64-bit entry of the Linux boot protocol
    Linux64,
}

impl RunArgs {
    /// The configuration that these arguments describe, valid as far as that
    /// can be told without touching the host. Errors begin with the option.
    /// That of a domain with a container has what `container` says.
    pub fn domain_config(&self, container: Option<InDomain>) -> Result<DomainConfig, String> {
        let config = self.unchecked_config(container)?;
        config.validate().map_err(|error| with_option(&error))?;
        Ok(config)
    }

    fn unchecked_config(&self, container: Option<InDomain>) -> Result<DomainConfig, String> {
        self.check_paths()?;
        if container.is_some() && self.console == Some(Console::Stdio) {
            return Err(
                "--console: standard input and output are the container's; `cofferdam logs --console` \
                        shows what is kept of the console"
                    .to_owned(),
            );
        }
        let stop_timeout = self.stop_timeout.or(container.as_ref().map(|one| one.stop_timeout));
        let (container, image, uds_path) = match container {
            Some(one) => (Some(one.container), Some(one.image), Some(one.vsock)),
            None => (None, self.image.clone(), self.vsock.clone()),
        };
        let vcpu_count = u8::try_from(self.cpus).map_err(|_| {
            let (min, max) = VCPU_COUNT;
            let field = "machine-config.vcpu_count".to_owned();
            with_option(&ConfigError::OutOfRange { field, value: self.cpus, min, max })
        })?;
        if !self.memory.is_multiple_of(1 << 20) {
            return Err(format!("--memory: {} bytes are not a whole number of MiB", self.memory));
        }
        Ok(DomainConfig {
            machine: MachineConfig { vcpu_count, mem_size_mib: self.memory >> 20 },
            boot: BootSource {
                kernel_image_path: self.kernel.clone(),
                initrd_path: self.initrd.clone(),
                boot_args: self.cmdline.clone(),
                boot_protocol: match self.boot_protocol {
                    None | Some(BootProtocolArg::Auto) => BootProtocol::Auto,
                    Some(BootProtocolArg::Pvh) => BootProtocol::Pvh,
                    Some(BootProtocolArg::Linux64) => BootProtocol::Linux64,
                },
                boot_mode: Some(match (self.boot, self.boot_protocol) {
                    (Some(BootModeArg::Direct), _) | (None, Some(_)) => BootMode::Direct,
                    (Some(BootModeArg::Image), _) | (None, None) => BootMode::Image,
                }),
                image_path: image,
            },
            drives: self
                .drives
                .iter()
                .cloned()
                .enumerate()
                .map(|(index, drive)| drive.into_drive(index))
                .collect(),
            container,
            vsock: uds_path.map(|uds_path| Vsock { guest_cid: self.guest_cid, uds_path }),
            serial: self.console.as_ref().map_or_else(Serial::default, Console::serial),
            confidential: Confidential {
                platform: match self.platform {
                    PlatformArg::Auto => PlatformChoice::Auto,
                    PlatformArg::Plain => PlatformChoice::Plain,
                    PlatformArg::Snp => PlatformChoice::Snp,
                },
                require_protected: self.require_protected,
                host_data: self.host_data,
                snp: SnpConfig {
                    policy: self.snp_policy,
                    id_block: self.snp_id_block.clone(),
                    id_auth: self.snp_id_auth.clone(),
                    certs: self.snp_certs.clone(),
                },
            },
            stop_timeout_ms: stop_timeout
                .map_or(DEFAULT_STOP_MS, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
            logger: None,
            metrics: None,
        })
    }

    /// The configuration is JSON, and that is UTF-8.
    fn check_paths(&self) -> Result<(), String> {
        let console = match &self.console {
            Some(Console::File(file)) => Some(file),
            Some(Console::Stdio | Console::None) | None => None,
        };
        let paths = [
            ("--kernel", self.kernel.as_ref()),
            ("--image", self.image.as_ref()),
            ("--initrd", self.initrd.as_ref()),
            ("--vsock", self.vsock.as_ref()),
            ("--snp-id-block", self.snp_id_block.as_ref()),
            ("--snp-id-auth", self.snp_id_auth.as_ref()),
            ("--snp-certs", self.snp_certs.as_ref()),
            ("--console", console),
        ];
        match paths.iter().find_map(|(option, path)| path.filter(|p| p.to_str().is_none()).zip(Some(option)))
        {
            Some((path, option)) => Err(format!("{option}: the path {path:?} is not UTF-8")),
            None => Ok(()),
        }
    }

    /// Name of the domain that the process of this id runs.
    pub fn domain_id(&self, process: u32) -> Result<String, String> {
        match &self.id {
            Some(id) => check_id("--id", id).map(|()| id.clone()).map_err(|error| error.to_string()),
            None => Ok(format!("domain-{process}")),
        }
    }
}

/// The message of `error`, with the option in place of the field that it gave its value.
fn with_option(error: &ConfigError) -> String {
    const OPTIONS: [(&str, &str); 13] = [
        ("machine-config.vcpu_count", "--cpus"),
        ("machine-config.mem_size_mib", "--memory"),
        ("boot-source.kernel_image_path", "--kernel"),
        ("boot-source.image_path", "--image"),
        ("boot-source.boot_protocol", "--boot-protocol"),
        ("boot-source.initrd_path", "--initrd"),
        ("boot-source.boot_args", "--cmdline"),
        ("confidential.platform", "--platform"),
        ("confidential.require_protected", "--require-protected"),
        ("confidential.host_data", "--host-data"),
        ("vsock.guest_cid", "--guest-cid"),
        ("vsock.uds_path", "--vsock"),
        ("stop_timeout_ms", "--stop-timeout"),
    ];
    let message = error.to_string();
    let field = error.field().unwrap_or_default();
    let reason = message.strip_prefix(field).and_then(|rest| rest.strip_prefix(": ")).unwrap_or(&message);
    let option = match OPTIONS.iter().find(|(name, _)| *name == field) {
        Some((_, option)) => (*option).to_owned(),
        None if field.starts_with("drives") => drive_option(field),
        None if field.starts_with("serial") => "--console".to_owned(),
        None => return message,
    };
    match error {
        ConfigError::OutOfRange { value, min, max, .. } => {
            let unit = match option.as_str() {
                "--memory" => " MiB",
                "--stop-timeout" => " ms",
                _ => "",
            };
            format!("{option}: {value}{unit} is not between {min} and {max}{unit}")
        }
        ConfigError::SecondRoot { index, first } => {
            format!("{option} {}, root: drive {} is the root already", index + 1, first + 1)
        }
        _ => format!("{option}: {reason}"),
    }
}

/// The part of a `--drive` that gave `field` its value. People count drives from 1.
fn drive_option(field: &str) -> String {
    let parts = field.strip_prefix("drives[").and_then(|rest| rest.split_once("]."));
    let Some((Ok(index), name)) = parts.map(|(index, name)| (index.parse::<usize>(), name)) else {
        return "--drive".to_owned();
    };
    let item = match name {
        "drive_id" => "id",
        "path_on_host" => "path",
        other => other,
    };
    format!("--drive {}, {item}", index.saturating_add(1))
}
