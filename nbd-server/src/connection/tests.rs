//! Clients beside each other on one worker thread.

use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use nbd_proto::transmission::Durability;
use tokio::net::UnixStream;

use super::*;
use crate::access::Access;
use crate::budget::Budget;
use crate::clients::Clients;
use crate::export::{
    Export, ExportEntry, ExportError, ExportInfo, FastExport, FileSpan, Holes, Lookup, Mapped,
    MayBlock, Operation, ReadMap, TryRead, TryWrite,
};
use crate::paused::Resting;
use crate::ring::RingCounters;
use crate::scheduler::Scheduler;
use crate::shutdown::ShutdownTrigger;
use crate::slots::Slots;
use crate::{ExportRegistry, ServerConfig};

const SIZE: usize = 32 << 20;

/// A disk in the page cache.
struct CachedDisk {
    file: Arc<OwnedFd>,
    /// Its bytes are sent from the file, or copied.
    is_sent: bool,
    /// The socket of a client, and how many bytes were there for it at the beginning of each read.
    watched: OnceLock<OwnedFd>,
    waiting: Mutex<Vec<u64>>,
}

impl CachedDisk {
    fn new(is_sent: bool) -> Arc<Self> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; SIZE]).unwrap();
        let (watched, waiting) = Default::default();
        Arc::new(Self { file: Arc::new(file.into()), is_sent, watched, waiting })
    }
}

impl Export for CachedDisk {
    fn info(&self) -> ExportInfo {
        ExportInfo::new(SIZE as u64)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        assert_eq!(rustix::io::pread(&self.file, &mut *buffer, offset), Ok(buffer.len()));
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8], _: Durability) -> Result<(), ExportError> {
        assert_eq!(rustix::io::pwrite(&self.file, data, offset), Ok(data.len()));
        Ok(())
    }

    fn fast(&self) -> Option<&dyn FastExport> {
        Some(self)
    }
}

impl FastExport for CachedDisk {
    fn try_read_at(
        &self,
        offset: u64,
        buffer: &mut [u8],
        _: Holes,
    ) -> Result<TryRead, ExportError> {
        if let Some(client) = self.watched.get() {
            self.waiting.lock().unwrap().push(rustix::io::ioctl_fionread(client).unwrap());
        }
        self.read_at(offset, buffer).map(|()| TryRead::Complete)
    }

    fn map_read(
        &self,
        offset: u64,
        length: usize,
        _: Holes,
        _: Lookup,
        map: &mut ReadMap,
    ) -> Result<Mapped, ExportError> {
        if self.is_sent {
            map.push_file(length, FileSpan { file: Arc::clone(&self.file), offset });
        } else {
            map.push_export(length);
        }
        Ok(Mapped::Complete)
    }

    fn may_block(&self, _: Operation) -> MayBlock {
        MayBlock::Yes
    }

    fn try_write_at(&self, _: u64, _: &[u8]) -> Result<TryWrite, ExportError> {
        Ok(TryWrite::WouldBlock)
    }
}

/// A client with structured replies, on the thread of its server.
struct Peer {
    stream: UnixStream,
    /// The server's end, to see what it has not received yet.
    far: OwnedFd,
    received: AtomicU64,
    sent: AtomicU64,
}

impl Peer {
    /// A client of a new connection to the server that `shared` belongs to.
    async fn connect(shared: &Shared, trigger: &ShutdownTrigger, thread: &Thread) -> Arc<Self> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let theirs = theirs.into_std().unwrap();
        let far = theirs.try_clone().unwrap().into();
        let socket = Socket::from_std_unix(theirs).attach().unwrap();
        let (shared, shutdown) = (shared.clone(), trigger.subscribe());
        let thread = thread.clone();
        tokio::spawn(async move {
            let newcomer = Newcomer { socket, peer: "peer", ungreeted: None, continued: None };
            serve(newcomer, shared, shutdown, thread).await;
        });
        let (received, sent) = (AtomicU64::new(0), AtomicU64::new(0));
        let peer = Self { stream: ours, far, received, sent };
        // Fixed newstyle without zeroes; structured replies; the default export.
        let mut hello = vec![0, 0, 0, 3];
        for option in [8_u32, 1] {
            hello.extend(*b"IHAVEOPT");
            hello.extend(option.to_be_bytes());
            hello.extend([0; 4]);
        }
        peer.send(&hello).await;
        // The greeting, the reply to the first option, size and flags.
        peer.skip(18 + 20 + 10).await;
        Arc::new(peer)
    }

    async fn send(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            self.stream.writable().await.unwrap();
            match self.stream.try_write(bytes) {
                Ok(count) => {
                    self.sent.fetch_add(count as u64, Ordering::Relaxed);
                    bytes = &bytes[count..];
                }
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
            }
        }
    }

    async fn request(&self, offset: usize, length: usize) {
        self.command(0, offset, length).await;
    }

    async fn command(&self, command: u16, offset: usize, length: usize) {
        self.send(&Self::header(command, offset, length)).await;
    }

    fn header(command: u16, offset: usize, length: usize) -> Vec<u8> {
        let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
        request.extend([0; 2]);
        request.extend(command.to_be_bytes());
        request.extend([0; 8]);
        request.extend((offset as u64).to_be_bytes());
        request.extend((length as u32).to_be_bytes());
        request
    }

    async fn read(&self, buffer: &mut [u8]) {
        let mut filled = 0;
        while filled < buffer.len() {
            self.stream.readable().await.unwrap();
            match self.stream.try_read(&mut buffer[filled..]) {
                Ok(0) => panic!("the server has gone"),
                Ok(count) => {
                    self.received.fetch_add(count as u64, Ordering::Relaxed);
                    filled += count;
                }
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
            }
        }
    }

    async fn skip(&self, mut count: usize) {
        let mut buffer = vec![0; 256 << 10];
        while count > 0 {
            let part = count.min(buffer.len());
            self.read(&mut buffer[..part]).await;
            count -= part;
        }
    }

    /// Takes the reply to one request, or to the first of several.
    async fn reply(&self) {
        loop {
            let mut header = [0; 20];
            self.read(&mut header[..16]).await;
            if header[..4] == [0x67, 0x44, 0x66, 0x98] {
                return;
            }
            assert_eq!(header[..4], [0x66, 0x8e, 0x33, 0xef]);
            self.read(&mut header[16..]).await;
            self.skip(u32::from_be_bytes(header[16..].try_into().unwrap()) as usize).await;
            if header[5] & 1 == 1 {
                return;
            }
        }
    }

    /// All bytes that the server has received from this client.
    fn taken(&self) -> u64 {
        let waiting = rustix::io::ioctl_fionread(&self.far).unwrap();
        self.sent.load(Ordering::Relaxed) - waiting
    }

    /// All bytes that the server has sent to this client.
    fn sent(&self) -> u64 {
        let unread = rustix::io::ioctl_fionread(&self.stream).unwrap();
        self.received.load(Ordering::Relaxed) + unread
    }
}

fn shared(disk: Arc<CachedDisk>) -> Shared {
    let exports = ExportRegistry::new();
    exports.add("", ExportEntry::new(disk)).unwrap();
    Shared {
        config: Arc::new(ServerConfig::default()),
        access: Access::default(),
        clients: Clients::new(),
        budget: Budget::new(256 << 20),
        slots: Slots::new(1),
        disk_slots: Slots::new(1),
        rings: RingCounters::new(1),
        room: Budget::new(256 << 20),
        answers: Budget::new(1 << 20),
        options: Budget::new(1 << 20),
        pauses: Pauses::new(1),
        scheduler: Scheduler::new(tokio::runtime::Handle::current(), 1),
        resting: Resting::default(),
        exports,
    }
}

/// The most bytes that a server sends to `floods` other clients, each of which has 4 reads of
/// `length` bytes in flight, between the request of a client that reads 4 KiB at a time and its
/// reply.
fn most_in_front(disk: Arc<CachedDisk>, floods: usize, length: usize) -> u64 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let trigger = ShutdownTrigger::new();
        let shared = shared(disk);
        let thread = Thread::new(Arc::new(AtomicUsize::new(floods + 1)));
        let mut others = Vec::new();
        for _ in 0..floods {
            let other = Peer::connect(&shared, &trigger, &thread).await;
            others.push(Arc::clone(&other));
            tokio::spawn(async move {
                for place in 0.. {
                    other.request(place * length % (SIZE - length), length).await;
                    if place >= 4 {
                        other.reply().await;
                    }
                }
            });
        }
        let good = Peer::connect(&shared, &trigger, &thread).await;
        let sent = || others.iter().map(|other| other.sent()).sum::<u64>();
        let mut most = 0;
        for round in 0..200 {
            let before = sent();
            good.request(round * 4096, 4096).await;
            good.reply().await;
            // The first ones show how the client is.
            if round >= 40 {
                most = most.max(sent() - before);
            }
        }
        assert!(sent() > 16 << 20, "the others are served as well");
        most
    })
}

#[test]
fn a_small_read_waits_for_a_few_hundred_kilobytes_however_large_the_reads_of_others_are() {
    let (sent, copied) = (CachedDisk::new(true), CachedDisk::new(false));
    // Longer ones that are copied are read by the pool.
    for (disk, length) in [
        (&sent, 256 << 10),
        (&sent, 1 << 20),
        (&sent, 8 << 20),
        (&copied, 256 << 10),
        (&copied, 1 << 20),
    ] {
        let most = most_in_front(Arc::clone(disk), 24, length);
        assert!(most <= 512 << 10, "{most} bytes came first, of reads of {length}");
    }
}

/// The most bytes that a server receives from `floods` other clients, each of which writes `length`
/// bytes at `start`, 4 at a time, between the request of a client that reads 4 KiB at a time and
/// its reply.
fn most_received_in_front(floods: usize, start: usize, length: usize) -> u64 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let trigger = ShutdownTrigger::new();
        let shared = shared(CachedDisk::new(true));
        let thread = Thread::new(Arc::new(AtomicUsize::new(floods + 1)));
        let payload = vec![9; length];
        let mut others = Vec::new();
        for _ in 0..floods {
            let other = Peer::connect(&shared, &trigger, &thread).await;
            others.push(Arc::clone(&other));
            let (answered, payload) = (Arc::clone(&other), payload.clone());
            tokio::spawn(async move {
                loop {
                    other.command(1, start, length).await;
                    other.send(&payload).await;
                }
            });
            tokio::spawn(async move {
                loop {
                    answered.reply().await;
                }
            });
        }
        let good = Peer::connect(&shared, &trigger, &thread).await;
        let taken = || others.iter().map(|other| other.taken()).sum::<u64>();
        let mut most = 0;
        for round in 0..200 {
            let before = taken();
            good.request(round * 4096, 4096).await;
            good.reply().await;
            // The first ones show how the client is.
            if round >= 40 {
                most = most.max(taken() - before);
            }
        }
        assert!(taken() > 16 << 20, "the others are served as well");
        most
    })
}

#[test]
fn a_small_read_waits_for_a_few_hundred_kilobytes_however_large_the_writes_of_others_are() {
    // Those past the end are refused, and their payloads discarded.
    for (start, length) in
        [(0, 64 << 10), (0, 128 << 10), (0, 256 << 10), (0, 1 << 20), (0, 8 << 20), (SIZE, 1 << 20)]
    {
        let most = most_received_in_front(24, start, length);
        // Half a megabyte, and what one more client has sent: on a busy machine it may be its turn,
        // too.
        assert!(most <= 640 << 10, "{most} bytes came first, of writes of {length} at {start}");
    }
}

/// The replies that a client had received before each of its 16 reads, which it sent at once.
fn received_before_each_read(connections: usize) -> Vec<u64> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let disk = CachedDisk::new(false);
    runtime.block_on(async {
        let trigger = ShutdownTrigger::new();
        let thread = Thread::new(Arc::new(AtomicUsize::new(connections)));
        let peer = Peer::connect(&shared(Arc::clone(&disk)), &trigger, &thread).await;
        disk.watched.set(rustix::io::dup(&peer.stream).unwrap()).unwrap();
        let requests: Vec<_> = (0..16).map(|place| Peer::header(0, place * 4096, 4096)).collect();
        peer.send(&requests.concat()).await;
        for _ in 0..16 {
            peer.reply().await;
        }
    });
    // Chunk header, offset, data.
    disk.waiting.lock().unwrap().iter().map(|bytes| bytes / (20 + 8 + 4096)).collect()
}

#[test]
fn the_first_replies_of_a_batch_leave_before_its_last_request_is_read() {
    assert_eq!(received_before_each_read(1), [0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12]);
}

#[test]
fn the_replies_of_a_batch_leave_together_if_others_are_on_the_thread() {
    assert_eq!(received_before_each_read(2), [0; 16]);
}
