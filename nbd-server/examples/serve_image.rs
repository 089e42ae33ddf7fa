//! Serves a disk image on a unix socket until Enter is pressed or standard input ends:
//! `cargo run -p nbd-server --example serve_image -- disk.img /tmp/nbd.sock`.

#![allow(clippy::print_stdout)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use imgfmt::{Access, Format, Image, OpenOptions};
use nbd_server::export::{ExportEntry, ImageExport};
use nbd_server::{ExportRegistry, ListenAddress, RunningServer, Server, ServerConfig};
use tokio::io::AsyncReadExt;

/// Serves the raw image as the default export.
pub async fn start(
    image: &Path,
    socket: PathBuf,
) -> Result<RunningServer, Box<dyn std::error::Error>> {
    let options = OpenOptions::new().format(Format::Raw).access(Access::ReadWrite);
    let export = ImageExport::new(Image::open(image, &options)?).with_allocation_depth();
    let exports = ExportRegistry::new();
    exports.add("", ExportEntry::new(Arc::new(export)))?;
    let mut server = Server::new(ServerConfig::default(), exports);
    server.listen(&ListenAddress::Unix(socket)).await?;
    Ok(server.start())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(image), Some(socket)) = (arguments.next(), arguments.next()) else {
        return Err("usage: serve_image IMAGE SOCKET".into());
    };
    let mut server = start(image.as_ref(), socket.into()).await?;
    println!("{}", server.addresses()[0].uri(""));
    let _ = tokio::io::stdin().read(&mut [0; 1]).await;
    server.shutdown();
    server.wait().await?;
    Ok(())
}
