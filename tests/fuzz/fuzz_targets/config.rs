//! The configuration of a domain as a client writes it: [`DomainConfig::from_json`] and [`DomainConfig::validate`].
//!
//! Holds: what is read can be written and read again without a change; what is found good is within the limits that
//! the rest of the monitor relies on; what is refused is refused in words.
#![no_main]

use std::fmt::Write;

use arbitrary::Arbitrary;
use cofferdam_api::config::{DomainConfig, MAX_CONFIG_SIZE};
use cofferdam_api::validate::{GUEST_CID, MAX_COMMAND_LINE, MAX_DEVICES, MEM_SIZE_MIB, VCPU_COUNT};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Input<'a> {
    Raw(&'a [u8]),
    /// A good configuration with something else in some places.
    Built(Vec<(Field, Value<'a>)>),
}

/// Names of the schema, and one that is not.
const NAMES: [&str; 36] = [
    "machine-config",
    "boot-source",
    "drives",
    "vsock",
    "serial",
    "confidential",
    "stop_timeout_ms",
    "vcpu_count",
    "mem_size_mib",
    "kernel_image_path",
    "initrd_path",
    "boot_args",
    "boot_protocol",
    "drive_id",
    "path_on_host",
    "is_root_device",
    "is_read_only",
    "cache_type",
    "io_engine",
    "block_size",
    "rate_limiter",
    "bandwidth",
    "ops",
    "size",
    "one_time_burst",
    "refill_time",
    "guest_cid",
    "uds_path",
    "mode",
    "serial_out_path",
    "platform",
    "huge_pages",
    "smt",
    "balloon",
    "logger",
    "",
];

/// Texts that some field takes.
const TEXTS: [&str; 14] = [
    "auto",
    "pvh",
    "linux64",
    "Unsafe",
    "Writeback",
    "Auto",
    "Sync",
    "Async",
    "Stdio",
    "File",
    "None",
    "plain",
    "a -- b",
    "\\u0000",
];

/// Which object of the document a field is put into.
#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
enum Section {
    Top,
    Machine,
    Boot,
    Drive(u8),
    Bandwidth,
    Vsock,
    Serial,
    Confidential,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Field {
    section: Section,
    name: u8,
}

#[derive(Arbitrary, Debug)]
enum Value<'a> {
    Null,
    Bool(bool),
    Number(i64),
    Unsigned(u64),
    Float(f64),
    Known(u8),
    Text(&'a str),
    Long(u16),
    Nested(u8),
    Object,
}

impl Value<'_> {
    fn write(&self, json: &mut String) {
        let _ = match self {
            Self::Null => write!(json, "null"),
            Self::Bool(value) => write!(json, "{value}"),
            Self::Number(value) => write!(json, "{value}"),
            Self::Unsigned(value) => write!(json, "{value}"),
            Self::Float(value) => write!(json, "{value:e}"),
            Self::Known(index) => write!(json, "\"{}\"", TEXTS[usize::from(*index) % TEXTS.len()]),
            Self::Text(text) => write!(json, "{}", serde_json::to_string(text).unwrap()),
            Self::Long(length) => write!(json, "\"{}\"", "x".repeat(usize::from(length % 4096))),
            Self::Nested(depth) => write!(json, "{}", "[".repeat(usize::from(*depth))),
            Self::Object => write!(json, "{{}}"),
        };
    }
}

/// The fields of one section, after those that it needs.
fn section(json: &mut String, name: Section, needed: &str, fields: &[(Field, Value)]) {
    json.push('{');
    json.push_str(needed);
    let mut first = needed.is_empty();
    for (field, value) in fields.iter().filter(|(field, _)| field.section == name) {
        if !std::mem::replace(&mut first, false) {
            json.push(',');
        }
        let _ = write!(json, "\"{}\":", NAMES[usize::from(field.name) % NAMES.len()]);
        value.write(json);
    }
}

fn build(fields: &[(Field, Value)]) -> String {
    let has = |name: Section| fields.iter().any(|(field, _)| field.section == name);
    let mut json = String::new();
    section(&mut json, Section::Top, "", fields);
    if json.len() > 1 {
        json.push(',');
    }
    json.push_str("\"boot-source\":");
    section(&mut json, Section::Boot, "\"kernel_image_path\":\"/k\"", fields);
    json.push_str("},\"drives\":[");
    let mut drives: Vec<u8> = fields
        .iter()
        .filter_map(|(field, _)| if let Section::Drive(index) = field.section { Some(index) } else { None })
        .collect();
    drives.dedup();
    for (index, drive) in drives.iter().enumerate() {
        let comma = if index == 0 { "" } else { "," };
        let needed = format!("\"drive_id\":\"d{drive}\",\"path_on_host\":\"/d\"");
        json.push_str(comma);
        section(&mut json, Section::Drive(*drive), &needed, fields);
        if has(Section::Bandwidth) && index == 0 {
            json.push_str(",\"rate_limiter\":{\"bandwidth\":");
            section(&mut json, Section::Bandwidth, "\"refill_time\":1", fields);
            json.push_str("}}");
        }
        json.push('}');
    }
    json.push(']');
    for (name, key, needed) in [
        (Section::Machine, "machine-config", ""),
        (Section::Vsock, "vsock", "\"uds_path\":\"/v\""),
        (Section::Serial, "serial", ""),
        (Section::Confidential, "confidential", ""),
    ] {
        if has(name) {
            let _ = write!(json, ",\"{key}\":");
            section(&mut json, name, needed, fields);
            json.push('}');
        }
    }
    json.push('}');
    json
}

fn check(json: &[u8]) {
    let config = match DomainConfig::from_json(json) {
        Ok(config) => config,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    assert!(json.len() <= MAX_CONFIG_SIZE);
    let written = serde_json::to_vec(&config).unwrap();
    assert_eq!(DomainConfig::from_json(&written).as_ref(), Ok(&config));
    let line = config.command_line();
    if let Err(error) = config.validate() {
        return assert!(!error.to_string().is_empty());
    }
    assert!(line.len() <= MAX_COMMAND_LINE && !line.contains('\0'));
    assert!(config.drives.len() + usize::from(config.vsock.is_some()) <= MAX_DEVICES);
    let within = |value: u64, (min, max): (u64, u64)| (min..=max).contains(&value);
    assert!(within(config.machine.vcpu_count.into(), VCPU_COUNT));
    assert!(within(config.machine.mem_size_mib, MEM_SIZE_MIB));
    assert!(config.vsock.iter().all(|vsock| within(vsock.guest_cid.into(), GUEST_CID)));
    for (index, drive) in config.drives.iter().enumerate() {
        assert!(matches!(drive.block_size, 512 | 4096));
        assert!(config.drives[..index].iter().all(|other| other.drive_id != drive.drive_id));
        let limits = drive.rate_limiter.iter().flat_map(|limiter| [limiter.bandwidth, limiter.ops]);
        assert!(limits.flatten().all(|bucket| bucket.size > 0 && bucket.refill_time > 0));
    }
}

fuzz_target!(|input: Input| {
    match input {
        Input::Raw(json) => check(json),
        Input::Built(fields) => check(build(&fields).as_bytes()),
    }
});
