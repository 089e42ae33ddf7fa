//! A disk in memory that answers the transmission phase.

use bytes::{Buf, BytesMut};
use nbd_proto::ProtocolError;
use nbd_proto::handshake::Negotiated;
use nbd_proto::transmission::server::{Parsed, Transmission};
use nbd_proto::transmission::{Command, Fragmentation, Position, ReplyEncoder, Request};
use nbd_proto::wire::{BlockDescriptor, MetaContextId, ReplyMode};

/// Reads and statuses look at pieces of this size.
const PIECE: usize = 512;

#[derive(Debug)]
pub struct MemoryDisk {
    transmission: Transmission,
    encoder: ReplyEncoder,
    contexts: Vec<MetaContextId>,
    pub data: Vec<u8>,
    discard: u64,
    pub is_disconnected: bool,
}

impl MemoryDisk {
    pub fn new(negotiated: &Negotiated) -> Self {
        Self {
            transmission: Transmission::new(negotiated),
            encoder: ReplyEncoder::new(negotiated.reply_mode),
            contexts: negotiated.meta_contexts.iter().map(|(id, _)| *id).collect(),
            data: vec![0; usize::try_from(negotiated.size).unwrap()],
            discard: 0,
            is_disconnected: false,
        }
    }

    /// Answers every whole request at the front of `input`.
    pub fn serve(&mut self, input: &mut BytesMut, out: &mut BytesMut) -> Result<(), ProtocolError> {
        while !self.is_disconnected {
            let discarded = input.len().min(usize::try_from(self.discard).unwrap_or(usize::MAX));
            input.advance(discarded);
            self.discard -= discarded as u64;
            if self.discard > 0 {
                return Ok(());
            }
            match self.transmission.parse(input)? {
                Parsed::NeedsInput(needed) => {
                    assert!(needed > input.len(), "asks for more than there is");
                    return Ok(());
                }
                Parsed::Request { request, consumed } => {
                    let payload = match request.command {
                        Command::Write(_) => request.length as usize,
                        _ => 0,
                    };
                    if input.len() < consumed + payload {
                        return Ok(());
                    }
                    input.advance(consumed);
                    let payload = input.split_to(payload);
                    self.answer(&request, &payload, out);
                }
                Parsed::Rejected { rejection, consumed, discard } => {
                    input.advance(consumed);
                    self.discard = discard;
                    self.encoder.error(rejection.tag, rejection.error, rejection.reason, out);
                }
            }
        }
        Ok(())
    }

    fn answer(&mut self, request: &Request, payload: &[u8], out: &mut BytesMut) {
        let start = request.offset as usize;
        let range = match request.command {
            Command::Flush | Command::Disconnect => 0..0,
            _ => start..start + request.length as usize,
        };
        match &request.command {
            Command::Read(fragmentation) => {
                return self.read(request, *fragmentation, out);
            }
            Command::BlockStatus(_, wanted) => {
                let contexts = wanted.as_deref().unwrap_or(&self.contexts).to_vec();
                return self.status(request, &contexts, out);
            }
            Command::Disconnect => {
                self.is_disconnected = true;
                return;
            }
            Command::Write(_) => self.data[range].copy_from_slice(payload),
            Command::WriteZeroes(..) | Command::Trim(_) => self.data[range].fill(0),
            Command::Flush | Command::Cache => {}
        }
        self.encoder.success(request.tag(), out);
    }

    fn read(&self, request: &Request, fragmentation: Fragmentation, out: &mut BytesMut) {
        let tag = request.tag();
        if request.length == 0 {
            return self.encoder.success(tag, out);
        }
        let start = request.offset as usize;
        let whole = &self.data[start..start + request.length as usize];
        let is_whole =
            self.encoder.mode() == ReplyMode::Simple || fragmentation == Fragmentation::Forbidden;
        if is_whole {
            let length = whole.len() as u32;
            self.encoder.data_header(tag, request.offset, length, Position::Last, out);
            out.extend_from_slice(whole);
            return;
        }
        let mut offset = request.offset;
        for piece in whole.chunks(PIECE) {
            let length = piece.len() as u32;
            if piece.iter().all(|byte| *byte == 0) {
                self.encoder.hole(tag, offset, length, Position::More, out);
            } else {
                self.encoder.data_header(tag, offset, length, Position::More, out);
                out.extend_from_slice(piece);
            }
            offset += u64::from(length);
        }
        self.encoder.success(tag, out);
    }

    /// Every context tells the same: 3 where a piece is zero, 0 where it is not.
    fn status(&self, request: &Request, contexts: &[MetaContextId], out: &mut BytesMut) {
        let start = request.offset as usize;
        let mut extents: Vec<BlockDescriptor> = Vec::new();
        for piece in self.data[start..start + request.length as usize].chunks(PIECE) {
            let flags = if piece.iter().all(|byte| *byte == 0) { 3 } else { 0 };
            match extents.last_mut() {
                Some(last) if last.flags == flags => last.length += piece.len() as u64,
                _ => extents.push(BlockDescriptor { length: piece.len() as u64, flags }),
            }
        }
        if let Command::BlockStatus(nbd_proto::transmission::ExtentLimit::One, _) = request.command
        {
            extents.truncate(1);
        }
        for (index, context) in contexts.iter().enumerate() {
            let position =
                if index + 1 == contexts.len() { Position::Last } else { Position::More };
            self.encoder.block_status(request.tag(), *context, &extents, position, out);
        }
    }
}
