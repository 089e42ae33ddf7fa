//! The bodies of the fuzz targets. Shared with `tests/fuzz_corpus.rs`, which replays the corpus on
//! every run of the tests.
//!
//! A body panics if something is wrong, and is silent otherwise. For the machines, the first byte
//! of an input chooses their configuration and how the bytes are cut.

use bytes::{Buf, BytesMut};
use nbd_proto::NbdUri;
use nbd_proto::handshake::client::{
    Answer, AwaitStep, Awaiting, ClientHandshake, ClientStep, ExportStep, InfoRequest, OptionPhase,
};
use nbd_proto::handshake::server::{GoAnswer, Handshake, HandshakeStep, ServerConfig, TlsPolicy};
use nbd_proto::handshake::{ExportDescription, ListedExport, Negotiated, RefusalReason};
use nbd_proto::transmission::client::{Event, Transmission as Client};
use nbd_proto::transmission::server::{Parsed, Transmission as Server};
use nbd_proto::transmission::{Command, ExtentLimit, Fragmentation};
use nbd_proto::wire::{
    BlockSizes, ChunkHeader, MetaContextId, MetaContextName, OptionHeader, OptionReplyHeader,
    ReplyMode, RequestHeader, SimpleReplyHeader, TransmissionFlags,
};

/// A name of a target with its body.
type Target = (&'static str, fn(&[u8]));

/// All of them.
pub(crate) const TARGETS: [Target; 6] = [
    ("wire_option", wire_option),
    ("server_handshake", server_handshake),
    ("client_handshake", client_handshake),
    ("server_transmission", server_transmission),
    ("client_transmission", client_transmission),
    ("uri", uri),
];

const SIZE: u64 = 1 << 20;

fn mode(choice: u8) -> ReplyMode {
    match choice % 3 {
        0 => ReplyMode::Simple,
        1 => ReplyMode::Structured,
        _ => ReplyMode::Extended,
    }
}

fn export(name: &str) -> ExportDescription {
    let mut export = ExportDescription::new(name, SIZE);
    export.description = Some("fuzzed".into());
    export.flags = TransmissionFlags::all() - TransmissionFlags::READ_ONLY;
    export.meta_contexts = vec![
        MetaContextName::base_allocation(),
        MetaContextName::qemu_allocation_depth(),
        MetaContextName::qemu_dirty_bitmap("b0").expect("a legal name"),
    ];
    export
}

fn negotiated(choice: u8) -> Negotiated {
    let mut export = export("disk");
    if choice & 0x40 != 0 {
        export.flags.insert(TransmissionFlags::READ_ONLY);
    }
    let mut negotiated = Negotiated::new("disk", export.size, export.flags, mode(choice));
    if choice & 0x80 != 0 {
        negotiated.block_sizes = BlockSizes::new(512, 4096, 65536).expect("legal sizes");
    }
    negotiated.meta_contexts = vec![
        (MetaContextId(0), MetaContextName::base_allocation()),
        (MetaContextId(2), MetaContextName::qemu_allocation_depth()),
    ];
    negotiated
}

/// Decoders of fixed headers: what is read is written back the same.
pub(crate) fn wire_option(data: &[u8]) {
    let mut out = Vec::new();
    let is_same = |out: &mut Vec<u8>| {
        assert!(data.starts_with(out), "an encoded header differs from what was decoded");
        out.clear();
    };
    if let Ok(Some(header)) = OptionHeader::decode(data) {
        header.encode(&mut out);
        is_same(&mut out);
    }
    if let Ok(Some(header)) = OptionReplyHeader::decode(data) {
        header.encode(&mut out);
        is_same(&mut out);
    }
    if let Ok(Some(header)) = RequestHeader::decode_compact(data) {
        header.encode_compact(&mut out).expect("it came from 32 bits");
        is_same(&mut out);
    }
    if let Ok(Some(header)) = RequestHeader::decode_extended(data) {
        header.encode_extended(&mut out);
        is_same(&mut out);
    }
    if let Ok(Some(header)) = ChunkHeader::decode_structured(data) {
        header.encode_structured(&mut out);
        is_same(&mut out);
    }
    if let Ok(Some((header, offset))) = ChunkHeader::decode_extended(data) {
        header.encode_extended(offset, &mut out);
        is_same(&mut out);
    }
    if let Some(header) = SimpleReplyHeader::decode(data) {
        header.encode(&mut out);
        // The magic number is looked at by the caller.
        assert_eq!(out.get(4..), data.get(4..16));
    }
}

/// A server's handshake and then its transmission phase, fed in pieces.
pub(crate) fn server_handshake(data: &[u8]) {
    let Some((&choice, data)) = data.split_first() else { return };
    let tls = match choice % 3 {
        0 => TlsPolicy::Off,
        1 => TlsPolicy::Allow,
        _ => TlsPolicy::Require,
    };
    let config = ServerConfig::new().tls(tls);
    let piece = usize::from(choice >> 2) + 1;
    let mut out = BytesMut::new();
    let mut input = BytesMut::new();
    let mut handshake = Handshake::start(config, &mut out);
    for bytes in data.chunks(piece) {
        input.extend_from_slice(bytes);
        handshake = match serve(handshake, &mut input, &mut out) {
            Some(handshake) => handshake,
            None => return,
        };
        out.clear();
    }
}

/// Answers questions until more bytes are needed; `None` when the handshake is over.
fn serve(mut handshake: Handshake, input: &mut BytesMut, out: &mut BytesMut) -> Option<Handshake> {
    let unknown = RefusalReason::UnknownExport;
    loop {
        handshake = match handshake.advance(input, out).ok()? {
            HandshakeStep::NeedsInput(handshake) => return Some(handshake),
            HandshakeStep::Go(go) if go.export_name().len() % 2 == 1 => {
                go.reject(unknown, "odd", out)
            }
            HandshakeStep::Go(go) => {
                let export = export(go.export_name());
                match go.accept(&export, out) {
                    GoAnswer::Transmission(negotiated) => {
                        transmit(&negotiated, input);
                        return None;
                    }
                    GoAnswer::BlockSizesRequired(handshake) => handshake,
                }
            }
            HandshakeStep::Info(info) => {
                let export = export(info.export_name());
                info.accept(&export, out)
            }
            HandshakeStep::ExportName(pending) => {
                let export = export(pending.export_name());
                transmit(&pending.accept(&export, out), input);
                return None;
            }
            HandshakeStep::List(list) => {
                let listed = ListedExport::new("disk", "");
                list.accept([&listed], out)
            }
            HandshakeStep::MetaContext(meta) => {
                let export = export(meta.export_name());
                meta.accept(&export.meta_contexts, out)
            }
            HandshakeStep::StartTls(tls) => tls.accept(input, out).ok()?.resume_after_tls(),
            HandshakeStep::Aborted => return None,
        };
    }
}

/// Parses requests until the bytes are used up; every request that is valid is inside the export.
fn transmit(negotiated: &Negotiated, input: &mut BytesMut) {
    let server = Server::new(negotiated);
    loop {
        let taken = match server.parse(input) {
            Err(_) => return,
            Ok(Parsed::NeedsInput(needed)) => {
                assert!(needed > input.len(), "asks for more than there is");
                return;
            }
            Ok(Parsed::Rejected { consumed, discard, .. }) => {
                assert!(consumed > 0);
                consumed.saturating_add(usize::try_from(discard).unwrap_or(usize::MAX))
            }
            Ok(Parsed::Request { request, consumed }) => {
                assert!(consumed > 0);
                if matches!(request.command, Command::Disconnect) {
                    return;
                }
                if request.command != Command::Flush {
                    let end = request.offset.checked_add(request.length);
                    assert!(end.is_some_and(|end| end <= negotiated.size), "outside the export");
                }
                let payload = match request.command {
                    Command::Write(_) => request.length as usize,
                    _ => 0,
                };
                consumed.saturating_add(payload)
            }
        };
        input.advance(taken.min(input.len()));
    }
}

/// The server's transmission phase in every mode.
pub(crate) fn server_transmission(data: &[u8]) {
    let Some((&choice, data)) = data.split_first() else { return };
    transmit(&negotiated(choice), &mut BytesMut::from(data));
}

/// A client's handshake against bytes that claim to be a server.
pub(crate) fn client_handshake(data: &[u8]) {
    let Some((&choice, data)) = data.split_first() else { return };
    let mut input = BytesMut::from(data);
    let mut out = BytesMut::new();
    let Ok(ClientStep::Newstyle(phase)) = ClientHandshake::new().advance(&mut input, &mut out)
    else {
        return;
    };
    let _ = negotiate(choice, phase, &mut input, &mut out);
}

fn ask<A: Answer>(awaiting: Awaiting<A>, input: &mut BytesMut) -> Option<A::Accepted> {
    match awaiting.advance(input) {
        Ok(AwaitStep::Accepted(accepted)) => Some(accepted),
        _ => None,
    }
}

fn negotiate(
    choice: u8,
    mut phase: OptionPhase,
    input: &mut BytesMut,
    out: &mut BytesMut,
) -> Option<()> {
    if choice & 1 != 0 {
        phase = ask(phase.structured_reply(out).ok()?, input)?;
    }
    if choice & 2 != 0 {
        phase = ask(phase.extended_headers(out).ok()?, input)?;
    }
    if choice & 4 != 0 {
        phase = ask(phase.list(out).ok()?, input)?.1;
    }
    if choice & 8 != 0 {
        phase = ask(phase.list_meta_context("disk", &[], out).ok()?, input)?.1;
    }
    if choice & 16 != 0 {
        let wanted = [MetaContextName::base_allocation(), MetaContextName::qemu_allocation_depth()];
        let (contexts, next) = ask(phase.set_meta_context("disk", &wanted, out).ok()?, input)?;
        assert!(contexts.iter().all(|(_, name)| wanted.contains(name)), "never asked for");
        phase = next;
    }
    if choice & 32 != 0 {
        phase = ask(phase.info("disk", InfoRequest::ALL, out).ok()?, input)?.1;
    }
    let negotiated = if choice & 64 != 0 {
        match phase.export_name("disk", out).ok()?.advance(input) {
            Ok(ExportStep::Transmission(negotiated)) => *negotiated,
            _ => return None,
        }
    } else {
        ask(phase.go("disk", InfoRequest::ALL, out).ok()?, input)?.0
    };
    assert!(negotiated.size <= i64::MAX as u64);
    receive(&negotiated, input);
    Some(())
}

/// A client's transmission phase against bytes that claim to be replies to its requests.
pub(crate) fn client_transmission(data: &[u8]) {
    let Some((&choice, data)) = data.split_first() else { return };
    receive(&negotiated(choice), &mut BytesMut::from(data));
}

/// Sends a few requests and believes replies only as far as they fit.
fn receive(negotiated: &Negotiated, input: &mut BytesMut) {
    let mut client = Client::new(negotiated);
    let mut out = Vec::new();
    let requests = [
        (0x1000, 0x1000, Command::Read(Fragmentation::Allowed)),
        (0x1000, 0x1000, Command::BlockStatus(ExtentLimit::Many, None)),
        (0, 0, Command::Flush),
        (0x2000, 0x200, Command::Read(Fragmentation::Allowed)),
        (0x1000, 0x1000, Command::BlockStatus(ExtentLimit::One, None)),
    ];
    for (offset, length, command) in requests {
        // Some are not negotiated in every mode.
        let _ = client.request(offset, length, &command, &mut out);
    }
    while let Ok(event) = client.advance(input) {
        match event {
            Event::NeedsInput => return,
            Event::Data { position, length, .. } => {
                assert!(length > 0 && position + length as u64 <= 0x1000, "outside the request");
                if input.len() < length {
                    return;
                }
                input.advance(length);
            }
            Event::Hole { position, length, .. } => {
                assert!(length > 0 && position + length as u64 <= 0x1000, "outside the request");
            }
            Event::BlockStatus { descriptors, .. } => {
                let total: u64 = descriptors.iter().map(|extent| extent.length).sum();
                assert!(total > 0 && total <= 0x1000, "extents beyond the request");
            }
            Event::Finished { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

/// URIs: what parses is written to something that parses to the same.
pub(crate) fn uri(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(uri) = text.parse::<NbdUri>() {
        let written = uri.to_string();
        assert_eq!(written.parse(), Ok(uri), "{written}");
    }
}
