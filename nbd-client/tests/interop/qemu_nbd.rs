//! qemu-nbd: extended headers, every command, sparse files, several connections.

use std::num::NonZeroUsize;

use nbd_client::{
    AllocationFlags, ApiMisuse, Bytes, Durability, Errno, Error, ExtentLimit, MetaContextName,
    OptionReplyType, Protocol, ReadChunk, ReplyMode, Scope, Speed, TransmissionFlags, ZeroMode,
};

use crate::common::{have, pattern, qemu_nbd, span};

const MIB: usize = 1 << 20;

#[tokio::test]
async fn every_command_does_what_it_says_in_every_reply_mode() {
    if !have("qemu-nbd") {
        return;
    }
    for mode in [ReplyMode::Simple, ReplyMode::Structured, ReplyMode::Extended] {
        let peer =
            qemu_nbd(&["-x", "disk", "-D", "a text", "--discard=unmap"], &pattern(2 * MIB)).await;
        let client = peer.connector_to("disk").reply_mode(mode).connect().await.unwrap();
        assert_eq!(client.reply_mode(), mode);
        assert_eq!(client.protocol(), Protocol::NewstyleFixed);
        assert_eq!(client.info().size, 2 * MIB as u64);
        assert_eq!(client.info().description.as_deref(), Some("a text"));
        assert_eq!(client.info().block_sizes.unwrap().maximum_payload(), 32 << 20);

        let mut model = pattern(2 * MIB);
        assert_eq!(client.read(span(0, 2 * MIB)).await.unwrap(), model, "{mode:?}");
        assert_eq!(client.read(12345..13023).await.unwrap(), model[12345..][..678]);

        for (offset, length) in [(0, 1), (511, 4097), (70_000, 300_000)] {
            let data = vec![offset as u8 ^ 0xaa; length];
            model[offset..][..length].copy_from_slice(&data);
            client.write(offset as u64, data.into(), Durability::Fua).await.unwrap();
        }
        let zeroes = (65_536, 131_072);
        client
            .write_zeroes(
                span(zeroes.0, zeroes.1),
                ZeroMode::MayUnmap,
                Speed::Any,
                Durability::Cached,
            )
            .await
            .unwrap();
        model[zeroes.0 as usize..][..zeroes.1 as usize].fill(0);
        client.trim(span(MIB as u64, 65_536), Durability::Cached).await.unwrap();
        client.cache(span(0, MIB as u64)).await.unwrap();
        client.flush().await.unwrap();
        let (front, back) =
            (client.read(span(0, MIB)), client.read(span(MIB as u64 + 65_536, MIB - 65_536)));
        assert_eq!(front.await.unwrap(), model[..MIB], "{mode:?}");
        assert_eq!(back.await.unwrap(), model[MIB + 65_536..], "{mode:?}");
        client.disconnect().await.unwrap();
    }
}

#[tokio::test]
async fn holes_are_seen_by_block_status_and_by_reads() {
    if !have("qemu-nbd") {
        return;
    }
    for mode in [ReplyMode::Structured, ReplyMode::Extended] {
        let peer = qemu_nbd(&[], &[]).await;
        let disk =
            std::fs::File::options().write(true).open(peer.directory().join("disk")).unwrap();
        disk.set_len(6 << 30).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&disk, &[1; 65_536], 5 << 30).unwrap();
        drop(disk);
        let mut peer = peer;
        peer.restart().await;

        let allocation = MetaContextName::base_allocation();
        let unknown = MetaContextName::new("x-nobody:has-this").unwrap();
        let connector =
            peer.connector().reply_mode(mode).meta_contexts([unknown.clone(), allocation.clone()]);
        let client = connector.connect().await.unwrap();
        assert_eq!(client.meta_contexts(), std::slice::from_ref(&allocation));

        let mut extents = Vec::new();
        let mut stream = client.extents(&allocation, 0..client.info().size);
        while let Some(extent) = stream.next().await {
            let extent = extent.unwrap();
            extents.push((extent.offset, extent.length, extent.allocation()));
        }
        let hole = AllocationFlags::all();
        let expected = [
            (0, 5 << 30, hole),
            (5 << 30, 65_536, AllocationFlags::empty()),
            ((5 << 30) + 65_536, (1 << 30) - 65_536, hole),
        ];
        assert_eq!(extents, expected, "{mode:?}");

        let part = client.extents(&allocation, (5 << 30) + 4096..(5 << 30) + 8192).next().await;
        let part = part.unwrap().unwrap();
        assert_eq!((part.offset, part.length, part.flags), ((5 << 30) + 4096, 4096, 0));
        let error = client.extents(&unknown, 0..512).next().await.unwrap().unwrap_err();
        assert!(matches!(error, Error::Misuse(ApiMisuse::NotNegotiated { .. })), "{error}");

        let one = client.block_status(span(5 << 30, 1 << 20), ExtentLimit::One).await.unwrap();
        assert_eq!(one.len(), 1);
        assert_eq!(one[0].1.len(), 1);
        assert_eq!(one[0].1[0].length, 65_536);

        let chunks = client.read_chunks(span((5 << 30) - 65_536, 3 * 65_536)).await.unwrap();
        let data = Bytes::from(vec![1; 65_536]);
        let expected = [
            ReadChunk::Hole { offset: (5 << 30) - 65_536, length: 65_536 },
            ReadChunk::Data { offset: 5 << 30, data },
            ReadChunk::Hole { offset: (5 << 30) + 65_536, length: 65_536 },
        ];
        assert_eq!(chunks, expected, "{mode:?}");
        let flat = client.read(span((5 << 30) - 1, 65_538)).await.unwrap();
        assert_eq!((flat[0], flat[1], flat[65_536], flat[65_537]), (0, 1, 1, 0));
    }
}

#[tokio::test]
async fn a_range_longer_than_32_bits_is_zeroed_and_trimmed() {
    if !have("qemu-nbd") {
        return;
    }
    for mode in [ReplyMode::Structured, ReplyMode::Extended] {
        let mut peer = qemu_nbd(&["--discard=unmap"], &[]).await;
        let disk =
            std::fs::File::options().write(true).open(peer.directory().join("disk")).unwrap();
        disk.set_len(5 << 30).unwrap();
        peer.restart().await;
        let client = peer.connector().reply_mode(mode).connect().await.unwrap();
        let size = client.info().size;
        let last = size - 512;
        client.write(last, vec![9; 512].into(), Durability::Cached).await.unwrap();
        client
            .write_zeroes(span(0, size), ZeroMode::MayUnmap, Speed::Any, Durability::Cached)
            .await
            .unwrap();
        assert_eq!(client.read(span(last, 512)).await.unwrap(), vec![0; 512]);
        client.trim(span(0, size), Durability::Fua).await.unwrap();
    }
}

#[tokio::test]
async fn reads_and_writes_over_the_maximum_payload_are_split() {
    if !have("qemu-nbd") {
        return;
    }
    let length = 80 * MIB;
    let peer = qemu_nbd(&[], &[]).await;
    let disk = std::fs::File::options().write(true).open(peer.directory().join("disk")).unwrap();
    disk.set_len(length as u64 + 512).unwrap();
    let mut peer = peer;
    peer.restart().await;
    let client = peer.connector().connect().await.unwrap();
    let data = Bytes::from(pattern(length));
    client.write(512, data.clone(), Durability::Cached).await.unwrap();
    assert!(client.read(span(512, length)).await.unwrap() == data);
    let mut buffer = vec![0; length];
    client.read_into(512, &mut buffer).await.unwrap();
    assert!(buffer == data);
    let chunks = client.read_chunks(span(512, length)).await.unwrap();
    let mut expected = 512;
    for piece in &chunks {
        assert_eq!(piece.offset(), expected, "chunks have no gaps");
        expected += piece.length();
    }
    assert_eq!(expected, 512 + length as u64);
}

#[tokio::test]
async fn a_read_only_export_refuses_writes_before_they_are_sent() {
    if !have("qemu-nbd") {
        return;
    }
    let peer = qemu_nbd(&["-r"], &pattern(MIB)).await;
    let client = peer.connector().connect().await.unwrap();
    assert!(client.info().flags.contains(TransmissionFlags::READ_ONLY));
    let write = client.write(0, Bytes::from_static(b"x"), Durability::Cached).await;
    assert!(matches!(write, Err(Error::Misuse(ApiMisuse::NotNegotiated { .. }))), "{write:?}");
    let outside = client.read(span(MIB as u64 - 1, 2)).await;
    assert!(matches!(outside, Err(Error::Misuse(ApiMisuse::OutOfBounds { .. }))), "{outside:?}");
    assert_eq!(outside.unwrap_err().errno(), None::<Errno>);
    assert_eq!(client.read(span(MIB as u64, 0)).await.unwrap(), Bytes::new());
}

#[tokio::test]
async fn an_unknown_export_is_named_in_the_error() {
    if !have("qemu-nbd") {
        return;
    }
    let peer = qemu_nbd(&["-x", "disk"], &pattern(MIB)).await;
    for mode in [ReplyMode::Simple, ReplyMode::Extended] {
        let error = peer.connector_to("nope").reply_mode(mode).connect().await.unwrap_err();
        assert_eq!(error.option_reply(), Some(OptionReplyType::ERR_UNKNOWN), "{error}");
        assert!(error.to_string().contains("the export \"nope\""), "{error}");
    }
}

#[tokio::test]
async fn the_server_is_inspected_without_opening_the_export() {
    if !have("qemu-nbd") {
        return;
    }
    let peer = qemu_nbd(&["-x", "disk", "-D", "a text", "-A"], &pattern(MIB)).await;
    let connector = peer.connector_to("disk");
    let listed = connector.list().await.unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((&*listed[0].name, &*listed[0].description), ("disk", "a text"));
    let expected =
        vec![MetaContextName::base_allocation(), MetaContextName::qemu_allocation_depth()];
    assert_eq!(connector.list_meta_contexts(&[]).await.unwrap(), expected);
    let qemu = connector.list_meta_contexts(&["qemu:".to_owned()]).await.unwrap();
    assert_eq!(qemu, expected[1..]);

    for scope in [Scope::ThisExport, Scope::AllExports] {
        let server = connector.inspect(scope).await.unwrap();
        assert_eq!(server.protocol, Protocol::NewstyleFixed);
        assert_eq!(server.reply_mode, ReplyMode::Extended);
        let [export] = &*server.exports else { panic!("{server:?}") };
        assert_eq!(export.name, "disk");
        assert_eq!(export.description.as_deref(), Some("a text"));
        assert_eq!(export.size, MIB as u64);
        assert_eq!(export.meta_contexts, expected);
        assert!(export.flags.contains(TransmissionFlags::SEND_DF));
    }
    let error = peer.connector_to("nope").inspect(Scope::ThisExport).await.unwrap_err();
    assert_eq!(error.option_reply(), Some(OptionReplyType::ERR_UNKNOWN), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_tasks_share_several_connections() {
    if !have("qemu-nbd") {
        return;
    }
    let contents = pattern(4 * MIB);
    // qemu-nbd allows several connections to a read-only export.
    let peer = qemu_nbd(&["-r"], &contents).await;
    let connections = NonZeroUsize::new(4).unwrap();
    let client = peer.connector().connections(connections).connect().await.unwrap();
    assert_eq!(client.connections(), 4);
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..32_usize {
        let client = client.clone();
        let contents = contents.clone();
        tasks.spawn(async move {
            for round in 0..50 {
                let offset = (task * 7919 + round * 104_729) % (3 * MIB);
                let length = if round % 5 == 0 { 200_000 } else { 4096 };
                let data = client.read(span(offset as u64, length)).await.unwrap();
                assert!(data == contents[offset..][..length], "{length} bytes at {offset}");
            }
        });
    }
    while let Some(result) = tasks.join_next().await {
        result.unwrap();
    }
    client.disconnect().await.unwrap();
}
