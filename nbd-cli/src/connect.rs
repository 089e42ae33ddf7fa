//! Connections to servers, and what to say when they fail.

use nbd_client::{Client, Connector, Error};
use nbd_proto::NbdUri;
use nbd_proto::wire::OptionReplyType;

use crate::error::CommandError;
use crate::output::printable;

/// How many names an error lists.
const MAX_NAMES: usize = 8;

/// Connects; an export that does not exist is reported together with those that do.
pub(crate) async fn connect(connector: &Connector, uri: &NbdUri) -> Result<Client, CommandError> {
    match connector.connect().await {
        Ok(client) => Ok(client),
        Err(error) => Err(explain_unknown_export(connector, uri, error).await),
    }
}

/// Turns an error of the handshake into one of the program.
pub(crate) async fn explain_unknown_export(
    connector: &Connector,
    uri: &NbdUri,
    error: Error,
) -> CommandError {
    if error.option_reply() != Some(OptionReplyType::ERR_UNKNOWN) {
        return CommandError::new(with_advice(&error));
    }
    let wanted = match uri.export_name.as_str() {
        "" => "no default export; name one".to_owned(),
        name => format!("no export named '{}'", printable(name)),
    };
    let offered = match connector.list().await {
        Ok(exports) if exports.is_empty() => "it lists none".to_owned(),
        Ok(exports) => {
            let names = exports.iter().take(MAX_NAMES);
            let names: Vec<_> =
                names.map(|export| format!("'{}'", printable(&export.name))).collect();
            let more = if exports.len() > MAX_NAMES { " and more" } else { "" };
            format!("it has {}{more}", names.join(", "))
        }
        Err(_) => "it does not list what it has; ask whoever runs it".to_owned(),
    };
    CommandError::new(format!("{uri}: the server has {wanted} ({offered})"))
}

/// Says what was tried when a server refused or failed later on.
pub(crate) fn failed(uri: &NbdUri, operation: &str, error: &Error) -> CommandError {
    match error {
        // These name the server themselves.
        Error::Connect { .. } => CommandError::new(with_advice(error)),
        Error::Request { .. } | Error::Misuse(_) | Error::Closed => CommandError::new(format!(
            "cannot {operation} {uri}: {}",
            printable(&error.to_string())
        )),
        _ => CommandError::new(printable(&error.to_string())),
    }
}

fn with_advice(error: &Error) -> String {
    let text = printable(&error.to_string());
    let advice = match error {
        Error::Connect { source, .. } => match source.kind() {
            std::io::ErrorKind::ConnectionRefused => "; is the server running there?",
            std::io::ErrorKind::NotFound => "; there is no such socket, is the server running?",
            std::io::ErrorKind::PermissionDenied => "; you may not use this socket",
            std::io::ErrorKind::TimedOut | std::io::ErrorKind::HostUnreachable => {
                "; check the address and the firewall"
            }
            _ => "",
        },
        _ => "",
    };
    text + advice
}
