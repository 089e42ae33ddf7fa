//! The least that a server does that reads and writes blocks of 4 KiB without the page cache: one
//! thread, and one ring for the file and the requests of the client.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::protocol::{
    COMMAND_DISCONNECT, COMMAND_FLAG_FUA, COMMAND_FLUSH, COMMAND_READ, COMMAND_WRITE, ERROR_IO,
    REQUEST_BYTES, Reply, Request, bad, send,
};
use crate::qcow2::Qcow2;
use crate::sys::{RECEIVED, Ring, SLOT_BYTES, SLOTS};

/// Requests that are submitted together, so that the disk begins while the next ones are parsed.
const TOGETHER: usize = 4;

/// What [`transmit`] reads and writes.
pub(crate) struct Disk {
    file: File,
    size: u64,
    /// Where each cluster is, and how many bits its size has; nothing for a raw file.
    clusters: Option<(Vec<u64>, u32)>,
}

impl Disk {
    /// A raw file.
    pub(crate) fn raw(path: &Path, size: u64) -> io::Result<Self> {
        Ok(Self { file: open(path)?, size, clusters: None })
    }

    /// A qcow2 image whose every cluster is mapped. Its tables stay in memory.
    pub(crate) fn qcow2(path: &Path, size: u64) -> io::Result<Self> {
        let image = Qcow2::open(path)?;
        let clusters = Some((image.places(size)?, image.cluster_bits()));
        Ok(Self { file: open(path)?, size, clusters })
    }

    /// The place of a block that lies on the disk.
    fn place(&self, offset: u64) -> u64 {
        match &self.clusters {
            Some((places, bits)) => {
                places[(offset >> bits) as usize] + (offset & ((1 << bits) - 1))
            }
            None => offset,
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path)
}

/// Answers requests for whole blocks until the client sends DISC.
pub(crate) fn transmit(stream: &mut UnixStream, disk: &Disk) -> io::Result<()> {
    let mut floor = Floor {
        ring: Ring::new()?,
        requests: [None; SLOTS],
        free: (0..SLOTS).rev().collect(),
        filled: 0,
    };
    floor.ring.receive(&*stream, 0)?;
    loop {
        floor.ring.enter(1)?;
        let (received, ended): (Vec<_>, Vec<_>) =
            floor.ring.ended().into_iter().partition(|(number, _)| *number == RECEIVED);
        floor.answer(stream, &ended)?;
        for (_, result) in received {
            match usize::try_from(result) {
                Err(_) => return Err(io::Error::from_raw_os_error(-result)),
                Ok(1..) if floor.take(result as usize, disk)? => {}
                Ok(_) => return Ok(()),
            }
            floor.ring.receive(&*stream, floor.filled)?;
        }
    }
}

struct Floor {
    ring: Ring,
    /// The requests in flight, each in the slot that it has.
    requests: [Option<Request>; SLOTS],
    free: Vec<usize>,
    /// Bytes that were received and do not make a whole request yet.
    filled: usize,
}

impl Floor {
    /// Sends the replies to the requests in these slots, which have ended with these results.
    fn answer(&mut self, stream: &mut UnixStream, ended: &[(usize, i32)]) -> io::Result<()> {
        let mut replies = Vec::new();
        for &(slot, result) in ended {
            let Some(request) = self.requests[slot].take() else { continue };
            let expected = if request.command == COMMAND_FLUSH { 0 } else { SLOT_BYTES as i32 };
            let error = if result == expected { 0 } else { ERROR_IO };
            let is_read = request.command == COMMAND_READ && error == 0;
            let length = if is_read { SLOT_BYTES } else { 0 };
            replies.push(Reply::new(&request, error, slot * SLOT_BYTES, length));
        }
        send(stream, &replies, self.ring.slots())?;
        self.free.extend(ended.iter().map(|(slot, _)| *slot));
        Ok(())
    }

    /// Begins the requests in what was received; returns whether the client goes on.
    fn take(&mut self, received: usize, disk: &Disk) -> io::Result<bool> {
        let end = self.filled + received;
        let mut at = 0;
        let mut pushed = 0;
        while let Some(bytes) = self.ring.received()[at..end].first_chunk::<REQUEST_BYTES>() {
            let request = Request::parse(bytes)?;
            let is_write = request.command == COMMAND_WRITE;
            let next = at + REQUEST_BYTES + if is_write { SLOT_BYTES } else { 0 };
            if request.command == COMMAND_DISCONNECT {
                return Ok(false);
            }
            if next > end {
                break;
            }
            self.begin(request, at + REQUEST_BYTES, disk)?;
            at = next;
            pushed += 1;
            if pushed % TOGETHER == 0 {
                self.ring.enter(0)?;
            }
        }
        self.ring.received().copy_within(at..end, 0);
        self.filled = end - at;
        Ok(true)
    }

    /// Begins a request; the payload of a write was received at byte `payload`.
    fn begin(&mut self, request: Request, payload: usize, disk: &Disk) -> io::Result<()> {
        let file = &disk.file;
        let is_block = request.length as usize == SLOT_BYTES
            && request.offset.is_multiple_of(SLOT_BYTES as u64)
            && request.is_inside(disk.size);
        let slot = self.free.pop().ok_or_else(|| bad("the client has too many requests"))?;
        self.requests[slot] = Some(request);
        match request.command {
            COMMAND_READ if is_block => self.ring.read(slot, file, disk.place(request.offset)),
            COMMAND_WRITE if is_block => {
                self.ring.fill(slot, payload);
                let durable = request.flags & COMMAND_FLAG_FUA != 0;
                self.ring.write(slot, file, disk.place(request.offset), durable)
            }
            COMMAND_FLUSH => self.ring.sync(slot, file),
            _ => Err(bad("the client asks for more than whole blocks of 4 KiB")),
        }
    }
}
