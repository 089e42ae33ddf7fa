//! Replaces TLS in builds without it. Neither type has a value.

use std::io;
use std::pin::Pin;
use std::task::{Context as TaskContext, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::TlsError;
use super::settings::Setup;
use crate::transport::Socket;

#[derive(Clone)]
pub(crate) enum Context {}

pub(crate) enum TlsStream {}

#[allow(dead_code, reason = "handled by the same code as with TLS")]
pub(crate) enum HandshakeFailure {
    Tls(TlsError),
    Io(io::Error),
}

impl Context {
    pub(crate) fn load(_: &Setup) -> Result<Self, TlsError> {
        Err(TlsError::NotBuiltIn)
    }

    pub(crate) async fn connect(&self, _: Socket) -> Result<TlsStream, HandshakeFailure> {
        match *self {}
    }
}

impl TlsStream {
    pub(crate) fn has_unsent(&self) -> bool {
        match *self {}
    }

    pub(crate) fn why_closed(&self) -> Option<TlsError> {
        match *self {}
    }
}

impl AsyncRead for TlsStream {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut TaskContext<'_>,
        _: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match *self {}
    }
}

impl AsyncWrite for TlsStream {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut TaskContext<'_>,
        _: &[u8],
    ) -> Poll<io::Result<usize>> {
        match *self {}
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        match *self {}
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        match *self {}
    }
}
