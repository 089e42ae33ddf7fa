//! Serves an image with a control socket, so that `nbd-cli control` and `nbd-cli backup` work on
//! this server: `cargo run -p nbd-jobs --example control_socket -- IMAGE SOCKET CONTROL`.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nbd_jobs::control::server::{ControlSocket, Controller, ServedDisk, ServedDisks};
use nbd_server::export::ImageExport;
use nbd_server::{ExportRegistry, ListenAddress, Server, ServerConfig};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    run(std::env::args().skip(1)).await
}

/// Returns when a client of the control socket requests the end.
pub(crate) async fn run(mut arguments: impl Iterator<Item = String>) -> Result<(), Box<dyn Error>> {
    let path = arguments.next().ok_or("name the image")?;
    let socket = PathBuf::from(arguments.next().ok_or("name the socket of NBD clients")?);
    let control = PathBuf::from(arguments.next().ok_or("name the control socket")?);
    let options = imgfmt::OpenOptions::new().access(imgfmt::Access::ReadWrite);
    let image = Arc::new(ImageExport::new(imgfmt::Image::open(Path::new(&path), &options)?));

    let mut server = Server::new(ServerConfig::default(), ExportRegistry::new());
    server.listen(&ListenAddress::Unix(socket)).await?;
    let mut server = server.start();
    let address = server.addresses()[0].clone();
    let controller = Controller::new(server.handle().clone(), ServedDisks::default())
        .uris(move |name| vec![address.uri(name).to_string()]);
    let controller = Arc::new(controller);
    controller.add_export("disk", ServedDisk::of_image(path, image)).await?;
    let (socket, served) = (ControlSocket::open(&control).await?, controller.clone());
    let clients = tokio::spawn(async move { socket.serve(served).await });

    controller.shutdown_requested().await;
    clients.abort();
    server.shutdown();
    server.wait().await?;
    controller.end_checkpoints().await;
    Ok(())
}
