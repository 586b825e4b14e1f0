//! `cofferdam container build`, as a person runs it.
#![allow(clippy::unwrap_used)] // helpers of tests fail by panicking

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn cofferdam(args: &[&str], place: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cofferdam"));
    command.args(["container", "build"]).args(args).current_dir(place).output().unwrap()
}

#[test]
fn a_root_file_system() {
    let place = tempfile::tempdir().unwrap();
    fs::create_dir(place.path().join("root")).unwrap();
    fs::write(place.path().join("root/hello"), "hello").unwrap();
    let tar = ["-C", "root", "-czf", "root.tar.gz", "."];
    assert!(Command::new("tar").args(tar).current_dir(place.path()).status().unwrap().success());

    let output = cofferdam(&["root.tar.gz", "-o", "out", "--", "/hello"], place.path());
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0));
    let manifest = fs::read(place.path().join("out/manifest.json")).unwrap();
    let digest = cofferdam_container::digest::Digest::of(&manifest).to_string();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let root_hash = manifest["layers"][0]["root_hash"].as_str().unwrap();
    assert_eq!(text, format!("layer 0: {root_hash}, 4096 bytes\nmanifest: {digest}\n"));
    assert_eq!(manifest["process"]["args"], serde_json::json!(["/hello"]));

    let output = cofferdam(&["root.tar.gz", "-o", "out", "--json", "--", "/hello"], place.path());
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    let layer = serde_json::json!({"root_hash": root_hash, "size": 4096, "source_layers": 1, "reused": true});
    let expected = serde_json::json!({"manifest_digest": digest, "layers": [layer], "left_out": 0});
    assert_eq!(summary, expected);
}

#[test]
fn what_is_refused() {
    let place = tempfile::tempdir().unwrap();
    fs::write(place.path().join("empty.tar"), [0; 1024]).unwrap();
    for (args, message) in [
        (&["none.tar", "-o", "out", "--", "/a"][..], "cannot read none.tar"),
        (&[".", "-o", "out", "--", "/a"], "out lies in the folder that is to be read"),
        (&["empty.tar", "-o", "out"], "the image names no program; give one after --"),
        (&["oci:", "-o", "out"], "it is oci:DIR or oci:DIR:TAG"),
        (&["empty.tar", "-o", "out", "--", ""], "process.args[0]: it is empty"),
    ] {
        let output = cofferdam(args, place.path());
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains(message), "{args:?}: {text}");
        assert_eq!(output.status.code(), Some(125));
        assert!(!place.path().join("out/manifest.json").exists());
    }
}
