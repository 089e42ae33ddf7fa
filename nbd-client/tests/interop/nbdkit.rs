//! nbdkit, whose filters simulate faulty and old servers.

use nbd_client::{
    ApiMisuse, BlockSizes, Bytes, Durability, Errno, Error, Protocol, ReplyMode, Scope,
};

use crate::common::{Peer, have, nbdkit, pattern, span};

const MIB: usize = 1 << 20;

async fn pattern_is_read(peer: &Peer) {
    let client = peer.connector().connect().await.unwrap();
    assert_eq!(client.info().size, MIB as u64);
    assert_eq!(client.read(span(0, MIB)).await.unwrap(), pattern(MIB));
    client.disconnect().await.unwrap();
}

#[tokio::test]
async fn old_and_masked_handshakes_lead_to_the_same_disk() {
    if !have("nbdkit") {
        return;
    }
    let cases: [(&[&str], Protocol, ReplyMode); 6] = [
        (&[], Protocol::NewstyleFixed, ReplyMode::Structured),
        (&["--no-sr"], Protocol::NewstyleFixed, ReplyMode::Simple),
        (&["--mask-handshake=0"], Protocol::Newstyle, ReplyMode::Simple),
        (&["--mask-handshake=1"], Protocol::NewstyleFixed, ReplyMode::Structured),
        (&["--mask-handshake=2"], Protocol::Newstyle, ReplyMode::Simple),
        (&["-o"], Protocol::Oldstyle, ReplyMode::Simple),
    ];
    for (options, protocol, mode) in cases {
        let arguments: Vec<&str> = options.iter().copied().chain(["pattern", "1M"]).collect();
        let peer = nbdkit(&arguments, &[]).await;
        pattern_is_read(&peer).await;
        let client = peer.connector().connect().await.unwrap();
        assert_eq!((client.protocol(), client.reply_mode()), (protocol, mode), "{options:?}");
        let server = peer.connector().inspect(Scope::ThisExport).await.unwrap();
        assert_eq!(server.protocol, protocol, "{options:?}");
        assert_eq!(server.reply_mode, mode, "{options:?}");
        assert_eq!(server.exports[0].size, MIB as u64, "{options:?}");
        let list = peer.connector().list().await;
        if protocol == Protocol::NewstyleFixed {
            list.unwrap();
        } else {
            assert!(matches!(list, Err(Error::Unsupported { .. })), "{options:?}: {list:?}");
        }
    }
}

#[tokio::test]
async fn an_oldstyle_server_has_no_names() {
    if !have("nbdkit") {
        return;
    }
    let peer = nbdkit(&["-o", "memory", "1M"], &[]).await;
    let error = peer.connector_to("disk").connect().await.unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
}

#[tokio::test]
async fn errors_of_the_export_fail_requests_and_leave_the_connection_alone() {
    if !have("nbdkit") {
        return;
    }
    for option in [&[][..], &["--no-sr"]] {
        let arguments = ["--filter=error", "memory", "1M", "error-pwrite=ENOSPC"];
        let arguments = [option, &arguments, &["error-pwrite-rate=100%", "error-pread-rate=0"]];
        let peer = nbdkit(&arguments.concat(), &[]).await;
        let client = peer.connector().connect().await.unwrap();
        for offset in [0, 4096] {
            let data = Bytes::from_static(&[1; 512]);
            let error = client.write(offset, data, Durability::Cached).await.unwrap_err();
            assert_eq!(error.errno(), Some(Errno::ENOSPC), "{error}");
            let text = error.to_string();
            assert!(text.starts_with("WRITE of 512 bytes at offset"), "{text}");
        }
        assert_eq!(client.read(0..512).await.unwrap(), vec![0; 512]);
        client.disconnect().await.unwrap();
    }
}

#[tokio::test]
async fn replies_in_any_order_find_their_requests() {
    if !have("nbdkit") {
        return;
    }
    // The server answers from 16 threads: replies overtake each other.
    let arguments = ["--filter=delay", "-t", "16", "pattern", "1M", "rdelay=20ms"];
    let peer = nbdkit(&arguments, &[]).await;
    let client = peer.connector().connect().await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for index in 0..64_u64 {
        let client = client.clone();
        tasks.spawn(async move {
            let offset = index * 4096;
            let data = client.read(span(offset, 4096)).await.unwrap();
            assert_eq!(data, pattern(MIB)[offset as usize..][..4096]);
        });
    }
    while let Some(result) = tasks.join_next().await {
        result.unwrap();
    }
}

#[tokio::test]
async fn a_minimum_block_size_is_told_and_obeyed() {
    if !have("nbdkit") {
        return;
    }
    let arguments = [
        "--filter=blocksize-policy",
        "memory",
        "1M",
        "blocksize-minimum=4096",
        "blocksize-preferred=65536",
        "blocksize-maximum=131072",
        "blocksize-error-policy=error",
    ];
    let peer = nbdkit(&arguments, &[]).await;
    let client = peer.connector().connect().await.unwrap();
    let sizes = BlockSizes::new(4096, 65_536, 131_072).unwrap();
    assert_eq!(client.info().block_sizes, Some(sizes));
    let unaligned = client.read(512..4608).await;
    assert!(
        matches!(unaligned, Err(Error::Misuse(ApiMisuse::Unaligned { minimum: 4096, .. }))),
        "{unaligned:?}"
    );
    // The server would refuse a single request of this length.
    let data = Bytes::from(pattern(512 * 1024));
    client.write(4096, data.clone(), Durability::Cached).await.unwrap();
    assert_eq!(client.read(span(4096, data.len())).await.unwrap(), data);
}

#[tokio::test]
async fn a_server_that_goes_away_fails_the_requests_in_flight() {
    if !have("nbdkit") {
        return;
    }
    let mut peer = nbdkit(&["--filter=delay", "pattern", "1M", "rdelay=60"], &[]).await;
    let client = peer.connector().connect().await.unwrap();
    let other = client.clone();
    let read = tokio::spawn(async move { other.read(0..4096).await });
    tokio::task::yield_now().await;
    peer.stop().await;
    let error = read.await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Lost { .. }), "{error}");
    let error = client.read(0..1).await.unwrap_err();
    assert!(matches!(error, Error::Lost { .. }), "the next request says it as well: {error}");
}
