//! Serves one image.

use std::path::PathBuf;
use std::sync::Arc;

use nbd_jobs::qemu_nbd::{AioMode, Options};
use nbd_jobs::tasks;
use nbd_server::export::{Export, ExportEntry};
use nbd_server::{ExportRegistry, ListenAddress, Server, ServerConfig};

use super::daemon::{self, Role};
use super::refusal::Refusal;
use super::source;
use crate::serving::{
    Aio, PidFile, allow_descriptors, runtime, serve_error, serve_until_signal, service_manager,
};
use crate::signals::{EndSignals, Hangup};

pub(super) fn run(options: &Options, role: Role) -> Result<(), Refusal> {
    let runtime = runtime()?;
    let registry = ExportRegistry::new();
    let (server, mut signals) = tasks::block_on(&runtime, listen(options, registry.clone()))?;
    // An image on another server blocks: it is opened, and finally dropped, outside of tasks.
    let export = std::thread::scope(|scope| {
        let (done, opened) = tokio::sync::oneshot::channel();
        scope.spawn(move || done.send(source::open(options)));
        tasks::block_on(&runtime, signals.meanwhile(opened))
    });
    let export = export.map_err(|_| Refusal::new("opening the image has ended unexpectedly"))??;
    add(options, &registry, Arc::clone(&export))?;
    let served = tasks::block_on(&runtime, serve(options, role, server, signals));
    // The image first: a process that waits for its locks should not wait for threads to end.
    drop(registry);
    drop(export);
    drop(runtime);
    served
}

async fn listen(
    options: &Options,
    registry: ExportRegistry,
) -> Result<(Server, EndSignals), Refusal> {
    let signals = EndSignals::new(Hangup::Ends)?;
    let mut config = config(options);
    config.tls = options.server_tls()?;
    allow_descriptors();
    let mut server = Server::new(config, registry);
    // As in qemu-nbd: clients can connect from here on, and wait for their greeting.
    server.listen(&address(options)?).await.map_err(serve_error)?;
    Ok((server, signals))
}

fn add(
    options: &Options,
    registry: &ExportRegistry,
    export: Arc<dyn Export>,
) -> Result<(), Refusal> {
    let mut entry = ExportEntry::new(export);
    if let Some(text) = &options.description {
        entry = entry.description(text.clone());
    }
    let name = options.export_name.clone().unwrap_or_default();
    registry.add(name, entry).map_err(|error| Refusal::new(error.to_string()))
}

async fn serve(
    options: &Options,
    role: Role,
    server: Server,
    signals: EndSignals,
) -> Result<(), Refusal> {
    PidFile::write_and_keep(options.pid_file.as_deref())?;
    daemon::ready(role, options)?;
    let mut clients = server.handle().client_count();
    let persistent = options.persistent;
    let ended = async move {
        match persistent {
            true => std::future::pending().await,
            false => clients.wait_until_unused().await,
        }
    };
    let drain_timeout = ServerConfig::default().drain_timeout;
    Ok(serve_until_signal(server, drain_timeout, signals, ended).await?)
}

fn config(options: &Options) -> ServerConfig {
    let mut config = ServerConfig::default();
    config.max_connections = match options.shared {
        0 => usize::MAX,
        shared => usize::try_from(shared).unwrap_or(usize::MAX),
    };
    config.handshake_timeout = options.handshake_limit;
    // A client over the limit is not refused at once: the previous one may just be disconnecting.
    config.queue_timeout = options.handshake_limit;
    let aio = if options.aio == Some(AioMode::Threads) { Aio::Threads } else { Aio::Auto };
    config.io_uring = aio.may_use_io_uring();
    config
}

fn address(options: &Options) -> Result<ListenAddress, Refusal> {
    if service_manager::gave_sockets() {
        return Ok(ListenAddress::Systemd);
    }
    match &options.socket {
        Some(path) => Ok(ListenAddress::Unix(PathBuf::clone(path))),
        None => {
            let (host, port) = options.host_and_port()?;
            let host = if host.contains(':') { format!("[{host}]") } else { host };
            Ok(ListenAddress::Tcp(format!("{host}:{port}")))
        }
    }
}
