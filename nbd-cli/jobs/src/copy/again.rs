//! Copies to servers that may restart during the copy.
//!
//! A connection that is lost and replaced may lead to a restarted server, and writes that were not
//! flushed before may be lost. Everything written since the last flush is therefore written again,
//! from the source, until a whole round completes without a new connection.

use std::sync::Arc;
use std::time::Duration;

use nbd_client::Client;
use nbd_proto::NbdUri;
use nbd_proto::wire::TransmissionFlags;

use super::destination::Destination;
use super::engine;
use super::job::Job;
use super::source::Source;
use crate::connect::failed;
use crate::error::JobError;

/// Interval between flushes, so that less has to be written again.
const FLUSH_INTERVAL: Duration = Duration::from_secs(30);

/// Most rounds that may end with a new connection before the copy fails.
const MOST_ROUNDS: usize = 8;

/// The position up to which the copy is durable, and the number of reconnections at that moment.
struct Safe {
    position: u64,
    reconnects: u64,
}

/// Copies everything, flushes if requested, and repeats the writes that a restarted server may have
/// lost.
///
/// # Errors
///
/// Those of the copy; and an error if a server restarts again and again, or restarts while standard
/// input, which cannot be read twice, is copied to it.
pub(crate) async fn run(job: &Arc<Job>, flush: bool) -> Result<(), JobError> {
    let Destination::Nbd { client, uri } = &job.destination else {
        engine::run(job).await?;
        return job.context.cancellation.unless_cancelled(job.destination.finish(flush)).await;
    };
    let mut safe = Safe { position: job.done(), reconnects: client.reconnects() };
    for _ in 0..MOST_ROUNDS {
        round(job, (client, uri), &mut safe).await?;
        job.context.cancellation.unless_cancelled(job.destination.finish(flush)).await?;
        if client.reconnects() == safe.reconnects {
            return Ok(());
        }
        if matches!(job.source, Source::Standard) {
            return Err(JobError::destination(format!(
                "the connection to {uri} was lost, its server may have lost what was not flushed, and \
                 standard input cannot be read again; begin again"
            )));
        }
        safe.reconnects = client.reconnects();
        safe.position = job.begin_again(safe.position).await?;
        let position = safe.position;
        job.context.observer.warning(&format!(
            "the connection to {uri} was lost, and its server may have lost what was not flushed: \
             everything from offset {position} on is written again"
        ));
    }
    Err(JobError::destination(format!(
        "the connection to {uri} is lost again and again, so that nothing is known to have arrived; \
         see what ends its server"
    )))
}

/// Copies once, and makes the written data durable from time to time.
async fn round(
    job: &Arc<Job>,
    (client, uri): (&Client, &NbdUri),
    safe: &mut Safe,
) -> Result<(), JobError> {
    let can_flush = client.info().flags.contains(TransmissionFlags::SEND_FLUSH);
    let mut running = std::pin::pin!(engine::run(job));
    loop {
        tokio::select! {
            result = &mut running => return result,
            () = tokio::time::sleep(FLUSH_INTERVAL), if can_flush => {
                // First the position up to which everything was answered, then the flush that
                // covers it.
                let done = job.done();
                let flushing = async {
                    let flushed = client.flush().await;
                    flushed.map_err(|error| JobError::destination(failed(uri, "flush", &error)))
                };
                job.context.cancellation.unless_cancelled(flushing).await?;
                if client.reconnects() == safe.reconnects {
                    safe.position = done;
                }
            }
        }
    }
}
