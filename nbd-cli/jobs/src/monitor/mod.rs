//! Watching a running server: metrics for Prometheus and a status page, over HTTP.
//!
//! It runs on a thread of its own, apart from those that serve disks, and only reads.

mod address;
mod disk_map;
mod error;
mod http;
mod listener;
mod page;
mod prometheus;

use std::sync::Arc;

use nbd_server::ServerHandle;

pub use self::address::MetricsAddress;
use self::disk_map::DiskMaps;
pub use self::error::MonitorError;
use self::http::Site;
use self::listener::MonitorListener;

use crate::tasks;

/// The socket of the monitor, before it answers.
pub struct Monitor {
    listener: MonitorListener,
}

/// A monitor that answers until this is dropped, and holds the exports until then: drop it before
/// the images have to be closed.
pub struct RunningMonitor {
    maps: DiskMaps,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Monitor {
    /// Listens on `address`.
    ///
    /// # Errors
    ///
    /// If the address is in use or not permitted.
    pub fn open(address: &MetricsAddress) -> Result<Self, MonitorError> {
        Ok(Self { listener: MonitorListener::open(address)? })
    }

    /// Returns the address that clients use, and whether other machines can reach it.
    pub fn address(&self) -> (String, bool) {
        (self.listener.to_string(), self.listener.is_public())
    }

    /// Starts to answer requests about `server`.
    ///
    /// # Errors
    ///
    /// If the system has no thread for it.
    pub fn start(self, server: ServerHandle) -> Result<RunningMonitor, MonitorError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(MonitorError::Thread)?;
        let maps = DiskMaps::default();
        let site = Arc::new(Site::new(server, maps.clone(), self.listener.host()));
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let serve = move || {
            tasks::block_on(&runtime, async {
                tokio::select! {
                    () = self.listener.serve(site) => {}
                    // An error means that the owner has dropped it.
                    _ = stopped => {}
                }
            });
            // Walks over disks end at their next step.
            runtime.shutdown_background();
        };
        let thread = tasks::start_thread("nbd-monitor", serve).map_err(MonitorError::Thread)?;
        Ok(RunningMonitor { maps, stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for RunningMonitor {
    fn drop(&mut self) {
        self.maps.close();
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It only ends early by a defect, which has been reported.
            let _ = thread.join();
        }
    }
}
