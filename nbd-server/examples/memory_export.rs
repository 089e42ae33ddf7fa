//! A custom export in 30 lines: a disk in memory, served on a unix socket until standard input
//! ends: `cargo run -p nbd-server --example memory_export -- /tmp/nbd.sock`.

#![allow(clippy::print_stdout)]

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use nbd_server::export::{Durability, Export, ExportEntry, ExportError, ExportInfo};
use nbd_server::{ExportRegistry, ListenAddress, RunningServer, Server, ServerConfig};
use tokio::io::AsyncReadExt;

/// The bytes of the disk.
struct Disk(RwLock<Vec<u8>>);

impl Export for Disk {
    fn info(&self) -> ExportInfo {
        ExportInfo::new(self.0.read().unwrap_or_else(PoisonError::into_inner).len() as u64)
    }

    // The server has checked that ranges are within the disk.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        let disk = self.0.read().unwrap_or_else(PoisonError::into_inner);
        buffer.copy_from_slice(&disk[offset as usize..][..buffer.len()]);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8], _: Durability) -> Result<(), ExportError> {
        let mut disk = self.0.write().unwrap_or_else(PoisonError::into_inner);
        disk[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }
}

/// Serves a disk of `size` bytes as the default export.
pub async fn start(
    socket: PathBuf,
    size: usize,
) -> Result<RunningServer, Box<dyn std::error::Error + Send + Sync>> {
    let exports = ExportRegistry::new();
    exports.add("", ExportEntry::new(Arc::new(Disk(RwLock::new(vec![0; size])))))?;
    let mut server = Server::new(ServerConfig::default(), exports);
    server.listen(&ListenAddress::Unix(socket)).await?;
    Ok(server.start())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let socket = std::env::args_os().nth(1).ok_or("usage: memory_export SOCKET")?;
    let mut server = start(socket.into(), 64 << 20).await?;
    println!("{}", server.addresses()[0].uri(""));
    let _ = tokio::io::stdin().read(&mut [0; 1]).await;
    server.shutdown();
    server.wait().await?;
    Ok(())
}
