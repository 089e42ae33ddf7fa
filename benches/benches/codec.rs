//! Encoding and decoding of headers and chunks, in every reply mode.

mod shared;

use std::hint::black_box;

use bytes::BytesMut;
use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use nbd_proto::transmission::client::{self, Event};
use nbd_proto::transmission::server::{self, Parsed};
use nbd_proto::transmission::{
    Command, ExtentLimit, Fragmentation, Position, ReplyEncoder, RequestTag,
};
use nbd_proto::wire::{BlockDescriptor, CommandType, Cookie, MetaContextId, ReplyMode};

use shared::{MODES, negotiated};

/// Requests processed together, as after one read from a socket.
const REQUESTS: usize = 64;
const READ: Command = Command::Read(Fragmentation::Allowed);
const LENGTH: u64 = 4096;

fn codec(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec");
    group.throughput(Throughput::Elements(REQUESTS as u64));
    for (name, mode) in MODES {
        request_encode(&mut group, name, mode);
        request_parse(&mut group, name, mode);
        reply_encode(&mut group, name, mode);
        reply_decode(&mut group, name, mode);
    }
    for (name, mode) in MODES.into_iter().skip(1) {
        for count in [1, 100, 10_000] {
            group.throughput(Throughput::Elements(count as u64));
            block_status(&mut group, name, mode, count);
        }
    }
    group.finish();
}

/// The bytes of a client that has sent `REQUESTS` reads.
fn requests(client: &mut client::Transmission, out: &mut BytesMut) {
    for number in 0..REQUESTS as u64 {
        let sent = client.request(number * LENGTH, LENGTH, &READ, out);
        sent.expect("the request lies inside the disk");
    }
}

fn request_encode(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, mode: ReplyMode) {
    group.bench_function(BenchmarkId::new("request_encode", name), |bencher| {
        let mut out = BytesMut::with_capacity(1 << 16);
        bencher.iter_with_large_drop(|| {
            // The machine tracks the requests in flight, so each iteration needs a new one.
            let mut client = client::Transmission::new(&negotiated(mode));
            out.clear();
            requests(&mut client, &mut out);
            client
        });
    });
}

fn request_parse(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, mode: ReplyMode) {
    let mut bytes = BytesMut::new();
    requests(&mut client::Transmission::new(&negotiated(mode)), &mut bytes);
    let server = server::Transmission::new(&negotiated(mode));
    group.bench_function(BenchmarkId::new("request_parse", name), |bencher| {
        bencher.iter(|| {
            let mut rest = &bytes[..];
            while let Ok(Parsed::Request { request, consumed }) = server.parse(rest) {
                black_box(&request);
                rest = &rest[consumed..];
            }
            assert!(rest.is_empty());
        });
    });
}

fn tag(number: u64) -> RequestTag {
    RequestTag::new(Cookie(number + 1), CommandType::READ, number * LENGTH)
}

/// The headers of the answers; the data itself is not copied.
fn reply_encode(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, mode: ReplyMode) {
    let encoder = ReplyEncoder::new(mode);
    let mut out = vec![0; REQUESTS * ReplyEncoder::MAX_READ_HEADER_LEN];
    group.bench_function(BenchmarkId::new("reply_encode", name), |bencher| {
        bencher.iter(|| {
            let mut rest = &mut out[..];
            for number in 0..REQUESTS as u64 {
                let offset = number * LENGTH;
                encoder.data_header(tag(number), offset, LENGTH as u32, Position::Last, &mut rest);
            }
            black_box(rest.len())
        });
    });
}

/// All answers to the requests of [`requests`], data included.
fn replies(mode: ReplyMode) -> BytesMut {
    let encoder = ReplyEncoder::new(mode);
    let mut out = BytesMut::new();
    for number in 0..REQUESTS as u64 {
        let offset = number * LENGTH;
        encoder.data_header(tag(number), offset, LENGTH as u32, Position::Last, &mut out);
        out.resize(out.len() + LENGTH as usize, 0);
    }
    out
}

fn reply_decode(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, mode: ReplyMode) {
    let bytes = replies(mode);
    group.bench_function(BenchmarkId::new("reply_decode", name), |bencher| {
        bencher.iter_batched(
            || {
                let mut client = client::Transmission::new(&negotiated(mode));
                requests(&mut client, &mut BytesMut::new());
                (client, bytes.clone())
            },
            |(mut client, mut input)| {
                let mut finished = 0;
                while finished < REQUESTS {
                    match client.advance(&mut input).expect("the replies fit the requests") {
                        Event::Data { length, .. } => drop(black_box(input.split_to(length))),
                        Event::Finished { .. } => finished += 1,
                        other => panic!("{other:?}"),
                    }
                }
                (client, input)
            },
            criterion::BatchSize::SmallInput,
        );
    });
}

/// Encodes and decodes one status chunk with `count` descriptors.
fn block_status(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    mode: ReplyMode,
    count: usize,
) {
    let descriptors: Vec<_> = (0..count as u64)
        .map(|number| BlockDescriptor { length: 65536, flags: number % 2 * 3 })
        .collect();
    let tag = RequestTag::new(Cookie(1), CommandType::BLOCK_STATUS, 0);
    let encoder = ReplyEncoder::new(mode);
    let context = MetaContextId(0);
    let mut out = BytesMut::new();
    let encode = |out: &mut BytesMut| {
        out.clear();
        encoder.block_status(tag, context, &descriptors, Position::Last, out);
    };
    group.bench_function(BenchmarkId::new(format!("status_encode_{name}"), count), |bencher| {
        bencher.iter(|| encode(&mut out));
    });
    encode(&mut out);
    group.bench_function(BenchmarkId::new(format!("status_decode_{name}"), count), |bencher| {
        bencher.iter_batched(
            || {
                let mut client = client::Transmission::new(&negotiated(mode));
                let command = Command::BlockStatus(ExtentLimit::Many, None);
                let length = 65536 * count as u64;
                let sent = client.request(0, length, &command, &mut BytesMut::new());
                sent.expect("the request lies inside the disk");
                (client, out.clone())
            },
            |(mut client, mut input)| {
                let event = client.advance(&mut input).expect("the chunk fits the request");
                assert!(matches!(event, Event::BlockStatus { .. }));
                (event, input)
            },
            criterion::BatchSize::SmallInput,
        );
    });
}

criterion_group!(all, codec);
criterion_main!(all);
