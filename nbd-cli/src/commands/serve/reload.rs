//! Reads the configuration file of a running server again, on SIGHUP and on request.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use nbd_jobs::control::server::{Controller, OpeningGuard};
use nbd_jobs::control::{ErrorKind, Failure};
use nbd_jobs::opening::{open_within, within};
use nbd_jobs::serving::{Changes, LiveSettings};
use nbd_jobs::tasks;
use nbd_jobs::text::without_error_numbers;
use nbd_server::ServerHandle;
use nbd_server::export::{Export, ExportEntry};
use nbd_server::tls::TlsMode;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::config::{Config, Configured, spec};
use super::export::ExportArgs;
use super::source::{self, OpenedExport};
use crate::error::CommandError;
use crate::serving::service_manager;

/// Options that can change while the server runs.
const LIVE: LiveSettings<'static> = LiveSettings {
    server: &["tls-only", "open-timeout"],
    exports: &[
        "description",
        "hidden",
        "allow",
        "readonly-for",
        "client-connections",
        "client-rate",
        "client-iops",
        "export-connections",
        "export-rate",
        "export-iops",
    ],
};

/// A new configuration whose sources are open.
struct Prepared {
    config: Config,
    changes: Changes<Arc<ExportArgs>>,
    opened: Opening,
}

/// Sources that a thread opens. If the reload no longer waits for the thread, those that it has
/// opened are closed: the next one may hang for ever.
struct Opening {
    opened: Arc<Mutex<Option<Vec<OpenedExport>>>>,
    /// Held until they are exported or closed: a program that takes over opens the same files.
    guard: Option<OpeningGuard>,
}

impl Opening {
    fn begin(guard: Option<OpeningGuard>) -> Self {
        Self { opened: Arc::new(Mutex::new(Some(Vec::new()))), guard }
    }

    /// Adds a source, or closes it if the reload no longer waits for it.
    fn add(opened: &Mutex<Option<Vec<OpenedExport>>>, source: OpenedExport) {
        let mut all = lock(opened);
        match &mut *all {
            Some(all) => all.push(source),
            None => {
                // Closing it may take long.
                drop(all);
                drop(source);
            }
        }
    }

    fn take(&self) -> Vec<OpenedExport> {
        lock(&self.opened).take().unwrap_or_default()
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        let opened = self.take();
        if !opened.is_empty() {
            let closing = (opened, self.guard.take());
            // Closing an image may block. Without a thread it is closed here.
            let _ = tasks::start_thread("close", || drop(closing));
        }
    }
}

/// A request to read the file again: the channel for its result.
type Wish = oneshot::Sender<Result<Value, Failure>>;

/// Asks a running server to read its file again.
#[derive(Debug, Clone)]
pub(super) struct ReloadHandle(mpsc::Sender<Wish>);

impl ReloadHandle {
    pub(super) fn new() -> (Self, mpsc::Receiver<Wish>) {
        let (sender, wishes) = mpsc::channel(1);
        (Self(sender), wishes)
    }

    /// Reads the file again; returns what has changed.
    pub(super) async fn reload(self) -> Result<Value, Failure> {
        let ended = |_| Failure::new(ErrorKind::Failed, "the server is ending");
        let (sender, result) = oneshot::channel();
        self.0.send(sender).await.map_err(|_| ended(()))?;
        result.await.map_err(|_| ended(()))?
    }
}

/// The configuration with which a server was started, and the current one.
pub(super) struct Reloader {
    path: PathBuf,
    config: Config,
    /// The current configuration, for a server that continues after a failed takeover.
    kept: Arc<Mutex<Config>>,
    tls: TlsMode,
    server: ServerHandle,
    /// The controller of a server with a control socket.
    controller: Option<Arc<Controller>>,
    /// Exports that were removed, until the last client has left and they are closed: where nothing
    /// locks, their images must not be opened again before.
    leaving: Vec<(Configured, Weak<dyn Export>)>,
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Reloader {
    /// For a server that was started with the configuration in `kept`, which reloads update.
    pub(super) fn new(
        path: PathBuf,
        kept: &Arc<Mutex<Config>>,
        tls: TlsMode,
        server: ServerHandle,
        controller: Option<Arc<Controller>>,
    ) -> Self {
        let (config, kept) = (lock(kept).clone(), Arc::clone(kept));
        Self { path, config, kept, tls, server, controller, leaving: Vec::new() }
    }

    /// Reads the file again on each SIGHUP and on each request. The task holds the exports.
    ///
    /// # Errors
    ///
    /// If SIGHUP cannot be caught.
    pub(super) fn start(
        mut self,
        mut wishes: mpsc::Receiver<Wish>,
    ) -> Result<JoinHandle<()>, CommandError> {
        let mut hangups = signal(SignalKind::hangup())
            .map_err(|error| CommandError::new(format!("cannot catch SIGHUP: {error}")))?;
        let reloading = tasks::spawn(async move {
            loop {
                let wish = tokio::select! {
                    Some(wish) = wishes.recv() => Some(wish),
                    Some(()) = hangups.recv() => None,
                    else => return,
                };
                service_manager::reloading();
                let result = self.reload().await;
                service_manager::reloaded();
                match &result {
                    Ok(changes) => tracing::info!(%changes, "the configuration was reloaded"),
                    Err(error) => tracing::warn!("{error}; nothing was changed"),
                }
                if let Some(wish) = wish {
                    let failed =
                        |error: CommandError| Failure::new(ErrorKind::Failed, error.to_string());
                    // A client that has left needs no result.
                    let _ = wish.send(result.map_err(failed));
                }
            }
        });
        Ok(reloading)
    }

    /// Applies the file's present content to the server. After an error nothing has changed.
    async fn reload(&mut self) -> Result<Value, CommandError> {
        let guard = self.controller.as_ref().map(|controller| controller.begin_opening());
        let guard = guard.transpose().map_err(|failure| CommandError::new(failure.message))?;
        let (path, reading) = (self.path.clone(), format!("reading '{}'", self.path.display()));
        let read = move |_: &_| Config::read(&path);
        let config = open_within(self.config.args.open_timeout, reading, read).await??;
        self.check_tls_only(&config)?;
        let Prepared { mut config, changes, opened } = self.prepare(config, guard.clone()).await?;
        let Changes { added, removed, mut left, .. } = changes;
        let tls_only = config.args.tls.tls_only.clone();
        if let Some(credentials) = self.tls.credentials() {
            credentials.reload().map_err(|error| CommandError::new(error.to_string()))?;
        }
        // Everything was checked, so from here on failures are only reported.
        self.note_leaving(&removed);
        let removed = self.remove_all(removed, &mut config, &mut left).await;
        let added = (added, opened.take());
        let added = self.add_all(added, guard.as_ref(), &mut config, &mut left).await;
        let exports = self.server.exports();
        for (name, entry) in exports.entries() {
            let Some(export) =
                config.configuration.exports.iter().find(|export| export.name == name)
            else {
                continue;
            };
            let entry = source::entry(&spec(export), &tls_only, entry.with_default_properties());
            if let Err(error) = exports.replace(&name, entry) {
                left.push(format!("{name}: {error}"));
            }
        }
        if let Some(first) = config.configuration.exports.first() {
            exports.set_default(first.name.clone());
        }
        for what in &left {
            let what = without_error_numbers(what.clone());
            tracing::warn!("not changed while the server runs: {what}");
        }
        if let Some(controller) = &self.controller {
            controller.set_open_timeout(config.args.open_timeout);
        }
        lock(&self.kept).clone_from(&config);
        self.config = config;
        Ok(json!({ "added": added, "removed": removed, "left": left }))
    }

    /// Finds the changes, and opens new sources. Everything that may hang is done here.
    async fn prepare(
        &self,
        mut config: Config,
        guard: Option<OpeningGuard>,
    ) -> Result<Prepared, CommandError> {
        let entries = self.server.exports().entries();
        let served: Vec<_> = entries.into_iter().map(|(name, _)| name).collect();
        let (old, is_controlled) = (self.config.clone(), self.controller.is_some());
        let leaving = self.leaving();
        let limit = config.args.open_timeout;
        let comparing = "comparing the sources of new exports with those that are served";
        let opening = Opening::begin(guard.clone());
        let opened = Arc::clone(&opening.opened);
        let prepared = open_within(limit, comparing, move |step| {
            let _until_closed = guard;
            let changes =
                old.configuration.changes_to(&mut config.configuration, LIVE, &served, &leaving)?;
            if changes.keeps_server {
                let mut args = old.args;
                args.tls.tls_only.clone_from(&config.args.tls.tls_only);
                args.open_timeout = limit;
                config.args = args;
            }
            for export in &changes.added {
                let export = spec(export);
                step.begin(source::opening(&export));
                let tls_only = &config.args.tls.tls_only;
                Opening::add(&opened, source::open_export(&export, tls_only, is_controlled)?);
            }
            Ok::<_, CommandError>((config, changes))
        });
        let (config, changes) = prepared.await??;
        Ok(Prepared { config, changes, opened: opening })
    }

    /// Remembers exports that are about to be removed.
    fn note_leaving(&mut self, removed: &[Configured]) {
        self.leaving.retain(|(_, export)| export.strong_count() > 0);
        for export in removed {
            if let Some((_, entry)) = self.server.exports().find(&export.name) {
                self.leaving.push((export.clone(), Arc::downgrade(entry.export())));
            }
        }
    }

    /// The exports that were removed and are not closed.
    fn leaving(&self) -> Vec<Configured> {
        let exports = self.server.exports();
        let is_open = |(export, open): &&(Configured, Weak<dyn Export>)| {
            // It may not have been removed after all.
            let served = exports.find(&export.name).map(|(_, entry)| Arc::clone(entry.export()));
            let is_served =
                served.is_some_and(|served| std::ptr::addr_eq(Arc::as_ptr(&served), open.as_ptr()));
            open.strong_count() > 0 && !is_served
        };
        self.leaving.iter().filter(is_open).map(|(export, _)| export.clone()).collect()
    }

    /// Refuses, like a start, `tls-only` exports on a server where TLS is not optional.
    fn check_tls_only(&self, config: &Config) -> Result<(), CommandError> {
        if config.args.tls.tls_only.is_empty() || matches!(self.tls, TlsMode::Allow(_)) {
            return Ok(());
        }
        Err(CommandError::new(
            "'tls-only' is for servers where TLS is optional, and this server was not started with \
             tls = \"allow\"; remove it, or restart the server",
        ))
    }

    /// Removes exports; returns the names of removed ones. The others stay in `config`, so that the
    /// next reload tries again.
    async fn remove_all(
        &self,
        removed: Vec<Configured>,
        config: &mut Config,
        left: &mut Vec<String>,
    ) -> Vec<String> {
        let mut names = Vec::new();
        for export in removed {
            let name = export.name.clone();
            let limit = config.args.open_timeout;
            let removed = within(limit, self.remove(&name)).await;
            let is_served =
                self.server.exports().entries().iter().any(|(served, _)| *served == name);
            let seconds = limit.as_secs_f64();
            match removed {
                Some(Ok(())) => {}
                Some(Err(why)) => left.push(format!("{name}: {why}")),
                None if is_served => left.push(format!(
                    "{name}: it is still served: after {seconds} s a request of the control socket is \
                     still being carried out"
                )),
                None => {
                    let why = "flushing it continues in the background";
                    left.push(format!("{name}: it is removed, but after {seconds} s {why}"));
                }
            }
            if is_served {
                config.configuration.exports.push(export);
            } else {
                names.push(name);
            }
        }
        names
    }

    /// Adds exports; returns the names of added ones. The others are removed from `config`, so that
    /// the next reload tries again.
    async fn add_all(
        &self,
        (added, opened): (Vec<Configured>, Vec<OpenedExport>),
        guard: Option<&OpeningGuard>,
        config: &mut Config,
        left: &mut Vec<String>,
    ) -> Vec<String> {
        let mut names = Vec::new();
        for (export, source) in added.into_iter().zip(opened) {
            let name = export.name;
            match self.add(&name, source, guard).await {
                Ok(()) => names.push(name),
                Err(why) => {
                    left.push(format!("{name}: {why}"));
                    config.configuration.exports.retain(|export| export.name != name);
                }
            }
        }
        names
    }

    async fn add(
        &self,
        name: &str,
        source: OpenedExport,
        guard: Option<&OpeningGuard>,
    ) -> Result<(), String> {
        match (source, &self.controller, guard) {
            (OpenedExport::Controlled(disk), Some(controller), Some(guard)) => {
                let added = controller.add_opened(name, guard.clone(), *disk).await;
                added.map(drop).map_err(|failure| failure.to_string())
            }
            (source, ..) => {
                let added = self.server.exports().add(name, source.entry());
                added.map_err(|error| error.to_string())
            }
        }
    }

    /// Removes an export; clients that use it keep it until they leave.
    async fn remove(&self, name: &str) -> Result<(), String> {
        match &self.controller {
            Some(controller) => {
                controller.release_export(name).await.map_err(|failure| failure.to_string())
            }
            None => {
                let removed: Option<ExportEntry> = self.server.exports().remove(name);
                // The last one to drop an image closes it, which may block.
                let closing = tasks::spawn_blocking(move || {
                    removed.map_or(Ok(()), |entry| entry.export().flush())
                });
                match closing.await {
                    Ok(Err(error)) => {
                        Err(format!("it is removed, but flushing it failed: {error}"))
                    }
                    _ => Ok(()),
                }
            }
        }
    }
}
