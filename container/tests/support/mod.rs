//! Sources made by hand.
#![allow(dead_code)] // no test file needs all of it

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cofferdam_container::build::{Options, Summary, build};
use cofferdam_container::digest::Digest;
use cofferdam_container::source::Source;
use cofferdam_container_manifest::{Manifest, decode};
use serde_json::{Value, json};
use tempfile::TempDir;

pub const FILE: u8 = b'0';
pub const HARD_LINK: u8 = b'1';
pub const SYMLINK: u8 = b'2';
pub const DEVICE: u8 = b'3';
pub const FOLDER: u8 = b'5';

/// An entry of a tar archive, with the name as it stands here.
pub fn entry(kind: u8, name: &str, target: &str, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 512];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    bytes[100..107].copy_from_slice(if kind == FOLDER { b"0000755" } else { b"0000644" });
    bytes[108..115].copy_from_slice(b"0000001");
    bytes[116..123].copy_from_slice(b"0000002");
    bytes[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
    bytes[136..147].copy_from_slice(b"00000000007");
    bytes[148..156].fill(b' ');
    bytes[156] = kind;
    bytes[157..157 + target.len()].copy_from_slice(target.as_bytes());
    bytes[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
    bytes[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    bytes.extend(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

/// One with PAX records before it.
pub fn pax(records: &[(&str, &[u8])], entry: Vec<u8>) -> Vec<u8> {
    let mut text = Vec::new();
    for (name, value) in records {
        let rest = name.len() + value.len() + 3;
        let length = (1..).find(|length| *length == rest + length.to_string().len()).unwrap();
        text.extend(format!("{length} {name}=").bytes().chain(value.iter().copied()).chain(*b"\n"));
    }
    [self::entry(b'x', "pax", "", &text), entry].concat()
}

pub fn archive(entries: &[Vec<u8>]) -> Vec<u8> {
    [&entries.concat()[..], &[0; 1024]].concat()
}

pub fn pack(program: &str, bytes: &[u8]) -> Vec<u8> {
    let mut child =
        Command::new(program).arg("-c").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let bytes = bytes.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&bytes).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    output.stdout
}

/// An image layout in a folder of its own.
pub struct Layout(pub TempDir);

impl Layout {
    pub fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        fs::create_dir_all(place.path().join("layout/blobs/sha256")).unwrap();
        Self(place)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn blob(&self, bytes: &[u8]) -> String {
        let digest = Digest::of(bytes);
        fs::write(self.path("layout/blobs/sha256").join(digest.hex()), bytes).unwrap();
        digest.to_string()
    }

    /// An image of these layers, each as it is packed and as it is.
    pub fn image(&self, layers: &[(Vec<u8>, Vec<u8>)], config: Value) {
        let ids: Vec<String> = layers.iter().map(|(_, plain)| Digest::of(plain).to_string()).collect();
        let blobs: Vec<Value> =
            layers.iter().map(|(packed, _)| json!({"digest": self.blob(packed)})).collect();
        let config =
            json!({"architecture": "amd64", "os": "linux", "config": config, "rootfs": {"diff_ids": ids}});
        self.manifest(&config, &blobs);
    }

    pub fn manifest(&self, config: &Value, blobs: &[Value]) {
        let config = self.blob(config.to_string().as_bytes());
        let manifest = json!({"config": {"digest": config}, "layers": blobs});
        let digest = self.blob(manifest.to_string().as_bytes());
        self.index(json!([{"digest": digest}]));
    }

    pub fn index(&self, manifests: Value) {
        fs::write(self.path("layout/index.json"), json!({"manifests": manifests}).to_string()).unwrap();
    }

    pub fn source(&self) -> Source {
        format!("oci:{}", self.path("layout").display()).parse().unwrap()
    }

    pub fn build(&self) -> Result<(Summary, Manifest), String> {
        build_to(&self.source(), &self.path("out"), 1 << 30)
    }
}

pub fn build_to(source: &Source, output: &Path, max_unpacked: u64) -> Result<(Summary, Manifest), String> {
    let command = ["/bin/true".to_owned()];
    let options = Options { output, store: None, max_unpacked };
    let summary = build(source, &options, &command).map_err(|error| error.to_string())?;
    let bytes = fs::read(output.join("manifest.json")).unwrap();
    assert_eq!(Digest::of(&bytes), summary.digest);
    Ok((summary, decode(&bytes).unwrap()))
}

/// Checks the layer, and extracts it.
pub fn extract(output: &Path, root_hash: &str, to: &Path) {
    let layer = output.join("layers").join(root_hash).join("layer.erofs");
    let metadata = fs::read_to_string(layer.with_extension("erofs.dmverity")).unwrap();
    let metadata: Value = serde_json::from_str(&metadata).unwrap();
    assert_eq!(metadata["roothash"], root_hash);
    let offset = format!("--hash-offset={}", metadata["hashoffset"]);
    let mut verify = Command::new("/usr/sbin/veritysetup");
    verify.arg("verify").args([&layer, &layer]).args([root_hash, &offset]);
    assert!(verify.status().unwrap().success());
    let to = format!("--extract={}", to.display());
    assert!(Command::new("fsck.erofs").arg(to).arg(&layer).stdout(Stdio::null()).status().unwrap().success());
}
