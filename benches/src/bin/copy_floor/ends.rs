//! The two ends of a copy, each of which belongs to one thread.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate};
use rustix::io::Errno;

use crate::client::Client;

/// Requests in flight on one connection.
const DEPTH: usize = 8;

#[derive(Clone, Copy)]
pub(crate) enum Place<'a> {
    File(&'a Path),
    /// By its unix socket.
    Server(&'a Path),
}

impl Place<'_> {
    /// Makes an empty file of `size` bytes. A server is taken as it is.
    pub(crate) fn prepare(self, size: u64) -> io::Result<()> {
        match self {
            Self::File(path) => File::create(path)?.set_len(size),
            Self::Server(_) => Ok(()),
        }
    }
}

pub(crate) enum Source {
    /// With the pieces to read.
    File(File, VecDeque<Range<u64>>),
    Server(Client),
}

impl Source {
    pub(crate) fn open(place: Place<'_>) -> io::Result<Self> {
        match place {
            Place::File(path) => Ok(Self::File(File::open(path)?, VecDeque::new())),
            Place::Server(socket) => Ok(Self::Server(Client::connect_to_read(socket)?)),
        }
    }

    pub(crate) fn size(&self) -> io::Result<u64> {
        match self {
            Self::File(file, _) => Ok(file.metadata()?.len()),
            Self::Server(client) => Ok(client.size()),
        }
    }

    /// The extents of the complete disk that have data.
    pub(crate) fn data(&mut self) -> io::Result<Vec<Range<u64>>> {
        match self {
            Self::File(file, _) => data_of(file),
            Self::Server(client) => client.data(),
        }
    }

    /// Pieces that may be asked for at a time.
    pub(crate) fn depth(&self) -> usize {
        match self {
            Self::File(..) => 1,
            Self::Server(_) => DEPTH,
        }
    }

    /// Asks for a piece, at the latest when the next one is received.
    pub(crate) fn ask(&mut self, piece: Range<u64>) {
        match self {
            Self::File(_, asked) => asked.push_back(piece),
            Self::Server(client) => client.ask(&piece),
        }
    }

    /// Receives one of the pieces; returns which.
    pub(crate) fn receive(&mut self, buffer: &mut [u8]) -> io::Result<Range<u64>> {
        match self {
            Self::File(file, asked) => {
                let piece = asked.pop_front().ok_or(io::ErrorKind::InvalidInput)?;
                let length = (piece.end - piece.start) as usize;
                file.read_exact_at(&mut buffer[..length], piece.start)?;
                Ok(piece)
            }
            Self::Server(client) => client.receive(buffer),
        }
    }
}

fn data_of(file: &File) -> io::Result<Vec<Range<u64>>> {
    let (mut extents, mut end) = (Vec::new(), 0);
    loop {
        let start = match rustix::fs::seek(file, SeekFrom::Data(end)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(extents),
            Err(error) => return Err(error.into()),
        };
        end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
        extents.push(start..end);
    }
}

pub(crate) enum Target {
    File(File),
    Server(Client),
}

impl Target {
    pub(crate) fn open(place: Place<'_>) -> io::Result<Self> {
        match place {
            Place::File(path) => Ok(Self::File(File::options().write(true).open(path)?)),
            Place::Server(socket) => Ok(Self::Server(Client::connect_to_write(socket)?)),
        }
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        match self {
            Self::File(file) => {
                // Where this is not possible, the write reserves the space.
                let _ = fallocate(&*file, FallocateFlags::empty(), offset, data.len() as u64);
                file.write_all_at(data, offset)
            }
            Self::Server(client) => client.write(offset, data, DEPTH),
        }
    }

    /// Waits until everything has arrived.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        match self {
            Self::File(_) => Ok(()),
            Self::Server(client) => client.wait(0),
        }
    }
}
