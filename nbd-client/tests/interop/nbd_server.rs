//! nbd-server: named exports, no structured replies.

use nbd_client::{Bytes, Durability, Protocol, ReplyMode, Scope};

use crate::common::{Peer, have, pattern, span};

const MIB: usize = 1 << 20;

async fn nbd_server() -> Peer {
    // It insists on a port as well, and takes 0 for inetd: one that was free a moment ago.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let arguments = ["-C", "{directory}/config", "-p", "{directory}/pid"];
    Peer::start("nbd-server", &arguments, |directory| {
        std::fs::write(directory.join("disk"), pattern(MIB)).unwrap();
        let config = format!(
            "[generic]\n  allowlist = true\n  unixsock = {0}/s\n  port = {1}\n  listenaddr = 127.0.0.1\n\
             [disk]\n  exportname = {0}/disk\n  flush = true\n  fua = true\n  trim = true\n",
            directory.display(),
            free.port()
        );
        std::fs::write(directory.join("config"), config).unwrap();
    })
    .await
}

#[tokio::test]
async fn a_server_with_simple_replies_only_is_used_and_inspected() {
    if !have("nbd-server") {
        return;
    }
    let peer = nbd_server().await;
    let connector = peer.connector_to("disk");
    let client = connector.connect().await.unwrap();
    assert_eq!(client.protocol(), Protocol::NewstyleFixed);
    assert_eq!(client.info().size, MIB as u64);
    let mut model = pattern(MIB);
    let data = vec![0xaa; 300_000];
    model[1000..][..data.len()].copy_from_slice(&data);
    client.write(1000, Bytes::from(data), Durability::Fua).await.unwrap();
    client.flush().await.unwrap();
    assert!(client.read(span(0, MIB)).await.unwrap() == model);
    client.disconnect().await.unwrap();

    let server = connector.inspect(Scope::AllExports).await.unwrap();
    assert_eq!(server.protocol, Protocol::NewstyleFixed);
    assert_eq!(server.exports[0].name, "disk");
    assert_eq!(server.exports[0].size, MIB as u64);
    let simple = connector.reply_mode(ReplyMode::Simple).inspect(Scope::ThisExport).await.unwrap();
    assert_eq!(simple.reply_mode, ReplyMode::Simple);
}
