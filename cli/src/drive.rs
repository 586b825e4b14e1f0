//! The value of `--drive`: `path=disk.img[,ro][,id=NAME][,root][,iops=N][,bandwidth=N][,engine=NAME]`.
//! A comma within a value is written twice.

use cofferdam_api::config::{CacheType, Drive, IoEngine, RateLimiter, TokenBucket};

use crate::units::parse_bandwidth;

/// Limits are refilled over this time, which is also the longest burst.
const REFILL_MS: u64 = 1000;

/// One `--drive`, before drives without a name get one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DriveArg {
    path: String,
    id: Option<String>,
    read_only: bool,
    root: bool,
    iops: Option<u64>,
    bandwidth: Option<u64>,
    engine: Option<IoEngine>,
}

impl DriveArg {
    /// Reads the value of `--drive`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut drive = Self::default();
        let mut seen = Vec::new();
        for item in split_commas(text) {
            let (key, value) = match item.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (item.as_str(), None),
            };
            match (key, value) {
                ("path", Some(path)) => drive.path = path.to_owned(),
                ("id", Some(id)) => drive.id = Some(id.to_owned()),
                ("ro", None) => drive.read_only = true,
                ("root", None) => drive.root = true,
                ("iops", Some(n)) => {
                    let iops =
                        n.parse().map_err(|_| format!("iops={n}: not a number of operations per second"))?;
                    drive.iops = Some(not_zero("iops", iops)?);
                }
                ("bandwidth", Some(n)) => {
                    let bandwidth = parse_bandwidth(n).map_err(|error| format!("bandwidth: {error}"))?;
                    drive.bandwidth = Some(not_zero("bandwidth", bandwidth)?);
                }
                ("engine", Some(name)) => {
                    drive.engine = Some(match name {
                        "auto" => IoEngine::Auto,
                        "sync" => IoEngine::Sync,
                        "async" => IoEngine::Async,
                        _ => return Err(format!("engine={name}: is none of auto, sync, async")),
                    });
                }
                _ => return Err(unknown_item(&item)),
            }
            if seen.iter().any(|before| before == key) {
                return Err(format!("{key} is given twice"));
            }
            seen.push(key.to_owned());
        }
        if !seen.iter().any(|key| key == "path") {
            return Err(format!("path= is missing: write path={text}"));
        }
        Ok(drive)
    }

    /// The drive at position `index`, which is called `drive<index>` unless it has a name.
    pub fn into_drive(self, index: usize) -> Drive {
        let bucket = |size| TokenBucket { size, one_time_burst: None, refill_time: REFILL_MS };
        let limiter = RateLimiter { bandwidth: self.bandwidth.map(bucket), ops: self.iops.map(bucket) };
        Drive {
            drive_id: self.id.unwrap_or_else(|| format!("drive{index}")),
            path_on_host: self.path.into(),
            is_root_device: self.root,
            is_read_only: self.read_only,
            // Not the API's defaults, which are Firecracker's: what a guest has synced is on the disk here.
            cache_type: CacheType::Writeback,
            io_engine: self.engine.unwrap_or(IoEngine::Auto),
            block_size: 512,
            rate_limiter: (limiter != RateLimiter::default()).then_some(limiter),
        }
    }
}

fn not_zero(key: &str, limit: u64) -> Result<u64, String> {
    if limit == 0 {
        Err(format!("{key}: must not be 0; leave it out if there is no limit"))
    } else {
        Ok(limit)
    }
}

fn unknown_item(item: &str) -> String {
    format!(
        "{item:?} is none of path=FILE, ro, root, id=NAME, iops=N, bandwidth=N, engine=NAME (a comma in a path is \
         written twice)"
    )
}

/// Splits at single commas; two in a row are one that belongs to the value.
fn split_commas(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            items.push(String::new());
        } else if let Some(item) = items.last_mut() {
            item.push(c);
        }
    }
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> DriveArg {
        DriveArg::parse(text).unwrap()
    }

    #[test]
    fn all_items() {
        let drive = parse("path=d.img,ro,id=data,root,iops=100,bandwidth=10M,engine=async").into_drive(0);
        assert_eq!(drive.path_on_host.to_str(), Some("d.img"));
        assert_eq!(drive.drive_id, "data");
        assert!(drive.is_read_only && drive.is_root_device);
        assert_eq!(drive.io_engine, IoEngine::Async);
        let limiter = drive.rate_limiter.unwrap();
        assert_eq!(limiter.ops, Some(TokenBucket { size: 100, one_time_burst: None, refill_time: 1000 }));
        assert_eq!(limiter.bandwidth.unwrap().size, 10 << 20);
    }

    #[test]
    fn defaults() {
        let drive = parse("path=d.img").into_drive(3);
        assert_eq!(drive.drive_id, "drive3");
        assert!(!drive.is_read_only && !drive.is_root_device && drive.rate_limiter.is_none());
        assert_eq!((drive.block_size, drive.cache_type), (512, CacheType::Writeback));
        assert_eq!(drive.io_engine, IoEngine::Auto);
    }

    #[test]
    fn commas_and_equal_signs_in_paths() {
        assert_eq!(parse("path=a,,b,ro").path, "a,b");
        assert!(parse("path=a,,b,ro").read_only);
        assert_eq!(parse("path=a,,,ro").path, "a,");
        assert!(parse("path=a,,,ro").read_only);
        assert_eq!(parse("path=a=b").path, "a=b");
        assert_eq!(parse("ro,path=é,,").path, "é,");
    }

    #[test]
    fn bad_values() {
        for (text, part) in [
            ("disk.img", "\"disk.img\" is none of path=FILE"),
            ("ro", "path= is missing"),
            ("", "is none of"),
            ("path=a,", "\"\" is none of"),
            ("path=a,rw=1", "\"rw=1\""),
            ("path=a,ro=1", "\"ro=1\""),
            ("path=a,root,root", "root is given twice"),
            ("path=a,path=b", "path is given twice"),
            ("path=a,iops=x", "iops=x"),
            ("path=a,iops=-1", "iops=-1"),
            ("path=a,bandwidth=5Q", "bandwidth: \"5Q\""),
            ("path=a,engine=aio", "engine=aio: is none of auto, sync, async"),
            ("path", "\"path\" is none of"),
        ] {
            let error = DriveArg::parse(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
