//! Unusual but legal answers.

use nbd_client::{Errno, Error, ExtentLimit, ReplyMode};

use crate::script::{
    CONTEXT, DATA, ERROR, ERROR_OFFSET, HOLE, NONE, STATUS, STATUS_EXT, bytes, connected, data_at,
    guarded, simple,
};

#[tokio::test]
async fn an_error_in_the_middle_of_a_read_fails_it_and_nothing_else() {
    for mode in [ReplyMode::Structured, ReplyMode::Extended] {
        let client = connected(mode, |mut server| async move {
            let read = server.request().await?;
            let body = bytes![read.offset.to_be_bytes(), data_at(read.offset, 512)];
            server.chunk(false, DATA, &read, &body).await?;
            let place = read.offset + 512;
            let message = b"bad sector";
            let error = bytes![5_u32.to_be_bytes(), [0, 10], message, place.to_be_bytes()];
            server.chunk(false, ERROR_OFFSET, &read, &error).await?;
            let later = bytes![(read.offset + 1024).to_be_bytes(), 512_u32.to_be_bytes()];
            server.chunk(false, HOLE, &read, &later).await?;
            server.chunk(true, NONE, &read, &[]).await?;
            let read = server.request().await?;
            server.answer_read(&read).await
        })
        .await;
        let error = guarded(client.read(4096..6144)).await.unwrap_err();
        assert_eq!(error.errno(), Some(Errno::EIO));
        let Error::Request { source, .. } = &error else { panic!("{error}") };
        assert_eq!((source.offset, &*source.message), (Some(4608), "bad sector"));
        assert_eq!(guarded(client.read(0..10)).await.unwrap(), data_at(0, 10), "{mode:?}");
    }
}

#[tokio::test]
async fn other_commands_than_reads_may_be_answered_simply() {
    let client = connected(ReplyMode::Structured, |mut server| async move {
        let flush = server.request().await?;
        server.send(&simple(0, flush.cookie)).await?;
        let flush = server.request().await?;
        server.send(&simple(28, flush.cookie)).await?;
        let status = server.request().await?;
        server.send(&simple(22, status.cookie)).await?;
        let flush = server.request().await?;
        let error = bytes![200_u32.to_be_bytes(), [0, 0]];
        server.chunk(true, ERROR, &flush, &error).await
    })
    .await;
    guarded(client.flush()).await.unwrap();
    assert_eq!(guarded(client.flush()).await.unwrap_err().errno(), Some(Errno::ENOSPC));
    let status = guarded(client.block_status(0..512, ExtentLimit::Many)).await;
    assert_eq!(status.unwrap_err().errno(), Some(Errno::EINVAL));
    assert_eq!(guarded(client.flush()).await.unwrap_err().errno(), Some(Errno(200)));
}

#[tokio::test]
async fn extents_that_reach_too_far_are_cut_and_short_answers_continued() {
    let client = connected(ReplyMode::Structured, |mut server| async move {
        // One descriptor at a time, neighbours alike, unknown bits, the last far too long.
        for (offset, length, flags) in
            [(100, 400_u32, 0_u32), (500, 100, 0x80), (600, 100, 3), (700, 99_999, 1)]
        {
            let status = server.request().await?;
            assert_eq!((status.offset, status.offset + status.length), (offset, 1000));
            let extent = bytes![length.to_be_bytes(), flags.to_be_bytes()];
            let body = bytes![CONTEXT.to_be_bytes(), extent];
            server.chunk(true, STATUS, &status, &body).await?;
        }
        server.goodbye().await;
        Ok(())
    })
    .await;
    let allocation = client.meta_contexts()[0].clone();
    let mut stream = client.extents(&allocation, 100..1000);
    let mut extents = Vec::new();
    while let Some(extent) = guarded(stream.next()).await {
        let extent = extent.unwrap();
        extents.push((extent.offset, extent.length, extent.flags));
    }
    assert_eq!(extents, [(100, 500, 0), (600, 100, 3), (700, 300, 1)]);
    assert!(guarded(stream.next()).await.is_none(), "the end is the end");
}

#[tokio::test]
async fn sixty_four_bit_extents_and_flags_are_understood() {
    let client = connected(ReplyMode::Extended, |mut server| async move {
        let status = server.request().await?;
        let extent = bytes![u64::MAX.to_be_bytes(), (1_u64 << 40 | 2).to_be_bytes()];
        let body = bytes![CONTEXT.to_be_bytes(), 1_u32.to_be_bytes(), extent];
        server.chunk(true, STATUS_EXT, &status, &body).await?;
        server.goodbye().await;
        Ok(())
    })
    .await;
    let allocation = client.meta_contexts()[0].clone();
    let size = client.info().size;
    let mut stream = client.extents(&allocation, 0..size);
    let extent = guarded(stream.next()).await.unwrap().unwrap();
    assert_eq!((extent.offset, extent.length, extent.flags), (0, size, 2));
}

#[tokio::test]
async fn data_in_many_small_chunks_out_of_order_is_put_together() {
    let client = connected(ReplyMode::Structured, |mut server| async move {
        for _ in 0..2 {
            let read = server.request().await?;
            let chunks = read.length / 64;
            for index in (0..chunks).rev() {
                let offset = read.offset + index * 64;
                if index % 3 == 0 {
                    let hole = bytes![offset.to_be_bytes(), 64_u32.to_be_bytes()];
                    server.chunk(false, HOLE, &read, &hole).await?;
                } else {
                    let data = bytes![offset.to_be_bytes(), data_at(offset, 64)];
                    server.chunk(false, DATA, &read, &data).await?;
                }
            }
            server.chunk(true, NONE, &read, &[]).await?;
        }
        Ok(())
    })
    .await;
    let mut expected = data_at(0, 131_072);
    for hole in expected.chunks_mut(64).step_by(3) {
        hole.fill(0);
    }
    assert_eq!(guarded(client.read(0..131_072)).await.unwrap(), expected);
    let chunks = guarded(client.read_chunks(0..131_072)).await.unwrap();
    let mut offset = 0;
    for piece in &chunks {
        assert_eq!(piece.offset(), offset, "in order, without gaps");
        offset += piece.length();
    }
    assert_eq!(offset, 131_072);
}
