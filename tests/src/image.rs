//! Image files, good ones and others.

use std::borrow::Cow;
use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use cofferdam_confidential::igvm::writer::{WriteError, Writer};
use cofferdam_confidential::image::compose::{Blob, Options, Source, compose};
use cofferdam_confidential::image::importer::{Content, Importer, Item, PageKind, PageRun, PlatformInfo};
use cofferdam_confidential::image::walk::Selection;
use cofferdam_firmware::boot::HEAD;
use cofferdam_firmware::layout::PARAMETER_PAGE;

/// An image to be.
pub struct Image<'a> {
    /// The kernel file.
    pub kernel: Cow<'a, [u8]>,
    /// The initrd; empty for none.
    pub initrd: &'a [u8],
    /// The kernel command line.
    pub command_line: &'a str,
    /// What it allows, and for whom it is.
    pub options: Options,
    /// What a lying host puts into the parameter page in place of the truth.
    pub parameters: Option<Vec<u8>>,
}

impl<'a> Image<'a> {
    /// That of a kernel, as `cofferdam image build` makes it.
    pub fn of(kernel: impl Into<Cow<'a, [u8]>>) -> Self {
        let options = Options::default();
        Self { kernel: kernel.into(), initrd: &[], command_line: "", options, parameters: None }
    }

    /// Writes the file.
    pub fn write(&self, path: &Path) {
        let source = Source {
            kernel: Blob::of(&self.kernel),
            kernel_head: &self.kernel[..self.kernel.len().min(HEAD)],
            initrd: (!self.initrd.is_empty()).then(|| Blob::of(self.initrd)),
            command_line: self.command_line,
        };
        let composition = compose(&source, &self.options).expect("the image can be composed");
        let mut host = Host { writer: Writer::default(), parameters: self.parameters.as_deref() };
        composition.walk(Selection::All, &mut host).expect("every item can be written");
        let file = File::create(path).expect("the image file can be created");
        host.writer.write(BufWriter::new(file)).expect("the image file can be written");
    }
}

/// Writes an image file, and lies in the parameter page if it is told to.
struct Host<'a> {
    writer: Writer<'a>,
    parameters: Option<&'a [u8]>,
}

impl<'a> Importer<'a> for Host<'a> {
    type Error = WriteError;

    fn platform(&mut self, platform: &PlatformInfo) -> Result<(), WriteError> {
        self.writer.platform(platform)
    }

    fn import(&mut self, mask: u32, item: &Item<'a>) -> Result<(), WriteError> {
        match (item, self.parameters) {
            (Item::Parameters(area), Some(bytes)) if area.gpa == PARAMETER_PAGE => {
                let content = Content { bytes, file_offset: None };
                let run = PageRun { gpa: area.gpa, pages: 1, kind: PageKind::Unmeasured, content };
                self.writer.import(mask, &Item::Pages(run))
            }
            _ => self.writer.import(mask, item),
        }
    }
}

/// A bzImage of one small program: its exit code is the first byte of the initrd, which it finds by `boot_params`.
pub fn bz_image() -> Vec<u8> {
    program(0x218, 0) // ramdisk_image
}

/// The same, whose exit code is a byte of the kernel's command line.
pub fn bz_image_of_command_line(byte: u8) -> Vec<u8> {
    program(0x228, byte) // cmd_line_ptr
}

/// A bzImage whose exit code is the byte that lies so far behind the address in the field of `boot_params`.
fn program(field: u16, byte: u8) -> Vec<u8> {
    let [low, high] = field.to_le_bytes();
    let code = [
        0x8b, 0x86, low, high, 0x00, 0x00, // mov eax, [rsi + field]
        0x8a, 0x40, byte, // mov al, [rax + byte]
        0x66, 0xba, 0x20, 0x06, // mov dx, EXIT_CODE_PORT
        0xee, // out dx, al
        0x66, 0xba, 0x00, 0x06, // mov dx, SLEEP_CONTROL_PORT
        0xb0, 0x34, // mov al, soft off
        0xee, // out dx, al
        0xf4, // hlt
        0xeb, 0xfd, // jmp to it
    ];
    let mut file = vec![0; 0x400];
    file.resize(0x400 + 0x200, 0x90);
    file.extend(code);
    file.resize(0x800, 0);
    let fields: [(usize, &[u8]); 11] = [
        (0x1f1, &[1]),                           // setup_sects
        (0x1fe, &[0x55, 0xaa]),                  // boot_flag
        (0x200, &[0xeb, 0x6a]),                  // jump
        (0x202, b"HdrS"),                        // header
        (0x206, &[0x0f, 0x02]),                  // version
        (0x211, &[1]),                           // loadflags
        (0x22c, &0x7fff_ffff_u32.to_le_bytes()), // initrd_addr_max
        (0x230, &0x20_0000_u32.to_le_bytes()),   // kernel_alignment
        (0x236, &[1]),                           // xloadflags
        (0x238, &2047_u32.to_le_bytes()),        // cmdline_size
        (0x258, &0x100_0000_u64.to_le_bytes()),  // pref_address
    ];
    for (offset, bytes) in fields {
        file[offset..][..bytes.len()].copy_from_slice(bytes);
    }
    file
}
