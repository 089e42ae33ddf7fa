//! Limits of a server.

use std::num::NonZeroUsize;
use std::time::Duration;

use nbd_proto::wire::ReplyMode;

#[cfg(feature = "tls")]
use crate::tls::TlsMode;

/// Limits and options of a [`Server`](crate::Server). Start from [`ServerConfig::default`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ServerConfig {
    /// Time limit of the handshake; a client that exceeds it is disconnected. Default: 10 s.
    pub handshake_timeout: Duration,
    /// Most connections at a time. Default: 1024.
    pub max_connections: usize,
    /// Time for which a client over that limit waits for another one to leave; then it is closed.
    /// Default: zero, it is closed at once.
    pub queue_timeout: Duration,
    /// Threads that serve connections. A connection stays on its thread; with fewer connections
    /// than threads each has its own. Default: twice the number of cores, at least 4.
    pub workers: NonZeroUsize,
    /// Most requests of one connection that wait for the thread pool or run in it. Requests without
    /// a payload that cover a range (BLOCK_STATUS, TRIM, WRITE_ZEROES, CACHE) are limited to an
    /// eighth of this. The scheduler shares the pool fairly among connections. Zero means one.
    /// Default: 64.
    pub max_requests: usize,
    /// Most bytes of payload and unsent replies of one connection, beyond one request of any legal
    /// size. Default: 64 MiB.
    pub connection_memory_limit: usize,
    /// Most bytes of payload of all connections' large requests together. When they are exhausted,
    /// each connection may still have one request of up to 1 MiB at a time. Default: 256 MiB.
    ///
    /// A READ takes memory for 1 MiB at a time if its reply may be sent in parts. With simple
    /// replies or DF it takes its complete length, up to 32 MiB, until the reply is sent: after the
    /// header of such a reply, an error could only close the connection, so all data is read
    /// before.
    pub memory_limit: usize,
    /// Time for which a worker thread with a single, busy connection polls for its next request
    /// before it sleeps, like QEMU's `poll-max-ns`. This lowers the latency of a client with one
    /// request in flight and costs CPU time. Polling stops when requests arrive more slowly, and at
    /// most half of the cores poll. Zero: never, and not for the ends of direct writes through
    /// io_uring either, for which a thread otherwise polls up to 400 us while many are under way.
    /// Default: 32.768 us.
    pub busy_poll: Duration,
    /// Whether reads that have to wait for a disk, and writes that bypass the page cache, may use
    /// io_uring. If not, or if the system lacks or forbids it, a pool of threads reads and writes.
    /// Default: true.
    pub io_uring: bool,
    /// Time without progress after which a client that has sent a part of a request, or has not
    /// received its replies, is disconnected (up to a quarter later). Its share of the budgets is
    /// then free. Idle clients and slow clients are never disconnected. Default: `None`, never, as
    /// in QEMU and nbdkit: a client that is stopped for a while (a debugger, a frozen container)
    /// must not lose its disk. For servers that untrusted clients can reach, 5 minutes are enough
    /// to survive the restart of a switch.
    pub stall_timeout: Option<Duration>,
    /// Time for clients to receive the replies to requests in flight once the server is told to
    /// stop. Default: 10 s.
    pub drain_timeout: Duration,
    /// The best form of replies that is negotiated. Below [`ReplyMode::Extended`] the server
    /// behaves like an older one. Default: [`ReplyMode::Extended`].
    pub best_reply_mode: ReplyMode,
    /// The TLS policy. Default: [`TlsMode::Off`].
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
            io_uring: true,
            stall_timeout: None,
            drain_timeout: Duration::from_secs(10),
            best_reply_mode: ReplyMode::Extended,
            #[cfg(feature = "tls")]
            tls: TlsMode::Off,
        }
    }
}
