//! A server that follows the script of a test.

use std::future::Future;
use std::io;
use std::time::Duration;

use nbd_client::{Client, Connector, MetaContextName, ReplyMode, TransmissionFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Size of the scripted export.
pub(crate) const SIZE: u64 = 1 << 20;
/// The number under which the scripted server selects `base:allocation`.
pub(crate) const CONTEXT: u32 = 7;

pub(crate) const NONE: u16 = 0;
pub(crate) const DATA: u16 = 1;
pub(crate) const HOLE: u16 = 2;
pub(crate) const STATUS: u16 = 5;
pub(crate) const STATUS_EXT: u16 = 6;
pub(crate) const ERROR: u16 = 0x8001;
pub(crate) const ERROR_OFFSET: u16 = 0x8002;

/// Concatenates byte strings.
macro_rules! bytes {
    ($($part:expr),* $(,)?) => {{
        let mut all = Vec::<u8>::new();
        $( all.extend_from_slice(&$part[..]); )*
        all
    }};
}
pub(crate) use bytes;

/// What the server offers.
#[derive(Clone)]
pub(crate) struct Offer {
    pub(crate) mode: ReplyMode,
    pub(crate) size: u64,
    pub(crate) flags: TransmissionFlags,
}

impl Offer {
    pub(crate) fn new(mode: ReplyMode) -> Self {
        let flags = TransmissionFlags::all()
            - (TransmissionFlags::READ_ONLY | TransmissionFlags::BLOCK_STATUS_PAYLOAD);
        Self { mode, size: SIZE, flags }
    }
}

/// A request as the server sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) flags: u16,
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// The server's end of a connection. Every method fails once the peer is gone or the budget of
/// bytes to send is used up, which closes the connection.
pub(crate) struct Script {
    stream: UnixStream,
    mode: ReplyMode,
    budget: usize,
    pub(crate) sent: usize,
}

impl Script {
    pub(crate) fn over(stream: UnixStream) -> Self {
        Self { stream, mode: ReplyMode::Simple, budget: usize::MAX, sent: 0 }
    }

    /// Dies after this many bytes.
    pub(crate) fn dying_after(stream: UnixStream, budget: usize) -> Self {
        Self { budget, ..Self::over(stream) }
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let allowed = bytes.len().min(self.budget - self.sent);
        self.stream.write_all(&bytes[..allowed]).await?;
        self.sent += allowed;
        if allowed < bytes.len() { Err(io::ErrorKind::Other.into()) } else { Ok(()) }
    }

    pub(crate) async fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).await?;
        Ok(bytes)
    }

    /// Sends the greeting and takes the client's flags.
    pub(crate) async fn greet(&mut self) -> io::Result<()> {
        self.send(b"NBDMAGICIHAVEOPT\0\x03").await?;
        assert_eq!(self.take().await?, [0, 0, 0, 3], "both flags are answered");
        Ok(())
    }

    /// Takes an option: its number and payload.
    pub(crate) async fn option(&mut self) -> io::Result<(u32, Vec<u8>)> {
        assert_eq!(&self.take::<8>().await?, b"IHAVEOPT");
        let option = u32::from_be_bytes(self.take().await?);
        let length = u32::from_be_bytes(self.take().await?);
        let mut payload = vec![0; length as usize];
        self.stream.read_exact(&mut payload).await?;
        Ok((option, payload))
    }

    pub(crate) async fn answer(&mut self, option: u32, kind: u32, body: &[u8]) -> io::Result<()> {
        self.send(&option_reply(option, kind, body)).await
    }

    /// A whole handshake.
    pub(crate) async fn handshake(&mut self, offer: &Offer) -> io::Result<()> {
        self.greet().await?;
        self.options(offer).await
    }

    /// What follows the greeting.
    pub(crate) async fn options(&mut self, offer: &Offer) -> io::Result<()> {
        const ACK: u32 = 1;
        const INFO: u32 = 3;
        const META_CONTEXT: u32 = 4;
        const ERR_UNSUP: u32 = 0x8000_0001;
        self.mode = offer.mode;
        loop {
            let (option, payload) = self.option().await?;
            match option {
                7 => {
                    let export =
                        bytes![[0, 0], offer.size.to_be_bytes(), offer.flags.bits().to_be_bytes()];
                    self.answer(option, INFO, &export).await?;
                    return self.answer(option, ACK, &[]).await;
                }
                8 if offer.mode == ReplyMode::Structured => self.answer(option, ACK, &[]).await?,
                11 if offer.mode == ReplyMode::Extended => self.answer(option, ACK, &[]).await?,
                10 => {
                    assert!(payload.ends_with(b"base:allocation"));
                    let selected = bytes![CONTEXT.to_be_bytes(), b"base:allocation"];
                    self.answer(option, META_CONTEXT, &selected).await?;
                    self.answer(option, ACK, &[]).await?;
                }
                _ => self.answer(option, ERR_UNSUP, b"no").await?,
            }
        }
    }

    /// Takes a request; the data of a WRITE is thrown away.
    pub(crate) async fn request(&mut self) -> io::Result<Seen> {
        let extended = self.mode == ReplyMode::Extended;
        let magic: u32 = if extended { 0x21e4_1c71 } else { 0x2560_9513 };
        assert_eq!(u32::from_be_bytes(self.take().await?), magic);
        let flags = u16::from_be_bytes(self.take().await?);
        let command = u16::from_be_bytes(self.take().await?);
        let cookie = u64::from_be_bytes(self.take().await?);
        let offset = u64::from_be_bytes(self.take().await?);
        let length = if extended {
            u64::from_be_bytes(self.take().await?)
        } else {
            u32::from_be_bytes(self.take().await?).into()
        };
        if command == 1 {
            let mut data = vec![0; length as usize];
            self.stream.read_exact(&mut data).await?;
        }
        Ok(Seen { flags, command, cookie, offset, length })
    }

    /// Sends a chunk of a reply to a request.
    pub(crate) async fn chunk(
        &mut self,
        done: bool,
        kind: u16,
        request: &Seen,
        body: &[u8],
    ) -> io::Result<()> {
        let chunk = chunk(self.mode, done, kind, request.cookie, request.offset, body);
        self.send(&chunk).await
    }

    /// Answers a READ with data made by [`data_at`].
    pub(crate) async fn answer_read(&mut self, request: &Seen) -> io::Result<()> {
        assert_eq!(request.command, 0, "a READ");
        let data = data_at(request.offset, request.length as usize);
        if self.mode == ReplyMode::Simple {
            return self.send(&bytes![simple(0, request.cookie), data]).await;
        }
        let body = bytes![request.offset.to_be_bytes(), data];
        self.chunk(true, DATA, request, &body).await
    }

    /// Reports success without content.
    pub(crate) async fn answer_done(&mut self, request: &Seen) -> io::Result<()> {
        match self.mode {
            ReplyMode::Extended => self.chunk(true, NONE, request, &[]).await,
            _ => self.send(&simple(0, request.cookie)).await,
        }
    }

    /// Waits for the client to close the connection.
    pub(crate) async fn closed(&mut self) {
        let mut rest = Vec::new();
        drop(self.stream.read_to_end(&mut rest).await);
        assert!(rest.is_empty(), "nothing comes before the end");
    }

    /// Takes what the client still has to say, until it closes the connection.
    pub(crate) async fn rest(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        drop(self.stream.read_to_end(&mut rest).await);
        rest
    }

    /// Waits for DISC and the end.
    pub(crate) async fn goodbye(&mut self) {
        let request = self.request().await.unwrap();
        assert_eq!(request.command, 2, "DISC");
        self.closed().await;
    }
}

pub(crate) fn option_reply(option: u32, kind: u32, body: &[u8]) -> Vec<u8> {
    bytes![
        0x0003_e889_0455_65a9_u64.to_be_bytes(),
        option.to_be_bytes(),
        kind.to_be_bytes(),
        (body.len() as u32).to_be_bytes(),
        body,
    ]
}

/// A simple reply.
pub(crate) fn simple(error: u32, cookie: u64) -> Vec<u8> {
    bytes![0x6744_6698_u32.to_be_bytes(), error.to_be_bytes(), cookie.to_be_bytes()]
}

/// A chunk of a structured or extended reply.
pub(crate) fn chunk(
    mode: ReplyMode,
    done: bool,
    kind: u16,
    cookie: u64,
    offset: u64,
    body: &[u8],
) -> Vec<u8> {
    let flags = u16::from(done);
    let (magic, place, length) = if mode == ReplyMode::Extended {
        let length = (body.len() as u64).to_be_bytes().to_vec();
        (0x6e8a_278c_u32, offset.to_be_bytes().to_vec(), length)
    } else {
        (0x668e_33ef, Vec::new(), (body.len() as u32).to_be_bytes().to_vec())
    };
    bytes![
        magic.to_be_bytes(),
        flags.to_be_bytes(),
        kind.to_be_bytes(),
        cookie.to_be_bytes(),
        place,
        length,
        body,
    ]
}

/// What the scripted export holds.
pub(crate) fn data_at(offset: u64, length: usize) -> Vec<u8> {
    (offset..).take(length).map(|position| (position % 251) as u8).collect()
}

/// A connector that asks for `base:allocation`.
pub(crate) fn connector() -> Connector {
    "nbd://scripted"
        .parse::<Connector>()
        .unwrap()
        .meta_contexts([MetaContextName::base_allocation()])
}

/// Runs a script and connects to it.
pub(crate) async fn connected<F, S>(mode: ReplyMode, script: S) -> Client
where
    S: FnOnce(Script) -> F + Send + 'static,
    F: Future<Output = io::Result<()>> + Send,
{
    let (ours, theirs) = UnixStream::pair().unwrap();
    tokio::spawn(async move {
        let mut server = Script::over(theirs);
        server.handshake(&Offer::new(mode)).await.unwrap();
        script(server).await.unwrap();
    });
    guarded(connector().connect_over(ours)).await.unwrap()
}

/// Turns a hang into a failure. The time is far beyond anything a test takes.
pub(crate) async fn guarded<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("this does not hang")
}

/// `length` bytes at `offset`.
pub(crate) fn span(offset: u64, length: impl TryInto<u64>) -> std::ops::Range<u64> {
    let Ok(length) = length.try_into() else { panic!("a length") };
    offset..offset + length
}
