//! This workspace's server, over TCP: the host's name is checked.

use std::num::NonZeroUsize;
use std::sync::Arc;

use nbd_client::{
    Bytes, CertificateCheck, Connector, Durability, Error, PreSharedKeys, TlsError, TlsOptions,
};
use nbd_server::export::{ExportEntry, MemoryExport};
use nbd_server::tls::{
    Authorization, ClientCertificates, CredentialSource, TlsCredentials, TlsMode,
};
use nbd_server::{ExportRegistry, ListenAddress, Server, ServerConfig};
use tokio::sync::oneshot;

use super::credentials::{Maker, Role, Validity, add_psk_user};
use super::{Kind, Site};
use crate::common::{pattern, span};

/// Serves 4 MiB of memory on a free port of this machine, until the sender goes.
async fn serve(tls: TlsMode) -> (u16, oneshot::Sender<()>) {
    let exports = ExportRegistry::new();
    exports.add("disk", ExportEntry::new(Arc::new(MemoryExport::new(4 << 20)))).unwrap();
    let mut config = ServerConfig::default();
    config.tls = tls;
    let mut server = Server::new(config, exports);
    let address = ListenAddress::Tcp("127.0.0.1:0".into());
    let bound = server.listen(&address).await.unwrap().remove(0);
    let nbd_client::Transport::Tcp { port, .. } = bound.uri("disk").transport else {
        panic!("{bound:?}");
    };
    let (stop, stopped) = oneshot::channel::<()>();
    tokio::spawn(server.serve(async { stopped.await.unwrap_or(()) }));
    (port, stop)
}

fn connector(site: &Site, kind: Kind, host: &str, port: u16) -> Connector {
    let options = TlsOptions::new(nbd_client::TlsMode::Require);
    let options = match kind {
        Kind::X509 => options.certificates(site.path("client")),
        Kind::PreSharedKey => options.pre_shared_keys(site.path("keys")).user("bob:builder"),
    };
    format!("nbds://{host}:{port}/disk").parse::<Connector>().unwrap().tls(options)
}

async fn is_useful(connector: &Connector) {
    let connector = connector.clone().connections(NonZeroUsize::new(2).unwrap());
    let client = connector.connect().await.unwrap();
    assert!(client.is_encrypted());
    assert_eq!(client.connections(), 2);
    let data = Bytes::from(pattern(4 << 20));
    let (first, second) = (data.slice(..2 << 20), data.slice(2 << 20..));
    let (first, second) = tokio::join!(
        client.write(0, first, Durability::Cached),
        client.write(2 << 20, second, Durability::Cached)
    );
    first.and(second).unwrap();
    assert!(client.read(span(0, 4 << 20)).await.unwrap() == data);
    client.disconnect().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_held_against_the_host_of_the_uri() {
    let Some(site) = Site::new(Maker::Openssl) else { return };
    let credentials = TlsCredentials::load(CredentialSource::X509 {
        directory: site.path("server"),
        key_password: None,
        client_certificates: ClientCertificates::Required,
        authorization: Authorization::default(),
    })
    .unwrap();
    let (port, _stop) = serve(TlsMode::Require(credentials)).await;
    for host in ["localhost", "127.0.0.1"] {
        is_useful(&connector(&site, Kind::X509, host, port)).await;
    }
    site.authority.issue(Role::Server, "other.example", Validity::Now, &site.path("other"));
    let credentials = TlsCredentials::load(CredentialSource::X509 {
        directory: site.path("other"),
        key_password: None,
        client_certificates: ClientCertificates::NotAsked,
        authorization: Authorization::default(),
    })
    .unwrap();
    let (port, _stop) = serve(TlsMode::Allow(credentials)).await;
    is_useful(&connector(&site, Kind::X509, "127.0.0.1", port)).await;
    match connector(&site, Kind::X509, "localhost", port).connect().await {
        Err(Error::Tls { source: TlsError::Certificate { check, .. }, .. }) => {
            assert!(matches!(check, CertificateCheck::WrongName { .. }), "{check:?}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pre_shared_key_needs_no_name() {
    let Some(site) = Site::new(Maker::Openssl) else { return };
    let file = site.path("keys");
    let credentials = TlsCredentials::load(CredentialSource::Psk { file }).unwrap();
    let (port, _stop) = serve(TlsMode::Require(credentials)).await;
    is_useful(&connector(&site, Kind::PreSharedKey, "127.0.0.1", port)).await;
    let wrong = site.path("wrong.psk");
    add_psk_user(&wrong, "bob:builder");
    add_psk_user(&wrong, "eve");
    for user in ["bob:builder", "eve"] {
        let options = TlsOptions::new(nbd_client::TlsMode::Require);
        let options = options.pre_shared_keys(&wrong).user(user);
        let connector = connector(&site, Kind::PreSharedKey, "127.0.0.1", port).tls(options);
        match connector.connect().await {
            Err(Error::Tls { source, .. }) => {
                assert!(source.to_string().contains(user), "{source}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_in_memory_serve_as_those_in_a_file_do() {
    let text = "bob:00112233445566778899aabbccddeeff\neve:ffeeddccbbaa99887766554433221100\n";
    let keys = PreSharedKeys::parse(text.as_bytes()).unwrap();
    let credentials = TlsCredentials::load(CredentialSource::PskKeys(keys.clone())).unwrap();
    let (port, _stop) = serve(TlsMode::Require(credentials)).await;
    let options = TlsOptions::new(nbd_client::TlsMode::Require).pre_shared_keys_in_memory(keys);
    let connector = |options: TlsOptions| {
        // The file of the URI is not used.
        let uri = format!("nbds://127.0.0.1:{port}/disk?tls-psk-file=/nowhere");
        uri.parse::<Connector>().unwrap().tls(options)
    };
    is_useful(&connector(options.clone().user("bob"))).await;
    for (options, text) in [
        (options.clone(), "'keys in memory' has the keys of 'bob', 'eve': say whose to use"),
        (options.user("mallory"), "'keys in memory' has no key for the user 'mallory'"),
    ] {
        match connector(options).connect().await {
            Err(Error::Tls { source, .. }) => assert!(source.to_string().contains(text)),
            other => panic!("{other:?}"),
        }
    }
}
