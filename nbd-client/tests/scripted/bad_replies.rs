//! Replies that do not match their requests end the connection with an error that names the reason.

use nbd_client::{Error, ExtentLimit, LostConnection, ProtocolError, ReplyMode};

use crate::script::{
    CONTEXT, DATA, ERROR, ERROR_OFFSET, HOLE, NONE, STATUS, STATUS_EXT, bytes, chunk, connected,
    guarded, simple, span,
};

const OFFSET: u64 = 8192;
const LENGTH: u64 = 4096;

/// The first cookie of a connection.
const COOKIE: u64 = 1;

fn extent(length: u32, flags: u32) -> Vec<u8> {
    bytes![length.to_be_bytes(), flags.to_be_bytes()]
}

fn data(offset: u64, length: usize) -> Vec<u8> {
    bytes![offset.to_be_bytes(), vec![1; length]]
}

fn hole(offset: u64, length: u32) -> Vec<u8> {
    bytes![offset.to_be_bytes(), length.to_be_bytes()]
}

fn error(errno: u32, message_len: u16, rest: &[u8]) -> Vec<u8> {
    bytes![errno.to_be_bytes(), message_len.to_be_bytes(), rest]
}

/// Asks, lets the server answer with `reply`, and gives the error.
async fn ask(mode: ReplyMode, status: bool, reply: Vec<u8>) -> Error {
    let client = connected(mode, move |mut server| async move {
        let first = server.request().await?;
        assert_eq!(first.cookie, COOKIE);
        server.request().await?;
        server.send(&reply).await?;
        server.closed().await;
        Ok(())
    })
    .await;
    // A second request that never gets an answer has to fail with the first.
    let bystander = client.clone();
    let asked = client.clone();
    let first = async move {
        if status {
            asked.block_status(span(OFFSET, LENGTH), ExtentLimit::One).await.map(drop)
        } else {
            asked.read(span(OFFSET, LENGTH as usize)).await.map(drop)
        }
    };
    let (first, second) = guarded(async { tokio::join!(first, bystander.flush()) }).await;
    let second = second.expect_err("the connection is over");
    assert!(matches!(second, Error::Lost { .. }), "{second}");
    let third = guarded(client.flush()).await.expect_err("and stays over");
    assert!(matches!(third, Error::Lost { .. }), "{third}");
    first.expect_err("a bad reply")
}

fn because(error: &Error) -> String {
    let Error::Lost { reason: LostConnection::Protocol(protocol), .. } = error else {
        panic!("{error:?} is not the server's fault")
    };
    match protocol {
        ProtocolError::BadChunk { why, .. } => (*why).to_owned(),
        other => other.to_string(),
    }
}

#[tokio::test]
async fn a_bad_answer_to_a_read_is_refused() {
    let mode = ReplyMode::Structured;
    let one = |done, kind, body: Vec<u8>| chunk(mode, done, kind, COOKIE, OFFSET, &body);
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (chunk(mode, true, DATA, 77, OFFSET, &data(OFFSET, 4096)), "not in flight"),
        (simple(0, 77), "not in flight"),
        (simple(0, COOKIE), "needs chunks"),
        (one(true, DATA, data(OFFSET - 1, 4096)), "before the request"),
        (one(true, DATA, data(OFFSET + 1, 4096)), "after the request"),
        (one(true, DATA, data(u64::MAX - 2, 4096)), "after the request"),
        (one(true, DATA, data(OFFSET, 4097)), "longer than the request"),
        (one(true, DATA, data(OFFSET, 0)), "too short"),
        (one(true, DATA, data(OFFSET, 4095)), "never sent"),
        (one(true, NONE, vec![]), "never sent"),
        (one(false, NONE, vec![]), "last"),
        (one(true, NONE, vec![0]), "payload"),
        (one(true, HOLE, hole(OFFSET, 0)), "empty"),
        (one(true, HOLE, hole(OFFSET, 4097)), "after the request"),
        (one(true, HOLE, hole(OFFSET + 4095, u32::MAX)), "after the request"),
        (one(true, HOLE, vec![0; 13]), "12 bytes"),
        (one(true, STATUS, bytes![CONTEXT.to_be_bytes(), extent(4096, 0)]), "does not answer"),
        (one(true, 99, vec![]), "does not answer"),
        (
            bytes![
                one(false, DATA, data(OFFSET, 2048)),
                one(true, DATA, data(OFFSET + 2047, 2049))
            ],
            "before",
        ),
        (
            bytes![one(false, HOLE, hole(OFFSET + 1, 10)), one(true, DATA, data(OFFSET, 4096))],
            "before",
        ),
        (bytes![one(false, DATA, data(OFFSET, 4096)), one(true, HOLE, hole(OFFSET, 1))], "before"),
        (one(true, ERROR, error(0, 0, &[])), "zero"),
        (one(true, ERROR, error(5, 9, b"short")), "longer than the chunk"),
        (one(true, ERROR, vec![0; 5]), "impossible"),
        (one(true, ERROR_OFFSET, error(5, 0, &(OFFSET + 4096).to_be_bytes())), "outside"),
        (chunk(ReplyMode::Extended, true, NONE, COOKIE, OFFSET, &[]), "a reply"),
        (b"HTTP/1.1 400 Bad Request".to_vec(), "a reply"),
    ];
    for (index, (reply, expected)) in cases.into_iter().enumerate() {
        let why = because(&ask(mode, false, reply).await);
        assert!(why.contains(expected), "case {index}: {why:?} does not say {expected:?}");
    }
}

#[tokio::test]
async fn error_chunks_without_end_are_refused() {
    for mode in [ReplyMode::Structured, ReplyMode::Extended] {
        for message in [vec![], vec![b'x'; 4000]] {
            let length = u16::try_from(message.len()).unwrap();
            let one = chunk(mode, false, ERROR, COOKIE, OFFSET, &error(5, length, &message));
            let end = chunk(mode, true, NONE, COOKIE, OFFSET, &[]);
            // Many are legal: a READ may meet many bad sectors.
            let many = [one.repeat(200), end].concat();
            let client = connected(mode, move |mut server| async move {
                server.request().await?;
                server.send(&many).await?;
                server.closed().await;
                Ok(())
            })
            .await;
            let told = guarded(client.read(span(OFFSET, LENGTH as usize))).await.unwrap_err();
            assert!(matches!(told, Error::Request { .. }), "{told}");
            drop(client);
            for status in [false, true] {
                let why = because(&ask(mode, status, one.repeat(2000)).await);
                assert!(why.contains("too many"), "{why}");
            }
        }
    }
}

#[tokio::test]
async fn holes_that_lie_outside_overlap_or_are_empty_are_refused_as_pieces_too() {
    for mode in [ReplyMode::Structured, ReplyMode::Extended] {
        let one = |done, body: Vec<u8>| chunk(mode, done, HOLE, COOKIE, OFFSET, &body);
        let cases = [
            (one(true, hole(OFFSET, 0)), "empty"),
            (one(true, hole(OFFSET - 1, 4096)), "before the request"),
            (one(true, hole(OFFSET, 4097)), "after the request"),
            (one(true, hole(u64::MAX, u32::MAX)), "after the request"),
            (bytes![one(false, hole(OFFSET, 10)), one(true, hole(OFFSET + 9, 4087))], "before"),
            (one(true, hole(OFFSET, 4095)), "never sent"),
        ];
        for (reply, expected) in cases {
            let client = connected(mode, move |mut server| async move {
                server.request().await?;
                server.send(&reply).await?;
                server.closed().await;
                Ok(())
            })
            .await;
            let memory = nbd_client::ReadMemory::new(1);
            memory.give_back(b"what is left over".to_vec().into());
            let read =
                guarded(client.read_chunks_into(span(OFFSET, LENGTH as usize), &memory)).await;
            let why = because(&read.expect_err("a bad reply"));
            assert!(why.contains(expected), "{mode:?}: {why:?} does not say {expected:?}");
        }
    }
}

#[tokio::test]
async fn a_bad_answer_to_a_block_status_is_refused() {
    let mode = ReplyMode::Structured;
    let id = CONTEXT.to_be_bytes();
    let one = |done, body: Vec<u8>| chunk(mode, done, STATUS, COOKIE, OFFSET, &body);
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (one(true, bytes![99_u32.to_be_bytes(), extent(4096, 0)]), "not requested"),
        (one(true, bytes![id, extent(0, 0)]), "empty"),
        (one(true, bytes![id, extent(512, 0), extent(512, 1)]), "one extent"),
        (one(true, bytes![id]), "impossible"),
        (one(true, bytes![id, extent(512, 0), [0]]), "impossible"),
        (
            bytes![one(false, bytes![id, extent(512, 0)]), one(true, bytes![id, extent(512, 0)])],
            "answered before",
        ),
        (chunk(mode, true, NONE, COOKIE, OFFSET, &[]), "never answered"),
        (chunk(mode, true, DATA, COOKIE, OFFSET, &data(OFFSET, 512)), "does not answer"),
        (simple(0, COOKIE), "cannot carry"),
    ];
    for (index, (reply, expected)) in cases.into_iter().enumerate() {
        let why = because(&ask(mode, true, reply).await);
        assert!(why.contains(expected), "case {index}: {why:?} does not say {expected:?}");
    }
}

#[tokio::test]
async fn a_bad_extended_answer_is_refused() {
    let mode = ReplyMode::Extended;
    let id = CONTEXT.to_be_bytes();
    let read = |offset, kind, body: Vec<u8>| chunk(mode, true, kind, COOKIE, offset, &body);
    let status = |body: Vec<u8>| chunk(mode, true, STATUS_EXT, COOKIE, OFFSET, &body);
    let wide = |length: u64| bytes![length.to_be_bytes(), u64::MAX.to_be_bytes()];
    let cases: Vec<(bool, Vec<u8>, &str)> = vec![
        (false, read(OFFSET + 1, DATA, data(OFFSET, 4096)), "offset is not"),
        (false, simple(5, COOKIE), "extended headers"),
        (false, read(OFFSET, STATUS_EXT, vec![0; 24]), "does not answer"),
        (false, chunk(ReplyMode::Structured, true, NONE, COOKIE, 0, &[]), "a reply"),
        (true, status(bytes![id, 2_u32.to_be_bytes(), wide(512)]), "count"),
        (true, status(bytes![id, 0_u32.to_be_bytes(), wide(512)]), "count"),
        (true, status(bytes![id, 1_u32.to_be_bytes(), wide(0)]), "empty"),
        (true, status(bytes![id, 0_u32.to_be_bytes()]), "impossible"),
        (true, read(OFFSET, STATUS, bytes![id, extent(512, 0)]), "does not answer"),
    ];
    for (index, (block_status, reply, expected)) in cases.into_iter().enumerate() {
        let why = because(&ask(mode, block_status, reply).await);
        assert!(why.contains(expected), "case {index}: {why:?} does not say {expected:?}");
    }
}

#[tokio::test]
async fn a_chunk_that_announces_too_much_is_refused_before_it_arrives() {
    // 4 GiB less a byte of descriptors, of which not one is sent.
    let header = bytes![
        0x668e_33ef_u32.to_be_bytes(),
        [0, 1],
        STATUS.to_be_bytes(),
        COOKIE.to_be_bytes(),
        u32::MAX.to_be_bytes(),
    ];
    let why = because(&ask(ReplyMode::Structured, true, header).await);
    assert!(why.contains("impossible"), "{why}");
}

#[tokio::test]
async fn a_reply_to_nothing_ends_the_connection() {
    let client = connected(ReplyMode::Structured, |mut server| async move {
        server.send(&simple(0, 77)).await?;
        server.closed().await;
        Ok(())
    })
    .await;
    let error = guarded(client.flush()).await.expect_err("nothing can be trusted any more");
    assert!(because(&error).contains("0x4d"), "{error}");
}

#[tokio::test]
async fn random_bytes_are_never_a_panic_or_a_hang() {
    for seed in 0..300_u64 {
        for mode in [ReplyMode::Simple, ReplyMode::Structured, ReplyMode::Extended] {
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let mut random = move || {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state
            };
            // A header that is right up to a point, then anything.
            let mut reply = match mode {
                ReplyMode::Simple => simple(0, COOKIE),
                _ => chunk(mode, true, DATA, COOKIE, OFFSET, &data(OFFSET, 64)),
            };
            let from = random() as usize % reply.len();
            for byte in &mut reply[from..] {
                *byte = random() as u8;
            }
            let client = connected(mode, move |mut server| async move {
                server.request().await?;
                server.send(&reply).await
            })
            .await;
            let read = guarded(client.read(span(OFFSET, 64))).await;
            // A task that panicked leaves its callers with `Closed`.
            assert!(!matches!(read, Err(Error::Closed)), "seed {seed}, {mode:?}");
            assert!(read.is_err() || from >= 4, "seed {seed}, {mode:?}: the magic was wrong");
        }
    }
}
