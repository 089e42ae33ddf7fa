//! Connections that another server has begun.

use bytes::BytesMut;
use nbd_proto::transmission::SavedConnection;

use super::catalog::Catalog;
use super::error::ConnectionError;
use super::handshake::Established;
use super::shared::Shared;
use super::socket::Socket;
use crate::paused::{Continued, Terms};
#[cfg(feature = "tls")]
use crate::tls::TlsMode;

/// Continues a connection, if this server keeps the promises made to the client.
pub(super) fn resume(
    socket: Socket,
    continued: Continued,
    shared: &Shared,
) -> Result<Established, ConnectionError> {
    let refuse = |why: &str| Err(ConnectionError::NotResumed(why.to_owned()));
    let Continued { state, terms } = continued;
    let SavedConnection { negotiated, received, discard, owes_failure } = state;
    let granted = match terms {
        Terms::OfNewClients => {
            #[cfg(feature = "tls")]
            if matches!(shared.config.tls, TlsMode::Require(_)) {
                return refuse("this server requires TLS");
            }
            let name = &negotiated.export_name;
            if shared.exports.find(name).is_some_and(|(found, _)| found != *name) {
                // The default export of this server may be another disk.
                return refuse("its export is not offered any more");
            }
            let catalog = Catalog::for_client(&socket, shared)?;
            catalog.grant(name)
        }
        Terms::AsBefore(unregistered) => {
            Catalog::for_known_client(&socket, shared).grant_again(&negotiated, unregistered)
        }
    };
    let (description, granted) = match granted {
        Ok(granted) => granted,
        Err((_, why)) => return refuse(why),
    };
    if let Err(why) = negotiated.check_kept_by(&description) {
        return refuse(why);
    }
    let owes_failure = owes_failure || granted.entry.failures().are_more_since_pause();
    let received = BytesMut::from(&received[..]);
    Ok(Established { socket, negotiated, granted, received, discard, owes_failure })
}
