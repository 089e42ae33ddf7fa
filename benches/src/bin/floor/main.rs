//! The floor of the benchmark: a server that answers every read from a constant buffer.
//!
//! It does the least work that any server has to do: one system call for all waiting requests, and
//! one for all their answers. Its time is the cost of the socket and of the client; the additional
//! time of another server is that server's own cost.
//!
//! `floor --socket PATH --size BYTES` serves until it is killed. `--file FILE` behind it answers
//! from a file instead, with a system call for each read; `--qcow2 FILE` from an image, without a
//! cache of tables; `--direct FILE` reads and writes a file without the page cache, by io_uring,
//! and `--direct-qcow2 FILE` an image whose every cluster is mapped.

mod direct;
mod protocol;
mod qcow2;
mod sys;

use std::env;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use direct::Disk;
use protocol::{
    FLAGS_READ_ONLY, FLAGS_WRITABLE, REQUEST_BYTES, Reply, Request, answer, negotiate, send,
};
use qcow2::Qcow2;

/// Bytes of requests that one read takes: more than any client here keeps in flight.
const RECEIVE_BYTES: usize = 256 << 10;
/// The constant data of every answer. Longer reads get it repeatedly.
const CONSTANT_BYTES: usize = 256 << 10;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("floor: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let ["--socket", socket, "--size", size, ref source @ ..] = arguments[..] else {
        return Err(usage());
    };
    let size: u64 = size.parse().map_err(|_| usage())?;
    let source = Arc::new(open(source, size)?);
    let listener = UnixListener::bind(socket)
        .map_err(|error| io::Error::new(error.kind(), format!("cannot bind {socket}: {error}")))?;
    for stream in listener.incoming() {
        let (stream, source) = (stream?, Arc::clone(&source));
        thread::spawn(move || {
            // A client that disconnects in the middle, like a probe, is not worth a message.
            if let Err(error) = serve(stream, size, &source)
                && error.kind() != ErrorKind::UnexpectedEof
                && error.kind() != ErrorKind::BrokenPipe
            {
                eprintln!("floor: {error}");
            }
        });
    }
    Ok(())
}

/// What the options say that is served.
fn open(options: &[&str], size: u64) -> io::Result<Source> {
    Ok(Source::Readable(match *options {
        [] => Readable::constant(),
        ["--file", file] => Readable::File(File::open(file)?),
        ["--qcow2", file] => Readable::Qcow2(Qcow2::open(Path::new(file))?),
        ["--direct", file] => return Disk::raw(Path::new(file), size).map(Source::Direct),
        ["--direct-qcow2", file] => return Disk::qcow2(Path::new(file), size).map(Source::Direct),
        _ => return Err(usage()),
    }))
}

fn usage() -> io::Error {
    io::Error::new(
        ErrorKind::InvalidInput,
        "usage: floor --socket PATH --size BYTES [--file FILE | --qcow2 FILE | --direct FILE | \
         --direct-qcow2 FILE]",
    )
}

/// What is served.
enum Source {
    Readable(Readable),
    /// Without the page cache, to read and to write.
    Direct(Disk),
}

/// What is only read.
enum Readable {
    Constant(Vec<u8>),
    File(File),
    Qcow2(Qcow2),
}

impl Readable {
    fn constant() -> Self {
        Self::Constant(vec![0x5a; CONSTANT_BYTES])
    }
}

fn serve(mut stream: UnixStream, size: u64, source: &Source) -> io::Result<()> {
    let flags = match source {
        Source::Readable(_) => FLAGS_READ_ONLY,
        Source::Direct(_) => FLAGS_WRITABLE,
    };
    if !negotiate(&mut stream, size, flags)? {
        return Ok(());
    }
    match source {
        Source::Readable(source) => transmit(&mut stream, size, source),
        Source::Direct(disk) => direct::transmit(&mut stream, disk),
    }
}

/// Answers requests until the client sends DISC.
fn transmit(stream: &mut UnixStream, size: u64, source: &Readable) -> io::Result<()> {
    let mut data = Vec::new();
    let mut received = vec![0; RECEIVE_BYTES];
    let mut filled = 0;
    let mut replies = Vec::new();
    loop {
        let count = stream.read(&mut received[filled..])?;
        if count == 0 {
            return Ok(());
        }
        filled += count;
        replies.clear();
        let (requests, _) = received[..filled].as_chunks::<REQUEST_BYTES>();
        let whole = requests.len() * REQUEST_BYTES;
        let mut is_over = false;
        for request in requests {
            match answer(&Request::parse(request)?, size)? {
                Some(reply) => replies.push(reply),
                None => is_over = true,
            }
        }
        let payloads = match source {
            Readable::Constant(constant) => constant,
            Readable::File(file) => {
                let read = |offset, data: &mut [u8]| file.read_exact_at(data, offset);
                read_all(read, &mut replies, &mut data)?;
                &data
            }
            Readable::Qcow2(image) => {
                let read = |offset, data: &mut [u8]| image.read(offset, data);
                read_all(read, &mut replies, &mut data)?;
                &data
            }
        };
        send(stream, &replies, payloads)?;
        if is_over {
            return Ok(());
        }
        received.copy_within(whole..filled, 0);
        filled -= whole;
    }
}

/// Reads what the replies ask for into `data`, one behind the other.
fn read_all(
    read: impl Fn(u64, &mut [u8]) -> io::Result<()>,
    replies: &mut [Reply],
    data: &mut Vec<u8>,
) -> io::Result<()> {
    let mut end = 0;
    for reply in replies {
        reply.start = end;
        end += reply.payload_length;
        if data.len() < end {
            data.resize(end, 0);
        }
        read(reply.offset, &mut data[reply.start..end])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::protocol::{
        COMMAND_DISCONNECT, COMMAND_FLAG_FUA, COMMAND_FLUSH, COMMAND_READ, COMMAND_WRITE,
        ERROR_INVALID, REQUEST_MAGIC, read_array,
    };

    fn request(command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
        request_with(0, command, cookie, (offset, length))
    }

    fn request_with(flags: u16, command: u16, cookie: u64, range: (u64, u32)) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(REQUEST_MAGIC.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(range.0.to_be_bytes());
        bytes.extend(range.1.to_be_bytes());
        bytes
    }

    fn connect(size: u64) -> UnixStream {
        connect_to(size, Source::Readable(Readable::constant()))
    }

    /// A client that went through the handshake with GO.
    fn connect_to(size: u64, source: Source) -> UnixStream {
        let (mut client, server) = UnixStream::pair().expect("socket pair");
        thread::spawn(move || serve(server, size, &source));
        let greeting: [u8; 18] = read_array(&mut client).expect("greeting");
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        let mut hello = vec![0, 0, 0, 3];
        hello.extend(b"IHAVEOPT");
        hello.extend([0, 0, 0, 7, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0]);
        client.write_all(&hello).expect("sent");
        let replies: [u8; 20 + 12 + 20] = read_array(&mut client).expect("information and ack");
        assert_eq!(replies[22..30], size.to_be_bytes());
        client
    }

    #[test]
    fn reads_are_answered_in_order_with_the_constant() {
        let mut client = connect(1 << 30);
        let mut requests = request(COMMAND_READ, 7, 0, 5);
        requests.extend(request(COMMAND_READ, 8, 4096, 300 << 10));
        client.write_all(&requests).expect("sent");
        for (cookie, length) in [(7_u64, 5), (8, 300 << 10)] {
            let header: [u8; 16] = read_array(&mut client).expect("header");
            assert_eq!(header[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
            assert_eq!(header[8..], cookie.to_be_bytes());
            let mut payload = vec![0; length];
            client.read_exact(&mut payload).expect("payload");
            assert!(payload.iter().all(|byte| *byte == 0x5a));
        }
    }

    #[test]
    fn requests_may_arrive_in_pieces() {
        let mut client = connect(1 << 20);
        for byte in request(COMMAND_READ, 1, 0, 1) {
            client.write_all(&[byte]).expect("sent");
        }
        let reply: [u8; 17] = read_array(&mut client).expect("reply");
        assert_eq!(reply[16], 0x5a);
    }

    #[test]
    fn reads_past_the_end_are_refused_and_goodbye_ends() {
        let mut client = connect(1 << 20);
        client.write_all(&request(COMMAND_READ, 1, 1 << 20, 1)).expect("sent");
        let reply: [u8; 16] = read_array(&mut client).expect("reply");
        assert_eq!(reply[4..8], ERROR_INVALID.to_be_bytes());
        client.write_all(&request(COMMAND_READ, 2, u64::MAX, 1)).expect("sent");
        let reply: [u8; 16] = read_array(&mut client).expect("reply");
        assert_eq!(reply[4..8], ERROR_INVALID.to_be_bytes());
        client.write_all(&request(COMMAND_DISCONNECT, 3, 0, 0)).expect("sent");
        assert_eq!(client.read(&mut [0]).expect("end of stream"), 0);
    }

    #[test]
    fn a_file_without_the_page_cache_keeps_what_is_written() {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("directory");
        let path = directory.path().join("disk.img");
        std::fs::write(&path, vec![1; 64 << 10]).expect("written");
        let disk = match Disk::raw(&path, 64 << 10) {
            Ok(disk) => disk,
            Err(error) => return eprintln!("skipped: no direct I/O here: {error}"),
        };
        let mut client = connect_to(64 << 10, Source::Direct(disk));
        for at in (0..16_u64).rev() {
            let flags = if at % 2 == 0 { COMMAND_FLAG_FUA } else { 0 };
            let mut bytes = request_with(flags, COMMAND_WRITE, at, (at * 4096, 4096));
            bytes.extend(vec![at as u8; 4096]);
            client.write_all(&bytes).expect("sent");
        }
        client.write_all(&request(COMMAND_FLUSH, 16, 0, 0)).expect("sent");
        let mut cookies: Vec<u64> = (0..17)
            .map(|_| {
                let header: [u8; 16] = read_array(&mut client).expect("reply");
                assert_eq!(header[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
                u64::from_be_bytes(header[8..].try_into().expect("8 bytes"))
            })
            .collect();
        cookies.sort_unstable();
        assert_eq!(cookies, (0..17).collect::<Vec<_>>());
        client.write_all(&request(COMMAND_READ, 1, 5 * 4096, 4096)).expect("sent");
        let reply: [u8; 16 + 4096] = read_array(&mut client).expect("reply");
        assert!(reply[16..].iter().all(|byte| *byte == 5));
        client.write_all(&request(COMMAND_DISCONNECT, 3, 0, 0)).expect("sent");
        assert_eq!(client.read(&mut [0]).expect("end of stream"), 0);
        let bytes = std::fs::read(&path).expect("readable");
        assert!(bytes.chunks(4096).enumerate().all(|(at, block)| block == vec![at as u8; 4096]));
    }

    #[test]
    fn a_block_of_an_image_is_where_its_tables_say() {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("directory");
        let [raw, image] = ["raw", "qcow2"].map(|name| directory.path().join(name));
        let bytes: Vec<u8> = (0..80_u8).flat_map(|at| vec![at + 1; 4096]).collect();
        std::fs::write(&raw, &bytes).expect("written");
        let mut convert = std::process::Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", "qcow2"]).arg(&raw).arg(&image);
        assert!(convert.status().expect("qemu-img").success());
        let disk = match Disk::qcow2(&image, bytes.len() as u64) {
            Ok(disk) => disk,
            Err(error) => return eprintln!("skipped: no direct I/O here: {error}"),
        };
        let mut client = connect_to(bytes.len() as u64, Source::Direct(disk));
        let mut write = request(COMMAND_WRITE, 1, 17 * 4096, 4096);
        write.extend([200; 4096]);
        client.write_all(&write).expect("sent");
        let _: [u8; 16] = read_array(&mut client).expect("reply");
        for (block, expected) in [(17_u64, 200), (79, 80)] {
            client.write_all(&request(COMMAND_READ, 2, block * 4096, 4096)).expect("sent");
            let reply: [u8; 16 + 4096] = read_array(&mut client).expect("reply");
            assert!(reply[16..].iter().all(|byte| *byte == expected), "{block}");
        }
    }
}
