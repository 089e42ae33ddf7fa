//! Access rules: which clients may use an export, and which of them may only read it.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::client::{ClientAddress, ClientInfo};

/// A set of clients.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClientRule {
    /// Processes with this effective user id that connect to a unix socket.
    User(u32),
    /// Processes with this group id, effective or supplementary, that connect to a unix socket.
    Group(u32),
    /// Clients that connect over TCP from an address in this range.
    Network(Network),
    /// Clients that use TLS and are authenticated by a name that matches this pattern: the
    /// distinguished name in the certificate, in either order, or the user of a pre-shared key. `*`
    /// matches any text and `?` any single character.
    TlsName(String),
}

impl ClientRule {
    /// Returns whether a client belongs to the set.
    #[must_use]
    pub fn matches(&self, client: &ClientInfo) -> bool {
        match (self, &client.address) {
            (Self::User(wanted), ClientAddress::Unix { user, .. }) => wanted == user,
            (Self::Group(wanted), ClientAddress::Unix { group, groups, .. }) => {
                wanted == group || groups.contains(wanted)
            }
            (Self::Network(network), ClientAddress::Tcp(address)) => network.contains(address.ip()),
            (Self::TlsName(pattern), _) => has_tls_name(pattern, client),
            _ => false,
        }
    }
}

#[cfg(feature = "tls")]
fn has_tls_name(pattern: &str, client: &ClientInfo) -> bool {
    client.tls.as_ref().is_some_and(|identity| identity.matches(pattern))
}

#[cfg(not(feature = "tls"))]
const fn has_tls_name(_: &str, _: &ClientInfo) -> bool {
    false
}

/// A range of IP addresses, such as `192.0.2.0/24`.
///
/// IPv4 addresses in IPv6 form (`::ffff:192.0.2.1`) count as IPv4 addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    /// Bits that all addresses have in common, at most 32 or 128.
    prefix: u32,
}

impl Network {
    /// Returns whether the range contains an address.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        let (address, length) = (address.to_canonical(), length(self.address));
        address.is_ipv4() == self.address.is_ipv4()
            && masked(bits(address), length, self.prefix) == bits(self.address)
    }
}

/// Reads an address or, with the number of common bits, a range.
impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let bare = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let given: IpAddr = bare.unwrap_or(address).parse().map_err(|_| {
            format!("'{text}' is not an IP address or a range such as 192.0.2.0/24")
        })?;
        let most = length(given);
        let prefix = match prefix.map(str::parse::<u32>) {
            None => most,
            Some(Ok(prefix)) if prefix <= most => prefix,
            Some(_) => return Err(format!("the range '{text}' must end with /0 to /{most}")),
        };
        let first = masked(bits(given), most, prefix);
        if first != bits(given) {
            let first = address_of(first, most);
            return Err(format!(
                "the range '{text}' does not begin with its first address: write {first}/{prefix}, \
                 or {given} for this address alone"
            ));
        }
        let address = given.to_canonical();
        // A range of IPv4 addresses in IPv6 form.
        let shorter = most - length(address);
        Ok(match prefix.checked_sub(shorter) {
            Some(prefix) => Self { address, prefix },
            None => Self { address: given, prefix },
        })
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.address)?;
        if self.prefix < length(self.address) {
            write!(f, "/{}", self.prefix)?;
        }
        Ok(())
    }
}

/// Bits of an address.
const fn length(address: IpAddr) -> u32 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

fn address_of(bits: u128, length: u32) -> IpAddr {
    match u32::try_from(bits) {
        Ok(bits) if length == 32 => IpAddr::V4(bits.into()),
        _ => IpAddr::V6(bits.into()),
    }
}

/// The first `prefix` of the last `length` bits; the others are zero.
fn masked(bits: u128, length: u32, prefix: u32) -> u128 {
    let dropped = length.saturating_sub(prefix);
    bits.checked_shr(dropped).and_then(|kept| kept.checked_shl(dropped)).unwrap_or(0)
}

/// A client's permission for an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Permission {
    /// Nothing: for the client there is no such export.
    Denied,
    /// It may read.
    ReadOnly,
    /// It may do everything that the export can do.
    Full,
}

/// The access rules of an export. By default every client may do everything.
///
/// The rules are applied in this order: clients that match a rule of [`read_only`](Self::read_only)
/// may read; clients that match one of [`allow`](Self::allow) may do everything; for all others,
/// [`read_only_for_others`](Self::read_only_for_others) decides.
///
/// ```
/// use nbd_server::{AccessRules, ClientRule};
///
/// // One network may write, and all other clients may read.
/// let writers = ClientRule::Network("192.0.2.0/24".parse()?);
/// let rules = AccessRules::new().allow(writers).read_only_for_others();
/// # assert!(!rules.is_empty());
/// # Ok::<(), String>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AccessRules {
    allow: Vec<ClientRule>,
    read_only: Vec<ClientRule>,
    others_read: bool,
}

impl AccessRules {
    /// Creates rules that allow everything.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Allows matching clients to do everything. If there is such a rule, clients that match none
    /// may not use the export.
    #[must_use]
    pub fn allow(mut self, rule: ClientRule) -> Self {
        self.allow.push(rule);
        self
    }

    /// Allows matching clients only to read, even if another rule allows more.
    #[must_use]
    pub fn read_only(mut self, rule: ClientRule) -> Self {
        self.read_only.push(rule);
        self
    }

    /// Allows clients that match no rule to read. Otherwise they may do nothing if there is a rule
    /// of [`allow`](Self::allow), or else everything.
    #[must_use]
    pub const fn read_only_for_others(mut self) -> Self {
        self.others_read = true;
        self
    }

    /// Returns whether every client may do everything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Returns whether a client that has not begun TLS may do anything once it has.
    pub(crate) fn may_permit_with_tls(&self, client: &ClientInfo) -> bool {
        let names_any =
            |rules: &[ClientRule]| rules.iter().any(|rule| matches!(rule, ClientRule::TlsName(_)));
        self.permission(client) != Permission::Denied
            || names_any(&self.allow)
            || names_any(&self.read_only)
    }

    /// Returns what a client may do.
    #[must_use]
    pub fn permission(&self, client: &ClientInfo) -> Permission {
        let any = |rules: &[ClientRule]| rules.iter().any(|rule| rule.matches(client));
        if any(&self.read_only) {
            Permission::ReadOnly
        } else if any(&self.allow) {
            Permission::Full
        } else if self.others_read {
            Permission::ReadOnly
        } else if self.allow.is_empty() {
            Permission::Full
        } else {
            Permission::Denied
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(address: ClientAddress) -> ClientInfo {
        ClientInfo {
            address,
            #[cfg(feature = "tls")]
            tls: None,
        }
    }

    fn tcp(address: &str) -> ClientInfo {
        client(ClientAddress::Tcp((address.parse::<IpAddr>().unwrap(), 1).into()))
    }

    fn process(user: u32, group: u32, groups: &[u32]) -> ClientInfo {
        let groups = groups.to_vec();
        client(ClientAddress::Unix { process: Some(1), user, group, groups })
    }

    #[test]
    fn a_range_contains_its_addresses_in_both_forms() {
        for (range, address, expected) in [
            ("192.0.2.0/24", "192.0.2.255", true),
            ("192.0.2.0/24", "::ffff:192.0.2.1", true),
            ("192.0.2.0/24", "192.0.3.0", false),
            ("::ffff:192.0.2.0/120", "192.0.2.7", true),
            ("192.0.2.7", "192.0.2.7", true),
            ("192.0.2.7", "192.0.2.8", false),
            ("0.0.0.0/0", "255.255.255.255", true),
            ("0.0.0.0/0", "::1", false),
            ("::/0", "192.0.2.7", false),
            ("::/0", "2001:db8::1", true),
            ("2001:db8::/32", "2001:db8:ffff::1", true),
            ("[2001:db8::]/32", "2001:db9::1", false),
            ("::1", "::1", true),
        ] {
            let rule = ClientRule::Network(range.parse().unwrap());
            assert_eq!(rule.matches(&tcp(address)), expected, "{range} {address}");
        }
    }

    #[test]
    fn a_range_that_may_mean_two_things_is_refused() {
        for (text, expected) in [
            ("192.0.2.7/24", "write 192.0.2.0/24, or 192.0.2.7"),
            ("2001:db8::1/32", "write 2001:db8::/32"),
            ("192.0.2.0/33", "/0 to /32"),
            ("192.0.2.0/", "/0 to /32"),
            ("::/129", "/0 to /128"),
            ("example.org", "is not an IP address"),
            ("", "is not an IP address"),
        ] {
            let error = text.parse::<Network>().unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn groups_are_effective_or_supplementary() {
        let rule = ClientRule::Group(7);
        assert!(rule.matches(&process(0, 7, &[])));
        assert!(rule.matches(&process(0, 1, &[3, 7])));
        assert!(!rule.matches(&process(7, 1, &[3])));
        assert!(!rule.matches(&tcp("0.0.0.7")));
    }

    #[test]
    fn the_stricter_rule_decides() {
        let local = || ClientRule::Network("127.0.0.0/8".parse().unwrap());
        let one = tcp("127.0.0.1");
        let other = tcp("192.0.2.1");
        let permissions = |rules: &AccessRules| [rules.permission(&one), rules.permission(&other)];
        let none = AccessRules::new();
        assert!(none.is_empty());
        assert_eq!(permissions(&none), [Permission::Full, Permission::Full]);
        let allowed = none.clone().allow(local());
        assert_eq!(permissions(&allowed), [Permission::Full, Permission::Denied]);
        let others_read = allowed.clone().read_only_for_others();
        assert_eq!(permissions(&others_read), [Permission::Full, Permission::ReadOnly]);
        let both = allowed.read_only(local());
        assert_eq!(permissions(&both), [Permission::ReadOnly, Permission::Denied]);
        let read_only = none.read_only(local());
        assert_eq!(permissions(&read_only), [Permission::ReadOnly, Permission::Full]);
    }

    #[cfg(feature = "tls")]
    #[test]
    fn tls_names_are_those_of_certificates_in_both_orders_and_of_users() {
        use crate::tls::PeerIdentity;
        let with = |identity| ClientInfo { tls: Some(identity), ..tcp("127.0.0.1") };
        let certificate = with(PeerIdentity::Certificate(r"CN=a\,b,O=Example".into()));
        let user = with(PeerIdentity::User("alice".into()));
        for (pattern, of_certificate, of_user) in [
            (r"CN=a\,b,O=Example", true, false),
            (r"O=Example,CN=a\,b", true, false),
            ("*,O=Example", true, false),
            ("alice", false, true),
            ("al*", false, true),
            ("*", true, true),
        ] {
            let rule = ClientRule::TlsName(pattern.into());
            assert_eq!(rule.matches(&certificate), of_certificate, "{pattern}");
            assert_eq!(rule.matches(&user), of_user, "{pattern}");
            assert!(!rule.matches(&with(PeerIdentity::Anonymous)), "{pattern}");
            assert!(!rule.matches(&tcp("127.0.0.1")), "{pattern}");
        }
    }
}
