//! Two machines joined in memory, with the bytes between them split as a test chooses.

use bytes::BytesMut;
use nbd_proto::ProtocolError;
use nbd_proto::handshake::server::{Handshake, ServerConfig};

use super::disk::MemoryDisk;
use super::{After, serve_handshake};

/// A small generator of numbers, so that a run can be repeated from its seed.
#[derive(Debug, Clone)]
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// How the bytes between the machines are cut.
#[derive(Debug, Clone)]
pub enum Cut {
    Whole,
    OneByte,
    Random(Numbers),
}

impl Cut {
    fn take(&mut self, available: usize) -> usize {
        match self {
            Self::Whole => available,
            Self::OneByte => available.min(1),
            Self::Random(numbers) => available.min(1 + numbers.below(700) as usize),
        }
    }
}

/// Where a client's bytes go to and come from.
pub trait Wire {
    /// Carries bytes: takes from `out`, adds to `input`. False if nothing will ever come again.
    fn exchange(&mut self, out: &mut BytesMut, input: &mut BytesMut) -> bool;
}

/// The server at the other end of a [`Wire`].
#[derive(Debug)]
pub enum ServerEnd {
    Handshake(Option<Handshake>),
    Disk(Box<MemoryDisk>),
    Closed,
}

/// A server in memory; records what went over the wire.
#[derive(Debug)]
pub struct Link {
    pub server: ServerEnd,
    server_input: BytesMut,
    server_out: BytesMut,
    cut: Cut,
    pub to_server: Vec<u8>,
    pub to_client: Vec<u8>,
}

impl Link {
    pub fn new(config: ServerConfig, cut: Cut) -> Self {
        let mut server_out = BytesMut::new();
        let handshake = Handshake::start(config, &mut server_out);
        Self {
            server: ServerEnd::Handshake(Some(handshake)),
            server_input: BytesMut::new(),
            server_out,
            cut,
            to_server: Vec::new(),
            to_client: Vec::new(),
        }
    }

    pub fn run_server(&mut self) -> Result<(), ProtocolError> {
        if let ServerEnd::Handshake(handshake) = &mut self.server {
            let handshake = handshake.take().expect("put back below");
            let after = serve_handshake(handshake, &mut self.server_input, &mut self.server_out)?;
            self.server = match after {
                After::Handshake(handshake) => ServerEnd::Handshake(Some(handshake)),
                After::Transmission(negotiated) => {
                    ServerEnd::Disk(Box::new(MemoryDisk::new(&negotiated)))
                }
                After::Closed => ServerEnd::Closed,
                After::BeforeTls(_) => panic!("no test of a whole session uses TLS"),
            };
        }
        if let ServerEnd::Disk(disk) = &mut self.server {
            disk.serve(&mut self.server_input, &mut self.server_out)?;
        }
        Ok(())
    }
}

impl Wire for Link {
    fn exchange(&mut self, out: &mut BytesMut, input: &mut BytesMut) -> bool {
        loop {
            let moved = out.split_to(self.cut.take(out.len()));
            self.to_server.extend_from_slice(&moved);
            self.server_input.extend_from_slice(&moved);
            self.run_server().expect("a valid stream in any cut");
            let back = self.server_out.split_to(self.cut.take(self.server_out.len()));
            self.to_client.extend_from_slice(&back);
            input.extend_from_slice(&back);
            if !back.is_empty() {
                return true;
            }
            if moved.is_empty() {
                return false;
            }
        }
    }
}

/// A recorded server: its bytes come once, whatever the client says.
#[derive(Debug)]
pub struct Recording<'a>(pub &'a [u8]);

impl Wire for Recording<'_> {
    fn exchange(&mut self, out: &mut BytesMut, input: &mut BytesMut) -> bool {
        out.clear();
        input.extend_from_slice(self.0);
        !std::mem::take(&mut self.0).is_empty()
    }
}
