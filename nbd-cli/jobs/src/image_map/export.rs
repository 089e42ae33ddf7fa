//! The map of an export, as reported by its server.

use std::collections::VecDeque;

use nbd_client::{Client, Connector, ExtentLimit};
use nbd_proto::NbdUri;
use nbd_proto::wire::{AllocationFlags, BlockDescriptor, MetaContextName};

use super::entry::{Joined, MapEntry};
use crate::cancellation::Cancellation;
use crate::connect::{connect, failed};
use crate::error::{JobError, JobErrorKind};

/// Connects to an export and passes its size and its parts to `each`, in order and without gaps.
///
/// The server reports them in `base:allocation` and, if it has it, `qemu:allocation-depth`; without
/// the latter the export has one layer, and without both everything is data.
///
/// # Errors
///
/// If the server cannot be reached or refuses; if the job is cancelled; or the error of `each`,
/// which ends the walk.
///
/// # Cancel safety
///
/// Safe: the connection is closed.
pub async fn map_export<E: From<JobError>>(
    connector: Connector,
    cancellation: &Cancellation,
    each: impl FnMut(u64, MapEntry) -> Result<(), E>,
) -> Result<(), E> {
    let contexts = [MetaContextName::base_allocation(), MetaContextName::qemu_allocation_depth()];
    let connector = connector.meta_contexts(contexts);
    let uri = connector.uri();
    let client = connect(&connector, uri, JobErrorKind::Source, cancellation).await?;
    map_client(&client, uri, cancellation, None, each).await?;
    // The map is complete, so the way in which the connection ends does not matter.
    let _ = client.disconnect().await;
    Ok(())
}

/// As [`map_export`], over a connection for which contexts were selected already. If `instead` is
/// given, only that context counts, and its numbers are taken for those of `base:allocation`, as by
/// QEMU's option `x-dirty-bitmap`: a dirty part is then one without data.
///
/// # Errors
///
/// As [`map_export`], except those of connecting; and if the context `instead` was not selected and
/// is not `base:allocation`.
///
/// # Cancel safety
///
/// Safe.
pub async fn map_client<E: From<JobError>>(
    client: &Client,
    uri: &NbdUri,
    cancellation: &Cancellation,
    instead: Option<&MetaContextName>,
    mut each: impl FnMut(u64, MapEntry) -> Result<(), E>,
) -> Result<(), E> {
    let size = client.info().size;
    let selected = client.meta_contexts();
    let is_known = instead.map_or(!selected.is_empty(), |context| selected.contains(context));
    if let (Some(context), false) = (instead, is_known)
        && context.as_str() != MetaContextName::BASE_ALLOCATION
    {
        return Err(JobError::source(format!("{uri}: the server has no context {context}")).into());
    }
    let mut entries = Joined::new(|entry| each(size, entry));
    if !is_known && size > 0 {
        // Without information from the server everything is data.
        entries.add(part(0, size, AllocationFlags::empty(), None))?;
    } else {
        let mut position = 0;
        while position < size {
            let ask = async {
                let answer = Answer::ask(client, position, size - position, instead).await;
                answer.map_err(|error| JobError::source(failed(uri, "map", &error)))
            };
            let mut answer = cancellation.unless_cancelled(ask).await?;
            while let Some((length, allocation, depth)) = answer.next() {
                let length = length.min(size - position);
                // As in QEMU, what is neither stored nor zero is not there.
                let is_here = allocation != AllocationFlags::STATE_HOLE;
                let depth = instead.map_or(depth, |_| Some(u64::from(is_here)));
                entries.add(part(position, length, allocation, depth))?;
                position += length;
            }
        }
    }
    entries.end()
}

/// The server's answer about a range, in one context or in two.
struct Answer {
    /// Empty if the server does not have the context.
    allocation: Option<VecDeque<BlockDescriptor>>,
    depth: Option<VecDeque<BlockDescriptor>>,
}

impl Answer {
    async fn ask(
        client: &Client,
        offset: u64,
        length: u64,
        instead: Option<&MetaContextName>,
    ) -> nbd_client::Result<Self> {
        let mut answer = Self { allocation: None, depth: None };
        for (context, descriptors) in
            client.block_status(offset..offset + length, ExtentLimit::Many).await?
        {
            match (context.as_str(), instead) {
                (_, Some(instead)) if context != *instead => {}
                (_, Some(_)) | (MetaContextName::BASE_ALLOCATION, None) => {
                    answer.allocation = Some(descriptors.into());
                }
                (_, None) => answer.depth = Some(descriptors.into()),
            }
        }
        Ok(answer)
    }

    /// Returns the next piece with one status in every context. The contexts may cover different
    /// lengths: the piece ends at the first end.
    fn next(&mut self) -> Option<(u64, AllocationFlags, Option<u64>)> {
        let first = |list: &Option<VecDeque<BlockDescriptor>>| match list {
            Some(list) => list.front().copied().map(Some),
            None => Some(None),
        };
        let (allocation, depth) = (first(&self.allocation)?, first(&self.depth)?);
        let length = [allocation, depth].iter().flatten().map(|piece| piece.length).min()?;
        for list in [&mut self.allocation, &mut self.depth].into_iter().flatten() {
            if let Some(piece) = list.front_mut() {
                piece.length -= length;
                if piece.length == 0 {
                    list.pop_front();
                }
            }
        }
        let flags = allocation.map_or(0, |piece| piece.flags);
        let depth = depth.map(|piece| piece.flags);
        Some((length, AllocationFlags::from_bits_truncate(flags), depth))
    }
}

/// In qemu-img's form; a server that does not report layers has a single one.
fn part(start: u64, length: u64, allocation: AllocationFlags, depth: Option<u64>) -> MapEntry {
    let layer = depth.unwrap_or(1);
    let present = layer > 0;
    MapEntry {
        start,
        length,
        depth: u32::try_from(layer.saturating_sub(1)).unwrap_or(u32::MAX),
        present,
        zero: allocation.contains(AllocationFlags::STATE_ZERO),
        data: !allocation.contains(AllocationFlags::STATE_HOLE),
        compressed: false,
        offset: present.then_some(start),
        is_kept: false,
        file: None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use nbd_server::export::{Export, ExportEntry, ExportError, ExportInfo};
    use nbd_server::{ExportRegistry, ListenAddress, Server, ServerConfig};

    use super::*;

    /// Cancels the job that asks for a status, and does not answer until the test ends.
    struct Silent {
        job: Cancellation,
        end: Mutex<Receiver<()>>,
    }

    impl Export for Silent {
        fn info(&self) -> ExportInfo {
            let mut info = ExportInfo::new(1 << 20);
            info.meta_contexts = vec![MetaContextName::base_allocation()];
            info
        }

        fn read_at(&self, _: u64, _: &mut [u8]) -> Result<(), ExportError> {
            Ok(())
        }

        fn block_status(
            &self,
            _: &MetaContextName,
            _: u64,
            _: u64,
            _: usize,
        ) -> Result<Vec<BlockDescriptor>, ExportError> {
            self.job.cancel("interrupted by SIGINT");
            let _ = self.end.lock().unwrap().recv();
            Ok(vec![BlockDescriptor { length: 1 << 20, flags: 0 }])
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_server_that_does_not_answer_does_not_keep_the_job_from_being_cancelled() {
        let directory = tempfile::tempdir().unwrap();
        let (job, (end, silence)) = (Cancellation::new(), channel());
        let disk = Silent { job: job.clone(), end: Mutex::new(silence) };
        let exports = ExportRegistry::new();
        exports.add("disk", ExportEntry::new(Arc::new(disk))).unwrap();
        let mut server = Server::new(ServerConfig::default(), exports);
        let socket = ListenAddress::Unix(directory.path().join("socket"));
        let uri = server.listen(&socket).await.unwrap().remove(0).uri("disk").to_string();
        let server = server.start();
        let map = map_export::<JobError>(uri.parse().unwrap(), &job, |_, _| Ok(()));
        let result = tokio::time::timeout(Duration::from_secs(60), map).await;
        drop(end);
        let error = result.expect("it ends").unwrap_err();
        assert_eq!(error.to_string(), "interrupted by SIGINT");
        drop(server);
    }

    #[test]
    fn contexts_that_reach_differently_far_are_cut_at_all_their_borders() {
        let list = |pieces: &[(u64, u64)]| {
            let descriptor = |&(length, flags)| BlockDescriptor { length, flags };
            Some(pieces.iter().map(descriptor).collect())
        };
        let mut answer =
            Answer { allocation: list(&[(10, 0), (20, 3)]), depth: list(&[(5, 1), (15, 0)]) };
        let mut pieces = Vec::new();
        while let Some((length, flags, depth)) = answer.next() {
            pieces.push((length, flags.bits(), depth));
        }
        assert_eq!(pieces, [(5, 0, Some(1)), (5, 0, Some(0)), (10, 3, Some(0))]);
        let mut alone = Answer { allocation: list(&[(10, 3)]), depth: None };
        assert_eq!(alone.next().map(|(length, ..)| length), Some(10));
        assert!(alone.next().is_none());
    }
}
