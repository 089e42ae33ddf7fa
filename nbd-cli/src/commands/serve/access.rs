//! Options for the access rules and quotas of exports.

use std::num::NonZeroU64;
use std::str::FromStr;

use clap::Args;
use nbd_jobs::size::ByteSize;
use nbd_server::export::ExportEntry;
use nbd_server::{AccessRules, ClientRule, Quota};

use crate::error::CommandError;
use crate::sys;

/// Rules and quotas of exports.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Access")]
pub struct AccessArgs {
    /// Let only these clients use an export: the one named before '=', or all. CLIENTS is
    /// user:NAME or group:NAME (of a process that connects to a unix socket), an IP address or a
    /// range such as 192.0.2.0/24, or tls:PATTERN (the distinguished name in a certificate, or the
    /// user of a pre-shared key). To other clients the export does not exist. May be repeated.
    #[arg(long, value_name = "[EXPORT=]CLIENTS")]
    pub allow: Vec<ExportRule>,

    /// Let these clients only read, also if --allow names them; 'others' are all clients that no
    /// rule names. May be repeated.
    #[arg(long, value_name = "[EXPORT=]CLIENTS")]
    pub readonly_for: Vec<ExportRule>,

    /// Most connections of one client to an export. A client is a TLS name, an IP address, or the
    /// user of a unix socket.
    #[arg(long, value_name = "N")]
    pub client_connections: Option<NonZeroU64>,

    /// Most bytes per second that one client reads and writes.
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    pub client_rate: Option<NonZeroU64>,

    /// Most requests per second of one client.
    #[arg(long, value_name = "N")]
    pub client_iops: Option<NonZeroU64>,

    /// Most connections to an export.
    #[arg(long, value_name = "N")]
    pub export_connections: Option<NonZeroU64>,

    /// Most bytes per second that all clients of an export read and write.
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    pub export_rate: Option<NonZeroU64>,

    /// Most requests per second of all clients of an export.
    #[arg(long, value_name = "N")]
    pub export_iops: Option<NonZeroU64>,
}

/// Clients of one export or of all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportRule {
    /// The name of the export; `None` for all.
    pub export: Option<String>,
    /// The clients.
    pub clients: Clients,
}

/// A set of clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Clients {
    /// Those that match.
    Matching(ClientRule),
    /// Those that no other rule names.
    Others,
}

impl FromStr for ExportRule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let kind = text.split_once(':').map(|(kind, _)| kind);
        if !matches!(kind, Some("user" | "group" | "tls"))
            && let Some((export, clients)) = text.split_once('=')
        {
            return Ok(Self { export: Some(export.to_owned()), clients: clients.parse()? });
        }
        Ok(Self { export: None, clients: text.parse()? })
    }
}

impl FromStr for Clients {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rule = match text.split_once(':') {
            _ if text == "others" => return Ok(Self::Others),
            Some(("user", name)) => ClientRule::User(id("user", name, sys::user_id)?),
            Some(("group", name)) => ClientRule::Group(id("group", name, sys::group_id)?),
            Some(("tls", "")) => return Err("'tls:' needs a name, or '*' for any".to_owned()),
            Some(("tls", pattern)) => ClientRule::TlsName(pattern.to_owned()),
            _ => ClientRule::Network(text.parse().map_err(|error| {
                format!("{error}; clients are also given as user:NAME, group:NAME or tls:PATTERN")
            })?),
        };
        Ok(Self::Matching(rule))
    }
}

/// A number is an id, as in chown.
pub(super) fn id(
    kind: &str,
    name: &str,
    look_up: fn(&str) -> std::io::Result<Option<u32>>,
) -> Result<u32, String> {
    match look_up(name) {
        Ok(Some(id)) => Ok(id),
        Ok(None) => name.parse().map_err(|_| format!("there is no {kind} '{name}' on this system")),
        Err(error) => Err(format!("cannot look up the {kind} '{name}': {error}")),
    }
}

pub(super) fn parse_rate(text: &str) -> Result<NonZeroU64, String> {
    let size: ByteSize = text.parse()?;
    NonZeroU64::new(size.bytes()).ok_or_else(|| {
        "a rate is at least one byte per second; leave the option out for no limit".to_owned()
    })
}

impl AccessArgs {
    /// Gives an export its rules and quotas.
    pub(super) fn apply(&self, name: &str, entry: ExportEntry) -> ExportEntry {
        let concerns =
            |rule: &&ExportRule| rule.export.as_deref().is_none_or(|export| export == name);
        let mut rules = AccessRules::new();
        for rule in self.allow.iter().filter(concerns) {
            if let Clients::Matching(clients) = &rule.clients {
                rules = rules.allow(clients.clone());
            }
        }
        for rule in self.readonly_for.iter().filter(concerns) {
            rules = match &rule.clients {
                Clients::Matching(clients) => rules.read_only(clients.clone()),
                Clients::Others => rules.read_only_for_others(),
            };
        }
        let mut of_client = Quota::default();
        of_client.connections = self.client_connections;
        of_client.bytes_per_second = self.client_rate;
        of_client.requests_per_second = self.client_iops;
        let mut total = Quota::default();
        total.connections = self.export_connections;
        total.bytes_per_second = self.export_rate;
        total.requests_per_second = self.export_iops;
        entry.access(rules).client_quota(of_client).quota(total)
    }

    /// Refuses rules that could never apply: they would protect nothing.
    ///
    /// # Errors
    ///
    /// Names the rule. `names` are those of the exports; more may come if `more_may_come`.
    pub(super) fn check(
        &self,
        names: &[String],
        more_may_come: bool,
        has_tls: bool,
    ) -> Result<(), CommandError> {
        let allowed = self.allow.iter().map(|rule| ("--allow", rule));
        let read = self.readonly_for.iter().map(|rule| ("--readonly-for", rule));
        for (option, ExportRule { export, clients }) in allowed.chain(read) {
            if let Some(export) = export
                && !names.contains(export)
                && !more_may_come
            {
                return Err(CommandError::new(format!(
                    "{option}: '{export}' is not the name of an export"
                )));
            }
            if matches!(clients, Clients::Matching(ClientRule::TlsName(_))) && !has_tls {
                return Err(CommandError::new(format!(
                    "{option}: names of TLS need --tls-certificates or --tls-psk"
                )));
            }
            if option == "--allow" && *clients == Clients::Others {
                return Err(CommandError::new(
                    "--allow others would allow everyone; leave it out, or use --readonly-for \
                     others",
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_for_all_exports_or_for_the_one_before_the_equals_sign() {
        for (text, export) in [
            ("user:root", None),
            ("vm=user:root", Some("vm")),
            ("tls:CN=a,O=b", None),
            ("vm=tls:CN=a,O=b", Some("vm")),
            ("192.0.2.0/24", None),
            ("=::1", Some("")),
            ("vm=2001:db8::/32", Some("vm")),
            ("others", None),
            ("vm=others", Some("vm")),
        ] {
            let rule: ExportRule = text.parse().unwrap();
            assert_eq!(rule.export.as_deref(), export, "{text}");
        }
        let rule: ExportRule = "vm=tls:CN=a,O=b".parse().unwrap();
        assert_eq!(rule.clients, Clients::Matching(ClientRule::TlsName("CN=a,O=b".into())));
        let rule: ExportRule = "group:4294967294".parse().unwrap();
        assert_eq!(rule.clients, Clients::Matching(ClientRule::Group(4_294_967_294)));
    }

    #[test]
    fn what_names_no_clients_is_refused_with_the_reason() {
        for (text, expected) in [
            ("user:no-such-user", "there is no user 'no-such-user'"),
            ("group:-1", "there is no group '-1'"),
            ("user:", "there is no user ''"),
            ("tls:", "needs a name"),
            ("everyone", "user:NAME"),
            ("192.0.2.1/24", "write 192.0.2.0/24"),
        ] {
            let error = text.parse::<ExportRule>().unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
