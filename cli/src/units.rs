//! Sizes and times as people write them.

use std::time::Duration;

/// Reads a size with a unit of 1,024 and its powers: `256M`, `1G`, `512MiB`.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text);
    if unit.is_empty() {
        return Err(format!("{text:?} has no unit: write {text}M for MiB, {text}G for GiB"));
    }
    scale(text, number, unit)
}

/// Reads a number of bytes per second, with or without a unit: `1048576`, `10M`, `10MiB/s`.
pub fn parse_bandwidth(text: &str) -> Result<u64, String> {
    let size = text.strip_suffix("/s").unwrap_or(text);
    let (number, unit) = split(size);
    scale(text, number, unit)
}

/// Reads a time: `10` and `10s` are seconds, `500ms` and `2m` are what they say.
pub fn parse_time(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text);
    let bad = || format!("{text:?} is not a time such as 10s, 500ms or 2m");
    let number: u64 = number.parse().map_err(|_| bad())?;
    let millis = match unit {
        "ms" => Some(number),
        "" | "s" => number.checked_mul(1000),
        "m" => number.checked_mul(60_000),
        _ => return Err(bad()),
    };
    millis.map(Duration::from_millis).ok_or_else(|| format!("{text:?} is too long"))
}

/// Reads a number, decimal or hexadecimal: `196608`, `0x30000`.
pub fn parse_number(text: &str) -> Result<u64, String> {
    let number = match text.strip_prefix("0x") {
        Some(hexadecimal) => u64::from_str_radix(hexadecimal, 16),
        None => text.parse(),
    };
    number.map_err(|_| format!("{text:?} is not a number such as 0x30000"))
}

fn split(text: &str) -> (&str, &str) {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    // Digits are single bytes, so this is a boundary.
    text.split_at_checked(digits).unwrap_or((text, ""))
}

fn scale(text: &str, number: &str, unit: &str) -> Result<u64, String> {
    let bad = || format!("{text:?} is not a size such as 256M, 1G or 512MiB (units: K, M, G, KiB, MiB, GiB)");
    let number: u64 = number.parse().map_err(|_| bad())?;
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        _ => return Err(bad()),
    };
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let good = [
            ("256M", 256 << 20),
            ("256m", 256 << 20),
            ("1G", 1 << 30),
            ("512MiB", 512 << 20),
            ("64GiB", 64 << 30),
            ("32768K", 32 << 20),
            ("0M", 0),
        ];
        for (text, bytes) in good {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "M",
            "256",
            "256X",
            "256MB",
            "-1M",
            "1.5G",
            " 1G",
            "1 G",
            "1G ",
            "é",
            "18446744073709551615G",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        assert!(parse_size("256").unwrap_err().contains("256M"));
        assert!(parse_size("99999999999999999999M").is_err());
    }

    #[test]
    fn bandwidths() {
        for (text, bytes) in [("1000", 1000), ("10M", 10 << 20), ("10MiB/s", 10 << 20), ("5/s", 5)] {
            assert_eq!(parse_bandwidth(text), Ok(bytes), "{text}");
        }
        for text in ["", "/s", "M/s", "10Mb", "10M/m"] {
            assert!(parse_bandwidth(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times() {
        for (text, millis) in [("10", 10_000), ("10s", 10_000), ("500ms", 500), ("2m", 120_000), ("0", 0)] {
            assert_eq!(parse_time(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "s", "10h", "-1", "1.5s", "18446744073709551615m"] {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }
}
