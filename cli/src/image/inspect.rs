//! `cofferdam image inspect`: what is in an image file.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use cofferdam_confidential::igvm::ReadError;
use cofferdam_confidential::igvm::reader::Igvm;
use cofferdam_confidential::image::inspect::{FileReport, ManifestReport, Report, inspect as report};

use super::{ImageError, read_file};
use crate::say::plain;

/// `cofferdam image inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The image file: any IGVM file
    pub image: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Looks into an image. Returns what to print.
pub fn inspect(args: &InspectArgs) -> Result<String, ImageError> {
    let file = read_file(&args.image)?;
    let wrong = |source| ImageError::Image { path: args.image.clone(), source };
    let image = Igvm::new(&file).map_err(wrong)?;
    let report = report(&file, &image).map_err(|error| wrong(ReadError::from(error)))?;
    Ok(if args.json { json_form(&report) } else { text_form(&report) })
}

fn json_form(report: &Report) -> String {
    // Names, numbers and texts are always JSON.
    let text = serde_json::to_string(report).unwrap_or_default();
    format!("{text}\n")
}

fn text_form(report: &Report) -> String {
    let mut text = format!(
        "IGVM {}, {}, {} headers, {} bytes\nSHA-256 {}\n",
        report.format_version, report.architecture, report.headers, report.size, report.sha256
    );
    if let Some(version) = &report.version_string {
        text.push_str(&format!("version {}\n", plain(version)));
    }
    text.push('\n');
    let rows = report.platforms.iter().map(|platform| {
        vec![
            platform.platform.to_owned(),
            format!("{:#x}", platform.mask),
            platform.policy.clone().unwrap_or_else(|| "-".to_owned()),
            report.measured_pages.get(platform.platform).map_or_else(String::new, u64::to_string),
        ]
    });
    table(&mut text, &["platform", "mask", "policy", "measured pages"], rows);
    text.push('\n');
    let rows = report.items.iter().map(|item| {
        vec![
            item.kind.to_owned(),
            item.platforms.join(","),
            item.gpa.map_or_else(|| "-".to_owned(), |gpa| format!("{gpa:#x}")),
            format!("{:#x}", item.size),
            item.file_offset.map_or_else(|| "-".to_owned(), |offset| format!("{offset:#x}")),
            item.sha256.clone().or_else(|| item.note.clone()).unwrap_or_default(),
        ]
    });
    table(&mut text, &["type", "platforms", "address", "size", "in file at", "SHA-256, or remark"], rows);
    if let Some(manifest) = &report.manifest {
        text.push('\n');
        manifest_form(&mut text, manifest);
    }
    if let Some(problem) = &report.problem {
        text.push_str(&format!("\nThis image cannot be loaded: {problem}\n"));
    }
    text
}

fn manifest_form(text: &mut String, manifest: &ManifestReport) {
    let files = [
        ("kernel", Some(&manifest.kernel)),
        ("initrd", manifest.initrd.as_ref()),
        ("command line", manifest.command_line.as_ref()),
    ];
    let there = files.into_iter().filter_map(|(name, file)| Some((name, file?)));
    let rows = there.map(|(name, file): (&str, &FileReport)| {
        let offset = file.file_offset.map_or_else(|| "-".to_owned(), |offset| offset.to_string());
        let state = if file.intact { "yes" } else { "NO" };
        vec![name.to_owned(), file.size.to_string(), offset, state.to_owned(), file.sha256.clone()]
    });
    table(text, &["launch manifest", "bytes", "in file at", "intact", "SHA-256"], rows);
    const MIB: u64 = 1 << 20;
    let (least, most) = (manifest.min_memory / MIB, manifest.max_memory / MIB);
    // Writing to a String cannot fail.
    let _ =
        write!(text, "\n{}, up to {} CPUs, {least} to {most} MiB", manifest.kernel_format, manifest.max_cpus);
    text.push_str(if manifest.host_data { ", wants host data" } else { "" });
    text.push_str(if manifest.accept_all { ", accepts all memory at the start\n" } else { "\n" });
    text.push_str(&format!("manifest hash {}\n", manifest.sha256));
    if let Some(line) = &manifest.command_line_text {
        text.push_str(&format!("command line: {}\n", plain(line)));
    }
}

/// Appends rows in columns, the last one as long as it likes.
fn table(text: &mut String, head: &[&str], rows: impl Iterator<Item = Vec<String>>) {
    let mut all: Vec<Vec<String>> = vec![head.iter().map(|cell| (*cell).to_owned()).collect()];
    all.extend(rows);
    let widths: Vec<usize> = (0..head.len())
        .map(|column| all.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or(0))
        .collect();
    for row in &all {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
}
