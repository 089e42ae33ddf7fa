//! A TLS stream against OpenSSL's own blocking server, without NBD.
#![allow(clippy::unwrap_used, reason = "tests may fail")]

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream as BlockingStream;
use std::thread::JoinHandle;

use nbd_proto::tls::PreSharedKeys;
use openssl::ssl::{Ssl, SslContext, SslMethod, SslStream, SslVersion};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use super::settings::{Credentials, Setup};
use super::{Context, KeySource, TlsMode, TlsStream};
use crate::transport::Socket;

const KEY: [u8; 32] = *b"a key that everybody knows, here";
const LENGTH: usize = 4 << 20;

type Server = JoinHandle<SslStream<BlockingStream>>;

/// Bytes that differ from place to place.
fn pattern(seed: usize) -> Vec<u8> {
    (0..LENGTH).map(|position| (position * 31 + position / 251 + seed) as u8).collect()
}

/// A connection, and a server that runs a script after the TLS handshake.
async fn connected(
    version: SslVersion,
    script: impl FnOnce(&mut SslStream<BlockingStream>) + Send + 'static,
) -> (TlsStream, Server) {
    let (ours, theirs) = BlockingStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        let mut builder = SslContext::builder(SslMethod::tls_server()).unwrap();
        builder.set_max_proto_version(Some(version)).unwrap();
        builder.set_cipher_list("PSK").unwrap();
        builder.set_psk_server_callback(|_, name, key| {
            assert_eq!(name, Some(&b"alice"[..]));
            key[..KEY.len()].copy_from_slice(&KEY);
            Ok(KEY.len())
        });
        let ssl = Ssl::new(&builder.build()).unwrap();
        let mut stream = SslStream::new(ssl, theirs).unwrap();
        stream.accept().unwrap();
        script(&mut stream);
        stream
    });
    let digits: String = KEY.iter().map(|byte| format!("{byte:02x}")).collect();
    let keys = PreSharedKeys::parse(format!("alice:{digits}\n").as_bytes()).unwrap();
    let credentials = Credentials::PreSharedKey { keys: KeySource::Memory(keys), user: None };
    let context = Context::load(&Setup { mode: TlsMode::Require, credentials }).unwrap();
    ours.set_nonblocking(true).unwrap();
    let socket = Socket::Unix(UnixStream::from_std(ours).unwrap());
    let Ok(stream) = context.connect(socket).await else { panic!("the keys are the same") };
    (stream, server)
}

#[tokio::test]
async fn neither_direction_waits_for_the_other() {
    for version in [SslVersion::TLS1_2, SslVersion::TLS1_3] {
        // Far more than the socket holds: the server reads nothing before all is written.
        let (stream, server) = connected(version, |server| {
            server.write_all(&pattern(1)).unwrap();
            let mut got = vec![0; LENGTH];
            server.read_exact(&mut got).unwrap();
            assert!(got == pattern(2));
        })
        .await;
        let (mut reader, mut writer) = tokio::io::split(stream);
        let writing = async {
            writer.write_all(&pattern(2)).await.unwrap();
            writer.flush().await.unwrap();
        };
        let mut got = vec![0; LENGTH];
        let reading = async { reader.read_exact(&mut got).await.unwrap() };
        tokio::join!(writing, reading);
        assert!(got == pattern(1));
        server.join().unwrap();
    }
}

#[tokio::test]
async fn small_parts_are_gathered_into_whole_records() {
    let (mut stream, server) = connected(SslVersion::TLS1_3, |server| {
        let mut got = vec![0; 64 << 10];
        let mut lengths = Vec::new();
        // OpenSSL gives one record at a time.
        while lengths.iter().sum::<usize>() < 40_000 {
            lengths.push(server.ssl_read(&mut got).unwrap());
        }
        assert_eq!(lengths, [16 << 10, 16 << 10, 40_000 - (32 << 10)]);
    })
    .await;
    let parts = vec![7; 1000];
    let slices = [std::io::IoSlice::new(&parts); 40];
    let taken = stream.write_vectored(&slices).await.unwrap();
    assert_eq!(taken, 40_000);
    stream.flush().await.unwrap();
    let server = tokio::task::spawn_blocking(|| server.join().unwrap());
    server.await.unwrap();
}

#[tokio::test]
async fn the_end_is_an_end_with_and_without_a_goodbye() {
    for says_goodbye in [true, false] {
        let (mut stream, server) = connected(SslVersion::TLS1_3, move |server| {
            server.write_all(b"the last words").unwrap();
            if says_goodbye {
                server.shutdown().unwrap();
            }
        })
        .await;
        drop(tokio::task::spawn_blocking(|| server.join().unwrap()).await.unwrap());
        let mut got = Vec::new();
        stream.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"the last words");
    }
}
