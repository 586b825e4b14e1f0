//! Containers: `cofferdam container` makes their images ready, `cofferdam run --container` starts them.

pub mod args;
pub mod attached;
pub mod derive;
pub mod requests;
pub mod side;
pub mod start;
pub mod store;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use cofferdam_container::build::{Options, Summary, build};
use cofferdam_container::source::Source;
use serde_json::json;

use crate::say::{Tone, print, say};
use crate::units::parse_size;

/// Exit code of a command that failed.
const FAILED: u8 = 125;

/// The commands about container images.
#[derive(Debug, Subcommand)]
pub enum ContainerCommand {
    /// Make verified layers and a manifest of an image
    Build(BuildArgs),
}

/// `cofferdam container build`.
#[derive(Debug, Args)]
#[command(after_help = BUILD_EXAMPLES)]
pub struct BuildArgs {
    /// An OCI image layout, oci:DIR[:TAG], an archive as `docker save` makes it, or a root file system: a folder or a tar archive
    ///
    /// docker-archive:FILE:NAME chooses one of several images in an archive.
    source: Source,
    /// Folder for the manifest, and without --store for the layers
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Folder for the layers, which images share
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    /// Most that the image may have when unpacked
    #[arg(long, value_name = "SIZE", default_value = "32G", value_parser = parse_size)]
    max_unpacked: u64,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
    /// Program and arguments, instead of the image's command but behind its entry point
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

const BUILD_EXAMPLES: &str = "\
Examples:
  cofferdam container build oci:python:3.13 -o python
  cofferdam container build debian.tar.gz -o debian   # of `docker save debian:12 | gzip`
  cofferdam container build rootfs.tar.zst -o rootfs -- /bin/sh -c 'echo hello'";

/// Runs a command. Returns 0, or 125 after saying why not.
pub fn run(command: &ContainerCommand) -> u8 {
    let ContainerCommand::Build(args) = command;
    let options =
        Options { output: &args.output, store: args.store.as_deref(), max_unpacked: args.max_unpacked };
    match build(&args.source, &options, &args.command) {
        Ok(summary) => {
            for warning in &summary.warnings.shown {
                say(Tone::Warning, warning, false);
            }
            if summary.warnings.more > 0 {
                say(Tone::Warning, &format!("{} more were left out", summary.warnings.more), false);
            }
            print(&if args.json { as_json(&summary) } else { as_text(&summary) });
            0
        }
        Err(error) => {
            say(Tone::Error, &error.to_string(), false);
            FAILED
        }
    }
}

fn as_text(summary: &Summary) -> String {
    let mut text = String::new();
    for (index, layer) in summary.layers.iter().enumerate() {
        let merged =
            if layer.sources > 1 { format!(", {} layers merged", layer.sources) } else { String::new() };
        let reused = if layer.reused { ", in the store already" } else { "" };
        let (root_hash, size) = (layer.written.root_hash, layer.written.size);
        text.push_str(&format!("layer {index}: {root_hash}, {size} bytes{merged}{reused}\n"));
    }
    text.push_str(&format!("manifest: {}\n", summary.digest));
    text
}

fn as_json(summary: &Summary) -> String {
    let layers: Vec<_> = summary
        .layers
        .iter()
        .map(|layer| {
            json!({
                "root_hash": layer.written.root_hash.to_string(),
                "size": layer.written.size,
                "source_layers": layer.sources,
                "reused": layer.reused,
            })
        })
        .collect();
    let left_out = summary.warnings.shown.len().saturating_add(summary.warnings.more);
    format!(
        "{}\n",
        json!({"manifest_digest": summary.digest.to_string(), "layers": layers, "left_out": left_out})
    )
}
