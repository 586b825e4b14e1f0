//! `cofferdam image sign`: the ID block of an SNP image, and who signed it.

use std::path::{Path, PathBuf};

use clap::Args;
use cofferdam_confidential::digest::id_block::{ID_BLOCK_VERSION, IdBlock};
use cofferdam_confidential::igvm::reader::Igvm;
use cofferdam_confidential::image::importer::ImagePlatform;
use serde::Serialize;
use zerocopy::IntoBytes;

use super::measure::{manifest, measure_snp, snp_digest};
use super::reference::Value;
use super::{ImageError, parse_hex, read_file, signing, write_file};

const EXAMPLES: &str = "\
Example:
  openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -out id-key.pem
  cofferdam image sign domain.igvm --vcpus 2 --key id-key.pem -o domain

writes domain.id-block (96 bytes) and domain.id-auth (4096 bytes), as the SNP firmware takes them.
A signature is for one number of CPUs. The same image and keys always give the same bytes.";

/// `cofferdam image sign`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct SignArgs {
    /// The image file
    pub image: PathBuf,
    /// Number of CPUs of the domains that the signature is for
    #[arg(long, value_name = "N")]
    pub vcpus: u32,
    /// The ID key: a private key for P-384 in PEM
    #[arg(long, value_name = "FILE")]
    pub key: PathBuf,
    /// A key of the same kind that vouches for the ID key
    #[arg(long, value_name = "FILE")]
    pub author_key: Option<PathBuf>,
    /// What you call the family of images: 32 hexadecimal digits [default: zeroes]
    #[arg(long, value_name = "HEX", value_parser = parse_hex::<16>)]
    pub family_id: Option<[u8; 16]>,
    /// What you call the image: 32 hexadecimal digits [default: zeroes]
    #[arg(long, value_name = "HEX", value_parser = parse_hex::<16>)]
    pub image_id: Option<[u8; 16]>,
    /// Security version of the guest
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub guest_svn: u32,
    /// Writes OUTPUT.id-block and OUTPUT.id-auth
    #[arg(short, long, value_name = "OUTPUT")]
    pub output: PathBuf,
    /// Print one JSON object: `digest`, `id_key_digest`, `author_key_digest`
    #[arg(long)]
    pub json: bool,
}

/// What a verifier sees of a signed guest, beside the names that were given.
#[derive(Debug, Serialize)]
struct Signed {
    vcpus: u32,
    digest: Value,
    id_key_digest: Value,
    author_key_digest: Option<Value>,
}

/// Signs an image, and returns what is printed.
pub fn sign(args: &SignArgs) -> Result<String, ImageError> {
    let file = read_file(&args.image)?;
    let igvm = Igvm::new(&file).map_err(|source| ImageError::Image { path: args.image.clone(), source })?;
    let (measurement, policy) = measure_snp(&igvm)?;
    let digest = snp_digest(&measurement, manifest(&igvm, ImagePlatform::Snp)?.as_ref(), args.vcpus)?;
    let id_key = signing::read_key(&args.key)?;
    let author_key = args.author_key.as_deref().map(signing::read_key).transpose()?;

    let block = IdBlock {
        launch_digest: digest,
        family_id: args.family_id.unwrap_or_default(),
        image_id: args.image_id.unwrap_or_default(),
        version: ID_BLOCK_VERSION,
        guest_svn: args.guest_svn,
        policy,
    };
    let authentication = signing::sign(&block, &id_key, author_key.as_ref());
    write_file(&with_suffix(&args.output, "id-block"), block.as_bytes())?;
    write_file(&with_suffix(&args.output, "id-auth"), authentication.as_bytes())?;

    let hex = |bytes: &[u8]| Value::Bytes(bytes.to_vec());
    let signed = Signed {
        vcpus: args.vcpus,
        digest: hex(&digest),
        id_key_digest: hex(&authentication.id_key.digest()),
        author_key_digest: author_key.map(|_| hex(&authentication.author_key.digest())),
    };
    Ok(if args.json {
        // Numbers and hexadecimal digits are always JSON.
        format!("{}\n", serde_json::to_string(&signed).unwrap_or_default())
    } else {
        signed.to_text()
    })
}

impl Signed {
    fn to_text(&self) -> String {
        let mut text =
            format!("launch digest      {}\nid_key_digest      {}\n", self.digest, self.id_key_digest);
        if let Some(digest) = &self.author_key_digest {
            text.push_str(&format!("author_key_digest  {digest}\n"));
        }
        text
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    name.into()
}
