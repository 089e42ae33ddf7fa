//! A part of a disk on a unix socket, durable with every write, until standard input ends:
//! `cargo run -p nbd-server --example filtered_export -- /tmp/nbd.sock`.

#![allow(clippy::print_stdout)]

use std::path::PathBuf;
use std::sync::Arc;

use nbd_server::export::filters::{DetectZeroes, FilterOptions, Window, WriteCache};
use nbd_server::export::{Export, ExportEntry};
use nbd_server::{ExportRegistry, ListenAddress, RunningServer, Server, ServerConfig};
use tokio::io::AsyncReadExt;

/// Serves a part of `disk` as the default export.
pub async fn start(
    socket: PathBuf,
    disk: Arc<dyn Export>,
    window: Window,
) -> Result<RunningServer, Box<dyn std::error::Error + Send + Sync>> {
    let mut options = FilterOptions::default();
    options.write_cache = WriteCache::Writethrough;
    options.detect_zeroes = DetectZeroes::Unmap;
    let part = options.apply(window.apply(disk)?);
    let exports = ExportRegistry::new();
    exports.add("", ExportEntry::new(part))?;
    let mut server = Server::new(ServerConfig::default(), exports);
    server.listen(&ListenAddress::Unix(socket)).await?;
    Ok(server.start())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let socket = std::env::args_os().nth(1).ok_or("usage: filtered_export SOCKET")?;
    let disk = Arc::new(nbd_server::export::MemoryExport::new(64 << 20));
    let window = Window { offset: 1 << 20, size: Some(32 << 20) };
    let mut server = start(socket.into(), disk, window).await?;
    println!("{}", server.addresses()[0].uri(""));
    let _ = tokio::io::stdin().read(&mut [0; 1]).await;
    server.shutdown();
    server.wait().await?;
    Ok(())
}
