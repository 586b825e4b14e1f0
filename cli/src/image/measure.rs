//! `cofferdam image measure`: reference values of an image.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use cofferdam_api::validate::VCPU_COUNT;
use cofferdam_confidential::digest::Sha384Digest;
use cofferdam_confidential::digest::cca::{CcaError, CcaMeasurement, HashAlgorithm};
use cofferdam_confidential::digest::id_block::IdAuthentication;
use cofferdam_confidential::digest::snp::SnpMeasurement;
use cofferdam_confidential::digest::tdx::TdxMeasurement;
use cofferdam_confidential::igvm::reader::Igvm;
use cofferdam_confidential::image::importer::ImagePlatform;
use cofferdam_confidential::image::manifest::ManifestFinder;
use cofferdam_confidential::image::walk::{Selection, WalkError, walk};
use cofferdam_firmware::manifest::Manifest;
use sha2::{Digest, Sha256};

use super::realm::RealmArg;
use super::reference::{LaunchDigest, Pin, Reference, Value};
use super::{ImageError, corim, parse_hex, read_file, write_file};

const EXAMPLES: &str = "\
Examples:
  The launch digests of domains with 1, 2 and 4 CPUs on AMD SEV-SNP:
    cofferdam image measure domain.igvm --platform snp --vcpus 1,2,4

  For programs, and as a CoRIM for a verifier:
    cofferdam image measure domain.igvm --platform tdx --json --corim domain.corim

Nothing is asked of this machine: the same file gives the same values everywhere.";

/// `cofferdam image measure`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct MeasureArgs {
    /// The image file
    pub image: PathBuf,
    /// For which platform
    #[arg(long, value_enum, value_name = "PLATFORM")]
    pub platform: MeasuredPlatform,
    /// Numbers of CPUs, for SNP only: there each has a launch digest of its own [default: 1]
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    pub vcpus: Vec<u32>,
    /// The host data that a domain will be given, for SNP only: 64 hexadecimal digits
    #[arg(long, value_name = "HEX", value_parser = parse_hex::<32>)]
    pub host_data: Option<[u8; 32]>,
    /// The realm that the image is for, for CCA only: ipa_bits=N,breakpoints=N,watchpoints=N and more
    ///
    /// What the host decides of a realm is in its measurement. Required: ipa_bits, breakpoints, watchpoints (their
    /// numbers). Further: hash=sha256|sha384|sha512, pmu_counters=N, sve_bits=N, lpa2; and for RMM 1.0, which
    /// measures where RAM is: rmm=1.0,ram=START+SIZE.
    #[arg(long, value_name = "SPEC", value_parser = RealmArg::parse, verbatim_doc_comment)]
    pub realm: Option<RealmArg>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Write the values as a CoRIM (unsigned, CBOR) too
    #[arg(long, value_name = "FILE")]
    pub corim: Option<PathBuf>,
}

/// The platforms that measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MeasuredPlatform {
    /// AMD SEV-SNP: launch digest
    Snp,
    /// Intel TDX: MRTD
    Tdx,
    /// Arm CCA: RIM
    Cca,
}

/// Measures an image, and returns what is printed.
pub fn measure(args: &MeasureArgs) -> Result<String, ImageError> {
    let file = read_file(&args.image)?;
    let igvm = Igvm::new(&file).map_err(|source| ImageError::Image { path: args.image.clone(), source })?;
    let reference = reference(&igvm, Value::Bytes(Sha256::digest(&file).to_vec()), args)?;
    if let Some(path) = &args.corim {
        write_file(path, &corim::document(&reference))?;
    }
    if args.json {
        // Names, numbers and texts are always JSON.
        return Ok(format!("{}\n", serde_json::to_string(&reference).unwrap_or_default()));
    }
    Ok(reference.to_text())
}

fn reference(igvm: &Igvm<'_>, image_sha256: Value, args: &MeasureArgs) -> Result<Reference, ImageError> {
    let only_for = |option: &str, platform: MeasuredPlatform, given: bool| {
        if given && args.platform != platform {
            return Err(ImageError::Options(format!("{option} is for {platform:?} only").to_lowercase()));
        }
        Ok(())
    };
    only_for("--vcpus", MeasuredPlatform::Snp, !args.vcpus.is_empty())?;
    only_for("--host-data", MeasuredPlatform::Snp, args.host_data.is_some())?;
    only_for("--realm", MeasuredPlatform::Cca, args.realm.is_some())?;
    let (platform, measured) = match args.platform {
        MeasuredPlatform::Snp => {
            let vcpus = if args.vcpus.is_empty() { &[1] } else { args.vcpus.as_slice() };
            (ImagePlatform::Snp, snp(igvm, vcpus, args.host_data.as_ref())?)
        }
        MeasuredPlatform::Tdx => (ImagePlatform::Tdx, tdx(igvm)?),
        MeasuredPlatform::Cca => (ImagePlatform::Cca, cca(igvm, args.realm.as_ref())?),
    };
    let Measured { digests, hash, pin } = measured;
    Ok(Reference { platform, image_sha256, digests, hash, pin })
}

/// What is found out of an image for one platform.
struct Measured {
    digests: Vec<LaunchDigest>,
    hash: HashAlgorithm,
    pin: Vec<Pin>,
}

fn snp(igvm: &Igvm<'_>, vcpus: &[u32], host_data: Option<&[u8; 32]>) -> Result<Measured, ImageError> {
    let manifest = manifest(igvm, ImagePlatform::Snp)?;
    let mut digests = Vec::new();
    let (measurement, policy) = measure_snp(igvm)?;
    for vcpus in vcpus {
        if digests.iter().any(|digest: &LaunchDigest| digest.vcpus == Some(*vcpus)) {
            return Err(ImageError::Options(format!("--vcpus: {vcpus} is given twice")));
        }
        let digest = snp_digest(&measurement, manifest.as_ref(), *vcpus)?;
        digests.push(LaunchDigest { vcpus: Some(*vcpus), digest: Value::Bytes(digest.to_vec()) });
    }
    let mut pin = vec![Pin { name: "policy", value: Some(Value::Flags(policy)), note: "" }];
    pin.extend(id_block_pins(&measurement, &digests)?);
    pin.push(host_data_pin(manifest.as_ref(), host_data));
    pin.push(Pin { name: "vmpl", value: Some(Value::Number(0)), note: "" });
    Ok(Measured { digests, hash: HashAlgorithm::Sha384, pin })
}

/// Walks the SNP part of an image; also returns the guest policy.
pub fn measure_snp(igvm: &Igvm<'_>) -> Result<(SnpMeasurement, u64), ImageError> {
    let mut measurement = SnpMeasurement::new();
    walk(igvm, Selection::One(ImagePlatform::Snp), &mut measurement)?;
    match measurement.policy() {
        Some(policy) => Ok((measurement, policy)),
        None => Err(ImageError::Options("the image has no guest policy for SNP".to_owned())),
    }
}

/// The launch digest for a number of virtual CPUs that image and monitor allow.
pub fn snp_digest(
    measurement: &SnpMeasurement,
    manifest: Option<&Manifest>,
    vcpus: u32,
) -> Result<Sha384Digest, ImageError> {
    let (min, monitor_max) = VCPU_COUNT;
    let max = manifest.map_or(monitor_max, |manifest| manifest.max_vcpus.into());
    if !(min..=max).contains(&vcpus.into()) {
        return Err(ImageError::Options(format!("--vcpus: {vcpus} is not between {min} and {max}")));
    }
    Ok(measurement.digest(vcpus)?)
}

/// The launch manifest, if the image is one of ours.
pub fn manifest(igvm: &Igvm<'_>, platform: ImagePlatform) -> Result<Option<Manifest>, ImageError> {
    let mut finder = ManifestFinder::new();
    match walk(igvm, Selection::One(platform), &mut finder) {
        Ok(()) => Ok(finder.manifest()?),
        // Measuring it says what is wrong.
        Err(_) => Ok(None),
    }
}

/// What is known of the host data, which a launch sets whatever the image says: zero without any.
fn host_data_pin(manifest: Option<&Manifest>, given: Option<&[u8; 32]>) -> Pin {
    let wanted = manifest.is_none_or(|manifest| manifest.host_data);
    let (value, note) = match given {
        Some(bytes) => (Some(*bytes), "as given"),
        None if wanted => (None, "what the domain is given at its launch"),
        None => (Some([0; 32]), "zero unless the domain is given some at its launch"),
    };
    Pin { name: "host_data", value: value.map(|bytes| Value::Bytes(bytes.to_vec())), note }
}

/// What an ID block decides: zeroes without one.
fn id_block_pins(measurement: &SnpMeasurement, digests: &[LaunchDigest]) -> Result<Vec<Pin>, ImageError> {
    let block = measurement.id_block();
    if let Some(block) = block
        && !digests.iter().any(|digest| digest.digest == Value::Bytes(block.launch_digest.to_vec()))
    {
        let vouched = Value::Bytes(block.launch_digest.to_vec());
        return Err(ImageError::Options(format!(
            "the image's ID block is for another launch digest, {vouched}"
        )));
    }
    let authentication = block.map(IdAuthentication::of_image);
    let id_key = authentication.as_ref().map(|authentication| authentication.id_key.digest());
    let author_key = authentication
        .as_ref()
        .filter(|authentication| authentication.author_key_algorithm != 0)
        .map(|authentication| authentication.author_key.digest());
    let bytes =
        |bytes: Option<&[u8]>, size| Some(Value::Bytes(bytes.map_or_else(|| vec![0; size], <[u8]>::to_vec)));
    let note = if block.is_none() { "zero without an ID block" } else { "" };
    let pin = |name, value| Pin { name, value, note };
    Ok(vec![
        pin("family_id", bytes(block.map(|block| block.family_id.as_slice()), 16)),
        pin("image_id", bytes(block.map(|block| block.image_id.as_slice()), 16)),
        pin("guest_svn", Some(Value::Number(block.map_or(0, |block| block.guest_svn)))),
        pin("id_key_digest", bytes(id_key.as_ref().map(<[u8; 48]>::as_slice), 48)),
        pin("author_key_digest", bytes(author_key.as_ref().map(<[u8; 48]>::as_slice), 48)),
    ])
}

/// IGVM's bits of a guest policy for TDX.
mod tdx_policy {
    pub const DEBUG: u64 = 1 << 0;
    pub const SEPT_VE_DISABLE: u64 = 1 << 1;
}

/// Bits of a TD's ATTRIBUTES.
mod attributes {
    pub const DEBUG: u64 = 1 << 0;
    /// KVM makes no TD without it.
    pub const SEPT_VE_DISABLE: u64 = 1 << 28;
}

fn tdx(igvm: &Igvm<'_>) -> Result<Measured, ImageError> {
    let mut measurement = TdxMeasurement::new();
    walk(igvm, Selection::One(ImagePlatform::Tdx), &mut measurement)?;
    let policy = measurement.policy().unwrap_or(tdx_policy::SEPT_VE_DISABLE);
    let unknown = policy & !(tdx_policy::DEBUG | tdx_policy::SEPT_VE_DISABLE);
    if unknown != 0 {
        return Err(ImageError::Options(format!(
            "the image's policy for TDX has bits {unknown:#x}, which KVM cannot keep"
        )));
    }
    let debug = if policy & tdx_policy::DEBUG == 0 { 0 } else { attributes::DEBUG };
    let zero = |name| Pin { name, value: Some(Value::Bytes(vec![0; 48])), note: "" };
    Ok(Measured {
        digests: vec![LaunchDigest { vcpus: None, digest: Value::Bytes(measurement.mrtd().to_vec()) }],
        hash: HashAlgorithm::Sha384,
        pin: vec![
            Pin {
                name: "attributes",
                value: Some(Value::Flags(attributes::SEPT_VE_DISABLE | debug)),
                note: "",
            },
            Pin {
                name: "xfam",
                value: None,
                note: "chosen at the launch: bits 0 and 1 are set; decide which others you accept",
            },
            Pin { name: "mrconfigid", value: None, note: "what the domain is given at its launch" },
            zero("mrowner"),
            zero("mrownerconfig"),
        ],
    })
}

fn cca(igvm: &Igvm<'_>, realm: Option<&RealmArg>) -> Result<Measured, ImageError> {
    let has: Vec<_> = igvm.platforms().iter().map(|info| info.platform).collect();
    if !has.contains(&ImagePlatform::Cca) {
        return Err(WalkError::<CcaError>::NoPlatform { wanted: ImagePlatform::Cca, has }.into());
    }
    let Some(realm) = realm else {
        return Err(ImageError::Options(
            "--realm is missing: what the host decides of a realm is measured".to_owned(),
        ));
    };
    let mut measurement = CcaMeasurement::new(realm.rim());
    walk(igvm, Selection::One(ImagePlatform::Cca), &mut measurement)?;
    Ok(Measured {
        digests: vec![LaunchDigest { vcpus: None, digest: Value::Bytes(measurement.rim().value().to_vec()) }],
        hash: realm.params.hash_algo,
        pin: vec![Pin { name: "rpv", value: Some(Value::Bytes(vec![0; 64])), note: "KVM sets none" }],
    })
}
