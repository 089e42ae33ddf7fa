//! The sentence for a host whose address is not found.

use core::net::Ipv6Addr;

/// Words in front of the reason that the standard library reports.
const STANDARD_PREFIX: &str = "failed to lookup address information: ";

/// Returns the sentence for a host whose address was not found: there is no network interface with
/// the name of its zone, or the system's reason `why`.
///
/// ```
/// use nbd_proto::host_lookup::explain;
///
/// let why = "failed to lookup address information: Name or service not known";
/// assert_eq!(explain("fe80::1%eth7", why), "this machine has no network interface 'eth7'");
/// assert_eq!(explain("::1%lo", why), "the address ::1 is valid without the zone 'lo' only");
/// assert_eq!(
///     explain("nosuch", why),
///     "the host name 'nosuch' cannot be resolved (Name or service not known)"
/// );
/// ```
#[must_use]
pub fn explain(host: &str, why: &str) -> String {
    let Some((address, zone)) = host.split_once('%') else {
        let why = why.strip_prefix(STANDARD_PREFIX).unwrap_or(why);
        return format!("the host name '{host}' cannot be resolved ({why})");
    };
    match address.parse::<Ipv6Addr>() {
        Ok(it) if !it.is_unicast_link_local() && !it.is_multicast() => {
            format!("the address {address} is valid without the zone '{zone}' only")
        }
        _ => format!("this machine has no network interface '{zone}'"),
    }
}
