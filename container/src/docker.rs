//! Images as `docker save` and `podman save` write them: a tar archive with `manifest.json`, a configuration and layers, and
//! since Docker 25 an OCI image layout beside that, which is taken then.
//!
//! ```text
//! manifest.json   [{"Config": NAME, "RepoTags": ["NAME:TAG"], "Layers": [NAME, the lowest first]}]
//! ```

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, openat};
use serde::Deserialize;

use crate::archive::ArchiveError;
use crate::budget::{Budget, Paid};
use crate::digest::Digest;
use crate::files::{Entries, Files, Index, entries};
use crate::region::Region;
use crate::source::{Opened, SourceError, opened, parse, same_name};
use crate::unpack::{is_packed, unpack};

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// The files of the image archive `file`. `None` if it is an archive of something else. What is packed is unpacked to a
/// file in `scratch` that nothing names.
///
/// # Errors
/// If the archive is refused.
pub fn files(
    path: &Path,
    file: File,
    scratch: &Path,
    max_unpacked: u64,
) -> Result<Option<Files>, SourceError> {
    let index = || {
        let archive = Region::whole(file)?;
        let budget = Budget::new(max_unpacked);
        let Some(entries) = entries(unpack(archive.clone())?, &budget)? else { return Ok(None) };
        if !is_image(&entries) {
            return Ok(None);
        }
        let archive =
            if is_packed(archive.clone())? { unpack_to(scratch, archive, max_unpacked)? } else { archive };
        Ok(Some(Index::new(path, archive, entries)))
    };
    let index = index().map_err(|source| SourceError::Archive { path: path.to_owned(), source })?;
    Ok(index.map(Files::Archive))
}

fn is_image(entries: &Entries) -> bool {
    [&b"index.json"[..], b"manifest.json"].iter().any(|name| entries.contains_key(*name))
}

fn unpack_to(scratch: &Path, archive: Region, max_unpacked: u64) -> Result<Region, ArchiveError> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let mut file =
        openat(CWD, scratch, flags, Mode::RUSR | Mode::WUSR).map(File::from).map_err(io::Error::from)?;
    let budget = Budget::new(max_unpacked);
    io::copy(&mut Paid { inner: unpack(archive)?, budget: &budget }, &mut file)?;
    Ok(Region::whole(file)?)
}

/// Opens the image `name`, or the only one, by `manifest.json`.
///
/// # Errors
/// If the image is refused.
pub fn open(files: &Files, name: Option<&str>) -> Result<Opened, SourceError> {
    const LIST: &str = "manifest.json";
    let images: Vec<Saved> = parse(LIST, &files.read(LIST)?)?;
    let tags: Vec<&str> =
        images.iter().flat_map(|one| one.repo_tags.iter().flatten()).map(String::as_str).collect();
    let fits =
        |one: &&Saved| name.is_none_or(|name| one.repo_tags.iter().flatten().any(|tag| same_name(tag, name)));
    let mut fitting = images.iter().filter(fits);
    let Some(image) = fitting.next() else {
        return Err(SourceError::None {
            wanted: name.unwrap_or("at all").to_owned(),
            found: tags.join(", "),
        });
    };
    if fitting.next().is_some() {
        return Err(SourceError::Several(tags.join(", ")));
    }
    let config = files.read(&image.config)?;
    if let Some(expected) = digest_of_name(&image.config) {
        let found = Digest::of(&config);
        if found != expected {
            return Err(SourceError::Digest { what: image.config.clone(), found, expected });
        }
    }
    let layers = image.layers.iter().map(|name| (name.clone(), digest_of_name(name)));
    opened(files, parse(&image.config, &config)?, layers.collect())
}

/// The digest by which a file is named, `blobs/sha256/HEX` or `HEX.json`. Other names, such as those of folders of layers, are of
/// something else.
fn digest_of_name(name: &str) -> Option<Digest> {
    let hex = name.strip_suffix(".json").or_else(|| name.strip_prefix("blobs/sha256/"))?;
    format!("sha256:{hex}").parse().ok()
}
