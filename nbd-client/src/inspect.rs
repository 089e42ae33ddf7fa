//! Queries about a server and its exports; an export is opened only if the server has no other way.

use bytes::BytesMut;
use nbd_proto::handshake::client::{InfoRequest, OptionPhase};
use nbd_proto::handshake::{ListedExport, Negotiated};
use nbd_proto::transmission::Command;
use nbd_proto::transmission::client::Transmission;
use nbd_proto::wire::{MetaContextName, OptionReplyType, ReplyMode};
use tokio::io::AsyncWriteExt;

use crate::connector::Connector;
use crate::dial::{agree_on_replies, dial, establish_at, export_in_words};
use crate::error::{Error, Result};
use crate::handshake::{Answered, Greeting, Wire};
use crate::info::{Details, ExportInfo, Protocol, RefusedExport, Scope, ServerInfo};
use crate::settings::Settings;

impl Connector {
    /// Lists the names of all exports (section "Option types", NBD_OPT_LIST).
    ///
    /// # Errors
    ///
    /// [`Error::Refused`](crate::Error::Refused) if the server refuses to list its exports,
    /// [`Error::Unsupported`](crate::Error::Unsupported) if it is too old, or a handshake error.
    ///
    /// # Cancel safety
    ///
    /// Safe: dropping the future closes the connection.
    pub async fn list(&self) -> Result<Vec<ListedExport>> {
        let (mut wire, phase) = self.options("a list of exports").await?;
        let (exports, phase) = list(&mut wire, phase).await?;
        wire.abort(phase).await;
        Ok(exports)
    }

    /// Lists the metadata contexts of the export (NBD_OPT_LIST_META_CONTEXT). A query is a full
    /// name or a wildcard such as `qemu:`; an empty list of queries requests all contexts.
    ///
    /// # Errors
    ///
    /// As for [`Connector::list`].
    ///
    /// # Cancel safety
    ///
    /// As for [`Connector::list`].
    pub async fn list_meta_contexts(&self, queries: &[String]) -> Result<Vec<MetaContextName>> {
        const WHAT: &str = "a list of metadata contexts";
        let (mut wire, phase) = self.options(WHAT).await?;
        let phase = agree_on_replies(&mut wire, phase, self.settings.wanted.reply_mode).await?;
        let queries: Vec<&str> = queries.iter().map(String::as_str).collect();
        let name = self.settings.wanted.export_name.as_str();
        let sent = phase.list_meta_context(name, &queries, &mut wire.out);
        match wire.answer(sent).await? {
            Answered::Accepted((names, phase)) => {
                wire.abort(phase).await;
                Ok(names)
            }
            Answered::Refused(error, phase) => {
                let what = format!("{WHAT} of {}", export_in_words(name));
                let error = wire.refused(what, error);
                wire.abort(phase).await;
                Err(error)
            }
        }
    }

    /// Queries all properties of the server and the exports in `scope`. Exports are queried with
    /// INFO; if a server does not support it, or reports a size of zero, the export is opened and
    /// closed again.
    ///
    /// # Errors
    ///
    /// As for [`Connector::list`].
    ///
    /// # Cancel safety
    ///
    /// As for [`Connector::list`].
    pub async fn inspect(&self, scope: Scope) -> Result<ServerInfo> {
        let mut wire = dial(&self.settings).await?;
        let phase = match wire.greeting().await? {
            Greeting::Newstyle(phase) if phase.is_fixed_newstyle() => phase,
            greeting => return self.inspect_old_server(wire, greeting).await,
        };
        let mut phase = agree_on_replies(&mut wire, phase, self.settings.wanted.reply_mode).await?;
        let (reply_mode, tls) = (phase.reply_mode(), phase.is_tls_established());
        let further = if tls { self.settings.requiring_tls() } else { self.settings.clone() };
        let names = match scope {
            Scope::ThisExport => vec![self.listed(&self.settings.wanted.export_name)],
            Scope::AllExports => {
                let (names, next) = list(&mut wire, phase).await?;
                phase = next;
                names
            }
        };
        let mut exports = Vec::with_capacity(names.len());
        let mut refused = Vec::new();
        for listed in names {
            let (told, next) = self.describe(&mut wire, phase, &listed.name).await?;
            phase = next;
            let info = match told {
                Told::Info(info) if info.size > 0 => Ok(info),
                // nbd-server answers INFO before it has determined the size of the export.
                Told::Info(told) => match open_and_close(&further, &listed.name).await {
                    Ok(seen) => Ok(ExportInfo { size: seen.size, ..told }),
                    Err(_) => Ok(told),
                },
                Told::Nothing => open_and_close(&further, &listed.name).await,
                Told::Refused(error) => Err(error),
            };
            match info {
                Ok(mut info) => {
                    if info.description.is_none() && !listed.description.is_empty() {
                        info.description = Some(listed.description);
                    }
                    exports.push(info);
                }
                Err(error) if scope == Scope::ThisExport => return Err(error),
                // One refused export does not hide the others.
                Err(error) => {
                    let reason = error.to_string();
                    refused.push(RefusedExport { name: listed.name, reason });
                }
            }
        }
        wire.abort(phase).await;
        Ok(ServerInfo { protocol: Protocol::NewstyleFixed, tls, reply_mode, exports, refused })
    }

    fn listed(&self, name: &str) -> ListedExport {
        ListedExport::new(name, "")
    }

    /// Begins a handshake in which options can be sent.
    async fn options(&self, what: &'static str) -> Result<(Wire, OptionPhase)> {
        let mut wire = dial(&self.settings).await?;
        match wire.greeting().await? {
            Greeting::Newstyle(phase) if phase.is_fixed_newstyle() => Ok((wire, phase)),
            _ => Err(wire.unsupported(what, "its protocol is too old to answer options")),
        }
    }

    async fn inspect_old_server(&self, mut wire: Wire, greeting: Greeting) -> Result<ServerInfo> {
        let (negotiated, protocol) = match greeting {
            Greeting::Oldstyle(negotiated) => (*negotiated, Protocol::Oldstyle),
            Greeting::Newstyle(phase) => {
                let sent = phase.export_name(&self.settings.wanted.export_name, &mut wire.out);
                (wire.export(sent).await?, Protocol::Newstyle)
            }
        };
        let info = ExportInfo::new(&negotiated, Details::unknown(protocol));
        say_goodbye(wire, &negotiated).await;
        let exports = vec![info];
        let (reply_mode, refused) = (ReplyMode::Simple, Vec::new());
        Ok(ServerInfo { protocol, tls: false, reply_mode, exports, refused })
    }

    /// Queries one export.
    async fn describe(
        &self,
        wire: &mut Wire,
        mut phase: OptionPhase,
        name: &str,
    ) -> Result<(Told, OptionPhase)> {
        wire.renew_deadline();
        let sent = phase.info(name, InfoRequest::ALL, &mut wire.out);
        let told = match wire.answer(sent).await? {
            Answered::Accepted((told, next)) => {
                phase = next;
                told
            }
            Answered::Refused(error, next) if error.reply == OptionReplyType::ERR_UNSUP => {
                return Ok((Told::Nothing, next));
            }
            Answered::Refused(error, next) => {
                let error = wire.refused(export_in_words(name), error);
                return Ok((Told::Refused(error), next));
            }
        };
        let mut meta_contexts = Vec::new();
        if phase.reply_mode() != ReplyMode::Simple {
            wire.renew_deadline();
            let sent = phase.list_meta_context(name, &[], &mut wire.out);
            phase = match wire.answer(sent).await? {
                Answered::Accepted((names, next)) => {
                    meta_contexts = names;
                    next
                }
                Answered::Refused(_, next) => next,
            };
        }
        let info = ExportInfo {
            name: name.to_owned(),
            canonical_name: told.canonical_name,
            description: told.description,
            size: told.size,
            flags: told.flags,
            block_sizes: told.block_sizes,
            meta_contexts,
        };
        Ok((Told::Info(info), phase))
    }
}

/// Queries an export of a server without INFO by opening it on a separate connection.
async fn open_and_close(settings: &Settings, name: &str) -> Result<ExportInfo> {
    let established = establish_at(&settings.with_export(name)).await?;
    let info = ExportInfo::new(&established.negotiated, established.details);
    let limit = settings.handshake_timeout;
    let wire = Wire::new(established.stream, settings.target(), limit, None);
    say_goodbye(wire, &established.negotiated).await;
    Ok(info)
}

/// A server's answer to INFO.
enum Told {
    Info(ExportInfo),
    /// The server does not support INFO.
    Nothing,
    Refused(Error),
}

async fn list(wire: &mut Wire, phase: OptionPhase) -> Result<(Vec<ListedExport>, OptionPhase)> {
    let sent = phase.list(&mut wire.out);
    match wire.answer(sent).await? {
        Answered::Accepted(accepted) => Ok(accepted),
        Answered::Refused(error, phase) => {
            let _ = phase;
            Err(wire.refused("a list of its exports", error))
        }
    }
}

/// Ends a transmission phase without requests.
async fn say_goodbye(mut wire: Wire, negotiated: &Negotiated) {
    let mut out = BytesMut::new();
    let disconnect = Transmission::new(negotiated).request(0, 0, &Command::Disconnect, &mut out);
    if disconnect.is_ok() {
        // The connection ends either way.
        drop(wire.stream.write_all(&out).await);
        drop(wire.stream.flush().await);
    }
}
