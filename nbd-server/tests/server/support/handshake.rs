//! The client's side of the handshake.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use bytes::BytesMut;
use nbd_proto::handshake::OptionError;
use nbd_proto::handshake::client::{
    Answer, AwaitStep, Awaiting, ClientHandshake, ClientStep, OptionPhase,
};

/// Reads once; false at the end. A server that cuts the connection ends it as well.
pub fn receive(stream: &mut UnixStream, input: &mut BytesMut) -> bool {
    let before = input.len();
    input.resize(before + (128 << 10), 0);
    let read = match stream.read(&mut input[before..]) {
        Ok(read) => read,
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => 0,
        Err(error) => panic!("reading from the server: {error}"),
    };
    input.truncate(before + read);
    read > 0
}

/// A connection before the transmission phase.
pub struct Handshake {
    pub stream: UnixStream,
    pub input: BytesMut,
}

impl Handshake {
    pub fn greet(&mut self) -> OptionPhase {
        self.try_greet().expect("the server closed instead of a greeting")
    }

    pub fn try_greet(&mut self) -> Option<OptionPhase> {
        let mut handshake = ClientHandshake::new();
        loop {
            let mut out = BytesMut::new();
            let step = handshake.advance(&mut self.input, &mut out).unwrap();
            self.stream.write_all(&out).unwrap();
            handshake = match step {
                ClientStep::NeedsInput(next) => next,
                ClientStep::Newstyle(phase) => return Some(phase),
                ClientStep::Oldstyle(_) => panic!("the server is newstyle"),
            };
            if !receive(&mut self.stream, &mut self.input) {
                return None;
            }
        }
    }

    pub fn ask<A: Answer>(
        &mut self,
        option: impl FnOnce(&mut BytesMut) -> Awaiting<A>,
    ) -> A::Accepted {
        self.try_ask(option).unwrap()
    }

    pub fn try_ask<A: Answer>(
        &mut self,
        option: impl FnOnce(&mut BytesMut) -> Awaiting<A>,
    ) -> Result<A::Accepted, OptionError> {
        let mut out = BytesMut::new();
        let mut awaiting = option(&mut out);
        self.stream.write_all(&out).unwrap();
        loop {
            awaiting = match awaiting.advance(&mut self.input).unwrap() {
                AwaitStep::NeedsInput(next) => next,
                AwaitStep::Accepted(accepted) => return Ok(accepted),
                AwaitStep::Refused { error, .. } => return Err(error),
            };
            assert!(receive(&mut self.stream, &mut self.input), "the server closed");
        }
    }
}
