//! Links the payloads as static executables at the addresses of `link.ld`.

fn main() {
    let folder = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    println!("cargo::rerun-if-changed=link.ld");
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "none") {
        println!("cargo::rustc-link-arg-bins=--script={folder}/link.ld");
        // The target links position-independent executables by default, which need a loader that relocates.
        println!("cargo::rustc-link-arg-bins=--no-pie");
    }
}
