//! Images that others made, with their tools: firmware that begins at the reset vector, in 32-bit mode and in 64-bit
//! mode, below the end of the first 4 GiB.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests fail by panicking

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use cofferdam_api::status::ExitReason;
use cofferdam_tests::{Finished, Run};
use igvm::{Arch, IgvmDirectiveHeader, IgvmFile, IgvmPlatformHeader, IgvmRevision};
use igvm_defs as defs;
use zerocopy::FromZeros;

const PAGE: usize = 4096;
/// The last page below 4 GiB, which has the reset vector at its end.
const FIRMWARE: u64 = 0xFFFF_F000;
/// Where the number of vCPUs goes.
const COUNT: u64 = 0x3000;

/// Writes to a port many times, so that the monitor has time to take away what it must not; then the exit code is the
/// byte at [`COUNT`], and the power goes off. For 32-bit and 64-bit mode.
const CODE: [u8; 34] = [
    0xba, 0x21, 0x06, 0, 0, // mov edx, USER_SPACE_PORT
    0xb9, 0x20, 0x4e, 0, 0,    // mov ecx, 20000
    0xee, // 1: out dx, al
    0xe2, 0xfd, // loop 1b
    0xbb, 0, 0x30, 0, 0, // mov ebx, COUNT
    0x8a, 0x03, // mov al, [ebx]
    0xb2, 0x20, // mov dl, low byte of EXIT_CODE_PORT
    0xee, // out dx, al
    0xba, 0x00, 0x06, 0, 0, // mov edx, SLEEP_CONTROL_PORT
    0xb0, 0x34, // mov al, soft off
    0xee, // out dx, al
    0xf4, // hlt
    0xeb, 0xfd, // jmp to it
];

/// The same for real mode, where words have 16 bits.
const REAL_CODE: [u8; 28] = [
    0xba, 0x21, 0x06, 0xb9, 0x20, 0x4e, 0xee, 0xe2, 0xfd, 0xbb, 0x00, 0x30, 0x8a, 0x07, 0xb2, 0x20, 0xee,
    0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4, 0xeb, 0xfd, 0x90, 0x90,
];
/// At the reset vector: a jump to the start of the page.
const JUMP: [u8; 3] = [0xe9, 0x0d, 0xf0];

/// How firmware ends that cannot go on: a KVM that interprets it may not get as far as a triple fault.
const FAILURES: [ExitReason; 2] = [ExitReason::VcpuError, ExitReason::TripleFault];

fn page(gpa: u64, data: Vec<u8>) -> IgvmDirectiveHeader {
    IgvmDirectiveHeader::PageData {
        gpa,
        compatibility_mask: 1,
        flags: defs::IgvmPageDataFlags::new(),
        data_type: defs::IgvmPageDataType::NORMAL,
        data,
    }
}

fn firmware(code: &[u8]) -> IgvmDirectiveHeader {
    let mut bytes = code.to_vec();
    bytes.resize(0xFF0, 0xcc);
    bytes.extend(JUMP);
    bytes.resize(PAGE, 0xcc);
    page(FIRMWARE, bytes)
}

/// A page of 64-bit words, zero but for these.
fn words(gpa: u64, words: &[(usize, u64)]) -> IgvmDirectiveHeader {
    let mut bytes = vec![0; PAGE];
    for (index, word) in words {
        bytes[8 * index..][..8].copy_from_slice(&word.to_le_bytes());
    }
    page(gpa, bytes)
}

fn context(change: impl FnOnce(&mut defs::IgvmNativeVpContextX64)) -> IgvmDirectiveHeader {
    let mut context = defs::IgvmNativeVpContextX64::new_zeroed();
    context.rip = FIRMWARE;
    context.rflags = 2;
    context.cr0 = 0x31; // protected mode
    (context.code_selector, context.code_attributes, context.code_limit) = (0x08, 0xc09b, u32::MAX);
    (context.data_selector, context.data_attributes, context.data_limit) = (0x10, 0xc093, u32::MAX);
    change(&mut context);
    IgvmDirectiveHeader::X64NativeVpContext { compatibility_mask: 1, vp_index: 0, context: Box::new(context) }
}

/// A file with these directives, and a parameter area at [`COUNT`] with `parameter` at its start.
fn write(
    folder: &Path,
    parameter: fn(defs::IGVM_VHS_PARAMETER) -> IgvmDirectiveHeader,
    directives: Vec<IgvmDirectiveHeader>,
) -> PathBuf {
    let platform = IgvmPlatformHeader::SupportedPlatform(defs::IGVM_VHS_SUPPORTED_PLATFORM {
        compatibility_mask: 1,
        highest_vtl: 0,
        platform_type: defs::IgvmPlatformType::NATIVE,
        platform_version: defs::IGVM_NATIVE_PLATFORM_VERSION,
        shared_gpa_boundary: 0,
    });
    let mut all = vec![
        IgvmDirectiveHeader::ParameterArea {
            number_of_bytes: PAGE as u64,
            parameter_area_index: 0,
            initial_data: Vec::new(),
        },
        parameter(defs::IGVM_VHS_PARAMETER { parameter_area_index: 0, byte_offset: 0 }),
        IgvmDirectiveHeader::ParameterInsert(defs::IGVM_VHS_PARAMETER_INSERT {
            gpa: COUNT,
            compatibility_mask: 1,
            parameter_area_index: 0,
        }),
    ];
    all.extend(directives);
    let revision = IgvmRevision::V2 { arch: Arch::X64, page_size: PAGE as u32 };
    let file = IgvmFile::new(revision, vec![platform], Vec::new(), all).unwrap();
    let mut bytes = Vec::new();
    file.serialize(&mut bytes).unwrap();
    let path = folder.join("foreign.igvm");
    fs::write(&path, bytes).unwrap();
    path
}

/// Runs an image that asks for the number of its vCPUs, with two.
fn run(directives: Vec<IgvmDirectiveHeader>) -> Finished {
    let folder = tempfile::tempdir().unwrap();
    let image = write(folder.path(), IgvmDirectiveHeader::VpCount, directives);
    let done = Run::image(image).with("cpus", "2").with("memory", "32M").finish();
    assert_eq!(done.code(), 2, "{done}");
    assert_eq!(done.outcome().exit_reason, ExitReason::PowerOff, "{done}");
    done
}

#[test]
fn firmware_begins_at_the_reset_vector() {
    let identity = run(vec![firmware(&REAL_CODE)]).outcome().identity;
    assert!(identity.predicted_digests.is_empty(), "it is for plain domains only");
    assert!(identity.image_hash.is_some() && identity.manifest_hash.is_none());
}

#[test]
fn firmware_begins_in_32_bit_mode() {
    run(vec![firmware(&CODE), context(|_| {})]);
}

#[test]
fn firmware_begins_in_64_bit_mode_with_page_tables_of_its_own() {
    run(vec![
        words(0x1000, &[(0, 0x2003)]),
        words(0x2000, &[(0, 0x4003), (3, 0x5003)]),
        words(0x4000, &[(0, 0x83)]),
        words(0x5000, &[(511, 0xFFE0_0083)]),
        firmware(&CODE),
        context(|context| {
            context.code_attributes = 0xa09b;
            (context.cr0, context.cr3, context.cr4, context.efer) = (0x8000_0031, 0x1000, 0x20, 0x500);
        }),
    ]);
}

#[test]
fn what_firmware_wants_and_does_not_get_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let image = write(folder.path(), IgvmDirectiveHeader::Madt, vec![firmware(&REAL_CODE)]);
    let done = Run::image(image).with("memory", "32M").finish();
    assert_eq!(done.outcome().exit_reason, ExitReason::Config, "{done}");
    assert!(done.outcome().message.contains("the parameter madt is not offered by this monitor"), "{done}");
    assert!(done.outcome().message.contains("header 3"), "{done}");
}

#[test]
fn firmware_that_fails_for_a_device_that_there_is_not_says_so() {
    let folder = tempfile::tempdir().unwrap();
    // out 0x70, al; in al, 0x71; int3, for which there is no handler
    let code = [0xe6, 0x70, 0xe4, 0x71, 0xcc];
    let directives = vec![firmware(&code), context(|_| {})];
    let image = write(folder.path(), IgvmDirectiveHeader::VpCount, directives);
    let outcome = Run::image(image).with("memory", "32M").finish().outcome();
    assert!(FAILURES.contains(&outcome.exit_reason), "{outcome:?}");
    let words = "; before that it looked for devices that there are not, at the ports 0x70, 0x71";
    assert!(outcome.message.ends_with(words), "{outcome:?}");
}

/// Debian's OVMF, made an image by other people's tool, for several platforms and in several modes.
#[test]
#[ignore = "fetches a Debian package and builds a tool; part of `make test-all`"]
fn debians_firmware_is_loaded_and_says_what_it_lacks() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    tool(folder, "apt-get", "-qq download ovmf");
    let package = fs::read_dir(folder).unwrap().next().unwrap().unwrap().file_name();
    tool(folder, "dpkg-deb", &format!("-x {} .", package.to_str().unwrap()));
    tool(folder, "cargo", "install --quiet --locked --root . virtfw-igvm-tools@0.2.6 --bin igvm-wrap");
    let image = |options: &str| {
        tool(folder, "bin/igvm-wrap", &format!("-i usr/share/ovmf/OVMF.fd -o ovmf.igvm {options}"));
        Run::image(folder.join("ovmf.igvm")).with("memory", "128M").finish().outcome()
    };
    for options in ["--real16", "--flat32", "--real16 --snp", "--flat32 --snp", "--real16 --no-params"] {
        let outcome = image(options);
        assert!(FAILURES.contains(&outcome.exit_reason), "{options}: {outcome:?}");
        assert!(outcome.message.contains("looked for devices that there are not"), "{options}: {outcome:?}");
        assert_eq!(outcome.identity.predicted_digests.contains_key("snp"), options.ends_with("--snp"));
    }
    let outcome = image("--snp --no-native");
    assert!(
        outcome.message.ends_with("the image is not for the platform plain, it is for snp"),
        "{outcome:?}"
    );
}

/// Runs a program to its end.
fn tool(folder: &Path, program: &str, arguments: &str) {
    let output = Command::new(program).args(arguments.split(' ')).current_dir(folder).output().unwrap();
    assert!(output.status.success(), "{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}
