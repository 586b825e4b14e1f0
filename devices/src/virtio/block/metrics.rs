//! What is counted of a drive.

use std::time::Duration;

use cofferdam_metrics::{Counter, Latency, group};

use super::operation::Work;

group! {
    /// Of a drive.
    pub struct BlockMetrics {
        /// Times that the driver started the device and could not be served
        pub activate_fails: Counter,
        /// Times that the driver broke the queue's rules, or io_uring failed, and the device needed reset
        pub event_fails: Counter,
        /// Requests that failed on the host's side
        pub execute_fails: Counter,
        /// Requests that were refused: unknown, outside the drive, or a change to a read-only one
        pub invalid_reqs_count: Counter,
        /// Notifications of the driver
        pub queue_event_count: Counter,
        /// Times that the drive got another file, or the same one with another size
        pub update_count: Counter,
        /// Times that it was to get one that cannot be used
        pub update_fails: Counter,
        /// Times that requests had to wait for the rate limiter
        pub rate_limiter_throttled_events: Counter,
        /// Times that requests had to wait because as many were under way as are possible
        pub io_engine_throttled_events: Counter,
        /// Bytes that were read
        pub read_bytes: Counter,
        /// Bytes that were written
        pub write_bytes: Counter,
        /// Reads that succeeded
        pub read_count: Counter,
        /// Writes that succeeded
        pub write_count: Counter,
        /// Flushes that succeeded
        pub flush_count: Counter,
        /// Discards that succeeded
        pub discard_count: Counter,
        /// Write-zeroes requests that succeeded
        pub write_zeroes_count: Counter,
        /// Time of reads, from the queue to the answer
        pub read_agg: Latency,
        /// Time of writes, from the queue to the answer
        pub write_agg: Latency,
        /// Time of flushes, from the queue to the answer
        pub flush_agg: Latency,
        /// Messages about this drive that were not logged, because there were too many
        pub rate_limited_log_count: Counter,
    }
}

impl BlockMetrics {
    /// `work` has succeeded in `time`, and moved that many `bytes`.
    pub(super) fn succeeded(&self, work: Work, bytes: u64, time: Duration) {
        match work {
            Work::Read => {
                self.read_count.count();
                self.read_bytes.add(bytes);
                self.read_agg.record(time);
            }
            Work::Write => {
                self.write_count.count();
                self.write_bytes.add(bytes);
                self.write_agg.record(time);
            }
            Work::Flush => {
                self.flush_count.count();
                self.flush_agg.record(time);
            }
            Work::Discard => self.discard_count.count(),
            Work::Zero { .. } => self.write_zeroes_count.count(),
        }
    }
}
