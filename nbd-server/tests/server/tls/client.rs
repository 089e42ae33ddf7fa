//! A client with TLS that speaks bytes: options, compact requests, simple replies.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use openssl::ssl::{
    HandshakeError, Ssl, SslContextBuilder, SslFiletype, SslMethod, SslStream, SslVerifyMode,
    SslVersion,
};

use crate::support::TestServer;

pub const EXPORT_NAME: u32 = 1;
pub const ABORT: u32 = 2;
pub const LIST: u32 = 3;
pub const STARTTLS: u32 = 5;
pub const GO: u32 = 7;
pub const STRUCTURED_REPLY: u32 = 8;
pub const SET_META_CONTEXT: u32 = 10;

pub const ACK: u32 = 1;
pub const ERR_POLICY: u32 = (1 << 31) + 2;
pub const ERR_INVALID: u32 = (1 << 31) + 3;
pub const ERR_TLS_REQD: u32 = (1 << 31) + 5;
pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;

/// An option as it is sent.
pub fn option(option: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend((payload.len() as u32).to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// The payload of GO: a name, no information requests.
pub fn go(name: &str) -> Vec<u8> {
    let mut payload = (name.len() as u32).to_be_bytes().to_vec();
    payload.extend(name.as_bytes());
    payload.extend([0, 0]);
    payload
}

/// The payload of SET_META_CONTEXT for base:allocation.
pub fn base_allocation(name: &str) -> Vec<u8> {
    let mut payload = (name.len() as u32).to_be_bytes().to_vec();
    payload.extend(name.as_bytes());
    payload.extend(1_u32.to_be_bytes());
    payload.extend(15_u32.to_be_bytes());
    payload.extend(b"base:allocation");
    payload
}

/// Sends an option and gives the type of the last answer to it.
pub fn ask(stream: &mut (impl Read + Write), number: u32, payload: &[u8]) -> u32 {
    answers(stream, number, payload).0
}

/// The names a server lists.
pub fn list(stream: &mut (impl Read + Write)) -> Vec<String> {
    let (last, entries) = answers(stream, LIST, &[]);
    assert_eq!(last, ACK);
    let name = |entry: &Vec<u8>| {
        let length = u32::from_be_bytes(entry[..4].try_into().unwrap()) as usize;
        String::from_utf8(entry[4..4 + length].to_vec()).unwrap()
    };
    entries.iter().map(name).collect()
}

/// Sends an option; the type of the last answer to it, and the content of those before.
fn answers(stream: &mut (impl Read + Write), number: u32, payload: &[u8]) -> (u32, Vec<Vec<u8>>) {
    stream.write_all(&option(number, payload)).unwrap();
    let mut contents = Vec::new();
    loop {
        let mut header = [0; 20];
        stream.read_exact(&mut header).unwrap();
        let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
        let mut rest = vec![0; word(16) as usize];
        stream.read_exact(&mut rest).unwrap();
        let is_information = word(12) != ACK && word(12) < 1 << 31;
        if !is_information {
            return (word(12), contents);
        }
        contents.push(rest);
    }
}

/// A connection that has exchanged greetings.
pub fn greet(server: &TestServer) -> UnixStream {
    let mut stream = server.connect();
    stream.read_exact(&mut [0; 18]).unwrap();
    stream.write_all(&3_u32.to_be_bytes()).unwrap();
    stream
}

/// What a client with a certificate brings.
pub fn certified(directory: &Path) -> SslContextBuilder {
    let mut builder = SslContextBuilder::new(SslMethod::tls_client()).unwrap();
    builder.set_verify(SslVerifyMode::PEER);
    builder.set_ca_file(directory.join("ca-cert.pem")).unwrap();
    builder.set_certificate_chain_file(directory.join("client-cert.pem")).unwrap();
    builder.set_private_key_file(directory.join("client-key.pem"), SslFiletype::PEM).unwrap();
    builder
}

/// What a user with a pre-shared key brings.
pub fn keyed(user: &'static str, secret: [u8; 16], version: SslVersion) -> SslContextBuilder {
    let mut builder = SslContextBuilder::new(SslMethod::tls_client()).unwrap();
    builder.set_max_proto_version(Some(version)).unwrap();
    builder.set_cipher_list("kECDHEPSK:kDHEPSK:kPSK").unwrap();
    builder.set_ciphersuites("TLS_AES_128_GCM_SHA256").unwrap();
    builder.set_psk_client_callback(move |_, _, identity, key| {
        identity[..user.len()].copy_from_slice(user.as_bytes());
        identity[user.len()] = 0;
        key[..secret.len()].copy_from_slice(&secret);
        Ok(secret.len())
    });
    builder
}

/// STARTTLS and the TLS handshake. In TLS 1.3 a refusal shows at the first read only.
pub fn upgrade(mut stream: UnixStream, tls: SslContextBuilder) -> Option<SslStream<UnixStream>> {
    assert_eq!(ask(&mut stream, STARTTLS, &[]), ACK);
    connect(tls, stream).ok()
}

/// The TLS handshake.
pub fn connect<S: Read + Write>(
    tls: SslContextBuilder,
    stream: S,
) -> Result<SslStream<S>, HandshakeError<S>> {
    Ssl::new(&tls.build()).unwrap().connect(stream)
}

/// Did the server let this client in? Its answer to an option says so.
pub fn is_let_in(server: &TestServer, tls: SslContextBuilder) -> bool {
    let Some(mut stream) = upgrade(greet(server), tls) else { return false };
    if stream.write_all(&option(ABORT, &[])).is_err() {
        return false;
    }
    stream.read(&mut [0; 20]).is_ok_and(|read| read > 0)
}

/// A client in the transmission phase, with simple replies.
pub struct Session<S>(pub S);

impl Session<SslStream<UnixStream>> {
    /// Opens the default export over TLS.
    pub fn open(server: &TestServer, tls: SslContextBuilder) -> Self {
        let mut stream = upgrade(greet(server), tls).expect("TLS");
        stream.write_all(&option(EXPORT_NAME, &[])).unwrap();
        stream.read_exact(&mut [0; 10]).unwrap();
        Self(stream)
    }
}

impl<S: Read + Write> Session<S> {
    pub fn read(&mut self, offset: u64, length: u32) -> Vec<u8> {
        self.0.write_all(&request(0, 1, offset, length)).unwrap();
        assert_eq!(self.reply(), (0, 1));
        let mut data = vec![0; length as usize];
        self.0.read_exact(&mut data).unwrap();
        data
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let mut bytes = request(1, 2, offset, data.len() as u32).to_vec();
        bytes.extend_from_slice(data);
        self.0.write_all(&bytes).unwrap();
        assert_eq!(self.reply(), (0, 2));
    }

    /// Error and cookie.
    fn reply(&mut self) -> (u32, u64) {
        let mut reply = [0; 16];
        self.0.read_exact(&mut reply).unwrap();
        assert_eq!(reply[..4], 0x6744_6698_u32.to_be_bytes());
        let error = u32::from_be_bytes(reply[4..8].try_into().unwrap());
        (error, u64::from_be_bytes(reply[8..].try_into().unwrap()))
    }
}

/// A compact request.
pub fn request(command: u16, cookie: u64, offset: u64, length: u32) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
    bytes[6..8].copy_from_slice(&command.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// Waits until the server closes; what it sent before.
pub fn rest(stream: &mut impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        Err(error) => panic!("the server does not close: {error}"),
    }
    bytes
}
