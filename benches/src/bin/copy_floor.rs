//! The floor of copies: the same bytes moved by the fewest calls, without a protocol.
//!
//! An end that is a server is a thread behind a unix socket: as a source it reads the file and sends
//! its bytes, as a destination it receives them into memory. There are no requests and no replies, so
//! the time that another program takes beyond this is the cost of the protocol and of that program;
//! the time of this one is the cost of the kernel's copies.
//!
//! Between two files, a thread for each core reads and writes, and leaves holes out. The space of each
//! write is allocated before it, which costs ext4 less than to reserve it block by block. Nothing is
//! written back, because that waits for the disk.
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
            let mut file = File::create(target)?;
            move_all(&mut received, &mut file)
        }),
        (false, true) => {
            send(source.metadata()?.len(), |socket| move_all(&mut File::open(source)?, socket))
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
    let mut file = File::open(source)?;
    let (near, mut far) = UnixStream::pair()?;
    let server = thread::spawn(move || move_all(&mut file, &mut far));
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
        let mut disk = vec![0; size];
        let mut filled = 0;
        while let Some(rest) = disk.get_mut(filled..)
            && !rest.is_empty()
        {
            let piece = rest.len().min(PIECE_BYTES);
            match far.read(&mut rest[..piece])? {
                0 => break,
                length => filled += length,
            }
        }
        Ok::<_, io::Error>(filled as u64)
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
    fn all_bytes_arrive_between_every_pair_of_ends() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let [source, target] = ["source", "target"].map(|name| directory.path().join(name));
        let bytes: Vec<u8> = (0..1_000_003_u32).map(|number| number as u8).collect();
        std::fs::write(&source, &bytes).expect("written");
        for (from, to) in
            [("file", "file"), ("file", "server"), ("server", "file"), ("server", "server")]
        {
            drop(std::fs::remove_file(&target));
            let ends = [from, &source.display().to_string(), to, &target.display().to_string()];
            let moved = run(&ends.map(str::to_owned)).expect("copied");
            assert_eq!(moved, bytes.len() as u64, "{from} to {to}");
            if to == "file" {
                assert!(std::fs::read(&target).expect("readable") == bytes, "{from} to {to}");
            }
        }
    }

    #[test]
    fn a_file_with_holes_arrives() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let [source, target] = ["source", "target"].map(|name| directory.path().join(name));
        let file = File::create(&source).expect("created");
        for offset in [3 << 20, 12 << 20, 40 << 20] {
            file.write_all_at(&[7; 8192], offset).expect("written");
        }
        file.set_len((64 << 20) + 1).expect("longer");
        let file = File::open(&source).expect("opened");
        copy_file(&file, &File::create(&target).expect("created")).expect("copied");
        let [from, to] = [&source, &target].map(|path| std::fs::read(path).expect("readable"));
        assert!(from == to);
    }

    #[test]
    fn a_source_that_is_missing_and_an_end_of_another_kind_are_errors() {
        let run = |ends: [&str; 4]| run(&ends.map(str::to_owned));
        assert!(run(["server", "/nonexistent/source", "server", "-"]).is_err());
        assert_eq!(run(["file", "a", "disk", "b"]).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
