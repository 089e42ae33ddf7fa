//! Permissions of the unix sockets of a server.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use clap::Args;
use nbd_jobs::users::{group_id, user_id};
use nbd_server::{BoundAddress, ListenAddress, Server};
use rustix::fs::Mode;
use rustix::process::umask;

use crate::error::CommandError;
use crate::serving::serve_error;

/// Access to the unix sockets of `--socket`.
#[derive(Clone, Debug, Args)]
pub struct SocketFileArgs {
    /// Permissions of the unix sockets, in octal digits; clients need the right to write. By
    /// default the umask decides.
    #[arg(long, value_name = "MODE", value_parser = parse_mode, requires = "socket")]
    pub socket_mode: Option<u32>,

    /// Owner of the unix sockets, by name or id.
    #[arg(long, value_name = "USER", value_parser = user_id, requires = "socket")]
    pub socket_owner: Option<u32>,

    /// Group of the unix sockets, by name or id.
    #[arg(long, value_name = "GROUP", value_parser = group_id, requires = "socket")]
    pub socket_group: Option<u32>,
}

fn parse_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode @ 0..=0o777) => Ok(mode),
        _ => Err("a mode is three octal digits, as in 660".to_owned()),
    }
}

impl SocketFileArgs {
    /// Listens on an address. The file of a unix socket has its permissions before clients can
    /// connect.
    ///
    /// # Errors
    ///
    /// If the address cannot be used, or the permissions cannot be set.
    pub(super) async fn listen(
        &self,
        server: &mut Server,
        address: &ListenAddress,
    ) -> Result<Vec<BoundAddress>, CommandError> {
        let ListenAddress::Unix(path) = address else {
            return server.listen(address).await.map_err(serve_error);
        };
        if self.socket_mode.is_none() && self.socket_owner.is_none() && self.socket_group.is_none()
        {
            return server.listen(address).await.map_err(serve_error);
        }
        // Images are open, and nothing else creates files yet: the umask could only make them
        // stricter.
        let usual = umask(Mode::RWXG | Mode::RWXO);
        let bound = server.listen(address).await;
        umask(usual);
        let bound = bound.map_err(serve_error)?;
        self.set_permissions(path, usual).map_err(|error| {
            CommandError::new(format!(
                "cannot set owner and permissions of the socket '{}': {error}",
                path.display()
            ))
        })?;
        Ok(bound)
    }

    fn set_permissions(&self, path: &Path, usual: Mode) -> std::io::Result<()> {
        if self.socket_owner.is_some() || self.socket_group.is_some() {
            std::os::unix::fs::chown(path, self.socket_owner, self.socket_group)?;
        }
        let mode = self.socket_mode.unwrap_or(0o777 & !usual.bits());
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_octal() {
        assert_eq!(parse_mode("660"), Ok(0o660));
        assert_eq!(parse_mode("0600"), Ok(0o600));
        for text in ["", "rw", "1777", "680", "-1"] {
            assert!(parse_mode(text).is_err(), "{text}");
        }
    }
}
