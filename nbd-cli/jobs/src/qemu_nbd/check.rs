//! Contradictory options.

use super::error::CommandLineError;
use super::options::Options;

/// The sockets that a service manager gives to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Activation {
    /// None: the server makes its socket.
    None,
    /// One.
    OneSocket,
    /// Several, or an unknown number; QEMU does not accept them.
    OtherSockets,
}

impl Options {
    /// Refuses contradictory options, in the order in which QEMU detects them.
    ///
    /// # Errors
    ///
    /// Names the options that contradict each other, or says what else is wrong.
    pub fn check(&self, activation: Activation) -> Result<(), CommandLineError> {
        if self.list {
            check_list(self)?;
        }
        if activation != Activation::None {
            check_activation(self, activation)?;
        }
        check_tls(self)?;
        if self.selinux_label {
            return Err(CommandLineError::new(match self.socket {
                None => "--selinux-label is not permitted without --socket",
                Some(_) => "--selinux-label is not supported; label the socket with chcon",
            }));
        }
        if self.list {
            return Ok(());
        }
        if self.files.len() != 1 {
            return Err(CommandLineError::usage("Invalid number of arguments"));
        }
        if self.image_options && self.format.is_some() {
            return Err(CommandLineError::new("--image-opts and -f are mutually exclusive"));
        }
        Ok(())
    }
}

fn check_list(options: &Options) -> Result<(), CommandLineError> {
    let wrong = if !options.files.is_empty() {
        "a file name"
    } else if options.says_something_about_the_disk() {
        "per-device settings"
    } else if options.fork {
        "forking"
    } else {
        return Ok(());
    };
    Err(CommandLineError::new(format!("List mode is incompatible with {wrong}")))
}

fn check_activation(options: &Options, activation: Activation) -> Result<(), CommandLineError> {
    let wrong = if options.connect.is_some() {
        "NBD device"
    } else if options.socket.is_some() {
        "Unix socket"
    } else if options.bind.is_some() {
        "The interface"
    } else if options.port.is_some() {
        "TCP port number"
    } else if options.selinux_label {
        "SELinux label"
    } else if options.list {
        return Err(CommandLineError::new("List mode is incompatible with socket activation"));
    } else {
        return match activation {
            Activation::OneSocket => Ok(()),
            _ => {
                Err(CommandLineError::new("socket activation is supported with LISTEN_FDS=1 only"))
            }
        };
    };
    Err(CommandLineError::new(format!("{wrong} can't be set when using socket activation")))
}

fn check_tls(options: &Options) -> Result<(), CommandLineError> {
    let Some(id) = &options.tls_creds else {
        return match (&options.tls_authz, &options.tls_hostname) {
            (Some(_), _) => {
                Err(CommandLineError::new("--tls-authz is not permitted without --tls-creds"))
            }
            (_, Some(_)) => {
                Err(CommandLineError::new("--tls-hostname is not permitted without --tls-creds"))
            }
            _ => Ok(()),
        };
    };
    if options.connect.is_some() {
        return Err(CommandLineError::new(
            "TLS is for clients on sockets, not for kernel devices (-c)",
        ));
    }
    if options.tls_authz.is_some() && options.list {
        return Err(CommandLineError::new("TLS authorization is incompatible with export list"));
    }
    if options.tls_hostname.is_some() && !options.list {
        return Err(CommandLineError::new("TLS hostname is only supported with export list"));
    }
    options.objects.credentials(id, options.list).map(drop).map_err(CommandLineError::new)
}

#[cfg(test)]
mod tests {
    use super::super::options::{Wanted, parse};
    use super::*;

    fn refused(words: &[&str], activation: Activation) -> Option<String> {
        let wanted = parse(words.iter().map(Into::into).collect()).unwrap();
        let Wanted::Work(options) = wanted else { panic!("{words:?}") };
        options.check(activation).err().map(|error| error.to_string())
    }

    #[test]
    fn options_that_contradict_each_other_are_refused() {
        for (words, why) in [
            (&["-L", "disk"] as &[_], "List mode is incompatible with a file name"),
            (&["-L", "-f", "raw"], "List mode is incompatible with per-device settings"),
            (&["-L", "--fork"], "List mode is incompatible with forking"),
            (&[], "Invalid number of arguments"),
            (&["--image-opts", "-f", "raw", "disk"], "--image-opts and -f are mutually exclusive"),
            (&["--tls-authz", "a", "disk"], "--tls-authz is not permitted without --tls-creds"),
            (
                &["--tls-creds", "a", "disk"],
                "Failed to get TLS creds: No TLS credentials with id 'a'",
            ),
        ] {
            assert_eq!(refused(words, Activation::None).as_deref(), Some(why), "{words:?}");
        }
        assert_eq!(refused(&["-r", "disk"], Activation::None), None);
    }

    #[test]
    fn a_socket_of_a_service_manager_leaves_no_address_to_choose() {
        assert_eq!(refused(&["disk"], Activation::OneSocket), None);
        let why = "TCP port number can't be set when using socket activation";
        assert_eq!(refused(&["-p", "1", "disk"], Activation::OneSocket).as_deref(), Some(why));
        let why = "socket activation is supported with LISTEN_FDS=1 only";
        assert_eq!(refused(&["disk"], Activation::OtherSockets).as_deref(), Some(why));
    }
}
