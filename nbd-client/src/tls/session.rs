//! One TLS session without a socket: it converts between records and data.
//!
//! OpenSSL makes a read for each record's header and body and a write for each record. This session
//! gives it buffers instead, so that one system call carries many records.

use std::io::{self, Read, Write};
use std::sync::{Arc, OnceLock};

use openssl::error::ErrorStack;
use openssl::ssl::{ErrorCode, Ssl, SslStream, SslVersion};

use super::TlsError;
use super::explain::{self, Identity};

/// Most data in one record, in bytes (RFC 8446, section 5.1).
pub(super) const RECORD_LEN: usize = 16 * 1024;

/// Size of the buffer for records, in bytes.
const INPUT_LEN: usize = 256 * 1024;

/// If less than this is free at the end of the input buffer, its contents move to the beginning.
const LEAST_ROOM: usize = 64 * 1024;

/// A TLS session.
pub(crate) struct Session {
    tls: SslStream<Records>,
    identity: Arc<Identity>,
    /// The result of the check of the server's certificate.
    failure: Arc<OnceLock<TlsError>>,
    is_keyed: bool,
}

/// The result of a step.
#[derive(Debug)]
pub(super) enum Step<T> {
    Done(T),
    /// More records of the server are needed.
    NeedsInput,
}

impl Session {
    /// Begins a client's handshake. With `is_keyed` only a pre-shared key is accepted.
    pub(super) fn new(
        mut ssl: Ssl,
        identity: Arc<Identity>,
        failure: Arc<OnceLock<TlsError>>,
        is_keyed: bool,
    ) -> Result<Self, ErrorStack> {
        ssl.set_connect_state();
        let tls = SslStream::new(ssl, Records::default())?;
        Ok(Self { tls, identity, failure, is_keyed })
    }

    /// Continues the handshake. There may be output even after a failure: the alert for the server.
    pub(super) fn handshake(&mut self) -> Result<Step<()>, TlsError> {
        match self.tls.do_handshake() {
            Ok(()) => self.check_key().map(Step::Done),
            Err(error) if error.code() == ErrorCode::WANT_READ => Ok(Step::NeedsInput),
            Err(error) => Err(self.explain(&error)),
        }
    }

    /// Returns whether the server authenticated itself with the key. In TLS 1.3 it could have
    /// ignored the key.
    fn check_key(&self) -> Result<(), TlsError> {
        let ssl = self.tls.ssl();
        let cipher = ssl.current_cipher().map_or("", |cipher| cipher.name());
        tracing::debug!(version = ssl.version_str(), cipher, "TLS is established");
        let is_key_used = match ssl.version2() {
            Some(SslVersion::TLS1_3) => ssl.session_reused(),
            _ => cipher.contains("PSK"),
        };
        if self.is_keyed && !is_key_used { Err(TlsError::NotPreSharedKey) } else { Ok(()) }
    }

    /// Decrypts at most one record; `Done(0)` is the end.
    pub(super) fn read(&mut self, data: &mut [u8]) -> io::Result<Step<usize>> {
        match self.tls.ssl_read(data) {
            Ok(length) => Ok(Step::Done(length)),
            Err(error) => match error.code() {
                ErrorCode::WANT_READ => Ok(Step::NeedsInput),
                ErrorCode::ZERO_RETURN => Ok(Step::Done(0)),
                // Servers close without close_notify; the caller knows whether data is missing.
                _ if self.tls.get_ref().is_at_end() => Ok(Step::Done(0)),
                _ => Err(io::Error::other(self.explain(&error))),
            },
        }
    }

    /// Encrypts one record and returns the number of bytes consumed.
    pub(super) fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let data = data.get(..RECORD_LEN).unwrap_or(data);
        if data.is_empty() {
            return Ok(0);
        }
        // Records go into a growable buffer: there is nothing to wait for.
        self.tls.ssl_write(data).map_err(|error| io::Error::other(self.explain(&error)))
    }

    /// Sends close_notify.
    pub(super) fn shut_down(&mut self) {
        // If it cannot be sent, closing the socket has the same effect.
        drop(self.tls.shutdown());
    }

    /// The buffer for the server's records.
    pub(super) fn input(&mut self) -> &mut [u8] {
        self.tls.get_mut().room()
    }

    /// Records that this many bytes were stored; zero means the end.
    pub(super) fn received(&mut self, length: usize) {
        let records = self.tls.get_mut();
        records.end += length;
        records.at_end |= length == 0;
    }

    /// The records to send to the server.
    pub(super) fn output(&self) -> &[u8] {
        let records = self.tls.get_ref();
        records.output.get(records.sent..).unwrap_or_default()
    }

    pub(super) fn has_output(&self) -> bool {
        let records = self.tls.get_ref();
        records.sent < records.output.len()
    }

    /// Records that this many bytes were sent.
    pub(super) fn sent(&mut self, length: usize) {
        let records = self.tls.get_mut();
        records.sent += length;
        if records.sent >= records.output.len() {
            records.output.clear();
            records.sent = 0;
        }
    }

    /// Describes the possible cause of the server's closing the connection.
    pub(super) fn closed(&self, when: &'static str) -> TlsError {
        explain::closed(when, &self.identity)
    }

    fn explain(&self, error: &openssl::ssl::Error) -> TlsError {
        match self.failure.get() {
            Some(failure) => failure.clone(),
            None => explain::failure(error, &self.identity),
        }
    }
}

/// The buffers of records in both directions.
#[derive(Default)]
struct Records {
    input: Box<[u8]>,
    start: usize,
    end: usize,
    at_end: bool,
    output: Vec<u8>,
    sent: usize,
}

impl Records {
    fn room(&mut self) -> &mut [u8] {
        if self.input.is_empty() {
            self.input = vec![0; INPUT_LEN].into();
        }
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.input.len() - self.end < LEAST_ROOM {
            self.input.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        self.input.get_mut(self.end..).unwrap_or_default()
    }

    const fn is_at_end(&self) -> bool {
        self.at_end && self.start == self.end
    }
}

impl Read for Records {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.input.get(self.start..self.end).unwrap_or_default();
        if available.is_empty() && !self.at_end {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let length = { available }.read(buffer)?;
        self.start += length;
        Ok(length)
    }
}

impl Write for Records {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.output.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
