//! Where the numbers of a server come from.

use std::fmt;
use std::io;
use std::net::{TcpStream, ToSocketAddrs as _};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use super::http;
use crate::control::{Request, call};
use crate::error::{JobError, JobErrorKind};
use crate::limited::{Deadline, Limited, connect_unix};
use crate::monitor::MetricsAddress;
use crate::status::{MAX_ENTRIES, Status};

/// A running server: its control socket, or the address of its metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchSource {
    /// The path of the control socket (`serve --control`).
    Control(PathBuf),
    /// The address of the metrics (`serve --metrics`).
    Metrics(MetricsAddress),
}

impl FromStr for WatchSource {
    type Err = String;

    /// `[HOST:]PORT`, `http://HOST:PORT` and `unix:PATH` are addresses of metrics; everything else
    /// is the path of a control socket.
    fn from_str(text: &str) -> Result<Self, String> {
        let web = text.strip_prefix("http://").map(|rest| rest.trim_end_matches('/'));
        match web.unwrap_or(text).parse() {
            Ok(address) => Ok(Self::Metrics(address)),
            Err(why) if web.is_some() || text.starts_with("unix:") => Err(why),
            Err(_) if text.is_empty() => Err("the name of the server is empty".to_owned()),
            Err(_) => Ok(Self::Control(text.into())),
        }
    }
}

impl fmt::Display for WatchSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Control(path) => write!(f, "{}", path.display()),
            Self::Metrics(MetricsAddress::Unix(path)) => write!(f, "unix:{}", path.display()),
            Self::Metrics(MetricsAddress::Tcp { host, port }) if host.contains(':') => {
                write!(f, "[{host}]:{port}")
            }
            Self::Metrics(MetricsAddress::Tcp { host, port }) => write!(f, "{host}:{port}"),
        }
    }
}

impl WatchSource {
    /// Asks for the numbers. Blocks, at most for `limit` for connecting and as long again for the
    /// answer, or without an end if that is zero. The time for looking up the name of a host is
    /// extra.
    ///
    /// # Errors
    ///
    /// If no server of ours answers there in time.
    pub fn fetch(&self, limit: Duration) -> Result<Status, JobError> {
        let failed = |why: String| {
            let message = format!("cannot get the numbers of the server at '{self}': {why}");
            JobError::new(JobErrorKind::ControlSocket, message)
        };
        let unclear = |_| {
            failed(format!(
                "its answer cannot be understood, or has more than {MAX_ENTRIES} exports or clients"
            ))
        };
        match self {
            Self::Control(path) => {
                let reply = call(path, &Request::Statistics {}, limit)?;
                serde_json::from_value(reply).map_err(unclear)
            }
            Self::Metrics(address) => {
                let body = get(address, limit).map_err(|error| {
                    if error.kind() == io::ErrorKind::TimedOut {
                        let seconds = limit.as_secs_f64();
                        return failed(format!("it has not answered for {seconds} s"));
                    }
                    let advice = match error.kind() {
                        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                            "; is a server running with --metrics?"
                        }
                        _ => "",
                    };
                    failed(format!("{error}{advice}"))
                })?;
                serde_json::from_slice(&body).map_err(unclear)
            }
        }
    }
}

fn get(address: &MetricsAddress, limit: Duration) -> io::Result<Vec<u8>> {
    const PATH: &str = "/status.json";
    match address {
        MetricsAddress::Unix(path) => {
            let mut stream = connect_unix(path, Deadline::after(limit))?;
            http::get(Limited::new(&mut stream, Deadline::after(limit)), PATH, "localhost")
        }
        MetricsAddress::Tcp { host, port } => {
            let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
            let sockets = (host.as_str(), *port).to_socket_addrs()?;
            let deadline = Deadline::after(limit);
            let count = u32::try_from(sockets.len()).unwrap_or(u32::MAX);
            for (number, socket) in (0_u32..).zip(sockets) {
                let connected = match deadline.left()? {
                    // One address that does not answer leaves time for the others.
                    Some(left) => TcpStream::connect_timeout(&socket, left / (count - number)),
                    None => TcpStream::connect(socket),
                };
                match connected {
                    Ok(mut stream) => {
                        let stream = Limited::new(&mut stream, Deadline::after(limit));
                        return http::get(stream, PATH, &socket.to_string());
                    }
                    Err(error) => last = error,
                }
            }
            Err(last)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_told_from_paths() {
        let tcp = |host: &str, port| MetricsAddress::Tcp { host: host.to_owned(), port };
        for (text, address) in [
            ("9810", tcp("127.0.0.1", 9810)),
            ("host:1", tcp("host", 1)),
            ("http://[::1]:9810/", tcp("::1", 9810)),
            ("unix:/run/m", MetricsAddress::Unix("/run/m".into())),
        ] {
            assert_eq!(text.parse(), Ok(WatchSource::Metrics(address)), "{text}");
        }
        for path in ["/run/nbd.control", "nbd.control", "./9810", "a:b"] {
            assert_eq!(path.parse(), Ok(WatchSource::Control(path.into())), "{path}");
        }
        for wrong in ["", "unix:", "http://", "http://host"] {
            assert!(wrong.parse::<WatchSource>().is_err(), "{wrong}");
        }
        assert_eq!("[::1]:5".parse::<WatchSource>().map(|it| it.to_string()), Ok("[::1]:5".into()));
    }
}
