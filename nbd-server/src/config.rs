//! What a server allows its clients.

use std::num::NonZeroUsize;
use std::time::Duration;

use nbd_proto::wire::ReplyMode;

#[cfg(feature = "tls")]
use crate::tls::TlsMode;

/// Bounds and choices of a [`Server`](crate::Server). Start from [`ServerConfig::default`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ServerConfig {
    /// A client that has not finished its handshake by then is dropped. Default: 10 s.
    pub handshake_timeout: Duration,
    /// Connections at a time. Default: 1024.
    pub max_connections: usize,
    /// How long a client over that limit may wait for another one to leave; it is closed then.
    /// Default: zero, it is closed at once.
    pub queue_timeout: Duration,
    /// Threads that serve connections. A connection stays on its thread; with fewer connections
    /// than threads each has one for itself. Default: twice the number of cores, at least 4.
    pub workers: NonZeroUsize,
    /// Requests of one connection that may wait for a thread of the pool or be in its hands. Those
    /// that walk over a range (BLOCK_STATUS, TRIM, WRITE_ZEROES, CACHE) count as an eighth of this each.
    /// Which of the connections is served next is decided by how much each has had. Default: 64.
    pub max_requests: usize,
    /// Bytes of payload and unsent replies one connection may hold, beyond one request of any
    /// legal size. Default: 64 MiB.
    pub connection_memory_limit: usize,
    /// Bytes of payload all connections together may hold in large requests. When they are used up
    /// each connection may still have one request of up to 1 MiB at a time. Default: 256 MiB.
    ///
    /// A READ takes memory for 1 MiB of it at a time if its reply may be sent in parts. With simple
    /// replies or DF it takes its whole length, up to 32 MiB, until the reply is sent: an error
    /// after the header of such a reply could only close the connection, so all is read before.
    pub memory_limit: usize,
    /// How long a worker thread that has a single, busy connection asks for its next request before it
    /// goes to sleep, as QEMU's `poll-max-ns`. A client with one request in flight is served faster
    /// that way, for more CPU time; as soon as its requests stay away for longer it is not polled
    /// any more, and at most half of the cores are used to poll. Zero: never. Default: 32.768 us.
    pub busy_poll: Duration,
    /// A client that has sent a part of a request, or for which there are replies it has not taken,
    /// is closed when no byte has moved for this long (up to a quarter longer); its part of the
    /// budgets is free then. A client that owes nothing may be silent for ever, and one that is
    /// slow as long as it likes. Default: `None`, never, as the peers: a client that is stopped for
    /// a while (a debugger, a frozen container) must not lose its disk. For servers that strangers
    /// reach, 5 minutes outlast the restart of a switch.
    pub stall_timeout: Option<Duration>,
    /// How long clients may take, once the server is told to stop, to take the replies to what was
    /// in flight. Default: 10 s.
    pub drain_timeout: Duration,
    /// The best form of replies that is negotiated. Below [`ReplyMode::Extended`] the server
    /// behaves like an older one. Default: [`ReplyMode::Extended`].
    pub best_reply_mode: ReplyMode,
    /// Whether clients may or have to use TLS. Default: [`TlsMode::Off`].
    #[cfg(feature = "tls")]
    pub tls: TlsMode,
}

impl Default for ServerConfig {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(2, NonZeroUsize::get);
        Self {
            handshake_timeout: Duration::from_secs(10),
            max_connections: 1024,
            queue_timeout: Duration::ZERO,
            workers: NonZeroUsize::new(cores.saturating_mul(2).max(4)).unwrap_or(NonZeroUsize::MIN),
            max_requests: 64,
            connection_memory_limit: 64 << 20,
            memory_limit: 256 << 20,
            busy_poll: Duration::from_nanos(32_768),
            stall_timeout: None,
            drain_timeout: Duration::from_secs(10),
            best_reply_mode: ReplyMode::Extended,
            #[cfg(feature = "tls")]
            tls: TlsMode::Off,
        }
    }
}
