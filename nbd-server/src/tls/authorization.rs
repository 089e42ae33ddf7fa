//! Authorization of clients with a valid certificate.

use std::path::PathBuf;

use super::distinguished_name::DistinguishedName;
use super::notes::{PeerIdentity, printable};
use super::{TlsError, file};

/// Whether clients must present a certificate signed by an authority in `ca-cert.pem`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ClientCertificates {
    /// Clients must present one.
    #[default]
    Required,
    /// Clients are not asked for one: any client that reaches the server may use it.
    NotAsked,
}

/// Authorization by the distinguished name in the client's certificate.
///
/// A pattern is a name with `*` for any text and `?` for any single character, for example
/// `CN=laptop-*,O=Example,C=GB`. A special character in a value is written as in names: `\,` is a
/// comma that belongs to a value, `,` the one between two parts; `\*` and `\?` are not wildcards.
/// Both orders match: the most specific part first, as printed by `certtool --certificate-info`,
/// and the order in the certificate, as in QEMU. Matching is case-sensitive.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub enum Authorization {
    /// Every client with a valid certificate.
    #[default]
    Everyone,
    /// Clients that match one of these patterns.
    Patterns(Vec<String>),
    /// Clients that match one of the patterns in a file: one per line; empty lines and lines that
    /// begin with `#` are ignored. The file is read for each client, so that changes apply at once.
    /// If it cannot be read, every client is refused.
    File(PathBuf),
    /// The first matching rule decides.
    Rules {
        /// The rules, in their order.
        rules: Vec<Rule>,
        /// The policy for clients that match no rule.
        otherwise: Verdict,
    },
}

/// A rule for matching distinguished names.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rule {
    /// The name or pattern.
    pub name: String,
    /// The kind of comparison.
    pub matching: Matching,
    /// The policy for matching clients.
    pub verdict: Verdict,
}

/// The comparison of names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Matching {
    /// Character by character.
    Exact,
    /// `*` matches any text and `?` any single character.
    Pattern,
}

/// Whether a client may connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Verdict {
    /// It may.
    Allow,
    /// It may not.
    Deny,
}

impl Rule {
    /// Creates a rule for the clients whose name matches `name`.
    #[must_use]
    pub fn new(name: impl Into<String>, matching: Matching, verdict: Verdict) -> Self {
        Self { name: name.into(), matching, verdict }
    }

    fn fits(&self, name: &DistinguishedName) -> bool {
        match self.matching {
            Matching::Exact => [&name.specific_first, &name.as_encoded].contains(&&self.name),
            Matching::Pattern => fits(&self.name, name),
        }
    }
}

impl Authorization {
    /// Checks whether this client may connect.
    ///
    /// # Errors
    ///
    /// The reason for the refusal, for the log.
    pub(super) fn check(&self, name: &DistinguishedName) -> Result<(), String> {
        let fits = match self {
            Self::Everyone => true,
            Self::Patterns(patterns) => patterns.iter().any(|pattern| fits(pattern, name)),
            Self::Rules { rules, otherwise } => {
                let rule = rules.iter().find(|rule| rule.fits(name));
                rule.map_or(*otherwise, |rule| rule.verdict) == Verdict::Allow
            }
            Self::File(path) => {
                let text = file::read("the list of clients", path);
                let text = text.map_err(|error: TlsError| error.to_string())?;
                let text = String::from_utf8_lossy(&text);
                let mut patterns = text
                    .lines()
                    .map(str::trim)
                    .filter(|line| !line.is_empty() && !line.starts_with('#'));
                patterns.any(|pattern| fits(pattern, name))
            }
        };
        if fits {
            return Ok(());
        }
        let name = printable(&name.specific_first);
        Err(format!("{name} is not on the list of names that may connect"))
    }
}

impl PeerIdentity {
    /// Returns whether the authenticated name matches a pattern, a distinguished name in either
    /// order.
    pub(crate) fn matches(&self, pattern: &str) -> bool {
        match self {
            Self::Anonymous => false,
            Self::Certificate(name) => {
                let pattern = pattern_of(pattern);
                matches(&pattern, &units(name)) || matches(&pattern, &units(&reversed(name)))
            }
            // The names of users have no escapes.
            Self::User(name) => {
                let bare = |character| (false, character);
                let pattern: Vec<_> = pattern.chars().map(bare).map(wanted_bare).collect();
                matches(&pattern, &name.chars().map(bare).collect::<Vec<_>>())
            }
        }
    }

    /// Returns the authenticated name.
    pub(crate) fn name(&self) -> Option<&str> {
        match self {
            Self::Anonymous => None,
            Self::Certificate(name) | Self::User(name) => Some(name),
        }
    }
}

/// A distinguished name in the other order.
fn reversed(name: &str) -> String {
    let mut parts = vec![String::new()];
    let mut is_escaped = false;
    for character in name.chars() {
        match (character, parts.last_mut()) {
            (',', _) if !is_escaped => parts.push(String::new()),
            (_, Some(part)) => part.push(character),
            (_, None) => {}
        }
        is_escaped = character == '\\' && !is_escaped;
    }
    parts.reverse();
    parts.join(",")
}

fn fits(pattern: &str, name: &DistinguishedName) -> bool {
    let fits = |name: &str| matches(&pattern_of(pattern), &units(name));
    fits(&name.specific_first) || fits(&name.as_encoded)
}

/// Whether a character of a name was escaped, and the character: `\,` is never the comma between
/// two parts.
type Unit = (bool, char);

/// An element of a pattern.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    AnyText,
    AnyCharacter,
    Only(Unit),
}

/// The characters of an escaped name. A backslash at the end is literal.
fn units(name: &str) -> Vec<Unit> {
    let mut characters = name.chars();
    let mut units = Vec::with_capacity(name.len());
    while let Some(character) = characters.next() {
        units.push(match character {
            '\\' => characters.next().map_or((false, '\\'), |escaped| (true, escaped)),
            _ => (false, character),
        });
    }
    units
}

/// A pattern for escaped names.
fn pattern_of(pattern: &str) -> Vec<Wanted> {
    let wanted = |unit| match unit {
        // Names do not escape these two.
        (true, literal @ ('*' | '?')) => Wanted::Only((false, literal)),
        unit => wanted_bare(unit),
    };
    units(pattern).into_iter().map(wanted).collect()
}

const fn wanted_bare(unit: Unit) -> Wanted {
    match unit {
        (false, '*') => Wanted::AnyText,
        (false, '?') => Wanted::AnyCharacter,
        unit => Wanted::Only(unit),
    }
}

/// Matches wildcards, in time proportional to the product of the lengths: of several `*`, only the
/// last is ever tried again.
fn matches(pattern: &[Wanted], text: &[Unit]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(Wanted::AnyText) => {
                star = Some((p, t));
                p += 1;
            }
            Some(wanted) if *wanted == Wanted::AnyCharacter || *wanted == Wanted::Only(text[t]) => {
                p += 1;
                t += 1;
            }
            _ => {
                let Some((at, taken)) = star else { return false };
                star = Some((at, taken + 1));
                p = at + 1;
                t = taken + 1;
            }
        }
    }
    pattern[p..].iter().all(|rest| *rest == Wanted::AnyText)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn laptop() -> DistinguishedName {
        DistinguishedName {
            specific_first: "CN=laptop-7,O=Example,C=GB".to_owned(),
            as_encoded: "C=GB,O=Example,CN=laptop-7".to_owned(),
        }
    }

    #[test]
    fn patterns_fit_whole_names() {
        for (pattern, expected) in [
            ("CN=laptop-7,O=Example,C=GB", true),
            ("C=GB,O=Example,CN=laptop-7", true),
            ("CN=laptop-?,*", true),
            ("*CN=laptop*", true),
            ("*", true),
            ("CN=laptop-7", false),
            ("CN=laptop-??,*", false),
            ("cn=laptop-7,*", false),
            ("", false),
            ("*,O=Example", false),
            ("*a*a*a*a*a*a*a*a*a*a*a*a*b", false),
        ] {
            assert_eq!(fits(pattern, &laptop()), expected, "{pattern}");
        }
    }

    #[test]
    fn an_escaped_comma_in_a_value_is_no_comma_between_parts() {
        let mallory = DistinguishedName {
            specific_first: r"CN=x\,O=Example".to_owned(),
            as_encoded: r"CN=x\,O=Example".to_owned(),
        };
        let identity = PeerIdentity::Certificate(mallory.specific_first.clone());
        for (pattern, expected) in [
            ("*,O=Example", false),
            ("CN=*,O=Example", false),
            ("*?,O=Example", false),
            (r"*\,O=Example", true),
            (r"CN=x\,*", true),
            ("CN=x?O=Example", true),
            (r"CN=x\", false),
            (r"CN=x\*", false),
            ("CN=*", true),
        ] {
            assert_eq!(fits(pattern, &mallory), expected, "{pattern}");
            assert_eq!(identity.matches(pattern), expected, "{pattern}");
        }
        let ends_with_backslash = PeerIdentity::Certificate(r"O=Example,CN=x\\,C=GB".to_owned());
        assert!(
            ends_with_backslash.matches("*,C=GB") && ends_with_backslash.matches("*,O=Example")
        );
        let star = PeerIdentity::Certificate("CN=*.example".to_owned());
        assert!(star.matches(r"CN=\*.example") && !star.matches(r"CN=\*"));
        let user = PeerIdentity::User(r"domain\bob".to_owned());
        assert!(user.matches(r"domain\bob") && user.matches(r"domain\*") && !user.matches("bob"));
    }

    #[test]
    fn a_list_in_a_file_is_read_anew_and_denies_when_it_is_missing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("clients");
        let authorization = Authorization::File(path.clone());
        assert!(authorization.check(&laptop()).unwrap_err().contains("cannot read"));
        std::fs::write(&path, "# who may\n\n  CN=laptop-*,O=Example,C=GB  \n").unwrap();
        assert_eq!(authorization.check(&laptop()), Ok(()));
        std::fs::write(&path, "# CN=laptop-*,O=Example,C=GB\nCN=other\n").unwrap();
        let error = authorization.check(&laptop()).unwrap_err();
        assert!(error.starts_with("CN=laptop-7,O=Example,C=GB is not on the list"), "{error}");
    }

    #[test]
    fn the_first_rule_that_fits_decides() {
        let rule = |name: &str, matching, verdict| Rule { name: name.into(), matching, verdict };
        let rules = vec![
            rule("CN=laptop-*", Matching::Exact, Verdict::Deny),
            rule("CN=laptop-7,*", Matching::Pattern, Verdict::Allow),
            rule("CN=laptop-*", Matching::Pattern, Verdict::Deny),
        ];
        let check = |rules: &[Rule], otherwise| {
            Authorization::Rules { rules: rules.to_vec(), otherwise }.check(&laptop()).is_ok()
        };
        assert!(check(&rules, Verdict::Deny));
        assert!(!check(&rules[2..], Verdict::Allow));
        assert!(check(&rules[..1], Verdict::Allow));
        assert!(!check(&[], Verdict::Deny));
        let exact = rule("C=GB,O=Example,CN=laptop-7", Matching::Exact, Verdict::Allow);
        assert!(check(&[exact], Verdict::Deny));
    }

    #[test]
    fn an_empty_list_denies() {
        assert!(Authorization::Patterns(Vec::new()).check(&laptop()).is_err());
        assert!(Authorization::Everyone.check(&laptop()).is_ok());
    }
}
