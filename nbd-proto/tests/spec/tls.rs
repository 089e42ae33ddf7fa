//! Section "TLS support", both sides.

use bytes::BytesMut;
use nbd_proto::ProtocolError;
use nbd_proto::handshake::RefusalReason;
use nbd_proto::handshake::client::{AwaitStep, ClientHandshake, ClientStep, OptionPhase};
use nbd_proto::handshake::server::{Handshake, HandshakeStep, ServerConfig, TlsPolicy};
use nbd_proto::wire::{MetaContextName, ReplyMode};

use super::common::listing::{info_payload, meta_payload, option, replies, reply};
use super::common::{After, Probe};
use super::{opt, rep};

fn probe(tls: TlsPolicy) -> Probe {
    Probe::fixed(ServerConfig::new().tls(tls))
}

/// Carries out STARTTLS without cryptography.
fn upgrade(server: &mut Probe) {
    assert_eq!(server.last_reply(opt::STARTTLS, &[]), rep::ACK);
    let Some(After::BeforeTls(before)) = server.after.take() else { panic!("no TLS") };
    let handshake = before.resume_after_tls();
    assert!(handshake.is_tls_established());
    server.after = Some(After::Handshake(handshake));
}

#[test]
fn without_tls_starttls_is_refused_by_policy() {
    let mut server = probe(TlsPolicy::Off);
    assert_eq!(server.last_reply(opt::STARTTLS, &[]), rep::ERR_POLICY);
    assert_eq!(server.last_reply(opt::LIST, &[]), rep::ACK);
}

#[test]
fn starttls_with_data_is_invalid() {
    let mut server = probe(TlsPolicy::Allow);
    assert_eq!(server.last_reply(opt::STARTTLS, b"x"), rep::ERR_INVALID);
    upgrade(&mut server);
}

#[test]
fn a_second_starttls_is_invalid() {
    let mut server = probe(TlsPolicy::Allow);
    upgrade(&mut server);
    assert_eq!(server.last_reply(opt::STARTTLS, &[]), rep::ERR_INVALID);
}

#[test]
fn when_tls_is_required_only_starttls_and_abort_are_accepted_before_it() {
    let mut server = probe(TlsPolicy::Require);
    let info = info_payload(b"disk", &[]);
    let meta = meta_payload(b"disk", &[]);
    let refused: [(u32, &[u8]); 9] = [
        (opt::LIST, &[]),
        (opt::INFO, &info),
        (opt::GO, &info),
        (opt::STRUCTURED_REPLY, &[]),
        (opt::EXTENDED_HEADERS, &[]),
        (opt::LIST_META_CONTEXT, &meta),
        (opt::SET_META_CONTEXT, &meta),
        (99, &[]),
        (opt::GO, &[0; 2 << 20]),
    ];
    for (option, payload) in refused {
        assert_eq!(server.last_reply(option, payload), rep::ERR_TLS_REQD, "option {option}");
    }
    upgrade(&mut server);
    assert_eq!(server.last_reply(opt::LIST, &[]), rep::ACK);
    assert_eq!(server.last_reply(opt::GO, &info), rep::ACK);

    let mut server = probe(TlsPolicy::Require);
    assert_eq!(server.last_reply(opt::ABORT, &[]), rep::ACK);
}

#[test]
fn when_tls_is_required_export_name_ends_the_connection() {
    let mut server = probe(TlsPolicy::Require);
    assert!(server.send(&option(opt::EXPORT_NAME, b"disk")).is_err());
    let mut server = probe(TlsPolicy::Require);
    upgrade(&mut server);
    assert_eq!(server.send(&option(opt::EXPORT_NAME, b"disk")).unwrap().len(), 10);
}

#[test]
fn starttls_discards_everything_negotiated_before_it() {
    let mut server = probe(TlsPolicy::Allow);
    server.last_reply(opt::EXTENDED_HEADERS, &[]);
    let set = meta_payload(b"disk", &[b"base:allocation"]);
    assert_eq!(server.last_reply(opt::SET_META_CONTEXT, &set), rep::ACK);
    upgrade(&mut server);
    assert_eq!(server.last_reply(opt::SET_META_CONTEXT, &set), rep::ERR_INVALID);
    assert_eq!(server.last_reply(opt::STRUCTURED_REPLY, &[]), rep::ACK, "not in use any more");
    server.option(opt::GO, &info_payload(b"disk", &[])).unwrap();
    let negotiated = server.negotiated();
    assert_eq!(negotiated.reply_mode, ReplyMode::Structured);
    assert!(negotiated.meta_contexts.is_empty());
}

#[test]
fn bytes_in_the_clear_behind_starttls_are_never_protocol() {
    // CVE-2021-3716: an option injected in front of the TLS handshake survived it.
    let mut server = probe(TlsPolicy::Allow);
    let mut bytes = option(opt::STARTTLS, &[]);
    bytes.extend(option(opt::STRUCTURED_REPLY, &[]));
    let error = server.send(&bytes).unwrap_err();
    assert!(matches!(error, ProtocolError::Unexpected { .. }), "{error}");
    for junk in [&b"\x16"[..], b"IHAV"] {
        let mut server = probe(TlsPolicy::Allow);
        assert!(server.send(&[&option(opt::STARTTLS, &[])[..], junk].concat()).is_err());
    }
}

#[test]
fn a_starttls_refused_by_the_server_leaves_the_stream_in_sync() {
    let mut out = BytesMut::new();
    let config = ServerConfig::new().tls(TlsPolicy::Allow);
    let handshake = Handshake::start(config, &mut out);
    let mut input = BytesMut::from(&3_u32.to_be_bytes()[..]);
    input.extend_from_slice(&option(opt::STARTTLS, &[]));
    input.extend_from_slice(&option(opt::LIST, &[]));
    out.clear();
    let HandshakeStep::StartTls(pending) = handshake.advance(&mut input, &mut out).unwrap() else {
        panic!("STARTTLS is asked");
    };
    let handshake = pending.reject(RefusalReason::Policy, "no certificate", &mut out);
    assert_eq!(replies(opt::STARTTLS, &out), [(rep::ERR_POLICY, b"no certificate".to_vec())]);
    let step = handshake.advance(&mut input, &mut out).unwrap();
    assert!(matches!(step, HandshakeStep::List(_)));
}

fn client_phase(out: &mut BytesMut) -> OptionPhase {
    let mut input = BytesMut::from(&b"NBDMAGICIHAVEOPT\x00\x03"[..]);
    let step = ClientHandshake::new().advance(&mut input, out).unwrap();
    let ClientStep::Newstyle(phase) = step else { panic!("{step:?}") };
    phase
}

#[test]
fn the_client_refuses_bytes_in_the_clear_behind_the_answer_to_starttls() {
    let mut out = BytesMut::new();
    let awaiting = client_phase(&mut out).start_tls(&mut out).unwrap();
    let mut input = BytesMut::from(&reply(opt::STARTTLS, rep::ACK, &[])[..]);
    input.extend_from_slice(b"x");
    let error = awaiting.advance(&mut input).unwrap_err();
    assert!(matches!(error, ProtocolError::Unexpected { .. }), "{error}");
}

#[test]
fn the_client_forgets_what_it_negotiated_before_tls() {
    let mut out = BytesMut::new();
    let awaiting = client_phase(&mut out).extended_headers(&mut out).unwrap();
    let mut input = BytesMut::from(&reply(opt::EXTENDED_HEADERS, rep::ACK, &[])[..]);
    let AwaitStep::Accepted(phase) = awaiting.advance(&mut input).unwrap() else { panic!() };
    let awaiting = phase.start_tls(&mut out).unwrap();
    input.extend_from_slice(&reply(opt::STARTTLS, rep::ACK, &[]));
    let AwaitStep::Accepted(before) = awaiting.advance(&mut input).unwrap() else { panic!() };
    let phase = before.resume_after_tls();
    assert!(phase.is_tls_established() && phase.is_fixed_newstyle());
    assert_eq!(phase.reply_mode(), ReplyMode::Simple);
    let contexts = [MetaContextName::base_allocation()];
    assert!(phase.set_meta_context("disk", &contexts, &mut out).is_err());
}

#[test]
fn a_refusal_of_starttls_is_told_to_the_client() {
    // CVE-2019-14842: whether to go on in the clear is the caller's decision, which it has to see.
    let mut out = BytesMut::new();
    let awaiting = client_phase(&mut out).start_tls(&mut out).unwrap();
    let mut input = BytesMut::from(&reply(opt::STARTTLS, rep::ERR_POLICY, b"off")[..]);
    let step = awaiting.advance(&mut input).unwrap();
    let AwaitStep::Refused { error, next } = step else { panic!("{step:?}") };
    assert_eq!(error.to_string(), "server answered ERR_POLICY: off");
    assert!(!next.is_tls_established());
}
