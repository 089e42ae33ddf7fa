//! The access rules and quotas of exports.

use std::str::FromStr;

use nbd_server::export::ExportEntry;
use nbd_server::{AccessRules, ClientRule, Quota};

use crate::error::JobError;
use crate::users::{group_id, user_id};

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
            Some(("user", name)) => ClientRule::User(user_id(name)?),
            Some(("group", name)) => ClientRule::Group(group_id(name)?),
            Some(("tls", "")) => return Err("'tls:' needs a name, or '*' for any".to_owned()),
            Some(("tls", pattern)) => ClientRule::TlsName(pattern.to_owned()),
            _ => ClientRule::Network(text.parse().map_err(|error| {
                format!("{error}; clients are also given as user:NAME, group:NAME or tls:PATTERN")
            })?),
        };
        Ok(Self::Matching(rule))
    }
}

/// The rules and quotas of the exports of a server.
///
/// ```
/// use std::sync::Arc;
///
/// use nbd_jobs::serving::AccessSettings;
/// use nbd_server::export::{ExportEntry, MemoryExport};
///
/// let mut access = AccessSettings::default();
/// access.allow = vec!["vm=192.0.2.0/24".parse()?, "user:root".parse()?];
/// access.read_only_for = vec!["others".parse()?];
/// access.check(&["vm".to_owned()], false, false)?;
/// let entry = ExportEntry::new(Arc::new(MemoryExport::new(1 << 20)));
/// let entry = access.apply("vm", entry);
/// # drop(entry);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct AccessSettings {
    /// The clients that may use exports; no rule for an export: all.
    pub allow: Vec<ExportRule>,
    /// The clients that may only read.
    pub read_only_for: Vec<ExportRule>,
    /// The quota of each client of an export.
    pub client_quota: Quota,
    /// The quota of all clients of an export.
    pub export_quota: Quota,
}

impl AccessSettings {
    /// Gives the export of that name its rules and quotas.
    pub fn apply(&self, name: &str, entry: ExportEntry) -> ExportEntry {
        let concerns =
            |rule: &&ExportRule| rule.export.as_deref().is_none_or(|export| export == name);
        let mut rules = AccessRules::new();
        for rule in self.allow.iter().filter(concerns) {
            if let Clients::Matching(clients) = &rule.clients {
                rules = rules.allow(clients.clone());
            }
        }
        for rule in self.read_only_for.iter().filter(concerns) {
            rules = match &rule.clients {
                Clients::Matching(clients) => rules.read_only(clients.clone()),
                Clients::Others => rules.read_only_for_others(),
            };
        }
        entry.access(rules).client_quota(self.client_quota).quota(self.export_quota)
    }

    /// Refuses rules that could never apply: they would protect nothing.
    ///
    /// # Errors
    ///
    /// Names the rule. `names` are those of the exports; more may come if `more_may_come`.
    pub fn check(
        &self,
        names: &[String],
        more_may_come: bool,
        has_tls: bool,
    ) -> Result<(), JobError> {
        let allowed = self.allow.iter().map(|rule| ("--allow", rule));
        let read = self.read_only_for.iter().map(|rule| ("--readonly-for", rule));
        for (option, ExportRule { export, clients }) in allowed.chain(read) {
            if let Some(export) = export
                && !names.contains(export)
                && !more_may_come
            {
                return Err(JobError::invalid(format!(
                    "{option}: '{export}' is not the name of an export"
                )));
            }
            if matches!(clients, Clients::Matching(ClientRule::TlsName(_))) && !has_tls {
                return Err(JobError::invalid(format!(
                    "{option}: names of TLS need --tls-certificates or --tls-psk"
                )));
            }
            if option == "--allow" && *clients == Clients::Others {
                return Err(JobError::invalid(
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

    #[test]
    fn rules_that_could_never_apply_are_refused() {
        let names = ["vm".to_owned()];
        for (allow, why) in [
            ("other=::1", "--allow: 'other' is not the name of an export"),
            ("tls:a", "--allow: names of TLS need --tls-certificates or --tls-psk"),
            ("others", "--allow others would allow everyone"),
        ] {
            let allow = vec![allow.parse().unwrap()];
            let access = AccessSettings { allow, ..AccessSettings::default() };
            let refused = access.check(&names, false, false).unwrap_err().to_string();
            assert!(refused.starts_with(why), "{refused}");
        }
        let allow = vec!["later=::1".parse().unwrap()];
        let access = AccessSettings { allow, ..AccessSettings::default() };
        access.check(&names, true, false).unwrap();
    }
}
