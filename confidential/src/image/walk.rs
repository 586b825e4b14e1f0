//! The walk over an image file: its directives, handed to an importer in their order.
//!
//! Pages that follow each other in memory and in the file become one run, so that an
//! importer meets a kernel as one item and not as thousands. This changes no order.

use std::collections::BTreeMap;

use thiserror::Error;

use super::importer::{
    Content, ImagePlatform, Importer, Item, PAGE, PageKind, PageRun, Parameter, ParameterArea, PlatformInfo,
    VcpuContext,
};
use crate::igvm::reader::{Entry, Igvm};
use crate::igvm::{FileBytes, FileData, Header, HeaderError, VpContext, header_name};

/// What a walk is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selection {
    /// One platform.
    One(ImagePlatform),
    /// All that the image names.
    All,
}

/// Why a walk ended early. `E` is the importer's error.
#[derive(Debug, Error)]
pub enum WalkError<E> {
    /// The image is for other platforms.
    #[error("the image is not for the platform {}, it is for {}", .wanted.name(), names(.has))]
    NoPlatform {
        /// The platform of the walk.
        wanted: ImagePlatform,
        /// The platforms of the image.
        has: Vec<ImagePlatform>,
    },
    /// The file has changed since it was checked.
    #[error("the image changed while it was read: {0}")]
    Changed(HeaderError),
    /// Something that no importer can do.
    #[error("{at}: {what}")]
    Unsupported {
        /// Where it stands.
        at: Place,
        /// What it is.
        what: &'static str,
    },
    /// The importer does not take the platform.
    #[error("platform {}: {source}", .platform.name())]
    Platform {
        /// Which one.
        platform: ImagePlatform,
        /// Why.
        source: E,
    },
    /// The importer does not take an item.
    #[error("{at}: {source}")]
    Item {
        /// Where it stands, or begins.
        at: Place,
        /// Why.
        source: E,
    },
}

/// Where an item comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A header of an image file.
    Header {
        /// Number of the header, from 0.
        index: u32,
        /// Where it begins in the file, bytes.
        offset: u64,
        /// Its type.
        header_type: u32,
    },
    /// An image that is in no file: what the item is.
    Composed(&'static str),
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Self::Header { index, offset, header_type } => {
                write!(f, "header {index} at file offset {offset:#x} ({})", header_name(header_type))
            }
            Self::Composed(name) => f.write_str(name),
        }
    }
}

impl Place {
    fn of(entry: &Entry<'_>) -> Self {
        Self::Header { index: entry.index, offset: entry.offset, header_type: entry.header_type }
    }
}

/// Names of platforms, as a person writes a list.
pub fn names(platforms: &[ImagePlatform]) -> String {
    let names: Vec<&str> = platforms.iter().map(|platform| platform.name()).collect();
    names.join(", ")
}

/// Hands the items of `image` that `selection` names to `importer`.
pub fn walk<'a, I: Importer<'a>>(
    image: &Igvm<'a>,
    selection: Selection,
    importer: &mut I,
) -> Result<(), WalkError<I::Error>> {
    let mask = begin(image.platforms(), selection, importer)?;
    let mut walk = Walk { file: image.file(), mask, importer, pending: None, areas: BTreeMap::new() };
    for entry in image.headers() {
        walk.entry(&entry.map_err(WalkError::Changed)?)?;
    }
    walk.flush()
}

/// Tells `importer` of the platforms among `all` that `selection` names. Returns their mask.
pub(super) fn begin<'a, I: Importer<'a>>(
    all: &[PlatformInfo],
    selection: Selection,
    importer: &mut I,
) -> Result<u32, WalkError<I::Error>> {
    let mut mask = 0;
    for info in all {
        if selection == Selection::All || selection == Selection::One(info.platform) {
            mask |= info.mask;
            importer
                .platform(info)
                .map_err(|source| WalkError::Platform { platform: info.platform, source })?;
        }
    }
    match selection {
        Selection::One(wanted) if mask == 0 => {
            Err(WalkError::NoPlatform { wanted, has: all.iter().map(|info| info.platform).collect() })
        }
        _ => Ok(mask),
    }
}

/// A walk under way.
struct Walk<'a, 'i, I> {
    file: FileBytes<'a>,
    /// The bits of the chosen platforms.
    mask: u32,
    importer: &'i mut I,
    /// Pages that the next header may extend.
    pending: Option<(Place, u32, PageRun<'a>)>,
    /// Parameter areas that are not inserted yet, by number, with an address of 0.
    areas: BTreeMap<u32, ParameterArea<'a>>,
}

impl<'a, I: Importer<'a>> Walk<'a, '_, I> {
    fn entry(&mut self, entry: &Entry<'a>) -> Result<(), WalkError<I::Error>> {
        let place = Place::of(entry);
        match &entry.header {
            Header::PageData { mask, gpa, length, kind, data } => {
                let pages = length.checked_div(PAGE as u64).unwrap_or(0);
                self.pages(place, *mask, PageRun { gpa: *gpa, pages, kind: *kind, content: content(data) })
            }
            Header::ParameterArea { area, length, initial } => {
                let pages = length.checked_div(PAGE as u64).unwrap_or(0);
                let initial = content(initial);
                self.areas.insert(*area, ParameterArea { gpa: 0, pages, initial, values: Vec::new() });
                Ok(())
            }
            Header::Parameter { kind, area, offset } => {
                if let Some(area) = self.areas.get_mut(area) {
                    area.values.push(Parameter { kind: *kind, offset: *offset });
                }
                Ok(())
            }
            Header::ParameterInsert { mask, gpa, area } => match self.areas.remove(area) {
                Some(area) => self.item(place, *mask, &Item::Parameters(ParameterArea { gpa: *gpa, ..area })),
                None => Ok(()),
            },
            Header::VpContext { mask, gpa, index, context } => {
                let index = *index;
                let context = match context {
                    VpContext::NativeX64(registers) => VcpuContext::NativeX64(registers.clone()),
                    VpContext::Vmsa(vmsa) => VcpuContext::SnpVmsa { gpa: *gpa, vmsa },
                    VpContext::Cca { x, pc, flags } => VcpuContext::Cca { x: *x, pc: *pc, flags: *flags },
                    VpContext::Vbs(_) => {
                        return self.unsupported(place, *mask, "registers for Hyper-V are not supported");
                    }
                };
                self.item(place, *mask, &Item::Vcpu { index, context })
            }
            Header::RequiredMemory { mask, gpa, length } => {
                self.item(place, *mask, &Item::RequiredMemory { gpa: *gpa, length: *length })
            }
            Header::SnpIdBlock { mask, block } => self.item(place, *mask, &Item::SnpIdBlock(block.clone())),
            Header::Relocation { mask } => {
                self.unsupported(place, *mask, "images that want to be relocated are not supported")
            }
            Header::ErrorRange { mask, .. } => {
                self.unsupported(place, *mask, "ranges for error reports are not supported")
            }
            // What was said of platforms is in the image's list, and the rest is for verifiers and people.
            Header::Platform { .. }
            | Header::GuestPolicy { .. }
            | Header::CcaPolicy { .. }
            | Header::CorimDocument { .. }
            | Header::CorimSignature { .. }
            | Header::VersionString(_)
            | Header::VbsMeasurement { .. }
            | Header::Skipped => Ok(()),
        }
    }

    fn unsupported(&self, at: Place, mask: u32, what: &'static str) -> Result<(), WalkError<I::Error>> {
        if mask & self.mask == 0 { Ok(()) } else { Err(WalkError::Unsupported { at, what }) }
    }

    fn item(&mut self, at: Place, mask: u32, item: &Item<'a>) -> Result<(), WalkError<I::Error>> {
        let mask = mask & self.mask;
        if mask == 0 {
            return Ok(());
        }
        self.flush()?;
        self.importer.import(mask, item).map_err(|source| WalkError::Item { at, source })
    }

    fn pages(&mut self, at: Place, mask: u32, next: PageRun<'a>) -> Result<(), WalkError<I::Error>> {
        let mask = mask & self.mask;
        if mask == 0 {
            return Ok(());
        }
        if let Some((_, pending_mask, run)) = &mut self.pending
            && *pending_mask == mask
            && let Some(joined) = join(self.file, run, &next)
        {
            *run = joined;
            return Ok(());
        }
        self.flush()?;
        self.pending = Some((at, mask, next));
        Ok(())
    }

    fn flush(&mut self) -> Result<(), WalkError<I::Error>> {
        let Some((at, mask, run)) = self.pending.take() else { return Ok(()) };
        self.importer.import(mask, &Item::Pages(run)).map_err(|source| WalkError::Item { at, source })
    }
}

fn content<'a>(data: &FileData<'a>) -> Content<'a> {
    Content { bytes: data.bytes, file_offset: data.offset }
}

/// `first` and `second` as one run, if they are neighbours in memory and in `file`.
fn join<'a>(file: FileBytes<'a>, first: &PageRun<'a>, second: &PageRun<'a>) -> Option<PageRun<'a>> {
    let fills_cpuid = |kind| matches!(kind, PageKind::SnpCpuid | PageKind::SnpCpuidXf | PageKind::SnpSecrets);
    if first.kind != second.kind
        || fills_cpuid(first.kind)
        || first.gpa.checked_add(first.length()) != Some(second.gpa)
    {
        return None;
    }
    let pages = first.pages.checked_add(second.pages)?;
    let content = match (first.content.file_offset, second.content.file_offset) {
        // Zeroes may follow anything.
        (_, None) => first.content,
        (Some(start), Some(offset)) => {
            let end = start.checked_add(first.content.bytes.len() as u64)?;
            if first.content.bytes.len() as u64 != first.length() || end != offset {
                return None;
            }
            let start = usize::try_from(start).ok()?;
            let length = first.content.bytes.len().checked_add(second.content.bytes.len())?;
            let bytes = file.get(start..start.checked_add(length)?)?;
            Content { bytes, file_offset: first.content.file_offset }
        }
        (None, Some(_)) => return None,
    };
    Some(PageRun { gpa: first.gpa, pages, kind: first.kind, content })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::importer::{NativeContext, ParameterKind};
    use crate::image::testing::{Recorder, file, flat, pages, parameters, platform, record};

    const ALL: [(ImagePlatform, u32); 3] =
        [(ImagePlatform::Plain, 1), (ImagePlatform::Snp, 2), (ImagePlatform::Tdx, 4)];

    fn image(items: &[(u32, Item<'_>)]) -> Vec<u8> {
        file(&ALL.map(|(kind, mask)| platform(kind, mask)), items)
    }

    #[test]
    fn neighbours_become_one_run_and_nothing_is_sorted() {
        let kernel = vec![1; 5 * PAGE + 10];
        let initrd = vec![2; 3 * PAGE];
        let items = [
            (7, pages(PageKind::Shared, 0xc000_0000, 6, &kernel)),
            // Neighbours in memory and in the file.
            (7, pages(PageKind::Shared, 0xc000_6000, 3, &initrd)),
            // Of another kind, for other platforms, at a lower address.
            (7, pages(PageKind::Measured, 0xc000_9000, 1, &initrd[..PAGE])),
            (2, pages(PageKind::Measured, 0xc000_a000, 1, &initrd[..PAGE])),
            (2, pages(PageKind::Measured, 0x1000, 1, &initrd[..PAGE])),
            // Zeroes may follow content, but content does not follow zeroes.
            (2, pages(PageKind::Measured, 0x2000, 3, &initrd[..PAGE])),
            (2, pages(PageKind::Measured, 0x5000, 1, &initrd[..PAGE])),
            // Pages that the platform fills stay alone.
            (2, pages(PageKind::SnpCpuid, 0x6000, 1, &[])),
            (2, pages(PageKind::SnpCpuid, 0x7000, 1, &[])),
        ];
        let file = image(&items);
        let all = record(&file, Selection::All).unwrap();
        assert_eq!(flat(&all.items), flat(&items));
        let runs = |recorder: &Recorder<'_>| -> Vec<(u32, u64, u64)> {
            let run = |(mask, item): &(u32, Item<'_>)| match item {
                Item::Pages(run) => (*mask, run.gpa, run.pages),
                other => panic!("{other:?}"),
            };
            recorder.items.iter().map(run).collect()
        };
        assert_eq!(
            runs(&all),
            [
                (7, 0xc000_0000, 9),
                (7, 0xc000_9000, 1),
                (2, 0xc000_a000, 1),
                (2, 0x1000, 4),
                (2, 0x5000, 1),
                (2, 0x6000, 1),
                (2, 0x7000, 1)
            ]
        );
        // For one platform masks make no difference.
        let snp = record(&file, Selection::One(ImagePlatform::Snp)).unwrap();
        assert_eq!(runs(&snp)[1], (2, 0xc000_9000, 2));
        let tdx = record(&file, Selection::One(ImagePlatform::Tdx)).unwrap();
        assert_eq!(runs(&tdx), [(4, 0xc000_0000, 9), (4, 0xc000_9000, 1)]);
        assert_eq!(tdx.platforms, [platform(ImagePlatform::Tdx, 4)]);
        // The content lies in the file, aligned.
        let Item::Pages(run) = &tdx.items[0].1 else { panic!() };
        assert_eq!(run.content.file_offset.unwrap() % PAGE as u64, 0);
        assert!(file.as_ptr_range().contains(&run.content.bytes.as_ptr()));
    }

    #[test]
    fn neighbours_in_memory_that_are_apart_in_the_file_stay_apart() {
        let (first, second) = (vec![1; PAGE], vec![2; PAGE]);
        let file = image(&[
            (1, pages(PageKind::Measured, 0x1000, 1, &first)),
            (2, pages(PageKind::Measured, 0x1000, 1, &first)),
            (1, pages(PageKind::Measured, 0x2000, 1, &second)),
        ]);
        let plain = record(&file, Selection::One(ImagePlatform::Plain)).unwrap();
        assert_eq!(plain.items.len(), 2);
    }

    #[test]
    fn parameters_come_where_they_are_inserted() {
        let values = vec![
            Parameter { kind: ParameterKind::VcpuCount, offset: 16 },
            Parameter { kind: ParameterKind::MemoryMap, offset: 512 },
        ];
        let area = parameters(0x1f000, 2, &[1, 2, 3], values);
        let context = Box::new(NativeContext { rip: 0x10000, ..NativeContext::default() });
        let items = [
            (2, pages(PageKind::SnpSecrets, 0x1000, 1, &[])),
            (3, area),
            (1, Item::Vcpu { index: 0, context: VcpuContext::NativeX64(context) }),
            (3, Item::RequiredMemory { gpa: 0x10000, length: 0x1000 }),
        ];
        let file = image(&items);
        assert_eq!(flat(&record(&file, Selection::All).unwrap().items), flat(&items));
        assert!(record(&file, Selection::One(ImagePlatform::Tdx)).unwrap().items.is_empty());
    }

    #[test]
    fn a_platform_that_is_missing_is_named_with_those_that_are_there() {
        let error = record(&image(&[]), Selection::One(ImagePlatform::Cca)).unwrap_err();
        assert_eq!(error.to_string(), "the image is not for the platform cca, it is for plain, snp, tdx");
    }

    #[test]
    fn a_refusal_says_where_the_item_begins() {
        let page = vec![1; PAGE];
        let file = image(&[
            (1, pages(PageKind::Measured, 0x1000, 1, &page)),
            (1, pages(PageKind::Shared, 0x2000, 2, &page)),
        ]);
        let image = Igvm::new(&file).unwrap();
        let mut recorder = Recorder { refuse: Some(1), ..Recorder::default() };
        let error = walk(&image, Selection::One(ImagePlatform::Plain), &mut recorder).unwrap_err();
        // Three platforms of 24 bytes, a page of 32, after a fixed header of 32.
        assert_eq!(error.to_string(), "header 4 at file offset 0x88 (PAGE_DATA): refused");
    }
}
