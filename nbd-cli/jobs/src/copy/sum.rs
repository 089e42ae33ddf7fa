//! Sums of what a copy reads, without a second read.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use imgfmt::ContentSum;
use tokio::sync::Notify;

use super::block_sum;
use crate::digest::{Checksum, ChecksumAlgorithm, Digest, Piece};
use crate::error::JobError;

/// A part of a disk waits if it is further ahead of the digest than this, in bytes: a bound on the
/// memory.
const WINDOW: u64 = 64 << 20;
/// Bytes of a hole that the digest is given at a time: other tasks of the thread run in between.
const ZEROES_LEN: u64 = 16 << 20;

/// What is summed up.
pub(crate) enum Sum {
    /// The bytes in their order.
    InOrder(InOrder),
    /// The blocks that each layer of the source holds, in any order.
    OfLayers(OfLayers),
}

impl Sum {
    /// Takes in data of a layer: 1 is the source itself, 0 is more than one.
    pub(super) async fn data(&self, offset: u64, data: &Bytes, depth: u32) -> Result<(), JobError> {
        match self {
            Self::InOrder(sum) => {
                let length = data.len() as u64;
                sum.room(offset, length).await;
                sum.add(offset, sum.algorithm.prepare(offset, data.clone())?).await
            }
            Self::OfLayers(sum) => {
                sum.add(offset, data, depth);
                Ok(())
            }
        }
    }

    /// Takes in a range of zeroes.
    pub(super) async fn zeroes(&self, offset: u64, length: u64) -> Result<(), JobError> {
        match self {
            Self::InOrder(sum) => {
                // It takes no memory, but there may be many of them.
                sum.room(offset, 0).await;
                sum.add(offset, Piece::Zeroes(length)).await
            }
            Self::OfLayers(_) => Ok(()),
        }
    }

    /// Prepares for a copy that begins again at `position`, in bytes; returns where it has to
    /// begin.
    pub(super) async fn begin_again(&self, position: u64) -> Result<u64, JobError> {
        match self {
            Self::InOrder(sum) => {
                *sum.digest.lock().await = Digest::new(sum.algorithm)?;
                let mut waiting = sum.waiting();
                (waiting.at, waiting.pieces) = (0, BTreeMap::new());
                Ok(0)
            }
            Self::OfLayers(sum) => {
                // What is below was added already, and some of what is above.
                *sum.lock() = (position == 0).then(Vec::new);
                Ok(position)
            }
        }
    }
}

/// A digest of the bytes in order, which tasks add as they have them.
pub(crate) struct InOrder {
    algorithm: ChecksumAlgorithm,
    waiting: Mutex<Waiting>,
    /// Locked by the task that has the next piece, for as long as there is a next one.
    digest: tokio::sync::Mutex<Digest>,
    moved: Notify,
}

#[derive(Default)]
struct Waiting {
    /// Where the next piece begins.
    at: u64,
    pieces: BTreeMap<u64, Piece>,
}

impl InOrder {
    pub(super) fn new(algorithm: ChecksumAlgorithm) -> Result<Self, JobError> {
        let digest = tokio::sync::Mutex::new(Digest::new(algorithm)?);
        Ok(Self { algorithm, waiting: Mutex::default(), digest, moved: Notify::new() })
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a piece is near enough to the next one. That one never waits.
    async fn room(&self, offset: u64, length: u64) {
        loop {
            let moved = self.moved.notified();
            let at = self.waiting().at;
            if offset <= at || offset.saturating_add(length) <= at.saturating_add(WINDOW) {
                return;
            }
            moved.await;
        }
    }

    /// Adds a piece, and passes everything up to the next gap to the digest.
    async fn add(&self, offset: u64, piece: Piece) -> Result<(), JobError> {
        if piece.length() > 0 {
            self.waiting().pieces.insert(offset, piece);
        }
        // The holder of the digest looks again after it has given it up.
        while self.has_next()
            && let Ok(mut digest) = self.digest.try_lock()
        {
            while let Some(piece) = self.next() {
                digest.add(&piece)?;
                self.moved.notify_waiters();
                tokio::task::yield_now().await;
            }
        }
        Ok(())
    }

    fn has_next(&self) -> bool {
        let waiting = self.waiting();
        waiting.pieces.contains_key(&waiting.at)
    }

    fn next(&self) -> Option<Piece> {
        let mut waiting = self.waiting();
        let at = waiting.at;
        let piece = match waiting.pieces.remove(&at)? {
            Piece::Zeroes(length) if length > ZEROES_LEN => {
                let rest = Piece::Zeroes(length - ZEROES_LEN);
                waiting.pieces.insert(at + ZEROES_LEN, rest);
                Piece::Zeroes(ZEROES_LEN)
            }
            piece => piece,
        };
        waiting.at += piece.length();
        Some(piece)
    }

    /// Returns the digest, after everything was added.
    pub(super) async fn finish(&self) -> Result<Checksum, JobError> {
        self.digest.lock().await.finish()
    }
}

/// Sums of the blocks that each layer holds.
pub(crate) struct OfLayers {
    /// Size of the disk in bytes.
    size: u64,
    /// None if no sum is known; that of a layer is not if a part of a block was read from it, the
    /// rest being another layer's.
    sums: Mutex<Option<Vec<Option<ContentSum>>>>,
}

impl OfLayers {
    /// Creates the sums of a disk of that size in bytes.
    pub(crate) fn new(size: u64) -> Self {
        Self { size, sums: Mutex::new(Some(Vec::new())) }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Vec<Option<ContentSum>>>> {
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the blocks of a part of the disk; of depth 0 it has those of several layers.
    fn add(&self, offset: u64, data: &[u8], depth: u32) {
        let end = offset + data.len() as u64;
        let is_end = |at: u64| at.is_multiple_of(block_sum::BLOCK) || at == self.size;
        let sum = (is_end(offset) && is_end(end)).then(|| block_sum::of(offset, data));
        let mut sums = self.lock();
        let Some(index) = depth.checked_sub(1) else {
            *sums = None;
            return;
        };
        let index = index as usize;
        let Some(layers) = sums.as_mut() else { return };
        if layers.len() <= index {
            // A chain has some hundreds of layers at most.
            layers.resize(index + 1, Some(ContentSum::default()));
        }
        let layer = &mut layers[index];
        *layer = layer.zip(sum).map(|(mut layer, sum)| {
            layer.add(sum);
            layer
        });
    }

    /// Returns the size of the disk in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Returns the sum of a layer, the source itself being 0; none if it is not known.
    pub(crate) fn of_layer(&self, index: usize) -> Option<ContentSum> {
        let sums = self.lock();
        sums.as_ref()?.get(index).copied().unwrap_or_else(|| Some(ContentSum::default()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn pieces_in_any_order_have_the_sum_of_the_disk() {
        let mut disk = vec![0; 300 << 10];
        for (index, byte) in disk.iter_mut().enumerate().skip(70 << 10) {
            *byte = (index / 1000) as u8;
        }
        let mut digest = Digest::new(ChecksumAlgorithm::Sha256).unwrap();
        digest.add(&Piece::Bytes(Bytes::copy_from_slice(&disk))).unwrap();
        let expected = digest.finish().unwrap();
        for order in [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]] {
            let sum = Arc::new(Sum::InOrder(InOrder::new(ChecksumAlgorithm::Sha256).unwrap()));
            let tasks = order.map(|number: u64| {
                let (sum, offset) = (sum.clone(), number * (60 << 10));
                let part = Bytes::copy_from_slice(&disk[offset as usize..][..60 << 10]);
                tokio::spawn(async move {
                    match number {
                        0 => sum.zeroes(0, 60 << 10).await,
                        _ => sum.data(offset, &part, 1).await,
                    }
                })
            });
            for task in tasks {
                task.await.unwrap().unwrap();
            }
            let Sum::InOrder(sum) = &*sum else { unreachable!() };
            assert_eq!(sum.finish().await.unwrap(), expected);
        }
    }

    #[tokio::test]
    async fn a_part_far_ahead_waits_for_those_before_it() {
        let sum = Arc::new(Sum::InOrder(InOrder::new(ChecksumAlgorithm::Blkhash).unwrap()));
        let ahead = {
            let sum = sum.clone();
            tokio::spawn(async move { sum.data(2 * WINDOW, &Bytes::from_static(b"x"), 1).await })
        };
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(!ahead.is_finished());
        sum.zeroes(0, 2 * WINDOW).await.unwrap();
        ahead.await.unwrap().unwrap();
        let Sum::InOrder(sum) = &*sum else { unreachable!() };
        assert_eq!(sum.waiting().at, 2 * WINDOW + 1);
    }

    #[test]
    fn parts_of_blocks_leave_the_sum_of_their_layer_unknown() {
        let sums = OfLayers::new((3 << 16) + 9);
        sums.add(3 << 16, &[7; 9], 1);
        sums.add(1 << 16, &[1; 1 << 16], 2);
        assert_eq!(sums.of_layer(0), Some(block_sum::of(3 << 16, &[7; 9])));
        assert_eq!(sums.of_layer(1), Some(block_sum::of(1 << 16, &[1; 1 << 16])));
        assert_eq!(sums.of_layer(9), Some(ContentSum::default()));
        sums.add(2 << 16, &[1; 4096], 2);
        sums.add(0, &[1; 1 << 16], 2);
        assert_eq!(sums.of_layer(1), None);
        sums.add(0, &[1; 1 << 16], 0);
        assert_eq!([sums.of_layer(0), sums.of_layer(9)], [None, None]);
    }

    #[tokio::test]
    async fn a_copy_that_goes_on_leaves_the_sums_of_layers_unknown_and_one_from_the_start_does_not()
    {
        let sum = Sum::OfLayers(OfLayers::new(3 << 16));
        let data = Bytes::from(vec![1; 1 << 16]);
        let of_first = |sum: &Sum| match sum {
            Sum::OfLayers(sums) => sums.of_layer(0),
            Sum::InOrder(_) => unreachable!(),
        };
        sum.data(0, &data, 1).await.unwrap();
        assert_eq!(sum.begin_again(0).await.unwrap(), 0);
        sum.data(0, &data, 1).await.unwrap();
        assert_eq!(of_first(&sum), Some(block_sum::of(0, &data)));
        assert_eq!(sum.begin_again(1 << 16).await.unwrap(), 1 << 16);
        sum.data(1 << 16, &data, 1).await.unwrap();
        assert_eq!(of_first(&sum), None);
    }

    #[tokio::test]
    async fn zeroes_far_ahead_wait_as_well() {
        let sum = Arc::new(Sum::InOrder(InOrder::new(ChecksumAlgorithm::Blkhash).unwrap()));
        let ahead = {
            let sum = sum.clone();
            tokio::spawn(async move { sum.zeroes(2 * WINDOW, 1).await })
        };
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(!ahead.is_finished());
        sum.zeroes(0, 2 * WINDOW).await.unwrap();
        ahead.await.unwrap().unwrap();
    }
}
