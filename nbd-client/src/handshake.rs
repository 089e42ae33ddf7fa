//! Runs the handshake of `nbd-proto` over a socket, with a deadline.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use nbd_proto::handshake::client::{
    Answer, AwaitStep, Awaiting, AwaitingExport, ClientHandshake, ClientStep, ExportStep,
    OptionPhase,
};
use nbd_proto::handshake::{Negotiated, OptionError};
use nbd_proto::wire::OptionReplyType;
use nbd_proto::{ApiMisuse, ProtocolError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout_at};

use crate::error::{Error, Result};
use crate::stream::Stream;
use crate::tls::{self, HandshakeFailure, TlsError, TlsMode};

/// Bytes requested from the socket at once. Answers are small, and the server sends nothing after
/// the handshake before a request arrives.
const READ_LEN: usize = 4096;

/// A socket in the handshake phase.
#[derive(Debug)]
pub(crate) struct Wire {
    pub(crate) stream: Stream,
    pub(crate) input: BytesMut,
    pub(crate) out: BytesMut,
    pub(crate) target: Arc<str>,
    limit: Duration,
    deadline: Instant,
    tls: Option<Tls>,
}

/// The TLS setting of a connection.
#[derive(Clone)]
pub(crate) struct Tls {
    pub(crate) mode: TlsMode,
    pub(crate) context: tls::Context,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tls({:?})", self.mode)
    }
}

/// The result of the greeting.
pub(crate) enum Greeting {
    Oldstyle(Box<Negotiated>),
    Newstyle(OptionPhase),
}

/// The result of an option.
pub(crate) enum Answered<A: Answer> {
    Accepted(A::Accepted),
    Refused(OptionError, OptionPhase),
}

impl Wire {
    pub(crate) fn new(stream: Stream, target: Arc<str>, limit: Duration, tls: Option<Tls>) -> Self {
        Self {
            stream,
            input: BytesMut::with_capacity(READ_LEN),
            out: BytesMut::new(),
            target,
            limit,
            deadline: Instant::now() + limit,
            tls,
        }
    }

    /// Shortens the server's time limit by the time that connecting took.
    pub(crate) fn until(mut self, deadline: Instant) -> Self {
        self.deadline = deadline;
        self
    }

    /// Restores the server's full time limit, for a handshake that queries many exports.
    pub(crate) fn renew_deadline(&mut self) {
        self.deadline = Instant::now() + self.limit;
    }

    /// Reads the greeting and starts TLS if it is requested.
    pub(crate) async fn greeting(&mut self) -> Result<Greeting> {
        let mut handshake = ClientHandshake::new();
        loop {
            let step = handshake.advance(&mut self.input, &mut self.out);
            match step.map_err(|error| self.protocol(error))? {
                ClientStep::NeedsInput(next) => handshake = next,
                ClientStep::Oldstyle(negotiated) => {
                    self.check_clear(TlsError::TooOld)?;
                    return Ok(Greeting::Oldstyle(negotiated));
                }
                // The client flags stay in `out` and are sent together with the first option.
                ClientStep::Newstyle(phase) if !phase.is_fixed_newstyle() => {
                    self.check_clear(TlsError::TooOld)?;
                    return Ok(Greeting::Newstyle(phase));
                }
                ClientStep::Newstyle(phase) => {
                    return self.secure(phase).await.map(Greeting::Newstyle);
                }
            }
            self.receive("before its greeting was complete").await?;
        }
    }

    /// Starts TLS if it is requested (STARTTLS).
    async fn secure(&mut self, phase: OptionPhase) -> Result<OptionPhase> {
        let Some(Tls { context, .. }) = self.tls.clone() else { return Ok(phase) };
        let sent = phase.start_tls(&mut self.out);
        let before = match self.answer(sent).await? {
            Answered::Accepted(before) => before,
            Answered::Refused(error, phase) => {
                let is_absent =
                    matches!(error.reply, OptionReplyType::ERR_UNSUP | OptionReplyType::ERR_POLICY);
                if !is_absent {
                    return Err(self.tls_error(TlsError::Refused(error)));
                }
                tracing::debug!(target = &*self.target, %error, "the server has no TLS");
                self.check_clear(TlsError::Refused(error))?;
                return Ok(phase);
            }
        };
        let connecting = context.connect(self.stream.take_out());
        let stream = match timeout_at(self.deadline, connecting).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(HandshakeFailure::Tls(error))) => return Err(self.tls_error(error)),
            Ok(Err(HandshakeFailure::Io(error))) => {
                return Err(self.lost("during the TLS handshake", error));
            }
            Err(_) => return Err(self.timed_out()),
        };
        self.stream = Stream::Tls(Box::new(stream));
        // Bytes received in the clear must not be interpreted as protocol.
        self.input = BytesMut::with_capacity(READ_LEN);
        Ok(before.resume_after_tls())
    }

    /// Fails unless the connection may continue in the clear.
    fn check_clear(&self, why_not: TlsError) -> Result<()> {
        match &self.tls {
            Some(tls) if tls.mode == TlsMode::Require => Err(self.tls_error(why_not)),
            _ => Ok(()),
        }
    }

    fn tls_error(&self, source: TlsError) -> Error {
        Error::Tls { target: Arc::clone(&self.target), source }
    }

    fn timed_out(&self) -> Error {
        Error::HandshakeTimeout { target: Arc::clone(&self.target), limit: self.limit }
    }

    pub(crate) async fn answer<A: Answer>(
        &mut self,
        sent: Result<Awaiting<A>, ApiMisuse>,
    ) -> Result<Answered<A>> {
        let mut awaiting = sent?;
        self.send().await?;
        loop {
            let step = awaiting.advance(&mut self.input);
            match step.map_err(|error| self.protocol(error))? {
                AwaitStep::NeedsInput(next) => awaiting = next,
                AwaitStep::Accepted(accepted) => return Ok(Answered::Accepted(accepted)),
                AwaitStep::Refused { error, next } => return Ok(Answered::Refused(error, next)),
            }
            self.receive("during the handshake").await?;
        }
    }

    pub(crate) async fn export(
        &mut self,
        sent: Result<AwaitingExport, ApiMisuse>,
    ) -> Result<Negotiated> {
        let mut awaiting = sent?;
        self.send().await?;
        loop {
            let step = awaiting.advance(&mut self.input);
            match step.map_err(|error| self.protocol(error))? {
                ExportStep::NeedsInput(next) => awaiting = next,
                ExportStep::Transmission(negotiated) => return Ok(*negotiated),
            }
            self.receive("after EXPORT_NAME, as servers do that have no such export").await?;
        }
    }

    /// Ends the handshake gracefully, without waiting for an uncooperative server.
    pub(crate) async fn abort(mut self, phase: OptionPhase) {
        let sent = phase.abort(&mut self.out);
        if sent.is_ok() {
            self.deadline = self.deadline.min(Instant::now() + Duration::from_secs(1));
            // Some servers close without an answer; in both cases the connection has ended.
            drop(self.answer(sent).await);
        }
    }

    pub(crate) fn refused(&self, what: impl Into<String>, source: OptionError) -> Error {
        if source.reply == OptionReplyType::ERR_TLS_REQD {
            return self.tls_error(TlsError::RequiredByServer);
        }
        Error::Refused { target: Arc::clone(&self.target), what: what.into(), source }
    }

    pub(crate) fn unsupported(&self, what: &'static str, why: &'static str) -> Error {
        Error::Unsupported { target: Arc::clone(&self.target), what, why }
    }

    fn protocol(&self, source: ProtocolError) -> Error {
        Error::Handshake { target: Arc::clone(&self.target), source }
    }

    async fn send(&mut self) -> Result<()> {
        let sending = async {
            self.stream.write_all_buf(&mut self.out).await?;
            self.stream.flush().await
        };
        let written = timeout_at(self.deadline, sending).await;
        let result = self.checked(written, "during the handshake");
        if result.is_err()
            && matches!(self.stream, Stream::Tls(_))
            && let Err(error @ Error::Tls { .. }) = self.receive("during the handshake").await
        {
            // The server has closed the connection, and may have sent the reason before.
            return Err(error);
        }
        result
    }

    async fn receive(&mut self, during: &'static str) -> Result<()> {
        self.input.reserve(READ_LEN);
        let read = timeout_at(self.deadline, self.stream.read_buf(&mut self.input)).await;
        if self.checked(read, during)? == 0 {
            let closed =
                io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection");
            return Err(self.lost(during, closed));
        }
        Ok(())
    }

    fn checked<T>(
        &self,
        result: Result<io::Result<T>, tokio::time::error::Elapsed>,
        during: &'static str,
    ) -> Result<T> {
        match result {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(self.lost(during, error)),
            Err(_) => Err(self.timed_out()),
        }
    }

    fn lost(&self, during: &'static str, source: io::Error) -> Error {
        if let Some(error) = source.get_ref().and_then(|inner| inner.downcast_ref::<TlsError>()) {
            return self.tls_error(error.clone());
        }
        if let Stream::Tls(stream) = &self.stream
            && let Some(error) = stream.why_closed()
        {
            return self.tls_error(error);
        }
        let source = Arc::new(source);
        Error::HandshakeLost { target: Arc::clone(&self.target), during, source }
    }
}
