//! Quotas of an export: connections, requests and bytes, in total and for each client.

mod bucket;

use std::collections::HashMap;
use std::net::IpAddr;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use self::bucket::{Bucket, instant_of, nanoseconds_now};
use crate::client::{ClientAddress, ClientInfo};

/// Number of accounts above which those of clients that have left and are within their limits are
/// removed.
const FEW_CLIENTS: usize = 64;

/// Limits for an export or for each of its clients. By default there are none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Quota {
    /// Most connections at a time. A further client is refused when it selects the export.
    pub connections: Option<NonZeroU64>,
    /// Most bytes of READ and WRITE payload per second.
    pub bytes_per_second: Option<NonZeroU64>,
    /// Most requests per second.
    pub requests_per_second: Option<NonZeroU64>,
}

/// An exhausted quota of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum UsedUp {
    OfClient,
    OfExport,
}

impl UsedUp {
    /// For the client.
    pub(crate) const fn answer(self) -> &'static str {
        match self {
            Self::OfClient => "you have reached your limit of connections",
            Self::OfExport => "the export has reached its limit of connections",
        }
    }

    /// For the log.
    pub(crate) const fn event(self) -> &'static str {
        match self {
            Self::OfClient => "the connection quota of the client is used up",
            Self::OfExport => "the connection quota of the export is used up",
        }
    }
}

/// The quotas of an export and the accounts of its clients.
#[derive(Debug, Default)]
pub(crate) struct Quotas {
    total: Arc<Account>,
    clients: Mutex<Clients>,
}

#[derive(Debug, Default)]
struct Clients {
    quota: Quota,
    accounts: HashMap<ClientKey, Arc<Account>>,
    /// The number of accounts at which unused ones are removed.
    many: usize,
}

/// The identity that connections of one client share.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum ClientKey {
    #[cfg(feature = "tls")]
    TlsName(String),
    Address(IpAddr),
    User(u32),
    Unknown,
}

impl ClientKey {
    fn new(client: &ClientInfo) -> Self {
        #[cfg(feature = "tls")]
        if let Some(name) = client.tls.as_ref().and_then(crate::tls::PeerIdentity::name) {
            return Self::TlsName(name.to_owned());
        }
        match &client.address {
            ClientAddress::Tcp(address) => Self::Address(address.ip().to_canonical()),
            ClientAddress::Unix { user, .. } => Self::User(*user),
            ClientAddress::Unknown => Self::Unknown,
        }
    }
}

impl Quotas {
    /// The quota of the export.
    pub(crate) fn set_total(&self, quota: Quota) {
        self.total.set(quota);
    }

    /// The quota of each client.
    pub(crate) fn set_of_clients(&self, quota: Quota) {
        let mut clients = self.clients();
        clients.quota = quota;
        clients.accounts.values().for_each(|account| account.set(quota));
    }

    /// The same quotas, of which nothing is used.
    pub(crate) fn unused(&self) -> Self {
        let fresh = Self::default();
        fresh.set_total(self.total.quota());
        fresh.set_of_clients(self.clients().quota);
        fresh
    }

    /// Counts a connection until the returned value is dropped.
    ///
    /// # Errors
    ///
    /// The exhausted quota.
    pub(crate) fn admit(&self, client: &ClientInfo) -> Result<Admission, UsedUp> {
        let key = ClientKey::new(client);
        // One statement, under one lock: an account without connections may be removed.
        let own = CountedConnection::take(self.clients().account(key)).ok_or(UsedUp::OfClient)?;
        let total = CountedConnection::take(Arc::clone(&self.total)).ok_or(UsedUp::OfExport)?;
        Ok(Admission { places: [own, total] })
    }

    /// Counts a connection that was admitted before, also above the limit.
    pub(crate) fn admit_again(&self, client: &ClientInfo) -> Admission {
        let own = CountedConnection::take_again(self.clients().account(ClientKey::new(client)));
        let total = CountedConnection::take_again(Arc::clone(&self.total));
        Admission { places: [own, total] }
    }

    fn clients(&self) -> std::sync::MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clients {
    fn account(&mut self, key: ClientKey) -> Arc<Account> {
        if self.accounts.len() >= self.many.max(FEW_CLIENTS) {
            let now = nanoseconds_now();
            // Otherwise a client that connects repeatedly would get a fresh account each time.
            self.accounts.retain(|_, account| !account.is_settled(now));
            self.many = self.accounts.len().saturating_mul(2);
        }
        let quota = self.quota;
        Arc::clone(self.accounts.entry(key).or_insert_with(|| {
            let account = Account::default();
            account.set(quota);
            Arc::new(account)
        }))
    }
}

/// The used part of a quota. A rate or limit of zero means none.
#[derive(Debug, Default)]
struct Account {
    connections: AtomicUsize,
    max_connections: AtomicU64,
    bytes: Bucket,
    requests: Bucket,
}

impl Account {
    fn set(&self, quota: Quota) {
        let or_none = |limit: Option<NonZeroU64>| limit.map_or(0, NonZeroU64::get);
        self.max_connections.store(or_none(quota.connections), Ordering::Relaxed);
        self.bytes.set_rate(or_none(quota.bytes_per_second));
        self.requests.set_rate(or_none(quota.requests_per_second));
    }

    fn quota(&self) -> Quota {
        Quota {
            connections: NonZeroU64::new(self.max_connections.load(Ordering::Relaxed)),
            bytes_per_second: NonZeroU64::new(self.bytes.rate()),
            requests_per_second: NonZeroU64::new(self.requests.rate()),
        }
    }

    fn changes(&self) -> usize {
        self.bytes.changes().wrapping_add(self.requests.changes())
    }

    fn is_settled(&self, now: u64) -> bool {
        self.connections.load(Ordering::Relaxed) == 0
            && self.bytes.is_idle(now)
            && self.requests.is_idle(now)
    }
}

/// The amount that a request has taken from an account.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Reservation {
    bytes: u64,
    requests: u64,
    /// The number of changes of the rates before.
    changes: usize,
}

/// A connection that is counted in an account.
#[derive(Debug)]
struct CountedConnection(Arc<Account>);

impl CountedConnection {
    fn take(account: Arc<Account>) -> Option<Self> {
        let most = account.max_connections.load(Ordering::Relaxed);
        let most = if most == 0 { usize::MAX } else { usize::try_from(most).unwrap_or(usize::MAX) };
        let update = |count: usize| count.checked_add(1).filter(|count| *count <= most);
        account.connections.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update).ok()?;
        Some(Self(account))
    }

    /// As `take`, also above the limit.
    fn take_again(account: Arc<Account>) -> Self {
        account.connections.fetch_add(1, Ordering::Relaxed);
        Self(account)
    }
}

impl Drop for CountedConnection {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A counted connection, and its quotas: its client's first, then the export's, so that a client
/// that waits for its own takes nothing from others.
#[derive(Debug)]
pub(crate) struct Admission {
    places: [CountedConnection; 2],
}

impl Admission {
    /// Whether neither quota limits requests or bytes. Called before each request.
    #[inline]
    pub(crate) fn is_unlimited(&self) -> bool {
        self.places.iter().all(|CountedConnection(account)| {
            account.bytes.rate() == 0 && account.requests.rate() == 0
        })
    }

    /// Takes the cost of a request from the quota with this index; returns when it may begin, if
    /// that is later, and the reservation. `None` if there is no such quota.
    pub(crate) fn reserve(
        &self,
        index: usize,
        bytes: u64,
    ) -> Option<(Option<Instant>, Reservation)> {
        let CountedConnection(account) = self.places.get(index)?;
        let changes = account.changes();
        let mut known = None;
        let mut now = || *known.get_or_insert_with(nanoseconds_now);
        let (bytes_at, bytes) = account.bytes.reserve(bytes, &mut now);
        let (requests_at, requests) = account.requests.reserve(1, &mut now);
        let at = bytes_at.max(requests_at);
        let is_later = known.is_some_and(|now| at > now);
        let at = if is_later { instant_of(at) } else { None };
        Some((at, Reservation { bytes, requests, changes }))
    }

    /// Whether the rates have changed since the reservation, so that it is void.
    pub(crate) fn is_void(&self, index: usize, taken: Reservation) -> bool {
        self.places
            .get(index)
            .is_some_and(|CountedConnection(account)| account.changes() != taken.changes)
    }

    /// Returns the reservation of a request that will not begin.
    pub(crate) fn give_back(&self, index: usize, taken: Reservation) {
        let Some(CountedConnection(account)) = self.places.get(index) else { return };
        if self.is_void(index, taken) {
            return;
        }
        account.bytes.give_back(taken.bytes);
        account.requests.give_back(taken.requests);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(value: u64) -> Option<NonZeroU64> {
        NonZeroU64::new(value)
    }

    fn user(user: u32) -> ClientInfo {
        let address = ClientAddress::Unix { process: None, user, group: 0, groups: Vec::new() };
        ClientInfo {
            address,
            #[cfg(feature = "tls")]
            tls: None,
        }
    }

    #[test]
    fn connections_are_counted_for_each_client_and_for_the_export() {
        let quotas = Quotas::default();
        quotas.set_of_clients(Quota { connections: limit(2), ..Quota::default() });
        quotas.set_total(Quota { connections: limit(3), ..Quota::default() });
        let first = quotas.admit(&user(1)).unwrap();
        let _second = quotas.admit(&user(1)).unwrap();
        assert!(quotas.admit(&user(1)).unwrap_err().answer().contains("you have"));
        let _third = quotas.admit(&user(2)).unwrap();
        assert!(quotas.admit(&user(2)).unwrap_err().answer().contains("the export has"));
        drop(first);
        let _fourth = quotas.admit(&user(2)).unwrap();
        quotas.set_total(Quota::default());
        assert!(quotas.admit(&user(1)).is_ok(), "limits change for those who are there");
    }

    #[test]
    fn who_connects_again_still_owes_what_it_took() {
        let quotas = Quotas::default();
        quotas.set_of_clients(Quota { bytes_per_second: limit(1), ..Quota::default() });
        let admission = quotas.admit(&user(1)).unwrap();
        let (at, _) = admission.reserve(0, 1 << 20).unwrap();
        assert!(at.is_none(), "the first request begins at once");
        drop(admission);
        for other in 1000..1000 + 2 * FEW_CLIENTS as u32 {
            drop(quotas.admit(&user(other)).unwrap());
        }
        assert!(quotas.clients().accounts.len() <= FEW_CLIENTS + 1);
        let again = quotas.admit(&user(1)).unwrap();
        assert!(again.reserve(0, 1).unwrap().0.is_some());
        let other = quotas.admit(&user(2)).unwrap();
        assert!(other.reserve(0, 1).unwrap().0.is_none(), "others owe nothing");
    }
}
