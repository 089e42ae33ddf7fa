//! Reads a complete export and reports the throughput.
//!
//! ```text
//! cargo run --release -p nbd-client --example read_disk -- nbd://localhost/disk 4 64 262144
//! ```
//!
//! The arguments are the URI, the number of connections, the total number of requests in flight,
//! and the size of each request in bytes.
#![allow(clippy::print_stdout)]

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use nbd_client::Connector;
use tokio::task::JoinSet;

/// Reads the export that the arguments name.
pub(crate) async fn run(
    mut arguments: impl Iterator<Item = String>,
) -> Result<(), Box<dyn std::error::Error>> {
    let uri = arguments.next().ok_or("usage: read_disk URI [CONNECTIONS [REQUESTS [LENGTH]]]")?;
    let mut number = |default: usize| arguments.next().map_or(Ok(default), |text| text.parse());
    let (connections, requests, length) = (number(1)?, number(64)?, number(256 * 1024)?);

    let connections = NonZeroUsize::new(connections).ok_or("no connections")?;
    let client = uri.parse::<Connector>()?.connections(connections).connect().await?;
    let size = client.info().size;
    let next = Arc::new(AtomicU64::new(0));
    let begin = Instant::now();
    let mut readers = JoinSet::new();
    for _ in 0..requests {
        let (client, next) = (client.clone(), Arc::clone(&next));
        readers.spawn(async move {
            loop {
                let offset = next.fetch_add(length as u64, Ordering::Relaxed);
                if offset >= size {
                    return Ok(());
                }
                let end = size.min(offset.saturating_add(length as u64));
                client.read(offset..end).await?;
            }
        });
    }
    while let Some(reader) = readers.join_next().await {
        reader?.map_err(|error: nbd_client::Error| error)?;
    }
    let seconds = begin.elapsed().as_secs_f64();
    println!(
        "{size} bytes over {} connections in {seconds:.2} s: {:.0} MiB/s",
        client.connections(),
        size as f64 / seconds / f64::from(1 << 20),
    );
    client.disconnect().await?;
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    run(std::env::args().skip(1)).await
}
