//! Questions about a server and its exports, without using an export where the server can.

use bytes::BytesMut;
use nbd_proto::handshake::client::{InfoRequest, OptionPhase};
use nbd_proto::handshake::{ListedExport, Negotiated};
use nbd_proto::transmission::Command;
use nbd_proto::transmission::client::Transmission;
use nbd_proto::wire::{BlockSizes, MetaContextName, OptionReplyType, ReplyMode, TransmissionFlags};
use tokio::io::AsyncWriteExt;

use crate::connector::Connector;
use crate::error::{Error, Result};
use crate::handshake::{Answered, Details, Greeting, Wire, agree_on_replies, export_in_words};

/// The handshake a server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// One nameless export, no options.
    Oldstyle,
    /// Exports with names, but no way to refuse an option.
    Newstyle,
    /// Fixed newstyle: everything of today's protocol.
    NewstyleFixed,
}

impl Protocol {
    /// The name as the tools print it: `oldstyle`, `newstyle` or `newstyle-fixed`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Oldstyle => "oldstyle",
            Self::Newstyle => "newstyle",
            Self::NewstyleFixed => "newstyle-fixed",
        }
    }
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Which exports a question is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Scope {
    /// The export that the connector names.
    #[default]
    ThisExport,
    /// Every export that the server lists.
    AllExports,
}

/// A server and its exports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerInfo {
    /// The handshake it speaks.
    pub protocol: Protocol,
    /// True if the connection is encrypted.
    pub tls: bool,
    /// The best form of replies it agreed to.
    pub reply_mode: ReplyMode,
    /// The exports asked about, in the server's order.
    pub exports: Vec<ExportInfo>,
    /// With [`Scope::AllExports`] those that the server lists and does not describe.
    pub refused: Vec<RefusedExport>,
}

/// An export that is listed, and refused when it is asked about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusedExport {
    /// Name, as it was listed.
    pub name: String,
    /// Why it is refused: a sentence for people.
    pub reason: String,
}

/// What is known about one export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// Name, as it was asked for or listed.
    pub name: String,
    /// The canonical name, if the server told it.
    pub canonical_name: Option<String>,
    /// A text for people, if the server told one.
    pub description: Option<String>,
    /// Size, in bytes; at most 2^63-1.
    pub size: u64,
    /// What the export can do in the agreed reply mode.
    pub flags: TransmissionFlags,
    /// Block size constraints; `None` if the server told none.
    pub block_sizes: Option<BlockSizes>,
    /// From [`Connector::inspect`] the contexts the export has; from
    /// [`Client::info`](crate::Client::info) those that were selected.
    pub meta_contexts: Vec<MetaContextName>,
}

impl ExportInfo {
    pub(crate) fn new(negotiated: &Negotiated, details: Details) -> Self {
        Self {
            name: negotiated.export_name.clone(),
            canonical_name: details.canonical_name,
            description: details.description,
            size: negotiated.size,
            flags: negotiated.flags,
            block_sizes: details.block_sizes,
            meta_contexts: negotiated.meta_contexts.iter().map(|(_, name)| name.clone()).collect(),
        }
    }
}

impl Connector {
    /// Asks for the names of all exports.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`](crate::Error::Refused) if the server does not tell,
    /// [`Error::Unsupported`](crate::Error::Unsupported) if it is too old, or a handshake error.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the connection, as for every method of this kind.
    pub async fn list(&self) -> Result<Vec<ListedExport>> {
        let (mut wire, phase) = self.options("a list of exports").await?;
        let (exports, phase) = list(&mut wire, phase).await?;
        wire.abort(phase).await;
        Ok(exports)
    }

    /// Asks which metadata contexts the export has. A query is a full name or a wildcard such as
    /// `qemu:`; no query asks for all.
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
        let phase = agree_on_replies(&mut wire, phase, self.wanted.reply_mode).await?;
        let queries: Vec<&str> = queries.iter().map(String::as_str).collect();
        let name = self.wanted.export_name.as_str();
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

    /// Asks everything there is to know. Exports are asked about with INFO; where a server has
    /// none, or gives a size of zero, an export is opened and closed again.
    ///
    /// # Errors
    ///
    /// As for [`Connector::list`].
    ///
    /// # Cancel safety
    ///
    /// As for [`Connector::list`].
    pub async fn inspect(&self, scope: Scope) -> Result<ServerInfo> {
        let mut wire = self.open().await?;
        let phase = match wire.greeting().await? {
            Greeting::Newstyle(phase) if phase.is_fixed_newstyle() => phase,
            greeting => return self.inspect_old_server(wire, greeting).await,
        };
        let mut phase = agree_on_replies(&mut wire, phase, self.wanted.reply_mode).await?;
        let (reply_mode, tls) = (phase.reply_mode(), phase.is_tls_established());
        let further = if tls { self.requiring_tls() } else { self.clone() };
        let names = match scope {
            Scope::ThisExport => vec![self.listed(&self.wanted.export_name)],
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
                // nbd-server answers INFO before it has looked how large the export is.
                Told::Info(told) => match further.open_and_close(&listed.name).await {
                    Ok(seen) => Ok(ExportInfo { size: seen.size, ..told }),
                    Err(_) => Ok(told),
                },
                Told::Nothing => further.open_and_close(&listed.name).await,
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
                // One export that is refused does not hide the others.
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
        ListedExport { name: name.to_owned(), description: String::new() }
    }

    /// Begins a handshake in which options can be sent.
    async fn options(&self, what: &'static str) -> Result<(Wire, OptionPhase)> {
        let mut wire = self.open().await?;
        match wire.greeting().await? {
            Greeting::Newstyle(phase) if phase.is_fixed_newstyle() => Ok((wire, phase)),
            _ => Err(wire.unsupported(what, "its protocol is too old to answer options")),
        }
    }

    async fn inspect_old_server(&self, mut wire: Wire, greeting: Greeting) -> Result<ServerInfo> {
        let (negotiated, protocol) = match greeting {
            Greeting::Oldstyle(negotiated) => (*negotiated, Protocol::Oldstyle),
            Greeting::Newstyle(phase) => {
                let sent = phase.export_name(&self.wanted.export_name, &mut wire.out);
                (wire.export(sent).await?, Protocol::Newstyle)
            }
        };
        let info = ExportInfo::new(&negotiated, Details::unknown(protocol));
        say_goodbye(wire, &negotiated).await;
        let exports = vec![info];
        let (reply_mode, refused) = (ReplyMode::Simple, Vec::new());
        Ok(ServerInfo { protocol, tls: false, reply_mode, exports, refused })
    }

    /// Asks about one export.
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

    /// Looks at an export of a server without INFO by opening it on a connection of its own.
    async fn open_and_close(&self, name: &str) -> Result<ExportInfo> {
        let established = self.clone().export_name(name).establish().await?;
        let info = ExportInfo::new(&established.negotiated, established.details);
        let wire = Wire::new(established.stream, self.target(), self.handshake_timeout, None);
        say_goodbye(wire, &established.negotiated).await;
        Ok(info)
    }
}

/// What a server says about an export when it is asked with INFO.
enum Told {
    Info(ExportInfo),
    /// It has no INFO.
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

/// Ends a transmission phase in which nothing was asked.
async fn say_goodbye(mut wire: Wire, negotiated: &Negotiated) {
    let mut out = BytesMut::new();
    let disconnect = Transmission::new(negotiated).request(0, 0, &Command::Disconnect, &mut out);
    if disconnect.is_ok() {
        // The connection ends either way.
        drop(wire.stream.write_all(&out).await);
        drop(wire.stream.flush().await);
    }
}
