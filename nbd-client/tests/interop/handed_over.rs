//! Connections that are handed over after the handshake.

use std::io::{Read as _, Write as _};
use std::sync::Arc;

use nbd_client::{Connector, NegotiatedStream, PlainSocket};
use nbd_proto::transmission::client::{Event, Transmission};
use nbd_proto::transmission::{Command, Durability, Fragmentation};
use nbd_server::export::{ExportEntry, MemoryExport};
use nbd_server::{ExportRegistry, ListenAddress, Server, ServerConfig};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// A disk of 1 MiB, and where it is.
async fn serve(address: ListenAddress) -> Connector {
    let exports = ExportRegistry::new();
    exports.add("disk", ExportEntry::new(Arc::new(MemoryExport::new(1 << 20)))).unwrap();
    let mut server = Server::new(ServerConfig::default(), exports);
    let bound = server.listen(&address).await.unwrap().remove(0);
    tokio::spawn(server.serve(std::future::pending()));
    Connector::new(bound.uri("disk"))
}

/// A WRITE and a READ of the same 4 KiB, as bytes.
fn requests(stream: &NegotiatedStream) -> (Transmission, Vec<u8>) {
    let mut transmission = Transmission::new(stream.negotiated());
    let mut out = Vec::new();
    transmission.request(8192, 4096, &Command::Write(Durability::Cached), &mut out).unwrap();
    out.extend([7; 4096]);
    (transmission, out)
}

/// Takes replies until one request is finished; gives the data that came.
fn replies(
    transmission: &mut Transmission,
    mut receive: impl FnMut(&mut [u8]) -> usize,
) -> Vec<u8> {
    let mut buffer = vec![0; 1 << 16];
    let (mut start, mut end, mut left, mut data) = (0, 0, 0, Vec::new());
    loop {
        let taken = left.min(end - start);
        data.extend_from_slice(&buffer[start..start + taken]);
        (start, left) = (start + taken, left - taken);
        if left == 0 {
            let mut input = &buffer[start..end];
            let event = transmission.advance(&mut input).unwrap();
            start = end - input.len();
            match event {
                Event::NeedsInput => {}
                Event::Data { length, .. } => {
                    left = length;
                    continue;
                }
                Event::Finished { result, .. } => {
                    result.unwrap();
                    return data;
                }
                other => panic!("{other:?}"),
            }
        }
        let received = receive(&mut buffer[end..]);
        assert!(received > 0, "the server closed the connection");
        end += received;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handed_over_socket_carries_requests_without_the_runtime() {
    let directory = tempfile::tempdir().unwrap();
    for address in
        [ListenAddress::Unix(directory.path().join("s")), ListenAddress::Tcp("127.0.0.1:0".into())]
    {
        let stream = serve(address.clone()).await.connect_stream().await.unwrap();
        assert!(!stream.is_encrypted() && stream.info().size == 1 << 20);
        let is_unix = matches!(address, ListenAddress::Unix(_));
        assert_eq!(stream.server_process(), is_unix.then(std::process::id));
        let again = stream.reconnector();
        let (mut transmission, mut out) = requests(&stream);
        let socket = stream.into_socket().unwrap().expect("no TLS");
        let exchange = move || {
            let (mut reader, mut writer): (Box<dyn std::io::Read>, Box<dyn std::io::Write>) =
                match socket {
                    PlainSocket::Tcp(it) => (Box::new(it.try_clone().unwrap()), Box::new(it)),
                    PlainSocket::Unix(it) => (Box::new(it.try_clone().unwrap()), Box::new(it)),
                };
            let mut receive = |buffer: &mut [u8]| reader.read(buffer).unwrap();
            writer.write_all(&out).unwrap();
            assert!(replies(&mut transmission, &mut receive).is_empty(), "a WRITE has no data");
            out.clear();
            let read = Command::Read(Fragmentation::Allowed);
            transmission.request(8192, 4096, &read, &mut out).unwrap();
            writer.write_all(&out).unwrap();
            replies(&mut transmission, &mut receive)
        };
        let data = tokio::task::spawn_blocking(exchange).await.unwrap();
        assert_eq!(data, [7; 4096]);
        // The connection is gone, and another is made in the same way.
        let second = again.connect().await.unwrap();
        assert_eq!(second.negotiated().size, 1 << 20);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handed_over_stream_carries_requests_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let connector = serve(ListenAddress::Unix(directory.path().join("s"))).await;
    let mut stream = connector.connect_stream().await.unwrap();
    let (mut transmission, out) = requests(&stream);
    stream.write_all(&out).await.unwrap();
    stream.flush().await.unwrap();
    let mut reply = vec![0; 32];
    stream.read_exact(&mut reply).await.unwrap();
    let mut input = &reply[..];
    let event = transmission.advance(&mut input).unwrap();
    assert!(matches!(event, Event::Finished { result: Ok(()), .. }), "{event:?}");
    assert!(connector.export_name("other").connect_stream().await.is_err());
}
