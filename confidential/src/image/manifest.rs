//! The launch manifest of an image, by which one of ours is known.

use std::convert::Infallible;

use cofferdam_firmware::layout::LAUNCH_MANIFEST;
use cofferdam_firmware::manifest::{MAGIC, Manifest, ManifestError};

use super::importer::{Importer, Item, PAGE, PageKind, PlatformInfo};

/// An importer that keeps nothing but the launch manifest.
#[derive(Clone, Debug, Default)]
pub struct ManifestFinder {
    page: Option<Box<[u8; PAGE]>>,
}

impl ManifestFinder {
    /// Before the walk.
    pub fn new() -> Self {
        Self::default()
    }

    /// The manifest; none in an image that was not made by [`super::compose`].
    ///
    /// # Errors
    /// If it is not what the first stage accepts.
    pub fn manifest(&self) -> Result<Option<Manifest>, ManifestError> {
        self.page.as_deref().map(Manifest::decode).transpose()
    }
}

impl<'a> Importer<'a> for ManifestFinder {
    type Error = Infallible;

    fn platform(&mut self, _platform: &PlatformInfo) -> Result<(), Infallible> {
        Ok(())
    }

    fn import(&mut self, _mask: u32, item: &Item<'a>) -> Result<(), Infallible> {
        let Item::Pages(run) = item else { return Ok(()) };
        if run.kind != PageKind::Measured {
            return Ok(());
        }
        let mut buffer = [0; PAGE];
        if let Some((_, content)) = run.each_page().find(|(gpa, _)| *gpa == LAUNCH_MANIFEST) {
            let page = content.bytes(&mut buffer);
            if page.starts_with(&MAGIC) {
                self.page = Some(Box::new(*page));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use cofferdam_firmware::layout::LOAD_WINDOW;
    use cofferdam_firmware::manifest::{Item as Part, Kernel, KernelFormat};

    use super::*;
    use crate::image::importer::{Content, PageRun};

    fn manifest() -> Manifest {
        Manifest {
            kernel: Kernel {
                file: Part { address: LOAD_WINDOW, size: 0x1000, sha256: [1; 32] },
                format: KernelFormat::BzImage,
                address: 0x100_0000,
            },
            initrd: Part::default(),
            command_line: Part::default(),
            max_vcpus: 4,
            min_memory: 128 << 20,
            max_memory: 1 << 30,
            host_data: true,
            accept_all: false,
        }
    }

    fn find(kind: PageKind, gpa: u64, bytes: &[u8]) -> Result<Option<Manifest>, ManifestError> {
        let mut finder = ManifestFinder::new();
        let run = PageRun { gpa, pages: 3, kind, content: Content { bytes, file_offset: None } };
        let Ok(()) = finder.import(1, &Item::Pages(run));
        finder.manifest()
    }

    #[test]
    fn a_measured_page_with_the_magic_at_its_address() {
        let page = manifest().encode();
        let second = [[0xee; PAGE], page].concat();
        assert_eq!(find(PageKind::Measured, LAUNCH_MANIFEST, &page), Ok(Some(manifest())));
        assert_eq!(find(PageKind::Measured, LAUNCH_MANIFEST - 0x1000, &second), Ok(Some(manifest())));
        assert_eq!(find(PageKind::Measured, LAUNCH_MANIFEST - 0x1000, &page), Ok(None));
        assert_eq!(find(PageKind::Measured, LAUNCH_MANIFEST, &second), Ok(None));
        assert_eq!(find(PageKind::Unmeasured, LAUNCH_MANIFEST, &page), Ok(None));
        let mut odd = page;
        odd[PAGE - 1] = 1;
        assert_eq!(find(PageKind::Measured, LAUNCH_MANIFEST, &odd), Err(ManifestError::Reserved));
    }
}
