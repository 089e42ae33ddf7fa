//! The floor of copies: the same bytes moved by the fewest calls, without a protocol.
//!
//! An end that is a server is a thread behind a unix socket: as a source it reads the data of the
//! file and sends it, as a destination it receives it into memory. There are no requests and no
//! replies, and nobody asks for holes, so the time that another program takes beyond this is the
//! cost of the protocol and of that program; the time of this one is the cost of the kernel's
//! copies.
//!
//! Between two files, a thread for each core reads and writes, and leaves holes out. The space of
//! each write is allocated before it, which costs ext4 less than to reserve it block by block.
//! Nothing is written back, because that waits for the disk.
//!
//! `copy_floor file|server SOURCE file|server TARGET`; TARGET is not used for a server.

use std::env;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate};
use rustix::io::Errno;

/// Bytes moved by one call: what nbdcopy and qemu-img move with one request or more.
const PIECE_BYTES: usize = 256 << 10;
/// The same between files.
const FILE_PIECE_BYTES: u64 = 1 << 20;
/// The offset and the length of an extent.
const HEADER_BYTES: usize = 16;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match run(&arguments) {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("copy_floor: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Copies, and returns the number of bytes that arrived.
fn run(arguments: &[String]) -> io::Result<u64> {
    let [from, source, to, target] = arguments else { return Err(usage()) };
    let is_server = |end: &String| match end.as_str() {
        "server" => Ok(true),
        "file" => Ok(false),
        _ => Err(usage()),
    };
    let (source, target) = (Path::new(source), Path::new(target));
    match (is_server(from)?, is_server(to)?) {
        (false, false) => copy_file(&File::open(source)?, &File::create(target)?),
        (true, false) => receive(source, |mut received| {
            let file = File::create(target)?;
            file.set_len(source.metadata()?.len())?;
            take_extents(&mut received, |data, at| file.write_all_at(data, at))
        }),
        (false, true) => {
            send(source.metadata()?.len(), |socket| give_extents(&File::open(source)?, socket))
        }
        (true, true) => receive(source, |mut received| {
            send(source.metadata()?.len(), |socket| move_all(&mut received, socket))
        }),
    }
}

fn usage() -> io::Error {
    let usage = "usage: copy_floor file|server SOURCE file|server TARGET";
    io::Error::new(ErrorKind::InvalidInput, usage)
}

/// Copies a file; returns its length.
fn copy_file(from: &File, to: &File) -> io::Result<u64> {
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let next = AtomicU64::new(0);
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let copy = || copy_pieces(from, to, length, &next);
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(copy)).collect();
        threads.into_iter().try_for_each(|thread| {
            thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
        })
    })?;
    Ok(length)
}

/// Copies one piece after the other that no other thread copies.
fn copy_pieces(from: &File, to: &File, length: u64, next: &AtomicU64) -> io::Result<()> {
    let mut piece = vec![0; FILE_PIECE_BYTES as usize];
    loop {
        let start = next.fetch_add(FILE_PIECE_BYTES, Ordering::Relaxed);
        if start >= length {
            return Ok(());
        }
        let end = (start + FILE_PIECE_BYTES).min(length);
        let data = match rustix::fs::seek(from, SeekFrom::Data(start)) {
            Ok(data) => data,
            Err(Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        if data >= end {
            next.fetch_max(data / FILE_PIECE_BYTES * FILE_PIECE_BYTES, Ordering::Relaxed);
            continue;
        }
        let piece = &mut piece[..(end - start) as usize];
        from.read_exact_at(piece, start)?;
        // Where this is not possible, the write reserves the space.
        let _ = fallocate(to, FallocateFlags::empty(), start, end - start);
        to.write_all_at(piece, start)?;
    }
}

/// Sends every extent of a file that has data: its offset, its length and its bytes. Returns the
/// number of bytes that were sent.
fn give_extents(file: &File, to: &mut impl Write) -> io::Result<u64> {
    let mut piece = vec![0; PIECE_BYTES];
    let (mut end, mut sent) = (0, 0);
    loop {
        let mut at = match rustix::fs::seek(file, SeekFrom::Data(end)) {
            Ok(data) => data,
            Err(Errno::NXIO) => return Ok(sent),
            Err(error) => return Err(error.into()),
        };
        end = rustix::fs::seek(file, SeekFrom::Hole(at))?;
        to.write_all(&[at.to_le_bytes(), (end - at).to_le_bytes()].concat())?;
        sent += HEADER_BYTES as u64 + (end - at);
        while at < end {
            let piece = &mut piece[..(end - at).min(PIECE_BYTES as u64) as usize];
            file.read_exact_at(piece, at)?;
            to.write_all(piece)?;
            at += piece.len() as u64;
        }
    }
}

/// Takes what [`give_extents`] sends; returns the number of bytes that were received.
fn take_extents(
    from: &mut impl Read,
    mut put: impl FnMut(&[u8], u64) -> io::Result<()>,
) -> io::Result<u64> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut received = 0;
    loop {
        let mut header = [0; HEADER_BYTES];
        match from.read_exact(&mut header) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(received),
            read => read?,
        }
        let header = u128::from_le_bytes(header);
        let (mut at, mut rest) = (header as u64, (header >> 64) as u64);
        received += HEADER_BYTES as u64 + rest;
        while rest > 0 {
            let piece = &mut piece[..rest.min(PIECE_BYTES as u64) as usize];
            from.read_exact(piece)?;
            put(piece, at)?;
            at += piece.len() as u64;
            rest -= piece.len() as u64;
        }
    }
}

/// Moves all bytes; returns their number.
fn move_all(from: &mut impl Read, to: &mut impl Write) -> io::Result<u64> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut moved = 0;
    loop {
        match from.read(&mut piece) {
            Ok(0) => return Ok(moved),
            Ok(length) => {
                to.write_all(&piece[..length])?;
                moved += length as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Calls `take` with a socket to which a thread sends a file.
fn receive(source: &Path, take: impl FnOnce(UnixStream) -> io::Result<u64>) -> io::Result<u64> {
    let file = File::open(source)?;
    let (near, mut far) = UnixStream::pair()?;
    let server = thread::spawn(move || give_extents(&file, &mut far));
    let taken = take(near);
    let sent = server.join().map_err(|_| io::Error::other("the source panicked"))?;
    let taken = taken?;
    if sent? == taken { Ok(taken) } else { Err(ErrorKind::UnexpectedEof.into()) }
}

/// Calls `give` with a socket from which a thread receives a disk of `size` bytes into memory.
fn send(size: u64, give: impl FnOnce(&mut UnixStream) -> io::Result<u64>) -> io::Result<u64> {
    let size = usize::try_from(size).map_err(|_| ErrorKind::FileTooLarge)?;
    let (mut near, mut far) = UnixStream::pair()?;
    let server = thread::spawn(move || {
        // What is not written takes no memory.
        let mut disk = vec![0; size];
        take_extents(&mut far, |data, at| {
            let room = usize::try_from(at).ok().and_then(|at| disk.get_mut(at..at + data.len()));
            room.ok_or(ErrorKind::InvalidData)?.copy_from_slice(data);
            Ok(())
        })
    });
    let given = give(&mut near);
    drop(near);
    let arrived = server.join().map_err(|_| io::Error::other("the destination panicked"))?;
    let given = given?;
    if arrived? == given { Ok(given) } else { Err(ErrorKind::UnexpectedEof.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_and_holes_arrive_between_every_pair_of_ends() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let [source, target] = ["source", "target"].map(|name| directory.path().join(name));
        let file = File::create(&source).expect("created");
        for offset in [3 << 20, 12 << 20, 40 << 20] {
            file.write_all_at(&[7; 800_000], offset).expect("written");
        }
        file.set_len((64 << 20) + 1).expect("longer");
        for (from, to) in
            [("file", "file"), ("file", "server"), ("server", "file"), ("server", "server")]
        {
            drop(std::fs::remove_file(&target));
            let ends = [from, &source.display().to_string(), to, &target.display().to_string()];
            let moved = run(&ends.map(str::to_owned)).expect("copied");
            assert!(moved >= 3 * 800_000, "{from} to {to}");
            if to == "file" {
                let [from, to] = [&source, &target].map(|path| std::fs::read(path).expect("read"));
                assert!(from == to);
            }
        }
    }

    #[test]
    fn a_source_that_is_missing_and_an_end_of_another_kind_are_errors() {
        let run = |ends: [&str; 4]| run(&ends.map(str::to_owned));
        assert!(run(["server", "/nonexistent/source", "server", "-"]).is_err());
        assert_eq!(run(["file", "a", "disk", "b"]).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
