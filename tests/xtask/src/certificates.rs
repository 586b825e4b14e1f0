//! What vouches for the emulated secure processor: a key that signs attestation reports (VCEK), and the certificates
//! from it to a root (ASK, ARK), with the fields of AMD's own (AMD 57230, "Versioned Chip Endorsement Key (VCEK)
//! Certificate and KDS Interface Specification").
//!
//! They are test keys, made once per cache: a verifier that pins AMD's roots must refuse them. The keys of the
//! authorities are thrown away at once.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache::Cache;
use crate::{Error, tool};

/// The versions of firmware and microcode that the emulated secure processor reports (its property `tcb`).
const BOOT_LOADER: u8 = 7;
const TEE: u8 = 0;
const SNP: u8 = 0x14;
const MICROCODE: u8 = 0x48;

/// `openssl req`'s settings; the extensions of the VCEK are added to it.
const SETTINGS: &str = "\
[req]
distinguished_name = name
prompt = no
[name]
OU = Engineering
C = US
L = Santa Clara
ST = CA
O = Emulated Micro Devices
CN = $ENV::COMMON_NAME
[authority]
basicConstraints = critical,CA:true
[vcek]
";

const LIFETIME_DAYS: &str = "9125";

/// A directory with `ark.pem`, `ask.pem`, `vcek.pem`, the same as `.der`, and `vcek-key.pem`; made if it is not in `cache`.
pub fn fetch(cache: &Cache) -> Result<PathBuf, Error> {
    cache.entry("snp-certificates", &[b"1", SETTINGS.as_bytes(), extensions("").as_bytes()], make)
}

fn make(directory: &Path) -> Result<(), Error> {
    tool::progress("making the emulated secure processor's key and its certificates");
    let openssl = |words: &[&str]| tool::run(Command::new("openssl").args(words).current_dir(directory));
    for name in ["ark-key.pem", "ask-key.pem"] {
        openssl(&[
            "genpkey",
            "-quiet",
            "-algorithm",
            "RSA",
            "-pkeyopt",
            "rsa_keygen_bits:4096",
            "-out",
            name,
        ])?;
    }
    let curve = ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"];
    openssl(&[&["genpkey"], &curve[..], &["-out", "vcek-key.pem"]].concat())?;
    let public_key = openssl(&["pkey", "-in", "vcek-key.pem", "-pubout", "-outform", "DER"])?;
    let chip_id = tool::filter("sha512sum", &[], &public_key)?;
    let chip_id = String::from_utf8_lossy(&chip_id).split(' ').next().unwrap_or_default().to_owned();
    let settings = directory.join("settings");
    let content = format!("{SETTINGS}{}", extensions(&chip_id));
    fs::write(&settings, content).map_err(Error::file("write", &settings))?;

    for (name, subject, extensions, issuer) in [
        ("ark", "ARK-Genoa", "authority", None),
        ("ask", "SEV-Genoa", "authority", Some("ark")),
        ("vcek", "SEV-VCEK", "vcek", Some("ask")),
    ] {
        let mut request = Command::new("openssl");
        request.env("COMMON_NAME", subject).current_dir(directory);
        request.args(["req", "-x509", "-new", "-config", "settings", "-days", LIFETIME_DAYS]);
        request.args(["-sha384", "-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:48"]);
        request.args(["-extensions", extensions, "-key", &format!("{name}-key.pem")]);
        if let Some(issuer) = issuer {
            request.args(["-CA", &format!("{issuer}.pem"), "-CAkey", &format!("{issuer}-key.pem")]);
        }
        tool::run(request.args(["-out", &format!("{name}.pem")]))?;
        let (pem, der) = (format!("{name}.pem"), format!("{name}.der"));
        openssl(&["x509", "-in", &pem, "-outform", "DER", "-out", &der])?;
    }
    for secret in ["ark-key.pem", "ask-key.pem", "settings"].map(|name| directory.join(name)) {
        fs::remove_file(&secret).map_err(Error::file("remove", secret))?;
    }
    Ok(())
}

/// The extensions of a VCEK's certificate (57230, "VCEK Certificate Fields"), as `openssl req` reads them.
fn extensions(chip_id: &str) -> String {
    const AMD: &str = "1.3.6.1.4.1.3704.1";
    // An INTEGER of one byte whose upper bit is clear.
    let integer = |value: u8| format!("02:01:{value:02x}");
    let fields = [
        ("1", integer(0)),                        // structVersion
        ("2", "16:05:47:65:6e:6f:61".to_owned()), // productName: an IA5String, "Genoa"
        ("3.1", integer(BOOT_LOADER)),
        ("3.2", integer(TEE)),
        ("3.3", integer(SNP)),
        ("3.4", integer(0)),
        ("3.5", integer(0)),
        ("3.6", integer(0)),
        ("3.7", integer(0)),
        ("3.8", integer(MICROCODE)),
        ("4", chip_id.to_owned()), // hwID: the bytes as they are
    ];
    fields.iter().fold(String::new(), |mut text, (number, value)| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{AMD}.{number} = DER:{value}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_certificate_is_signed_by_the_next_and_the_authorities_keys_are_gone() {
        let cache = tempfile::tempdir().unwrap();
        let directory = fetch(&Cache::at(cache.path()).unwrap()).unwrap();
        let openssl = |words: &[&str]| {
            let output = tool::run(Command::new("openssl").args(words).current_dir(&directory)).unwrap();
            String::from_utf8(output).unwrap()
        };
        let verified = openssl(&["verify", "-CAfile", "ark.pem", "-untrusted", "ask.pem", "vcek.pem"]);
        assert_eq!(verified, "vcek.pem: OK\n");
        let text = openssl(&["x509", "-in", "vcek.pem", "-noout", "-text"]);
        assert!(text.contains("1.3.6.1.4.1.3704.1.4") && text.contains("rsassaPss"), "{text}");
        let of_key = openssl(&["pkey", "-in", "vcek-key.pem", "-pubout"]);
        assert_eq!(openssl(&["x509", "-in", "vcek.pem", "-noout", "-pubkey"]), of_key);
        let mut names: Vec<_> =
            fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        let expected = ["ark.der", "ark.pem", "ask.der", "ask.pem", "vcek-key.pem", "vcek.der", "vcek.pem"];
        assert_eq!(names, expected);
    }
}
