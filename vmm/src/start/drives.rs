//! The files and limits of drives.

use std::path::Path;
use std::time::Duration;

use cofferdam_api::config::{self, CacheType, Drive, IoEngine};
use cofferdam_api::source::Source;
use cofferdam_devices::rate_limiter::{RateLimitChange, RateLimits, TokenBucket};
use cofferdam_devices::virtio::block::{BlockFile, BlockOptions, BlockSource, Cache, Engine};

use super::{StartError, bad_descriptor, source};
use crate::descriptor::Inherited;

/// Checks that drive `index` can be used now, but for locks that others have on it, and keeps nothing of it.
pub fn check_drive(index: usize, drive: &Drive) -> Result<(), StartError> {
    let options = block_options(index, drive, &mut Inherited::default())?;
    BlockFile::check(options).map_err(|source| StartError::Drive { index, source })
}

/// What a patch of a drive's limits asks of the limiter.
pub fn limit_change(limits: config::RateLimiter) -> RateLimitChange {
    RateLimitChange { bandwidth: limits.bandwidth.map(bucket), operations: limits.ops.map(bucket) }
}

pub(super) fn bucket(bucket: config::TokenBucket) -> Option<TokenBucket> {
    bucket.limits().then(|| TokenBucket {
        size: bucket.size,
        one_time_burst: bucket.one_time_burst.unwrap_or(0),
        refill_time: Duration::from_millis(bucket.refill_time),
    })
}

/// The field with the file of drive `index`.
pub fn drive_field(index: usize) -> String {
    format!("drives[{index}].path_on_host")
}

/// The file, device or descriptor that a drive's `field` names.
pub fn block_source(field: &str, path: &Path, inherited: &mut Inherited) -> Result<BlockSource, StartError> {
    Ok(match source(field, path)? {
        Source::Path(path) => BlockSource::Path(path),
        Source::Descriptor(fd) => {
            let file = inherited.duplicate(fd).map_err(bad_descriptor(field))?;
            BlockSource::File(file.into(), path.to_owned())
        }
    })
}

pub(super) fn block_options(
    index: usize,
    drive: &Drive,
    inherited: &mut Inherited,
) -> Result<BlockOptions, StartError> {
    let limits = drive.rate_limiter.unwrap_or_default();
    Ok(BlockOptions {
        source: block_source(&drive_field(index), &drive.path_on_host, inherited)?,
        read_only: drive.is_read_only,
        cache: match drive.cache_type {
            CacheType::Unsafe => Cache::Unsafe,
            CacheType::Writeback => Cache::Writeback,
        },
        engine: match drive.io_engine {
            IoEngine::Auto => Engine::Auto,
            IoEngine::Sync => Engine::Sync,
            IoEngine::Async => Engine::Async,
        },
        block_size: drive.block_size,
        id: drive.drive_id.clone(),
        limits: RateLimits {
            bandwidth: limits.bandwidth.and_then(bucket),
            operations: limits.ops.and_then(bucket),
        },
    })
}
