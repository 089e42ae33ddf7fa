//! Scripted servers that accept several connections in succession.

use nbd_client::{Connector, MetaContextName};
use tokio::net::{UnixListener, UnixStream};

use crate::script::{Offer, Script, guarded};

pub(crate) struct Listener {
    listener: UnixListener,
    directory: tempfile::TempDir,
}

impl Listener {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("s")).unwrap();
        Self { listener, directory }
    }

    /// A connector that comes here and asks for `base:allocation`.
    pub(crate) fn connector(&self) -> Connector {
        let uri = format!("nbd+unix:///?socket={}/s", self.directory.path().display());
        uri.parse::<Connector>().unwrap().meta_contexts([MetaContextName::base_allocation()])
    }

    pub(crate) async fn stream(&self) -> UnixStream {
        guarded(self.listener.accept()).await.unwrap().0
    }

    /// The next client, after its handshake.
    pub(crate) async fn serve(&self, offer: &Offer) -> Script {
        let mut server = Script::over(self.stream().await);
        server.handshake(offer).await.unwrap();
        server
    }
}
