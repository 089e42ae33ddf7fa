//! The common part of both kinds of credentials: the settings of the TLS library.

use openssl::error::ErrorStack;
use openssl::ssl::{
    SslAcceptor, SslContext, SslContextBuilder, SslMethod, SslOptions, SslSessionCacheMode,
    SslVersion,
};

/// The fastest on processors with AES instructions comes first, and the server's order is used:
/// external keys are bound to SHA-256, and with that the default orders of OpenSSL and GnuTLS
/// select CHACHA20, which is three to four times slower.
const CIPHERSUITES_1_3: &str =
    "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256";

/// Credentials in the TLS library's form.
pub(super) struct Loaded {
    pub(super) context: SslContext,
    pub(super) host_names: Vec<String>,
    pub(super) users: Vec<String>,
}

impl std::fmt::Debug for Loaded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loaded")
            .field("host_names", &self.host_names)
            .field("users", &self.users)
            .finish_non_exhaustive()
    }
}

/// A context with everything but credentials.
pub(super) fn builder() -> Result<Builder, ErrorStack> {
    let mut builder = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls_server())?;
    builder.set_min_proto_version(Some(SslVersion::TLS1_2))?;
    builder.set_ciphersuites(CIPHERSUITES_1_3)?;
    builder.set_options(
        SslOptions::CIPHER_SERVER_PREFERENCE
            | SslOptions::NO_RENEGOTIATION
            | SslOptions::NO_TICKET
            // A client that closes without a TLS close_notify after its DISC is the normal case.
            | SslOptions::IGNORE_UNEXPECTED_EOF,
    );
    // Connections are long-lived: a resumed session saves nothing, and would skip the check of the
    // client's identity.
    builder.set_session_cache_mode(SslSessionCacheMode::OFF);
    builder.set_num_tickets(0)?;
    Ok(Builder(builder))
}

/// The library's builder, with helpers.
pub(super) struct Builder(openssl::ssl::SslAcceptorBuilder);

impl Builder {
    pub(super) fn build(self) -> SslContext {
        self.0.build().into_context()
    }
}

impl std::ops::Deref for Builder {
    type Target = SslContextBuilder;

    fn deref(&self) -> &SslContextBuilder {
        &self.0
    }
}

impl std::ops::DerefMut for Builder {
    fn deref_mut(&mut self) -> &mut SslContextBuilder {
        &mut self.0
    }
}
