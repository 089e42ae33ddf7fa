//! Exports that are served over TLS only, beside others (SELECTIVETLS).

use std::io::Write;
use std::sync::Arc;

use nbd_server::export::{ExportEntry, MemoryExport};
use nbd_server::tls::TlsMode;
use nbd_server::{AccessRules, ClientRule, ExportRegistry};
use openssl::ssl::SslVersion;

use super::client::{
    ACK, ERR_POLICY, ERR_TLS_REQD, ERR_UNKNOWN, EXPORT_NAME, GO, SET_META_CONTEXT,
    STRUCTURED_REPLY, ask, base_allocation, go, greet, keyed, list, option, rest, upgrade,
};
use super::{ALICES_KEY, psk, serve_all};
use crate::support::TestServer;

fn server() -> TestServer {
    let (_directory, credentials) = psk();
    let exports = ExportRegistry::new();
    let disk = || ExportEntry::new(Arc::new(MemoryExport::new(1 << 20)));
    exports.add("public", disk()).unwrap();
    exports.add("secret", disk().tls_required()).unwrap();
    exports.set_default("secret");
    serve_all(TlsMode::Allow(credentials), exports)
}

#[test]
fn an_export_for_tls_only_is_refused_in_the_clear() {
    let server = server();
    let mut stream = greet(&server);
    assert_eq!(ask(&mut stream, GO, &go("secret")), ERR_TLS_REQD);
    assert_eq!(ask(&mut stream, GO, &go("")), ERR_TLS_REQD);
    assert_eq!(ask(&mut stream, STRUCTURED_REPLY, &[]), ACK);
    // ERR_TLS_REQD would not be allowed as an answer to this one.
    assert_eq!(ask(&mut stream, SET_META_CONTEXT, &base_allocation("secret")), ERR_POLICY);
    assert_eq!(ask(&mut stream, GO, &go("public")), ACK);
    let mut stream = greet(&server);
    stream.write_all(&option(EXPORT_NAME, b"secret")).unwrap();
    assert!(rest(&mut stream).is_empty());
}

#[test]
fn the_names_of_exports_for_tls_only_are_listed_over_tls_only() {
    let server = server();
    assert_eq!(list(&mut greet(&server)), ["public"]);
    let tls = keyed("alice", ALICES_KEY, SslVersion::TLS1_3);
    let mut stream = upgrade(greet(&server), tls).unwrap();
    assert_eq!(list(&mut stream), ["public", "secret"]);
}

#[test]
fn over_tls_every_export_is_served() {
    let server = server();
    for name in ["secret", "public", ""] {
        let tls = keyed("alice", ALICES_KEY, SslVersion::TLS1_3);
        let mut stream = upgrade(greet(&server), tls).unwrap();
        assert_eq!(ask(&mut stream, GO, &go(name)), ACK, "{name}");
    }
}

#[test]
fn a_client_whom_the_rules_deny_cannot_find_out_in_the_clear_that_there_is_an_export() {
    let (_directory, credentials) = psk();
    let exports = ExportRegistry::new();
    let disk = || ExportEntry::new(Arc::new(MemoryExport::new(1 << 20))).tls_required();
    let nobody = ClientRule::User(u32::MAX);
    exports.add("denied", disk().access(AccessRules::new().allow(nobody.clone()))).unwrap();
    let alice = ClientRule::TlsName("alice".into());
    let rules = AccessRules::new().allow(nobody).allow(alice);
    exports.add("alices", disk().access(rules)).unwrap();
    let server = serve_all(TlsMode::Allow(credentials), exports);
    let mut stream = greet(&server);
    assert_eq!(ask(&mut stream, GO, &go("denied")), ERR_UNKNOWN);
    // Who the client is shows when it uses TLS.
    assert_eq!(ask(&mut stream, GO, &go("alices")), ERR_TLS_REQD);
    assert_eq!(ask(&mut stream, STRUCTURED_REPLY, &[]), ACK);
    assert_eq!(ask(&mut stream, SET_META_CONTEXT, &base_allocation("denied")), ERR_UNKNOWN);
}
