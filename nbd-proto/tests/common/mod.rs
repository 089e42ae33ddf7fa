//! Shared code of the test programs: an export list, a server that answers with it, a disk in
//! memory, and byte listings. Each program uses a part of it.

#![allow(dead_code, unreachable_pub, missing_docs)]
// Helpers of tests fail like tests; clippy.toml allows it in functions marked as tests only.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

pub mod client;
pub mod disk;
pub mod link;
pub mod listing;

use bytes::BytesMut;
use nbd_proto::ProtocolError;
use nbd_proto::handshake::server::{BeforeTls, GoAnswer, Handshake, HandshakeStep, ServerConfig};
use nbd_proto::handshake::{
    ExportDescription, ListedExport, MinimumBlockSize, Negotiated, RefusalReason,
};
use nbd_proto::wire::{BlockSizes, MetaContextId, MetaContextName, ReplyMode, TransmissionFlags};

pub const DISK_SIZE: u64 = 1 << 20;

/// `disk` (everything), `sectors` (512-byte blocks), `advice` (such blocks as mere advice),
/// `ro` (read-only, an odd size); no name at all means `disk`.
pub fn export(name: &str) -> Option<ExportDescription> {
    let mut export = ExportDescription::new(name, DISK_SIZE);
    export.flags = TransmissionFlags::all()
        - TransmissionFlags::READ_ONLY
        - TransmissionFlags::SEND_RESIZE
        - TransmissionFlags::ROTATIONAL;
    export.meta_contexts = vec![
        MetaContextName::base_allocation(),
        MetaContextName::qemu_allocation_depth(),
        MetaContextName::qemu_dirty_bitmap("b0").unwrap(),
    ];
    match name {
        "" | "disk" => {
            export.name = "disk".into();
            export.description = Some("a disk with everything".into());
        }
        "sectors" => export.block_sizes = BlockSizes::new(512, 4096, 65536).unwrap(),
        "advice" => {
            export.block_sizes = BlockSizes::new(512, 4096, 65536).unwrap();
            export.minimum_block_size = MinimumBlockSize::Advised;
        }
        "ro" => {
            export.size = 1001;
            export.flags = TransmissionFlags::HAS_FLAGS
                | TransmissionFlags::READ_ONLY
                | TransmissionFlags::SEND_FLUSH
                | TransmissionFlags::SEND_CACHE;
            export.meta_contexts.clear();
        }
        _ => return None,
    }
    Some(export)
}

/// A transmission phase over 1 TiB with everything switched on and the contexts 0 and 2 selected.
pub fn negotiated(reply_mode: ReplyMode) -> Negotiated {
    let mut flags = TransmissionFlags::all();
    flags.remove(TransmissionFlags::READ_ONLY);
    let mut negotiated = Negotiated::new("disk", 1 << 40, flags, reply_mode);
    negotiated.meta_contexts = vec![
        (MetaContextId(0), MetaContextName::base_allocation()),
        (MetaContextId(2), MetaContextName::qemu_dirty_bitmap("b0").unwrap()),
    ];
    negotiated
}

pub fn listed_exports() -> Vec<ListedExport> {
    ["disk", "sectors", "ro"]
        .into_iter()
        .filter_map(export)
        .map(|export| ListedExport::new(export.name, export.description.unwrap_or_default()))
        .collect()
}

/// What a server is after it has gone on as far as it could.
#[derive(Debug)]
pub enum After {
    Handshake(Handshake),
    Transmission(Box<Negotiated>),
    BeforeTls(BeforeTls),
    Closed,
}

/// Goes on with a handshake until it needs bytes or is over, answering from [`export`].
pub fn serve_handshake(
    mut handshake: Handshake,
    input: &mut BytesMut,
    out: &mut BytesMut,
) -> Result<After, ProtocolError> {
    const UNKNOWN: (RefusalReason, &str) = (RefusalReason::UnknownExport, "no such export");
    loop {
        handshake = match handshake.advance(input, out)? {
            HandshakeStep::NeedsInput(handshake) => return Ok(After::Handshake(handshake)),
            HandshakeStep::Go(go) => match export(go.export_name()) {
                Some(export) => match go.accept(&export, out) {
                    GoAnswer::Transmission(negotiated) => {
                        return Ok(After::Transmission(negotiated));
                    }
                    GoAnswer::BlockSizesRequired(handshake) => handshake,
                },
                None => go.reject(UNKNOWN.0, UNKNOWN.1, out),
            },
            HandshakeStep::Info(info) => match export(info.export_name()) {
                Some(export) => info.accept(&export, out),
                None => info.reject(UNKNOWN.0, UNKNOWN.1, out),
            },
            HandshakeStep::ExportName(pending) => {
                return match export(pending.export_name()) {
                    Some(export) => Ok(After::Transmission(Box::new(pending.accept(&export, out)))),
                    None => Err(pending.reject()),
                };
            }
            HandshakeStep::List(list) => list.accept(&listed_exports(), out),
            HandshakeStep::MetaContext(meta) => match export(meta.export_name()) {
                Some(export) => meta.accept(&export.meta_contexts, out),
                None => meta.reject(UNKNOWN.0, UNKNOWN.1, out),
            },
            HandshakeStep::StartTls(tls) => return tls.accept(input, out).map(After::BeforeTls),
            HandshakeStep::Aborted => return Ok(After::Closed),
        };
    }
}

/// A server of the export list in the middle of a handshake, as the tests of single options use it.
#[derive(Debug)]
pub struct Probe {
    pub after: Option<After>,
    pub input: BytesMut,
    pub out: BytesMut,
}

impl Probe {
    /// Begins, drops the greeting and sends client flags.
    pub fn new(config: ServerConfig, client_flags: u32) -> Self {
        let mut out = BytesMut::new();
        let handshake = Handshake::start(config, &mut out);
        out.clear();
        let mut probe =
            Self { after: Some(After::Handshake(handshake)), input: BytesMut::new(), out };
        probe.send(&client_flags.to_be_bytes()).expect("known flags");
        probe
    }

    pub fn fixed(config: ServerConfig) -> Self {
        Self::new(config, 3)
    }

    /// Sends raw bytes and gives what the server answers to them.
    pub fn send(&mut self, bytes: &[u8]) -> Result<Vec<u8>, ProtocolError> {
        self.input.extend_from_slice(bytes);
        match self.after.take() {
            Some(After::Handshake(handshake)) => {
                self.after = Some(serve_handshake(handshake, &mut self.input, &mut self.out)?);
            }
            other => panic!("the handshake is over: {other:?}"),
        }
        Ok(self.out.split().to_vec())
    }

    /// Sends one option and gives the answers as (reply type, payload).
    pub fn option(
        &mut self,
        option: u32,
        payload: &[u8],
    ) -> Result<Vec<(u32, Vec<u8>)>, ProtocolError> {
        let bytes = self.send(&listing::option(option, payload))?;
        Ok(listing::replies(option, &bytes))
    }

    /// Sends one option and gives the type of the last answer.
    pub fn last_reply(&mut self, option: u32, payload: &[u8]) -> u32 {
        let replies = self.option(option, payload).expect("the server stays in sync");
        replies.last().expect("there is an answer").0
    }

    pub fn negotiated(self) -> Negotiated {
        match self.after {
            Some(After::Transmission(negotiated)) => *negotiated,
            other => panic!("no transmission phase: {other:?}"),
        }
    }

    pub fn is_in_handshake(&self) -> bool {
        matches!(self.after, Some(After::Handshake(_)))
    }
}
