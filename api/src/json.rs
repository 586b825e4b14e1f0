//! JSON whose errors name the field. serde's own say what is wrong and in which line, but of a wrong type not where.

use serde::de::DeserializeOwned;
use serde_path_to_error::{Path, Segment};

/// Reads `json`. The error names the field at fault, where there is one, line and column.
pub fn read<T: DeserializeOwned>(json: &[u8]) -> Result<T, String> {
    serde_json::from_slice(json).map_err(|error| {
        let message = error.to_string();
        if !error.is_data() {
            return message;
        }
        // It is read once more, so that what is good costs nothing.
        let mut reader = serde_json::Deserializer::from_slice(json);
        match serde_path_to_error::deserialize::<_, T>(&mut reader) {
            Err(error) if !is_named(error.path(), &message) => format!("{}: {message}", error.path()),
            _ => message,
        }
    })
}

/// Whether `message` has the name of the field that `path` leads to, or there is none.
fn is_named(path: &Path, message: &str) -> bool {
    let name = |segment: &Segment| match segment {
        Segment::Map { key } => Some(key.clone()),
        _ => None,
    };
    path.iter().filter_map(name).next_back().is_none_or(|name| message.contains(&name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DomainConfig;
    use crate::observe::LoggerConfig;

    #[test]
    fn what_is_wrong_is_named() {
        let with = |more: &str| format!(r#"{{"boot-source": {{"kernel_image_path": "k"}}, {more}}}"#);
        for (more, words) in [
            (
                r#""stop_timeout_ms": "x""#,
                r#"stop_timeout_ms: invalid type: string "x", expected u64 at line 1"#,
            ),
            (
                r#""machine-config": {"vcpu_count": -1, "mem_size_mib": 64}"#,
                "machine-config.vcpu_count: invalid value",
            ),
            (
                r#""drives": [{"drive_id": 1, "path_on_host": "p"}]"#,
                "drives[0].drive_id: invalid type: integer `1`",
            ),
            (
                r#""drives": [{"drive_id": "d", "path_on_host": "p", "io_engine": "Fast"}]"#,
                "drives[0].io_engine: unknown variant `Fast`",
            ),
            (
                r#""serial": {"rate_limiter": {"size": 1}}"#,
                "serial.rate_limiter: missing field `refill_time`",
            ),
            (r#""serial": {"mdoe": "None"}"#, "unknown field `mdoe`, expected one of `mode`"),
            (r#""machine-config": 5"#, "machine-config: invalid type: integer `5`"),
            // These have it already.
            (
                r#""drives": [{"drive_id": "d", "path_on_host": "p", "socket": "s"}]"#,
                "drives[].socket: not supported",
            ),
            (r#""balloon": {"a": 1}"#, "balloon: not supported"),
            (r#""vsock": {"guest_cid": 3, "uds_path": "v"}, "vsock": null"#, "duplicate field `vsock`"),
        ] {
            let message = read::<DomainConfig>(with(more).as_bytes()).unwrap_err();
            assert!(message.starts_with(words), "{message}");
        }
        assert!(
            read::<LoggerConfig>(br#"{"level": "Loud"}"#)
                .unwrap_err()
                .starts_with("level: \"Loud\" is none of")
        );
        for text in ["", "{", "5", "[]x"] {
            assert!(read::<DomainConfig>(text.as_bytes()).unwrap_err().contains("line 1"), "{text}");
        }
    }
}
