//! `-L`: the exports of another server, in the text form that scripts read.

use std::fmt::Write as _;

use nbd_client::{ExportInfo, Scope, ServerInfo};
use nbd_jobs::qemu_nbd::Options;
use nbd_jobs::tasks;
use nbd_proto::uri::{NbdUri, Transport};
use nbd_proto::wire::{ReplyMode, TransmissionFlags};

use super::refusal::{Refusal, print};
use crate::async_runtime::runtime;
use crate::connect::ServerArgs;
use crate::output::printable;

/// The named flags, in the order of their bits.
const FLAGS: [(TransmissionFlags, &str); 12] = [
    (TransmissionFlags::READ_ONLY, "readonly"),
    (TransmissionFlags::SEND_FLUSH, "flush"),
    (TransmissionFlags::SEND_FUA, "fua"),
    (TransmissionFlags::ROTATIONAL, "rotational"),
    (TransmissionFlags::SEND_TRIM, "trim"),
    (TransmissionFlags::SEND_WRITE_ZEROES, "zeroes"),
    (TransmissionFlags::SEND_DF, "df"),
    (TransmissionFlags::CAN_MULTI_CONN, "multi"),
    (TransmissionFlags::SEND_RESIZE, "resize"),
    (TransmissionFlags::SEND_CACHE, "cache"),
    (TransmissionFlags::SEND_FAST_ZERO, "fast-zero"),
    (TransmissionFlags::BLOCK_STATUS_PAYLOAD, "block-status-payload"),
];

pub(super) fn run(options: &Options) -> Result<(), Refusal> {
    let transport = match &options.socket {
        Some(path) => Transport::Unix { path: path.clone() },
        None => {
            let (host, port) = options.host_and_port()?;
            Transport::Tcp { host, port }
        }
    };
    let mut uri = NbdUri::new(transport, "");
    options.secure(&mut uri)?;
    let connector = ServerArgs::default().connector(&uri);
    let server = tasks::block_on(&runtime()?, connector.inspect(Scope::AllExports));
    let server = server.map_err(|error| Refusal::new(printable(&error.to_string())))?;
    if let Some(refused) = server.refused.first() {
        return Err(Refusal::new(printable(&refused.reason)));
    }
    print(&text(&server))
}

/// Writing to a string cannot fail.
fn text(server: &ServerInfo) -> String {
    let mut text = format!("exports available: {}\n", server.exports.len());
    for export in &server.exports {
        let _ = writeln!(text, " export: '{}'", printable(&export.name));
        if let Some(description) = export.description.as_deref().filter(|text| !text.is_empty()) {
            let _ = writeln!(text, "  description: {}", printable(description));
        }
        describe(&mut text, export, server.reply_mode);
    }
    text
}

fn describe(text: &mut String, export: &ExportInfo, mode: ReplyMode) {
    let _ = writeln!(text, "  size:  {}", export.size);
    let _ = write!(text, "  flags: 0x{:x} (", export.flags.bits());
    for (_, name) in FLAGS.iter().filter(|(flag, _)| export.flags.contains(*flag)) {
        let _ = write!(text, " {name}");
    }
    text.push_str(" )\n");
    if let Some(sizes) = export.block_sizes {
        let _ = writeln!(text, "  min block: {}", sizes.minimum());
        let _ = writeln!(text, "  opt block: {}", sizes.preferred());
        let _ = writeln!(text, "  max block: {}", sizes.maximum_payload());
    }
    let bits = if mode == ReplyMode::Extended { "64" } else { "32" };
    let _ = writeln!(text, "  transaction size: {bits}-bit");
    if !export.meta_contexts.is_empty() {
        let _ = writeln!(text, "  available meta contexts: {}", export.meta_contexts.len());
        for context in &export.meta_contexts {
            let _ = writeln!(text, "   {}", printable(context.as_str()));
        }
    }
}
