//! The floor of copies: the data of a disk moved between two ends by a program of the least cost.
//!
//! It speaks to the servers of the other contenders: it asks for the holes of the complete disk
//! first, and then only reads or writes the data. Each thread has connections of its own, and the
//! threads share nothing but a counter. Nothing is retried, examined or reported. So what it takes
//! is the cost of the servers and of the kernel; what another program takes beyond this is its own.
//!
//! The space of each write to a file is allocated before it, which costs ext4 less than to reserve
//! it block by block. Nothing is written back, because that waits for the disk.
//!
//! `copy_floor file|server SOURCE file|server TARGET`; a server is named by its unix socket.

mod client;
mod ends;

use std::env;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use ends::{Place, Source, Target};

/// Bytes moved by one request: what nbdcopy and qemu-img move with one or more.
const PIECE_BYTES: u64 = 256 << 10;
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

/// Copies, and returns the number of bytes that were moved.
fn run(arguments: &[String]) -> io::Result<u64> {
    let [from, source, to, target] = arguments else { return Err(usage()) };
    let place = |kind: &String, path| match kind.as_str() {
        "server" => Ok(Place::Server(Path::new(path))),
        "file" => Ok(Place::File(Path::new(path))),
        _ => Err(usage()),
    };
    let (from, to) = (place(from, source)?, place(to, target)?);
    let mut first = Source::open(from)?;
    let size = first.size()?;
    to.prepare(size)?;
    let longest = match (from, to) {
        (Place::File(_), Place::File(_)) => FILE_PIECE_BYTES,
        _ => PIECE_BYTES,
    };
    let pieces = Pieces::new(&first.data()?, longest);
    // A server that is written to has work for the other cores, and more connections cost it more.
    let threads = match to {
        Place::File(_) => thread::available_parallelism().map_or(1, usize::from),
        Place::Server(_) => 1,
    };
    thread::scope(|scope| {
        let mut sources = vec![first];
        while sources.len() < threads {
            sources.push(Source::open(from)?);
        }
        let copy = |source| pieces.copy(source, Target::open(to)?);
        let running = sources.into_iter().map(|source| scope.spawn(move || copy(source)));
        let running: Vec<_> = running.collect();
        running.into_iter().try_fold(0, |moved, thread| {
            let ended = thread.join().unwrap_or_else(|_| Err(io::Error::other("it panicked")));
            Ok(moved + ended?)
        })
    })
}

fn usage() -> io::Error {
    let usage = "usage: copy_floor file|server SOURCE file|server TARGET";
    io::Error::new(ErrorKind::InvalidInput, usage)
}

/// The data of the disk in pieces, each of which is taken once.
struct Pieces {
    longest: u64,
    all: Vec<Range<u64>>,
    next: AtomicUsize,
}

impl Pieces {
    fn new(extents: &[Range<u64>], longest: u64) -> Self {
        let mut all = Vec::new();
        for extent in extents {
            let mut start = extent.start;
            while start < extent.end {
                let end = extent.end.min(start - start % longest + longest);
                all.push(start..end);
                start = end;
            }
        }
        Self { longest, all, next: AtomicUsize::new(0) }
    }

    fn take(&self) -> Option<Range<u64>> {
        self.all.get(self.next.fetch_add(1, Ordering::Relaxed)).cloned()
    }

    /// Copies one piece after the other until none is left; returns the bytes moved.
    fn copy(&self, mut source: Source, mut target: Target) -> io::Result<u64> {
        let mut buffer = vec![0; self.longest as usize];
        let (mut waiting, mut moved) = (0, 0);
        loop {
            while waiting < source.depth() {
                let Some(piece) = self.take() else { break };
                source.ask(piece);
                waiting += 1;
            }
            if waiting == 0 {
                target.finish()?;
                return Ok(moved);
            }
            let piece = source.receive(&mut buffer)?;
            waiting -= 1;
            let length = piece.end - piece.start;
            target.write(piece.start, &buffer[..length as usize])?;
            moved += length;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    use nbd_server::export::{ExportEntry, MemoryExport};
    use nbd_server::{ExportRegistry, ListenAddress, Server, ServerConfig};

    use super::*;

    #[tokio::test]
    async fn data_and_holes_arrive_between_every_pair_of_ends() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = |name: &str| directory.path().join(name).display().to_string();
        let file = File::create(path("source")).expect("created");
        for offset in [3 << 20, 12 << 20, 40 << 20] {
            file.write_all_at(&[7; 800_000], offset).expect("written");
        }
        file.set_len(64 << 20).expect("longer");
        let mut running = Vec::new();
        for name in ["first.sock", "second.sock"] {
            let exports = ExportRegistry::new();
            let disk = MemoryExport::new(64 << 20);
            exports.add("", ExportEntry::new(Arc::new(disk))).expect("a new name");
            let mut server = Server::new(ServerConfig::default(), exports);
            let socket = ListenAddress::Unix(path(name).into());
            server.listen(&socket).await.expect("listens");
            running.push(tokio::spawn(server.serve(std::future::pending::<()>())));
        }
        for ends in [
            ["file", "source", "server", "first.sock"],
            ["server", "first.sock", "server", "second.sock"],
            ["server", "second.sock", "file", "back"],
            ["file", "back", "file", "target"],
        ] {
            let [from, source, to, target] = ends;
            let ends = [from.to_owned(), path(source), to.to_owned(), path(target)];
            let copied = tokio::task::spawn_blocking(move || run(&ends)).await.expect("ended");
            let moved = copied.expect("copied");
            assert!((3 * 800_000..64 << 20).contains(&moved), "{from} to {to}: {moved}");
        }
        running.iter().for_each(tokio::task::JoinHandle::abort);
        let [from, to] = ["source", "target"].map(|name| fs::read(path(name)).expect("read"));
        assert!(from == to);
    }

    #[test]
    fn a_source_that_is_missing_and_an_end_of_another_kind_are_errors() {
        let run = |ends: [&str; 4]| run(&ends.map(str::to_owned));
        assert!(run(["server", "/nonexistent/source", "server", "-"]).is_err());
        assert_eq!(run(["file", "a", "disk", "b"]).unwrap_err().kind(), ErrorKind::InvalidInput);
    }

    #[test]
    fn pieces_end_at_multiples_of_their_length_and_with_the_data() {
        let pieces = Pieces::new(&[5..25, 30..31], 10);
        assert_eq!(pieces.all, [5..10, 10..20, 20..25, 30..31]);
    }
}
