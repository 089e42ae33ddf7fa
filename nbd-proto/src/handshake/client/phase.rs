//! A handshake between two options.

use crate::codec::protocol_string;
use crate::error::ApiMisuse;
use crate::handshake::meta_context::Selection;
use crate::limits::MAX_STRING_LEN;
use crate::wire::{ClientFlags, ReplyMode};

/// A handshake in which the client may send one option.
///
/// Every method appends the option to `out`. A method that fails with [`ApiMisuse`] has sent
/// nothing and consumes the phase: check external values beforehand (an export name with
/// [`OptionPhase::check_export_name`], the mode with [`OptionPhase::is_fixed_newstyle`] and
/// [`OptionPhase::reply_mode`]).
#[derive(Debug)]
pub struct OptionPhase {
    pub(super) client_flags: ClientFlags,
    pub(super) tls_established: bool,
    pub(super) reply_mode: ReplyMode,
    pub(super) selection: Option<Selection>,
}

impl OptionPhase {
    pub(super) const fn new(client_flags: ClientFlags) -> Self {
        Self {
            client_flags,
            tls_established: false,
            reply_mode: ReplyMode::Simple,
            selection: None,
        }
    }

    /// Returns false for a server that supports [`OptionPhase::export_name`] only.
    #[must_use]
    pub const fn is_fixed_newstyle(&self) -> bool {
        self.client_flags.contains(ClientFlags::FIXED_NEWSTYLE)
    }

    /// Returns true once TLS is established.
    #[must_use]
    pub const fn is_tls_established(&self) -> bool {
        self.tls_established
    }

    /// Returns the form of replies negotiated so far.
    #[must_use]
    pub const fn reply_mode(&self) -> ReplyMode {
        self.reply_mode
    }

    /// Checks that the protocol can express this export name: UTF-8 without NUL, at most 4096
    /// bytes.
    ///
    /// # Errors
    ///
    /// [`ApiMisuse::BadString`] if it is longer than 4096 bytes or contains a NUL byte.
    pub fn check_export_name(name: &str) -> Result<(), ApiMisuse> {
        check_string("the export name", name)
    }
}

pub(super) fn check_string(what: &'static str, text: &str) -> Result<(), ApiMisuse> {
    match protocol_string(what, text.as_bytes()) {
        Ok(_) => Ok(()),
        Err(_) if text.len() > MAX_STRING_LEN => {
            Err(ApiMisuse::BadString { what, why: "it is longer than 4096 bytes" })
        }
        Err(_) => Err(ApiMisuse::BadString { what, why: "it contains a NUL byte" }),
    }
}
