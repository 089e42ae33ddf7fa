//! The request loop of a connection without sockets: it parses requests from a buffer, executes
//! them on a memory disk and collects the replies in one buffer.

mod shared;

use bytes::BytesMut;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use nbd_proto::transmission::server::{Parsed, Transmission};
use nbd_proto::transmission::{Command, Durability, Fragmentation, Position, ReplyEncoder, client};
use nbd_proto::wire::ReplyMode;
use nbd_server::export::{Export, Holes, MemoryExport};

use shared::{DISK_SIZE, MODES, negotiated};

const LENGTH: usize = 4096;

/// Answers every request in `input`; returns the number of bytes written to `out`.
fn serve(
    transmission: &Transmission,
    encoder: ReplyEncoder,
    disk: &dyn Export,
    mut input: &[u8],
    out: &mut [u8],
) -> usize {
    let whole = out.len();
    let mut rest = out;
    while let Parsed::Request { request, consumed } =
        transmission.parse(input).expect("the client keeps to the protocol")
    {
        input = &input[consumed..];
        let tag = request.tag();
        match request.command {
            Command::Read(_) => {
                let length = request.length as u32;
                encoder.data_header(tag, request.offset, length, Position::Last, &mut rest);
                let (data, behind) = rest.split_at_mut(length as usize);
                disk.try_read_at(request.offset, data, Holes::Told)
                    .expect("a disk in memory has no errors");
                rest = behind;
            }
            Command::Write(durability) => {
                let (payload, behind) = input.split_at(request.length as usize);
                disk.write_at(request.offset, payload, durability)
                    .expect("a disk in memory has no errors");
                input = behind;
                encoder.success(tag, &mut rest);
            }
            other => panic!("{other:?} was not sent"),
        }
    }
    whole - rest.len()
}

/// `depth` requests spread over the disk, as in the receive buffer.
fn requests(mode: ReplyMode, depth: usize, command: &Command) -> BytesMut {
    let mut client = client::Transmission::new(&negotiated(mode));
    let mut out = BytesMut::new();
    let payload = if let Command::Write(_) = command { LENGTH } else { 0 };
    for number in 0..depth as u64 {
        // Steps of a prime number of blocks, so that consecutive requests are not adjacent.
        let offset = number * 7919 * LENGTH as u64 % DISK_SIZE;
        let sent = client.request(offset, LENGTH as u64, command, &mut out);
        sent.expect("the request lies inside the disk");
        out.resize(out.len() + payload, 7);
    }
    out
}

fn request_loop(criterion: &mut Criterion) {
    let disk = MemoryExport::new(DISK_SIZE);
    let mut group = criterion.benchmark_group("request_loop");
    // Writes come first: the reads then find existing pages.
    for (what, command) in [
        ("write_4k", Command::Write(Durability::Cached)),
        ("read_4k", Command::Read(Fragmentation::Allowed)),
    ] {
        for (name, mode) in MODES {
            for depth in [1, 16, 64] {
                let input = requests(mode, depth, &command);
                let transmission = Transmission::new(&negotiated(mode));
                let encoder = ReplyEncoder::new(mode);
                let mut out = vec![0; depth * (LENGTH + ReplyEncoder::MAX_READ_HEADER_LEN)];
                group.throughput(Throughput::Elements(depth as u64));
                group.bench_function(
                    BenchmarkId::new(format!("{what}_{name}"), depth),
                    |bencher| {
                        bencher.iter(|| serve(&transmission, encoder, &disk, &input, &mut out));
                    },
                );
            }
        }
    }
    group.finish();
}

criterion_group!(all, request_loop);
criterion_main!(all);
