//! What is counted of the vsock device.

use cofferdam_metrics::{Counter, group};

group! {
    /// Of the vsock device.
    pub struct VsockMetrics {
        /// Times that the driver started the device and could not be served
        pub activate_fails: Counter,
        /// Times that the driver broke the rules of the receive queue, and the device needed reset
        pub rx_queue_event_fails: Counter,
        /// Times that the driver broke the rules of the transmit queue, and the device needed reset
        pub tx_queue_event_fails: Counter,
        /// Times that the host's sockets could not be watched
        pub muxer_event_fails: Counter,
        /// Notifications of the receive queue
        pub rx_queue_event_count: Counter,
        /// Notifications of the transmit queue
        pub tx_queue_event_count: Counter,
        /// Bytes of data to the guest
        pub rx_bytes_count: Counter,
        /// Bytes of data from the guest, for connections that there are
        pub tx_bytes_count: Counter,
        /// Packets to the guest
        pub rx_packets_count: Counter,
        /// Packets from the guest
        pub tx_packets_count: Counter,
        /// Connections that were begun
        pub conns_added: Counter,
        /// Connections that have ended
        pub conns_removed: Counter,
        /// Packets that were answered by RST because they belong to no connection
        pub refused_packets_count: Counter,
        /// Packets that belong to no connection and were not answered, as too many answers waited for the guest to take them
        pub unsent_refusals_count: Counter,
        /// Connections of the guest that the host refused
        pub connect_fails: Counter,
        /// Times that connections of the host had to wait because one could not be accepted
        pub accept_fails: Counter,
        /// Messages about this device that were not logged, because there were too many
        pub rate_limited_log_count: Counter,
    }
}
