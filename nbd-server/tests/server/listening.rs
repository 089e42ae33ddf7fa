//! Where a server listens, and what it tells about it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use nbd_proto::uri::Transport;
use nbd_proto::wire::CommandType;
use nbd_server::export::{ExportEntry, MemoryExport};
use nbd_server::{BoundAddress, ExportRegistry, ListenAddress, ServeError, Server, ServerConfig};
use tokio::sync::oneshot;

use crate::support::{LONG, Random, disk_file, header, image_export};

fn server() -> Server {
    let exports = ExportRegistry::new();
    exports.add("", ExportEntry::new(Arc::new(MemoryExport::new(4096)))).unwrap();
    Server::new(ServerConfig::default(), exports)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn one_server_serves_on_several_addresses_and_closes_them_all() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
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

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_session_over_tcp_gives_the_same_bytes() {
    let content = Random::new().bytes(8 << 20);
    let file = disk_file(&content);
    let exports = ExportRegistry::new();
    exports.add("", ExportEntry::new(Arc::new(image_export(file.path())))).unwrap();
    let mut server = Server::new(ServerConfig::default(), exports);
    let bound = server.listen(&ListenAddress::Tcp("127.0.0.1:0".into())).await.unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = tokio::spawn(server.serve(async { stopped.await.unwrap_or(()) }));
    let BoundAddress::Tcp(address) = bound[0] else { panic!("{bound:?}") };
    let answer = tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        // The flags, GO without a name, a copied read, one sent from the file, and a goodbye.
        let mut bytes = b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0".to_vec();
        for (command, offset, length) in [
            (CommandType::READ, 100, 1000),
            (CommandType::READ, 4096, 6 << 20),
            (CommandType::DISC, 0, 0),
        ] {
            header(command, offset, length).encode_compact(&mut bytes).unwrap();
        }
        stream.write_all(&bytes).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        answer
    });
    let answer = answer.await.unwrap();
    // Simple replies: 16 bytes in front of the data. They may come in either order.
    let (short, long) = (&content[100..1100], &content[4096..4096 + (6 << 20)]);
    let replies = &answer[answer.len() - 32 - short.len() - long.len()..];
    let is = |first: &[u8], second: &[u8]| {
        replies[16..16 + first.len()] == *first && replies[32 + first.len()..] == *second
    };
    assert!(is(short, long) || is(long, short));
    stop.send(()).unwrap();
    serving.await.unwrap().unwrap();
}

#[tokio::test]
async fn the_uri_of_a_relative_path_is_absolute() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let here = std::env::current_dir().unwrap();
    let up = "../".repeat(here.components().count() - 1);
    let relative = format!("{up}{}", path.strip_prefix("/").unwrap().display());
    let mut server = server();
    let bound = server.listen(&ListenAddress::Unix(relative.into())).await.unwrap();
    let Transport::Unix { path: told } = bound[0].uri("").transport else {
        panic!("{bound:?} is not a unix socket")
    };
    assert!(told.is_absolute(), "{} means something else in another directory", told.display());
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
    let missing = ListenAddress::Unix("/nonexistent/directory/socket".into());
    let error = server().listen(&missing).await.unwrap_err();
    assert!(error.to_string().contains("/nonexistent/directory/socket"), "{error}");
}
