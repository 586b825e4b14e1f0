//! `cofferdam image measure` and `cofferdam image sign` on files made here.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests fail by panicking

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use cofferdam_confidential::digest::cca::{CcaMeasurement, HashAlgorithm, RealmParams, Rim};
use cofferdam_confidential::digest::id_block::{IdAuthentication, IdBlock};
use cofferdam_confidential::digest::snp::SnpMeasurement;
use cofferdam_confidential::digest::tdx::TdxMeasurement;
use cofferdam_confidential::igvm::writer::Writer;
use cofferdam_confidential::image::compose::{Blob, Composition, Options, Source, compose};
use cofferdam_confidential::image::importer::{
    CcaPolicy, Content, ImagePlatform, Importer, Item, PageKind, PageRun, PlatformInfo, PublicKey, Signature,
    SnpIdBlock, VcpuContext,
};
use cofferdam_confidential::image::walk::Selection;
use openssl::ec::{EcGroup, EcKey};
use openssl::nid::Nid;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use zerocopy::FromBytes;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A file that begins as a bzImage does.
fn kernel() -> Vec<u8> {
    let mut kernel = vec![0x90; 5000];
    kernel[..0x400].fill(0);
    kernel[0x1f1] = 1;
    kernel[0x1fe..0x200].copy_from_slice(&0xaa55_u16.to_le_bytes());
    kernel[0x201..0x208].copy_from_slice(b"\x6aHdrS\x0f\x02");
    kernel[0x211] = 1;
    kernel[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
    kernel[0x230..0x234].copy_from_slice(&0x20_0000_u32.to_le_bytes());
    kernel[0x234..0x238].copy_from_slice(&[1, 0, 1, 0]);
    kernel[0x238..0x23c].copy_from_slice(&2047_u32.to_le_bytes());
    kernel[0x258..0x260].copy_from_slice(&0x100_0000_u64.to_le_bytes());
    kernel[0x260..0x264].copy_from_slice(&0x40_0000_u32.to_le_bytes());
    kernel
}

fn composition<'a>(kernel: &'a [u8], options: &Options) -> Composition<'a> {
    let source =
        Source { kernel: Blob::of(kernel), kernel_head: kernel, initrd: None, command_line: "quiet" };
    compose(&source, options).unwrap()
}

/// The composition as a file, with more items for SNP.
fn file(composition: &Composition<'_>, more: &[Item<'_>]) -> Vec<u8> {
    let mut writer = Writer::default();
    composition.walk(Selection::All, &mut writer).unwrap();
    for item in more {
        writer.import(SNP_MASK, item).unwrap();
    }
    let mut bytes = Vec::new();
    writer.write(&mut bytes).unwrap();
    bytes
}

/// The bit of SNP in composed images.
const SNP_MASK: u32 = 2;

struct Folder(TempDir);

impl Folder {
    fn with(image: &[u8]) -> Self {
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("domain.igvm"), image).unwrap();
        Self(folder)
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    /// `cofferdam image WORDS` in the folder.
    fn image(&self, words: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cofferdam"));
        command.arg("image").args(words).current_dir(self.0.path()).output().unwrap()
    }

    fn text(&self, words: &[&str]) -> String {
        let output = self.image(words);
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, words: &[&str]) -> Value {
        serde_json::from_str(&self.text(words)).unwrap()
    }

    /// What is said of a command that fails.
    fn refused(&self, words: &[&str]) -> String {
        let output = self.image(words);
        assert_eq!(output.status.code(), Some(125), "{words:?}");
        assert!(output.stdout.is_empty());
        String::from_utf8(output.stderr).unwrap().trim().trim_start_matches("cofferdam: ").to_owned()
    }

    fn key(&self, name: &str, curve: Nid) {
        let key = EcKey::generate(&EcGroup::from_curve_name(curve).unwrap()).unwrap();
        fs::write(self.path(name), key.private_key_to_pem().unwrap()).unwrap();
    }
}

fn snp_digests(composition: &Composition<'_>, vcpus: &[u32]) -> Vec<String> {
    let mut measurement = SnpMeasurement::new();
    composition.walk(Selection::One(ImagePlatform::Snp), &mut measurement).unwrap();
    vcpus.iter().map(|vcpus| hex(&measurement.digest(*vcpus).unwrap())).collect()
}

#[test]
fn snp_reference_values() {
    let kernel = kernel();
    let composition = composition(&kernel, &Options { max_vcpus: 4, ..Options::default() });
    let image = file(&composition, &[]);
    let folder = Folder::with(&image);
    let digests = snp_digests(&composition, &[1, 2, 4]);
    assert_eq!(
        folder.json(&["measure", "domain.igvm", "--platform", "snp", "--vcpus", "1,2,4", "--json"]),
        json!({
            "platform": "snp",
            "image_sha256": hex(&Sha256::digest(&image)),
            "digests": [
                {"vcpus": 1, "digest": digests[0]},
                {"vcpus": 2, "digest": digests[1]},
                {"vcpus": 4, "digest": digests[2]},
            ],
            "pin": {
                "policy": "0x30000",
                "family_id": "00".repeat(16),
                "image_id": "00".repeat(16),
                "guest_svn": 0,
                "id_key_digest": "00".repeat(48),
                "author_key_digest": "00".repeat(48),
                "host_data": "00".repeat(32),
                "vmpl": 0,
            },
        })
    );
    let text = folder.text(&["measure", "domain.igvm", "--platform", "snp", "--corim", "domain.corim"]);
    assert!(text.contains(&format!("launch digest, 1 vCPU  {}\n", digests[0])), "{text}");
    let (corim, comids) =
        corim::validate::decode_and_validate(&fs::read(folder.path("domain.corim")).unwrap()).unwrap();
    assert_eq!(corim.id.to_string(), format!("cofferdam:sha256:{}:snp", hex(&Sha256::digest(&image))));
    assert_eq!(comids.len(), 1);

    let measure = |vcpus| folder.refused(&["measure", "domain.igvm", "--platform", "snp", "--vcpus", vcpus]);
    assert_eq!(measure("0"), "--vcpus: 0 is not between 1 and 4");
    assert_eq!(measure("1,5"), "--vcpus: 5 is not between 1 and 4");
    assert_eq!(measure("2,1,2"), "--vcpus: 2 is given twice");
}

/// The program in the documentation, which knows nothing of ours, agrees.
#[test]
fn the_digest_is_reproduced_by_hand() {
    let text = include_str!("../../docs/images.md");
    let (_, rest) = text.split_once("```python\n").unwrap();
    let (program, _) = rest.split_once("```").unwrap();
    let kernel = kernel();
    let composition = composition(&kernel, &Options::default());
    let folder = Folder::with(&file(&composition, &[]));
    fs::write(folder.path("measure.py"), program).unwrap();
    for (vcpus, digest) in ["1", "2", "32"].iter().zip(snp_digests(&composition, &[1, 2, 32])) {
        let mut command = Command::new("python3");
        let output =
            command.args(["measure.py", "domain.igvm", vcpus]).current_dir(folder.0.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(String::from_utf8(output.stdout).unwrap().trim(), digest);
    }
}

#[test]
fn host_data_are_pinned_as_the_launch_sets_them() {
    let kernel = kernel();
    let composed = |host_data| file(&composition(&kernel, &Options { host_data, ..Options::default() }), &[]);
    let (data, zero) = ("5a".repeat(32), "00".repeat(32));
    let arguments = |data| ["measure", "domain.igvm", "--platform", "snp", "--json", "--host-data", data];

    let with = Folder::with(&composed(true));
    assert_eq!(with.json(&arguments(data.as_str()))["pin"]["host_data"], json!(data));
    assert_eq!(with.json(&arguments(data.as_str())[..5])["pin"]["host_data"], json!(null));

    let without = Folder::with(&composed(false));
    assert_eq!(without.json(&arguments(data.as_str()))["pin"]["host_data"], json!(data));
    assert_eq!(without.json(&arguments(data.as_str())[..5])["pin"]["host_data"], json!(zero));
}

#[test]
fn tdx_reference_values() {
    let kernel = kernel();
    let measure = |tdx_policy| {
        let composition = composition(&kernel, &Options { tdx_policy, ..Options::default() });
        let mut measurement = TdxMeasurement::new();
        composition.walk(Selection::One(ImagePlatform::Tdx), &mut measurement).unwrap();
        (Folder::with(&file(&composition, &[])), hex(&measurement.mrtd()))
    };
    let arguments = ["measure", "domain.igvm", "--platform", "tdx", "--json"];
    let (folder, mrtd) = measure(2);
    let value = folder.json(&arguments);
    assert_eq!(value["digests"], json!([{"vcpus": null, "digest": mrtd}]));
    assert_eq!(
        value["pin"],
        json!({
            "attributes": "0x10000000",
            "xfam": null,
            "mrconfigid": null,
            "mrowner": "00".repeat(48),
            "mrownerconfig": "00".repeat(48),
        })
    );
    let (debug, _) = measure(3);
    assert_eq!(debug.json(&arguments)["pin"]["attributes"], json!("0x10000001"));
    let text = folder.text(&arguments[..4]);
    assert!(text.contains(&format!("  MRTD          {mrtd}\n")), "{text}");
}

#[test]
fn cca_reference_values() {
    let policy = CcaPolicy { required_zeroes: 0, required_ones: 0, hash_algorithm: 1, lfa_policy: 0 };
    let info = PlatformInfo {
        platform: ImagePlatform::Cca,
        mask: 1,
        highest_vtl: 0,
        shared_gpa_boundary: 0,
        policy: None,
        cca_policy: Some(policy),
    };
    let content = Content { bytes: b"some code", file_offset: None };
    let items = [
        Item::Pages(PageRun { gpa: 0x8000_0000, pages: 2, kind: PageKind::Measured, content }),
        Item::Vcpu { index: 0, context: VcpuContext::Cca { x: [1; 8], pc: 0x8000_0000, flags: 1 } },
    ];
    let params = RealmParams {
        flags: 0,
        ipa_bits: 40,
        sve_vl: 0,
        num_bps: 5,
        num_wps: 3,
        pmu_num_ctrs: 0,
        hash_algo: HashAlgorithm::Sha512,
    };
    let mut measurement = CcaMeasurement::new(Rim::new(&params));
    let mut writer = Writer::default();
    writer.platform(&info).unwrap();
    for item in &items {
        measurement.import(1, item).unwrap();
        writer.import(1, item).unwrap();
    }
    let mut image = Vec::new();
    writer.write(&mut image).unwrap();
    let folder = Folder::with(&image);

    let realm = "ipa_bits=40,breakpoints=6,watchpoints=4,hash=sha512";
    let arguments = ["measure", "domain.igvm", "--platform", "cca", "--json", "--realm", realm];
    let value = folder.json(&arguments);
    assert_eq!(value["digests"], json!([{"vcpus": null, "digest": hex(measurement.rim().value())}]));
    assert_eq!(value["pin"], json!({"rpv": "00".repeat(64)}));
    assert_eq!(
        folder.refused(&arguments[..5]),
        "--realm is missing: what the host decides of a realm is measured"
    );
    let other_hash =
        ["measure", "domain.igvm", "--platform", "cca", "--realm", realm.trim_end_matches(",hash=sha512")];
    let refused = folder.refused(&other_hash);
    assert!(
        refused.ends_with("the image asks for hash algorithm 1, and the realm is made with Sha256"),
        "{refused}"
    );
}

#[test]
fn what_cannot_be_measured() {
    let kernel = kernel();
    let folder = Folder::with(&file(&composition(&kernel, &Options::default()), &[]));
    let measure = |more: &[&str]| folder.refused(&[&["measure", "domain.igvm", "--platform"], more].concat());
    assert_eq!(measure(&["cca"]), "the image is not for the platform cca, it is for plain, snp, tdx");
    assert_eq!(measure(&["tdx", "--vcpus", "1"]), "--vcpus is for snp only");
    assert_eq!(measure(&["tdx", "--host-data", &"00".repeat(32)]), "--host-data is for snp only");
    assert_eq!(
        measure(&["snp", "--realm", "ipa_bits=40,breakpoints=2,watchpoints=2"]),
        "--realm is for cca only"
    );
    assert!(measure(&["snp", "--corim", "no/such/folder"]).starts_with("cannot write no/such/folder: "));
    let missing = folder.refused(&["measure", "none.igvm", "--platform", "snp"]);
    assert!(missing.starts_with("cannot read none.igvm: "), "{missing}");
    fs::write(folder.path("text"), "no image").unwrap();
    let text = folder.refused(&["measure", "text", "--platform", "snp"]);
    assert!(text.starts_with("text: "), "{text}");
    let policy = |platform, policy| {
        let info = PlatformInfo {
            platform,
            mask: 1,
            highest_vtl: 0,
            shared_gpa_boundary: 0,
            policy,
            cca_policy: None,
        };
        let mut writer = Writer::default();
        writer.platform(&info).unwrap();
        let content = Content { bytes: b"some code", file_offset: None };
        let run = PageRun { gpa: 0x1000, pages: 1, kind: PageKind::Measured, content };
        writer.import(1, &Item::Pages(run)).unwrap();
        let mut image = Vec::new();
        writer.write(&mut image).unwrap();
        Folder::with(&image).refused(&["measure", "domain.igvm", "--platform", platform.name()])
    };
    assert_eq!(policy(ImagePlatform::Snp, None), "the image has no guest policy for SNP");
    assert_eq!(
        policy(ImagePlatform::Tdx, Some(6)),
        "the image's policy for TDX has bits 0x4, which KVM cannot keep"
    );
    // The command line.
    assert_eq!(folder.image(&["measure", "domain.igvm"]).status.code(), Some(125));
    assert_eq!(folder.image(&["measure", "domain.igvm", "--platform", "plain"]).status.code(), Some(125));
}

fn signed(folder: &Folder, output: &str) -> (IdBlock, IdAuthentication) {
    let read = |suffix: &str| fs::read(folder.path(&format!("{output}.{suffix}"))).unwrap();
    (
        IdBlock::read_from_bytes(&read("id-block")).unwrap(),
        IdAuthentication::read_from_bytes(&read("id-auth")).unwrap(),
    )
}

/// The signature itself is checked where it is made, in `src/image/signing.rs`.
#[test]
fn an_image_is_signed_for_one_number_of_vcpus() {
    let kernel = kernel();
    let composition =
        composition(&kernel, &Options { max_vcpus: 4, snp_policy: 0xb0000, ..Options::default() });
    let folder = Folder::with(&file(&composition, &[]));
    folder.key("id.pem", Nid::SECP384R1);
    folder.key("author.pem", Nid::SECP384R1);
    folder.key("p256.pem", Nid::X9_62_PRIME256V1);
    let (family, image) = ("a1".repeat(16), "b2".repeat(16));
    let sign = ["sign", "domain.igvm", "--vcpus", "2", "--key", "id.pem", "-o", "one", "--json"];
    let names =
        ["--author-key", "author.pem", "--family-id", &family, "--image-id", &image, "--guest-svn", "7"];

    let value = folder.json(&[&sign[..], &names].concat());
    let digest = &snp_digests(&composition, &[2])[0];
    let (block, authentication) = signed(&folder, "one");
    assert_eq!(hex(&block.launch_digest), *digest);
    assert_eq!((block.family_id, block.image_id), ([0xa1; 16], [0xb2; 16]));
    assert_eq!((block.version, block.guest_svn, block.policy), (1, 7, 0xb0000));
    assert_eq!(
        value,
        json!({
            "vcpus": 2,
            "digest": digest,
            "id_key_digest": hex(&authentication.id_key.digest()),
            "author_key_digest": hex(&authentication.author_key.digest()),
        })
    );

    // Again, and without the author and the names.
    folder.json(&[&sign[..7], &["two", "--json"], &names].concat());
    assert_eq!(signed(&folder, "two"), (block, authentication));
    let text = folder.text(&["sign", "domain.igvm", "--vcpus", "2", "--key", "id.pem", "-o", "three"]);
    let (block, authentication) = signed(&folder, "three");
    assert_eq!((block.family_id, block.guest_svn, authentication.author_key_algorithm), ([0; 16], 0, 0));
    assert_eq!(
        text,
        format!("launch digest      {digest}\nid_key_digest      {}\n", hex(&authentication.id_key.digest()))
    );

    let refused =
        |key, vcpus| folder.refused(&["sign", "domain.igvm", "--vcpus", vcpus, "--key", key, "-o", "four"]);
    assert!(refused("p256.pem", "2").starts_with("p256.pem is no private key for P-384 in PEM"));
    assert!(refused("none.pem", "2").starts_with("cannot read none.pem: "));
    assert_eq!(refused("id.pem", "5"), "--vcpus: 5 is not between 1 and 4");
    assert!(!Path::new(&folder.path("four.id-block")).exists());
    let folderless = ["sign", "domain.igvm", "--vcpus", "2", "--key", "id.pem", "-o", "no/such"];
    assert!(folder.refused(&folderless).starts_with("cannot write no/such.id-block: "));
}

/// An ID block in the image itself decides what is pinned, and for which launch.
#[test]
fn an_id_block_in_the_image_is_pinned() {
    let kernel = kernel();
    let composition = composition(&kernel, &Options::default());
    let unsigned = Folder::with(&file(&composition, &[]));
    unsigned.key("id.pem", Nid::SECP384R1);
    unsigned.text(&[
        "sign",
        "domain.igvm",
        "--vcpus",
        "2",
        "--key",
        "id.pem",
        "-o",
        "signed",
        "--guest-svn",
        "3",
    ]);
    let (block, authentication) = signed(&unsigned, "signed");
    let id_key = authentication.id_key;
    let signature = authentication.id_block_signature;
    let directive = Item::SnpIdBlock(Box::new(SnpIdBlock {
        launch_digest: block.launch_digest,
        family_id: *b"a family of ours",
        image_id: block.image_id,
        version: block.version,
        guest_svn: block.guest_svn,
        id_key_algorithm: authentication.id_key_algorithm,
        author_key_algorithm: 0,
        id_signature: Signature { r: signature.r, s: signature.s },
        id_key: PublicKey { curve: id_key.curve, x: id_key.qx, y: id_key.qy },
        author: None,
    }));
    let folder = Folder::with(&file(&composition, &[directive]));
    let value = folder.json(&["measure", "domain.igvm", "--platform", "snp", "--vcpus", "1,2", "--json"]);
    assert_eq!(value["digests"][1]["digest"], json!(hex(&block.launch_digest)));
    assert_eq!(value["pin"]["family_id"], json!(hex(b"a family of ours")));
    assert_eq!(value["pin"]["guest_svn"], json!(3));
    assert_eq!(value["pin"]["id_key_digest"], json!(hex(&id_key.digest())));
    assert_eq!(value["pin"]["author_key_digest"], json!("00".repeat(48)));
    assert_eq!(
        folder.refused(&["measure", "domain.igvm", "--platform", "snp", "--vcpus", "1"]),
        format!("the image's ID block is for another launch digest, {}", hex(&block.launch_digest))
    );
}
