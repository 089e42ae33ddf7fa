//! Where a server listens, and what it tells about it.

use std::io::Read;
use std::net::TcpStream;
use std::sync::Arc;

use nbd_proto::uri::Transport;
use nbd_server::export::{ExportEntry, MemoryExport};
use nbd_server::{BoundAddress, ExportRegistry, ListenAddress, ServeError, Server, ServerConfig};
use tokio::sync::oneshot;

fn server() -> Server {
    let exports = ExportRegistry::new();
    exports.add("", ExportEntry::new(Arc::new(MemoryExport::new(4096)))).unwrap();
    Server::new(ServerConfig::default(), exports)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn one_server_serves_on_several_addresses_and_closes_them_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let mut server = server();
    let mut bound = server.listen(&ListenAddress::Tcp("127.0.0.1:0".into())).await.unwrap();
    match server.listen(&ListenAddress::Tcp("[::1]:0".into())).await {
        Ok(addresses) => bound.extend(addresses),
        Err(error) => println!("skipped: no IPv6 here: {error}"),
    }
    bound.extend(server.listen(&ListenAddress::Unix(path.clone())).await.unwrap());
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = tokio::spawn(server.serve(async { stopped.await.unwrap_or(()) }));
    let addresses = bound.clone();
    tokio::task::spawn_blocking(move || {
        for address in &addresses {
            let mut greeting = [0; 18];
            match address {
                BoundAddress::Tcp(address) => {
                    assert_ne!(address.port(), 0, "the port that was chosen is told");
                    TcpStream::connect(address).unwrap().read_exact(&mut greeting).unwrap();
                }
                BoundAddress::Unix(Some(path)) => {
                    let mut stream = std::os::unix::net::UnixStream::connect(path).unwrap();
                    stream.read_exact(&mut greeting).unwrap();
                }
                other => panic!("{other:?}"),
            }
            assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        }
    })
    .await
    .unwrap();
    stop.send(()).unwrap();
    serving.await.unwrap().unwrap();
    assert!(!path.exists());
    for address in bound {
        if let BoundAddress::Tcp(address) = address {
            assert!(TcpStream::connect(address).is_err(), "nobody listens on {address} any more");
        }
    }
}

#[tokio::test]
async fn the_uri_of_a_relative_path_is_absolute() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let here = std::env::current_dir().unwrap();
    let up = "../".repeat(here.components().count() - 1);
    let relative = format!("{up}{}", path.strip_prefix("/").unwrap().display());
    let mut server = server();
    let bound = server.listen(&ListenAddress::Unix(relative.into())).await.unwrap();
    let Transport::Unix { path: told } = bound[0].uri("").transport else {
        panic!("{bound:?} is no unix socket")
    };
    assert!(told.is_absolute(), "{} means something else in another folder", told.display());
    assert_eq!(told.canonicalize().unwrap(), path.canonicalize().unwrap());
    let BoundAddress::Unix(Some(told)) = &bound[0] else { panic!("{bound:?}") };
    assert!(told.is_absolute());
}

#[tokio::test]
async fn a_server_without_an_address_does_not_serve() {
    let result = server().serve(std::future::pending()).await;
    assert!(matches!(result, Err(ServeError::NoListener)));
}

#[tokio::test]
async fn a_name_that_leads_nowhere_is_an_error_that_names_it() {
    for address in ["127.0.0.1", "127.0.0.1:port", "127.0.0.1:70000"] {
        let error = server().listen(&ListenAddress::Tcp(address.into())).await.unwrap_err();
        assert!(error.to_string().contains(address), "{error}");
    }
    let missing = ListenAddress::Unix("/nonexistent/folder/socket".into());
    let error = server().listen(&missing).await.unwrap_err();
    assert!(error.to_string().contains("/nonexistent/folder/socket"), "{error}");
}
