//! A client with any number of requests in flight. It takes its requests from `nbd-proto`'s client
//! machine, which checks every reply, or sends headers that no machine would.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread::JoinHandle;

use bytes::BytesMut;
use nbd_proto::handshake::client::{ExportInfo, InfoRequest, OptionPhase};
use nbd_proto::handshake::{ListedExport, Negotiated, OptionError};
use nbd_proto::transmission::client::{Event, ServerError, Transmission};
use nbd_proto::transmission::{Command, Durability, Fragmentation};
use nbd_proto::wire::{
    BlockDescriptor, ChunkHeader, CommandFlags, CommandType, Cookie, Errno, MetaContextId,
    MetaContextName, ReplyFlags, ReplyMode, RequestHeader, SimpleReplyHeader, magic,
};

use super::handshake::{Handshake, receive};
use super::{LONG, TestServer};

/// Small requests are joined up to this many bytes.
const GATHERED_LEN: usize = 64 * 1024;

/// What one request gave.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The content of a READ; bytes that were not sent are 0xee.
    pub data: Vec<u8>,
    /// The parts of it that came, as distance from the start and length, in bytes.
    pub parts: Vec<(u64, usize)>,
    /// Those of them that came as holes.
    pub holes: Vec<(u64, usize)>,
    /// Answers of a BLOCK_STATUS.
    pub statuses: Vec<(MetaContextId, Vec<BlockDescriptor>)>,
    pub result: Result<(), ServerError>,
}

/// One connection in the transmission phase.
pub struct Client {
    pub negotiated: Negotiated,
    stream: UnixStream,
    /// Requests leave by a thread of their own: the server may stop to read while it cannot send.
    sender: Option<mpsc::Sender<Vec<u8>>>,
    writer: Option<JoinHandle<()>>,
    input: BytesMut,
    transmission: Transmission,
    pending: HashMap<Cookie, Outcome>,
}

/// A request header as no machine would write it, with the cookie 77.
pub fn header(command: CommandType, offset: u64, length: u64) -> RequestHeader {
    RequestHeader { flags: CommandFlags::empty(), command, cookie: Cookie(77), offset, length }
}

impl Client {
    /// Opens the default export of `server`.
    pub fn connect(server: &TestServer, mode: ReplyMode) -> Self {
        Self::open(server, mode, "", &[])
    }

    /// Opens an export and selects contexts.
    pub fn open(
        server: &TestServer,
        mode: ReplyMode,
        name: &str,
        contexts: &[MetaContextName],
    ) -> Self {
        let mut handshake = Handshake { stream: server.connect(), input: BytesMut::new() };
        let phase = handshake.greet();
        Self::negotiate(handshake, phase, mode, name, contexts)
    }

    /// Opens the default export; `None` if the server has no place for another client.
    pub fn try_connect(server: &TestServer, mode: ReplyMode) -> Option<Self> {
        let mut handshake = Handshake { stream: server.connect(), input: BytesMut::new() };
        let phase = handshake.try_greet()?;
        Some(Self::negotiate(handshake, phase, mode, "", &[]))
    }

    /// Opens an export on a connected stream; `None` if the server closes it or has no such export.
    pub fn on(stream: UnixStream, mode: ReplyMode, name: &str) -> Option<Self> {
        stream.set_read_timeout(Some(LONG)).unwrap();
        let mut handshake = Handshake { stream, input: BytesMut::new() };
        let mut phase = handshake.try_greet()?;
        phase = match mode {
            ReplyMode::Extended => handshake.ask(|out| phase.extended_headers(out).unwrap()),
            ReplyMode::Structured => handshake.ask(|out| phase.structured_reply(out).unwrap()),
            ReplyMode::Simple => phase,
        };
        let went = handshake.try_ask(|out| phase.go(name, InfoRequest::ALL, out).unwrap());
        let (negotiated, _) = *went.ok()?;
        Some(Self::start(handshake.stream, handshake.input, negotiated))
    }

    /// Opens the default export on a connected stream and selects contexts.
    pub fn with_contexts(
        stream: UnixStream,
        mode: ReplyMode,
        contexts: &[MetaContextName],
    ) -> Self {
        stream.set_read_timeout(Some(LONG)).unwrap();
        let mut handshake = Handshake { stream, input: BytesMut::new() };
        let phase = handshake.greet();
        Self::negotiate(handshake, phase, mode, "", contexts)
    }

    fn negotiate(
        mut handshake: Handshake,
        mut phase: OptionPhase,
        mode: ReplyMode,
        name: &str,
        contexts: &[MetaContextName],
    ) -> Self {
        if mode != ReplyMode::Simple {
            phase = match mode {
                ReplyMode::Extended => handshake.ask(|out| phase.extended_headers(out).unwrap()),
                _ => handshake.ask(|out| phase.structured_reply(out).unwrap()),
            };
            if !contexts.is_empty() {
                let selected =
                    handshake.ask(|out| phase.set_meta_context(name, contexts, out).unwrap());
                phase = selected.1;
            }
        }
        let (negotiated, _) = *handshake.ask(|out| phase.go(name, InfoRequest::ALL, out).unwrap());
        assert_eq!(negotiated.reply_mode, mode);
        Self::start(handshake.stream, handshake.input, negotiated)
    }

    /// The names and descriptions a server lists.
    pub fn list(server: &TestServer) -> Vec<ListedExport> {
        let mut handshake = Handshake { stream: server.connect(), input: BytesMut::new() };
        let phase = handshake.greet();
        handshake.ask(|out| phase.list(out).unwrap()).0
    }

    /// What a server tells about an export, or why it does not.
    pub fn info(server: &TestServer, name: &str) -> Result<ExportInfo, OptionError> {
        let mut handshake = Handshake { stream: server.connect(), input: BytesMut::new() };
        let phase = handshake.greet();
        handshake.try_ask(|out| phase.info(name, InfoRequest::ALL, out).unwrap()).map(|info| info.0)
    }

    /// Does the server refuse this form of replies?
    pub fn refuses_mode(server: &TestServer, mode: ReplyMode) -> bool {
        let mut handshake = Handshake { stream: server.connect(), input: BytesMut::new() };
        let phase = handshake.greet();
        match mode {
            ReplyMode::Extended => {
                handshake.try_ask(|out| phase.extended_headers(out).unwrap()).is_err()
            }
            _ => handshake.try_ask(|out| phase.structured_reply(out).unwrap()).is_err(),
        }
    }

    fn start(stream: UnixStream, input: BytesMut, negotiated: Negotiated) -> Self {
        let (sender, requests) = mpsc::channel::<Vec<u8>>();
        let mut output = stream.try_clone().unwrap();
        let writer = std::thread::spawn(move || {
            while let Ok(mut bytes) = requests.recv() {
                // What waits leaves together, as it does from a client that pipelines.
                while bytes.len() < GATHERED_LEN
                    && let Ok(next) = requests.try_recv()
                {
                    bytes.extend_from_slice(&next);
                }
                if output.write_all(&bytes).is_err() {
                    return;
                }
            }
            let _ = output.shutdown(Shutdown::Write);
        });
        Self {
            transmission: Transmission::new(&negotiated),
            negotiated,
            stream,
            sender: Some(sender),
            writer: Some(writer),
            input,
            pending: HashMap::new(),
        }
    }

    /// The socket, to do with what a client should not.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Requests that have no answer yet.
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Sends any bytes.
    pub fn send(&self, bytes: Vec<u8>) {
        self.sender.as_ref().unwrap().send(bytes).unwrap();
    }

    /// After what was sent comes the end of the stream; replies can still come.
    pub fn finish_sending(&mut self) {
        self.sender = None;
    }

    /// Sends a request and gives its cookie.
    pub fn submit(
        &mut self,
        offset: u64,
        length: u64,
        command: &Command,
        payload: &[u8],
    ) -> Cookie {
        let mut out = BytesMut::new();
        let cookie = self.transmission.request(offset, length, command, &mut out).unwrap();
        out.extend_from_slice(payload);
        self.send(out.to_vec());
        let data =
            if let Command::Read(_) = command { vec![0xee; length as usize] } else { vec![] };
        let (parts, holes, statuses) = (Vec::new(), Vec::new(), Vec::new());
        let outcome = Outcome { data, parts, holes, statuses, result: Ok(()) };
        self.pending.insert(cookie, outcome);
        cookie
    }

    /// The next request that is over, whichever it is.
    pub fn next_finished(&mut self) -> (Cookie, Outcome) {
        loop {
            match self.transmission.advance(&mut self.input).unwrap() {
                Event::NeedsInput => assert!(self.receive(), "the server closed the connection"),
                Event::Data { cookie, position, length } => {
                    let data = self.take(length);
                    let outcome = self.pending.get_mut(&cookie).unwrap();
                    outcome.data[position as usize..][..length].copy_from_slice(&data);
                    outcome.parts.push((position, length));
                }
                Event::Hole { cookie, position, length } => {
                    let outcome = self.pending.get_mut(&cookie).unwrap();
                    outcome.data[position as usize..][..length].fill(0);
                    outcome.parts.push((position, length));
                    outcome.holes.push((position, length));
                }
                Event::BlockStatus { cookie, context, descriptors } => {
                    let outcome = self.pending.get_mut(&cookie).unwrap();
                    outcome.statuses.push((context, descriptors));
                }
                Event::Finished { cookie, result } => {
                    let outcome = self.pending.remove(&cookie).unwrap();
                    return (cookie, Outcome { result, ..outcome });
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// Sends one request while no other is in flight, and waits for its answer.
    pub fn request(&mut self, offset: u64, length: u64, command: &Command) -> Outcome {
        self.request_with(offset, length, command, &[])
    }

    fn request_with(
        &mut self,
        offset: u64,
        length: u64,
        command: &Command,
        data: &[u8],
    ) -> Outcome {
        let cookie = self.submit(offset, length, command, data);
        let (finished, outcome) = self.next_finished();
        assert_eq!(finished, cookie);
        outcome
    }

    /// A READ that has to succeed.
    pub fn read(&mut self, offset: u64, length: u64) -> Vec<u8> {
        let outcome = self.request(offset, length, &Command::Read(Fragmentation::Allowed));
        assert_eq!(outcome.result, Ok(()), "READ of {length} bytes at {offset}");
        outcome.data
    }

    /// A WRITE and what came of it.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), ServerError> {
        let command = Command::Write(Durability::Cached);
        self.request_with(offset, data.len() as u64, &command, data).result
    }

    /// The wire form of a request.
    pub fn encode(&self, header: &RequestHeader) -> Vec<u8> {
        let mut out = Vec::new();
        match self.negotiated.reply_mode {
            ReplyMode::Extended => header.encode_extended(&mut out),
            _ => header.encode_compact(&mut out).unwrap(),
        }
        out
    }

    /// Sends a header of any content and a payload, and gives the error that is answered to it (0
    /// for success). For requests without content only.
    pub fn raw(&mut self, header: &RequestHeader, payload: &[u8]) -> Errno {
        let mut bytes = self.encode(header);
        bytes.extend_from_slice(payload);
        self.send(bytes);
        let (cookie, errno) = self.raw_reply();
        assert_eq!(cookie, header.cookie);
        errno
    }

    /// Reads a whole reply without content: its cookie and error.
    pub fn raw_reply(&mut self) -> (Cookie, Errno) {
        let mut errno = Errno(0);
        loop {
            let front = self.peek(4);
            let (header, header_len) = match u32::from_be_bytes(front.try_into().unwrap()) {
                magic::SIMPLE_REPLY => {
                    let bytes = self.take(SimpleReplyHeader::LEN);
                    let header = SimpleReplyHeader::decode(&bytes).unwrap();
                    return (header.cookie, header.error);
                }
                magic::STRUCTURED_REPLY => {
                    let front = self.peek(ChunkHeader::STRUCTURED_LEN);
                    let header = ChunkHeader::decode_structured(&front).unwrap().unwrap();
                    (header, ChunkHeader::STRUCTURED_LEN)
                }
                magic::EXTENDED_REPLY => {
                    let front = self.peek(ChunkHeader::EXTENDED_LEN);
                    let header = ChunkHeader::decode_extended(&front).unwrap().unwrap().0;
                    (header, ChunkHeader::EXTENDED_LEN)
                }
                other => panic!("{other:#x} is not a reply"),
            };
            drop(self.take(header_len));
            let payload = self.take(header.length as usize);
            if header.reply.is_error() {
                errno = Errno(u32::from_be_bytes(payload[..4].try_into().unwrap()));
            }
            if header.flags.contains(ReplyFlags::DONE) {
                return (header.cookie, errno);
            }
        }
    }

    /// Reads until the server closes; the bytes that came and that no reply was made of.
    pub fn read_to_end(&mut self) -> Vec<u8> {
        while self.receive() {}
        self.input.split().to_vec()
    }

    /// Waits until the server closes, without another byte before it does.
    pub fn expect_end(&mut self) {
        let rest = self.read_to_end();
        assert!(rest.is_empty(), "the server sent {} more bytes", rest.len());
    }

    /// Waits until something was sent, and reads no more than a byte of it.
    pub fn peek_some(&mut self) -> usize {
        let mut byte = [0];
        let count = self.stream.read(&mut byte).unwrap();
        self.input.extend_from_slice(&byte[..count]);
        count
    }

    fn peek(&mut self, length: usize) -> Vec<u8> {
        while self.input.len() < length {
            assert!(self.receive(), "the server closed the connection");
        }
        self.input[..length].to_vec()
    }

    fn take(&mut self, length: usize) -> BytesMut {
        while self.input.len() < length {
            assert!(self.receive(), "the server closed the connection");
        }
        self.input.split_to(length)
    }

    fn receive(&mut self) -> bool {
        receive(&mut self.stream, &mut self.input)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
        self.sender = None;
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}
