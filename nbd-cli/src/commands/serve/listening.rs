//! The addresses to listen on, and those that clients are told.

use std::io::Write as _;

use nbd_jobs::serving::PrivateDirectory;
use nbd_server::tls::TlsMode;
use nbd_server::{BoundAddress, ListenAddress};

use super::args::ServeArgs;
use super::tls;
use crate::error::CommandError;
use crate::output::warn;
use crate::serving::service_manager;

/// Creates the directory of a private socket for a command, if there is one.
pub(super) fn private_directory(
    args: &ServeArgs,
) -> Result<Option<PrivateDirectory>, CommandError> {
    let is_wanted = args.run.is_some() && args.listen.is_empty() && args.socket.is_empty();
    Ok(is_wanted.then(PrivateDirectory::new).transpose()?)
}

/// Returns the addresses to listen on: the given ones, or else a private socket for a command, or
/// else the loopback interface. Sockets of a service manager may have been taken over already.
pub(super) fn addresses(
    args: &ServeArgs,
    private: Option<&PrivateDirectory>,
    has_passed: bool,
) -> Vec<ListenAddress> {
    let tcp = args.listen.iter().cloned();
    let unix = args.socket.iter().cloned().map(ListenAddress::Unix);
    let mut addresses: Vec<_> = tcp.chain(unix).collect();
    if has_passed {
        return addresses;
    }
    if service_manager::gave_sockets() {
        addresses.push(ListenAddress::Systemd);
    } else if let Some(directory) = private {
        addresses.push(ListenAddress::Unix(directory.socket()));
    }
    if addresses.is_empty() {
        addresses.push(ListenAddress::default());
    }
    addresses
}

/// Returns true for an address that other machines can reach.
fn is_exposed(address: &BoundAddress) -> bool {
    matches!(address, BoundAddress::Tcp(address) if !address.ip().is_loopback())
}

pub(super) fn warn_of_exposure(bound: &[BoundAddress], tls: &TlsMode, and_change: &str) {
    let Some(why) = tls::exposure(tls) else { return };
    for address in bound.iter().filter(|address| is_exposed(address)) {
        warn(&format!(
            "{address} can be reached by other machines, and anyone who can reach it can \
             read{and_change} the disk: {why}; use TLS with credentials, 127.0.0.1, --socket or a \
             firewall"
        ));
    }
}

/// One URI per line. A closed standard output is not an error.
pub(super) fn announce(bound: &[BoundAddress], names: &[String], tls: &TlsMode) {
    let mut stdout = std::io::stdout().lock();
    for address in bound {
        for name in names {
            let _ = writeln!(stdout, "{}", tls::uri(address, name, tls));
        }
    }
    let _ = stdout.flush();
}

/// Returns the URIs of an export; unix sockets first.
pub(super) fn uris(bound: &[BoundAddress], name: &str, tls: &TlsMode) -> Vec<String> {
    let (unix, other): (Vec<_>, Vec<_>) =
        bound.iter().partition(|address| matches!(address, BoundAddress::Unix(_)));
    let uri = |address: &BoundAddress| tls::uri(address, name, tls).to_string();
    unix.into_iter().chain(other).map(uri).collect()
}
