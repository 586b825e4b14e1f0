//! What is wrong with a file.

use thiserror::Error;

use super::header_name;
use crate::image::importer::ImagePlatform;

/// Why a file cannot be read.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ReadError {
    /// The fixed header is cut off.
    #[error("{length} bytes are too few for an IGVM file")]
    Short {
        /// Length of the file, bytes.
        length: usize,
    },
    /// Another kind of file.
    #[error("not an IGVM file: its magic number at offset 0 is {0:#010x}, not 0x4d564749")]
    Magic(u32),
    /// A version of the format that is not known.
    #[error("IGVM format version {0} at file offset 4 is not known (1 and 2 are)")]
    Version(u32),
    /// An architecture that is not known.
    #[error("architecture {0} at file offset 24 is not known (0, x86-64, and 1, AArch64, are)")]
    Architecture(u32),
    /// A page size that is not supported.
    #[error("page size {0} at file offset 28 is not supported (4096 is)")]
    PageSize(u32),
    /// The file is cut off, or something was appended.
    #[error("the header says {header} bytes (at file offset 16), the file has {file}")]
    FileSize {
        /// Length in the fixed header, bytes.
        header: u32,
        /// Length of the file, bytes.
        file: usize,
    },
    /// The variable headers are not where they could be.
    #[error(
        "variable headers of {size} bytes at file offset {offset} (fields at 8 and 12) do not lie \
         at a multiple of 8 between the fixed header and the end of the file"
    )]
    Section {
        /// Offset of the variable headers, bytes.
        offset: u32,
        /// Their size, bytes.
        size: u32,
    },
    /// The headers are not those that were written.
    #[error("the checksum of the headers is {computed:#010x}, the file says {header:#010x} (at offset 20)")]
    Checksum {
        /// Checksum in the fixed header.
        header: u32,
        /// Checksum of the headers.
        computed: u32,
    },
    /// No platform header.
    #[error("the file names no platform")]
    NoPlatform,
    /// Something is wrong with a variable header.
    #[error(transparent)]
    Header(#[from] HeaderError),
}

/// What is wrong with a variable header, and which one it is.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("header {index} at file offset {offset:#x} ({}): {problem}", header_name(*header_type))]
pub struct HeaderError {
    /// Number of the header in the file, from 0, platforms and initialization included.
    pub index: u32,
    /// Where it begins in the file, bytes.
    pub offset: u64,
    /// Its type, without the optional bit.
    pub header_type: u32,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What can be wrong with a variable header.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Problem {
    /// It reaches beyond the variable headers.
    #[error("it does not fit in the {left} bytes that are left of the variable headers")]
    Truncated {
        /// Bytes left, type and length included.
        left: usize,
    },
    /// The padding is not zero.
    #[error("its padding is not zero")]
    Padding,
    /// A type that is not known and not optional.
    #[error("type {0:#x} is not known and not optional")]
    UnknownType(u32),
    /// A header of an earlier section after one of a later section.
    #[error("it stands after headers of a later section")]
    Order,
    /// The content has another length than its type has.
    #[error("its content has {length} bytes, not {expected}")]
    Length {
        /// Length of the content, bytes.
        length: usize,
        /// Length of the type's structure, bytes.
        expected: usize,
    },
    /// A reserved field or bit is not zero.
    #[error("{0} is reserved, and not zero")]
    Reserved(&'static str),
    /// A value that the field does not have.
    #[error("{field} {value:#x} is not known")]
    Value {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// An address or size that is not a multiple of its unit.
    #[error("{field} {value:#x} is not a multiple of {unit:#x}")]
    Unaligned {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it must be a multiple of, bytes.
        unit: u64,
    },
    /// A size of zero.
    #[error("{0} is 0")]
    Empty(&'static str),
    /// A range that goes beyond the last address.
    #[error("{length:#x} bytes at {gpa:#x} reach beyond the end of the address space")]
    Wraps {
        /// Guest-physical address.
        gpa: u64,
        /// Length, bytes.
        length: u64,
    },
    /// Content outside the file data.
    #[error("its {length:#x} bytes of data at file offset {offset:#x} are not inside the file data")]
    Data {
        /// File offset of the data.
        offset: u32,
        /// Its length, bytes.
        length: u64,
    },
    /// Content that must be there is not.
    #[error("it has no data")]
    NoData,
    /// Text that is not UTF-8.
    #[error("its text is not UTF-8")]
    Text,
    /// A mask that must have one bit has more or none.
    #[error("the compatibility mask {0:#x} does not have exactly one bit")]
    Mask(u32),
    /// Something that belongs to one platform names none or several.
    #[error("the compatibility mask {0:#x} does not name exactly one platform of the file")]
    NotOnePlatform(u32),
    /// Two platforms have the same bit.
    #[error("the compatibility mask {0:#x} is another platform's already")]
    MaskTaken(u32),
    /// A platform of the other architecture.
    #[error("the platform {} does not exist on this architecture", .0.name())]
    PlatformArchitecture(ImagePlatform),
    /// Something that a platform may have once is there twice.
    #[error("the platform {} has one already", .0.name())]
    Twice(ImagePlatform),
    /// Something that a file may have once is there twice.
    #[error("the file has one already")]
    TwiceInFile,
    /// A platform that cannot have this.
    #[error("the platform {} has no such thing", .0.name())]
    NotOnPlatform(ImagePlatform),
    /// A boundary of shared memory on a platform that has none.
    #[error("the platform {} has no boundary of shared memory", .0.name())]
    SharedBoundary(ImagePlatform),
    /// A vCPU whose context is there already.
    #[error("vCPU {index} of the platform {} has a context already", .platform.name())]
    VpTwice {
        /// Index of the vCPU.
        index: u16,
        /// The platform.
        platform: ImagePlatform,
    },
    /// A parameter area that is declared twice.
    #[error("parameter area {0} is declared already")]
    AreaTwice(u32),
    /// A parameter area that is not declared, or not any more.
    #[error("parameter area {0} is not declared, or inserted already")]
    NoArea(u32),
    /// A parameter outside its area.
    #[error("byte {offset:#x} is outside parameter area {area} of {length:#x} bytes")]
    OutsideArea {
        /// Number of the area.
        area: u32,
        /// Offset in it, bytes.
        offset: u32,
        /// Its length, bytes.
        length: u64,
    },
    /// Pages that are there already.
    #[error("{length:#x} bytes at {gpa:#x} overlap other pages of the platform {}", .platform.name())]
    Overlap {
        /// Guest-physical address.
        gpa: u64,
        /// Length, bytes.
        length: u64,
        /// The platform.
        platform: ImagePlatform,
    },
    /// Far more memory than the file has bytes.
    #[error("with it the file fills more than {limit:#x} bytes of memory, the most for a file of its size")]
    TooMuch {
        /// The limit, bytes.
        limit: u64,
    },
    /// A CoRIM signature without a document.
    #[error("it stands before its CoRIM document")]
    NoCorim,
    /// A register of a Hyper-V context is not as it must be.
    #[error("register {0} of the context has another VTL than the first, or padding that is not zero")]
    VbsRegister(u32),
}
