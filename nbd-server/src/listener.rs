//! Sockets that accept connections.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nbd_proto::host_lookup;
use rustix::net::sockopt;
use tokio::net::{TcpListener, UnixListener};

use crate::connection::Socket;
use crate::error::{ServeError, system_words};
use crate::handover::take_over;
use crate::listen_address::{BoundAddress, ListenAddress};
use crate::paused::{ListenerOrigin, PausedListener};
use crate::socket_file::SocketFile;
use crate::sys;

/// The time without data from a client before the first probe of its host.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// The number of unanswered probes that end the connection.
const KEEPALIVE_PROBES: u32 = 6;

/// A socket that accepts connections.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(Opener, TcpListener),
    /// The file is removed before the socket is closed: no client finds a file without a listener,
    /// and no other socket can have the same identity meanwhile.
    Unix(Option<SocketFile>, UnixListener),
}

/// Who opened a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Opener {
    Server,
    ServiceManager,
}

impl Listener {
    /// Opens every socket for `address`, or takes it from the `adopted` ones.
    ///
    /// # Errors
    ///
    /// [`ServeError`]; no file remains.
    pub(crate) async fn open(
        address: &ListenAddress,
        adopted: &mut Vec<Self>,
    ) -> Result<Vec<Self>, ServeError> {
        match address {
            ListenAddress::Tcp(address) => open_tcp(address, adopted).await,
            ListenAddress::Unix(path) => {
                if let Some(listener) = adopted_unix(path, adopted) {
                    return Ok(vec![listener]);
                }
                Ok(vec![take_over(|| std::future::ready(open_unix(path))).await?])
            }
            ListenAddress::Systemd => open_inherited(),
        }
    }

    /// The address on which this listens.
    pub(crate) fn address(&self) -> io::Result<BoundAddress> {
        match self {
            Self::Tcp(_, listener) => listener.local_addr().map(BoundAddress::Tcp),
            Self::Unix(Some(file), _) => Ok(BoundAddress::Unix(Some(file.path.clone()))),
            Self::Unix(None, listener) => {
                let address = listener.local_addr()?;
                let path = address.as_pathname().map(std::path::absolute).transpose()?;
                Ok(BoundAddress::Unix(path))
            }
        }
    }

    /// A listener for a socket of any family that a service manager passed.
    fn passed(socket: OwnedFd) -> Result<Self, ServeError> {
        let refuse = |error: io::Error| ServeError::Systemd { why: system_words(&error) };
        let listening =
            sockopt::socket_acceptconn(socket.as_fd()).map_err(|error| refuse(error.into()))?;
        if !listening {
            return Err(ServeError::Systemd {
                why: "a descriptor is a connected socket; set Accept=no in the socket unit".into(),
            });
        }
        // The service manager owns the file.
        Self::from_descriptor(socket, Opener::ServiceManager, None).map_err(refuse)
    }

    /// The listener of a paused server. Its file is not [owned](Self::own_file) yet.
    pub(crate) fn adopt(paused: PausedListener) -> Result<Self, ServeError> {
        let (opener, file) = match paused.origin {
            ListenerOrigin::Tcp => (Opener::Server, None),
            ListenerOrigin::UnixFile { path, identity } => {
                (Opener::Server, Some(SocketFile { path, identity, is_owned: false }))
            }
            ListenerOrigin::ServiceManager => (Opener::ServiceManager, None),
        };
        let adopted = Self::from_descriptor(paused.socket, opener, file);
        adopted.map_err(|source| ServeError::Bind { address: "an adopted socket".into(), source })
    }

    fn from_descriptor(
        socket: OwnedFd,
        opener: Opener,
        file: Option<SocketFile>,
    ) -> io::Result<Self> {
        let family = sockopt::socket_domain(socket.as_fd())?;
        if family == rustix::net::AddressFamily::UNIX {
            let listener = std::os::unix::net::UnixListener::from(socket);
            listener.set_nonblocking(true)?;
            return Ok(Self::Unix(file, UnixListener::from_std(listener)?));
        }
        let listener = std::net::TcpListener::from(socket);
        listener.set_nonblocking(true)?;
        Ok(Self::Tcp(opener, TcpListener::from_std(listener)?))
    }

    /// Releases the socket with its file, for another server.
    pub(crate) fn pause(self) -> io::Result<PausedListener> {
        let (socket, origin) = match self {
            Self::Tcp(opener, listener) => {
                let origin = match opener {
                    Opener::Server => ListenerOrigin::Tcp,
                    Opener::ServiceManager => ListenerOrigin::ServiceManager,
                };
                (listener.into_std()?.into(), origin)
            }
            Self::Unix(file, listener) => {
                let origin = match file {
                    None => ListenerOrigin::ServiceManager,
                    Some(mut file) => {
                        file.is_owned = false;
                        let (path, identity) = (file.path.clone(), file.identity);
                        ListenerOrigin::UnixFile { path, identity }
                    }
                };
                (listener.into_std()?.into(), origin)
            }
        };
        Ok(PausedListener { socket, origin })
    }

    /// Whether a service manager passed it.
    pub(crate) const fn is_passed(&self) -> bool {
        matches!(self, Self::Tcp(Opener::ServiceManager, _) | Self::Unix(None, _))
    }

    /// Owns its file, if it has one, from now on: it is removed with the listener.
    pub(crate) const fn own_file(&mut self) {
        if let Self::Unix(Some(file), _) = self {
            file.is_owned = true;
        }
    }

    /// The next client, and its name in the log.
    pub(crate) async fn accept(&self) -> io::Result<(Socket, String)> {
        match self {
            Self::Tcp(_, listener) => {
                let (stream, peer) = listener.accept().await?;
                prepare_tcp(&stream)?;
                Ok((Socket::from_std_tcp(stream.into_std()?), peer.to_string()))
            }
            Self::Unix(file, listener) => {
                let (stream, _) = listener.accept().await?;
                let name = file
                    .as_ref()
                    .map_or_else(|| "unix socket".into(), |file| file.path.display().to_string());
                Ok((Socket::from_std_unix(stream.into_std()?), name))
            }
        }
    }
}

/// Sets the options of a client's socket: replies are sent at once, and the connection ends two
/// minutes after the client's host has vanished, even if nothing is sent. Otherwise it would count
/// as a connection forever.
pub(crate) fn prepare_tcp(stream: impl AsFd) -> io::Result<()> {
    let stream = stream.as_fd();
    sockopt::set_tcp_nodelay(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)?;
    Ok(sockopt::set_socket_keepalive(stream, true)?)
}

/// The adopted listener at a TCP address; port 0 means any port.
fn adopted_tcp(wanted: SocketAddr, adopted: &mut Vec<Listener>) -> Option<Listener> {
    take_from(adopted, |address| match address {
        BoundAddress::Tcp(address) if wanted.port() == 0 => address.ip() == wanted.ip(),
        BoundAddress::Tcp(address) => *address == wanted,
        BoundAddress::Unix(_) => false,
    })
}

/// The adopted listener of a unix socket's file.
fn adopted_unix(wanted: &Path, adopted: &mut Vec<Listener>) -> Option<Listener> {
    let wanted = std::path::absolute(wanted).ok()?;
    take_from(
        adopted,
        |address| matches!(address, BoundAddress::Unix(Some(path)) if *path == wanted),
    )
}

fn take_from(
    adopted: &mut Vec<Listener>,
    is_wanted: impl Fn(&BoundAddress) -> bool,
) -> Option<Listener> {
    let mut listeners = adopted.iter();
    let found = listeners.position(|listener| listener.address().is_ok_and(|at| is_wanted(&at)))?;
    Some(adopted.swap_remove(found))
}

async fn open_tcp(address: &str, adopted: &mut Vec<Listener>) -> Result<Vec<Listener>, ServeError> {
    let bind_error = |source| ServeError::Bind { address: address.to_owned(), source };
    let name = address.to_owned();
    let found = tokio::task::spawn_blocking(move || resolve(&name));
    let mut addresses =
        found.await.map_err(|error| bind_error(io::Error::other(error)))?.map_err(bind_error)?;
    addresses.sort_unstable();
    addresses.dedup();
    let mut listeners = Vec::with_capacity(addresses.len());
    for address in addresses {
        if let Some(listener) = adopted_tcp(address, adopted) {
            listeners.push(listener);
            continue;
        }
        let bind = || async move {
            let bound = TcpListener::bind(address).await;
            bound.map_err(|source| ServeError::Bind { address: address.to_string(), source })
        };
        let listener = take_over(bind).await?;
        listeners.push(Listener::Tcp(Opener::Server, listener));
    }
    if listeners.is_empty() {
        return Err(ServeError::NoAddress { address: address.to_owned() });
    }
    Ok(listeners)
}

/// Every address of `host:port`. Unlike the standard library, this supports zones in brackets.
fn resolve(address: &str) -> io::Result<Vec<SocketAddr>> {
    let Some((host, port)) = address.rsplit_once(':') else {
        return address.to_socket_addrs().map(Iterator::collect);
    };
    let host = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    let found = match port.parse::<u16>() {
        Ok(port) => (host, port).to_socket_addrs(),
        Err(_) => return address.to_socket_addrs().map(Iterator::collect),
    };
    found.map(Iterator::collect).map_err(|error| {
        io::Error::new(error.kind(), host_lookup::explain(host, &system_words(&error)))
    })
}

fn open_unix(path: &Path) -> Result<Listener, ServeError> {
    let (file, listener) = SocketFile::bind(path)?;
    Ok(Listener::Unix(Some(file), listener))
}

fn open_inherited() -> Result<Vec<Listener>, ServeError> {
    let refuse = |why: String| ServeError::Systemd { why };
    let variable = |name| std::env::var(name).ok();
    let own = std::process::id().to_string();
    match variable("LISTEN_PID") {
        None => return Err(refuse("LISTEN_PID is not set; start this from a socket unit".into())),
        Some(pid) if pid.trim() != own => {
            return Err(refuse(format!("LISTEN_PID is {pid}, this is process {own}")));
        }
        Some(_) => {}
    }
    let count = variable("LISTEN_FDS").and_then(|count| count.trim().parse::<u16>().ok());
    let count = count.filter(|count| (1..=64).contains(count));
    let Some(count) = count else {
        return Err(refuse("LISTEN_FDS is not a number from 1 to 64".into()));
    };
    let fds = sys::take_inherited(count);
    if fds.len() != usize::from(count) {
        return Err(refuse(format!("only {} of {count} descriptors are open", fds.len())));
    }
    fds.into_iter().map(Listener::passed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn open(address: &ListenAddress) -> Result<Vec<Listener>, ServeError> {
        Listener::open(address, &mut Vec::new()).await
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_removed_at_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "the standard library leaves the file behind");
        let address = ListenAddress::Unix(path.clone());
        let listeners = open(&address).await.unwrap();
        assert!(matches!(open(&address).await, Err(ServeError::SocketInUse { .. })));
        drop(listeners);
        assert!(!path.exists());
    }

    #[test]
    fn zones_are_read_by_name_and_number_and_written_by_name() {
        for text in ["[fe80::1%lo]:7", "[fe80::1%1]:7"] {
            let found = resolve(text).unwrap();
            let [SocketAddr::V6(address)] = found[..] else { panic!("{text}: {found:?}") };
            assert_eq!((address.scope_id(), address.port()), (1, 7), "{text}");
            let uri = BoundAddress::Tcp(address.into()).uri("disk").to_string();
            assert_eq!(uri, "nbd://[fe80::1%25lo]:7/disk");
        }
        let error = resolve("[fe80::1%no-such-interface]:7").unwrap_err().to_string();
        assert_eq!(error, "this machine has no network interface 'no-such-interface'");
        assert_eq!(resolve("[::1]:7").unwrap(), ["[::1]:7".parse().unwrap()]);
        assert_eq!(resolve("127.0.0.1:7").unwrap(), ["127.0.0.1:7".parse().unwrap()]);
    }

    #[test]
    fn a_client_whose_host_vanished_is_found_out() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        prepare_tcp(&stream).unwrap();
        assert!(sockopt::socket_keepalive(&stream).unwrap() && stream.nodelay().unwrap());
        let idle = sockopt::tcp_keepidle(&stream).unwrap();
        let probes = sockopt::tcp_keepcnt(&stream).unwrap();
        let interval = sockopt::tcp_keepintvl(&stream).unwrap();
        assert_eq!(idle + interval * probes, Duration::from_secs(120));
    }

    #[tokio::test]
    async fn an_address_that_another_server_is_about_to_leave_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let old = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let address = ListenAddress::Unix(path.clone());
        let next = tokio::spawn(async move { open(&address).await });
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!next.is_finished(), "it is neither taken away nor refused at once");
        drop(old);
        let next = next.await.unwrap().unwrap();
        assert!(path.exists());
        drop(next);

        let old = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = ListenAddress::Tcp(old.local_addr().unwrap().to_string());
        let next = tokio::spawn(async move { open(&address).await });
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!next.is_finished());
        drop(old);
        next.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn the_file_of_a_socket_is_gone_before_the_next_server_can_take_its_place() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let address = ListenAddress::Unix(path.clone());
        for _ in 0..100 {
            let old = open(&address).await.unwrap();
            // The next one comes while this one goes.
            let going = std::thread::spawn(move || drop(old));
            let next = open(&address).await.unwrap();
            going.join().unwrap();
            assert!(std::os::unix::net::UnixStream::connect(&path).is_ok(), "its file is there");
            drop(next);
        }
    }

    #[tokio::test]
    async fn a_socket_that_took_our_place_is_not_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listeners = open(&ListenAddress::Unix(path.clone())).await.unwrap();
        std::fs::rename(&path, directory.path().join("moved")).unwrap();
        std::fs::write(&path, "somebody else's").unwrap();
        drop(listeners);
        assert!(path.exists());
    }

    #[tokio::test]
    async fn a_busy_port_is_an_error_that_says_so() {
        let first = open(&ListenAddress::Tcp("127.0.0.1:0".into())).await.unwrap();
        let address = first[0].address().unwrap().to_string();
        let error = open(&ListenAddress::Tcp(address.clone())).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains(&address) && text.contains("another program"), "{text}");
    }
}
