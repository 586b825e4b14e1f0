//! An importer that remembers what it was given, and images for tests.

use super::importer::{
    Content, Importer, Item, PAGE, PageKind, PageRun, Parameter, ParameterArea, PlatformInfo,
};
use super::walk::{Selection, WalkError, walk};
use crate::igvm::reader::Igvm;
use crate::igvm::writer::Writer;

/// Remembers everything.
#[derive(Debug, Default, PartialEq)]
pub struct Recorder<'a> {
    pub platforms: Vec<PlatformInfo>,
    pub items: Vec<(u32, Item<'a>)>,
    /// The number of the item to refuse.
    pub refuse: Option<usize>,
}

impl<'a> Importer<'a> for Recorder<'a> {
    type Error = String;

    fn platform(&mut self, platform: &PlatformInfo) -> Result<(), String> {
        self.platforms.push(*platform);
        Ok(())
    }

    fn import(&mut self, mask: u32, item: &Item<'a>) -> Result<(), String> {
        if self.refuse == Some(self.items.len()) {
            return Err("refused".to_owned());
        }
        self.items.push((mask, item.clone()));
        Ok(())
    }
}

/// What a walk over `file` gives.
pub fn record(file: &[u8], selection: Selection) -> Result<Recorder<'_>, WalkError<String>> {
    let image = Igvm::new(file).expect("a file that was written well");
    let mut recorder = Recorder::default();
    walk(&image, selection, &mut recorder)?;
    Ok(recorder)
}

/// An image with these platforms and items, as a file.
pub fn file(platforms: &[PlatformInfo], items: &[(u32, Item<'_>)]) -> Vec<u8> {
    let mut writer = Writer::default();
    for platform in platforms {
        writer.platform(platform).unwrap();
    }
    for (mask, item) in items {
        writer.import(*mask, item).unwrap();
    }
    let mut bytes = Vec::new();
    writer.write(&mut bytes).unwrap();
    bytes
}

/// What an importer is given, without what depends on how it is stored: whole pages, one by one.
#[derive(Debug, PartialEq)]
pub enum Flat {
    Page(u32, u64, PageKind, Box<[u8; PAGE]>),
    ParameterPage(u32, u64, Box<[u8; PAGE]>, Vec<Parameter>),
    Other(u32, String),
}

/// The items, page by page.
pub fn flat(items: &[(u32, Item<'_>)]) -> Vec<Flat> {
    let mut buffer = [0; PAGE];
    let mut flat = Vec::new();
    for (mask, item) in items {
        match item {
            Item::Pages(run) => {
                for (gpa, content) in run.each_page() {
                    flat.push(Flat::Page(*mask, gpa, run.kind, Box::new(*content.bytes(&mut buffer))));
                }
            }
            Item::Parameters(area) => {
                for (gpa, content) in area.each_page() {
                    let content = Box::new(*content.bytes(&mut buffer));
                    flat.push(Flat::ParameterPage(*mask, gpa, content, area.values.clone()));
                }
            }
            other => flat.push(Flat::Other(*mask, format!("{other:?}"))),
        }
    }
    flat
}

/// Pages with `bytes` at `gpa`.
pub fn pages(kind: PageKind, gpa: u64, pages: u64, bytes: &[u8]) -> Item<'_> {
    Item::Pages(PageRun { gpa, pages, kind, content: Content { bytes, file_offset: None } })
}

/// A parameter area with `values`.
pub fn parameters(gpa: u64, pages: u64, initial: &[u8], values: Vec<Parameter>) -> Item<'_> {
    let initial = Content { bytes: initial, file_offset: None };
    Item::Parameters(ParameterArea { gpa, pages, initial, values })
}

/// A platform with this mask.
pub fn platform(platform: super::importer::ImagePlatform, mask: u32) -> PlatformInfo {
    PlatformInfo { platform, mask, highest_vtl: 0, shared_gpa_boundary: 0, policy: None, cca_policy: None }
}
