//! The list of the exports, with their bitmaps, and of the clients.

use std::sync::Arc;
use std::time::SystemTime;

use nbd_proto::wire::TransmissionFlags;
use nbd_server::ClientStatistics;
use nbd_server::export::ImageExport;
use serde_json::Value;
use tokio::sync::Mutex;

use super::bitmaps;
use super::controller::{Controller, blocking};
use super::disks::ServedDisk;
use super::streaming::Streaming;
use crate::control::{ClientState, ExportState, Failure, Listing, Traffic};
use crate::opening::within;
use crate::tasks;

impl Controller {
    /// Looks at the bitmaps and the identities of all disks that have any, beside each other. What
    /// hangs is left out.
    async fn look(&self) -> Result<Vec<(String, Look)>, Failure> {
        let disks = self.disks.lock().await;
        disks.refuse_if_suspended()?;
        let looked = disks.disks.iter().filter_map(|(name, disk)| {
            Some((name.clone(), disk.image.clone()?, Arc::clone(&disk.look)))
        });
        let looked: Vec<_> = looked.collect();
        drop(disks);
        let mut found = Vec::with_capacity(looked.len());
        let all = tasks::all_at_once(looked.into_iter().map(look_at), |look| found.push(look));
        within(self.time_to_look, all).await;
        found.into_iter().collect()
    }

    /// Describes the exports and the clients.
    ///
    /// # Errors
    ///
    /// If the disks were given away, or one that was looked at has failed.
    pub(super) async fn list(&self) -> Result<Listing, Failure> {
        let mut looks = self.look().await?;
        let disks = self.disks.lock().await;
        let statistics = self.server.statistics();
        let mut exports = Vec::new();
        for (name, entry) in self.server.exports().entries() {
            let (info, done) = (entry.export().info(), entry.statistics());
            let disk = disks.get(&name).ok();
            let look = looks.iter_mut().find(|(looked, _)| *looked == name);
            let look = look.map(|(_, look)| std::mem::take(look));
            let hangs = look.is_none() && disk.is_some_and(|disk| disk.image.is_some());
            let (bitmaps, id) = look.unwrap_or_default();
            exports.push(ExportState {
                size: info.size,
                read_only: info.flags.contains(TransmissionFlags::READ_ONLY),
                clients: self.server.users_of(&entry),
                since: Some(seconds(done.since)),
                traffic: Traffic::new(&done.requests, done.in_flight),
                source: disk.map(|disk| disk.source.clone()),
                bitmaps,
                problem: hangs.then(|| HANGS.to_owned()),
                disk: id,
                checkpoint: disk.and_then(ServedDisk::describe_checkpoint),
                stream: disk.and_then(|disk| disk.streaming.as_ref()).map(Streaming::state),
                name,
            });
        }
        let clients = statistics.clients.into_iter().map(
            |ClientStatistics { client, requests, in_flight, .. }| ClientState {
                id: client.id,
                address: Some(client.to_string()),
                peer: client.peer,
                export: client.export,
                since: seconds(client.since),
                traffic: Traffic::new(&requests, in_flight),
            },
        );
        let since = statistics.since.map(seconds);
        Ok(Listing { since, exports, clients: clients.collect() })
    }
}

/// The bitmaps of a disk, and its UUID.
type Look = (Vec<Value>, Option<String>);

/// Looks at a disk of that name.
async fn look_at(
    (name, image, turn): (String, Arc<ImageExport>, Arc<Mutex<()>>),
) -> Result<(String, Look), Failure> {
    // Not more than one thread hangs for each.
    let guard = turn.lock_owned().await;
    let look = move || {
        let _guard = guard;
        let id = image.image().disk_id().map(|id| id.to_string());
        (bitmaps::list(&image), id)
    };
    Ok((name, blocking(look).await?))
}

/// Why bitmaps are not listed.
const HANGS: &str = "its bitmaps are not listed, because what the disk is on does not answer, or a request about \
     them takes long";

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use imgfmt::{CreateOptions, Format, Image};
    use nbd_server::{ExportRegistry, Server, ServerConfig};
    use tokio::task::yield_now;
    use tokio::time::timeout;

    use super::super::disks::ServedDisks;
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_disk_that_hangs_keeps_no_other_from_being_looked_at() {
        let directory = tempfile::tempdir().unwrap();
        let server = Server::new(ServerConfig::default(), ExportRegistry::new()).start();
        let mut controller = Controller::new(server.handle().clone(), ServedDisks::default());
        // Without an end.
        controller.time_to_look = Duration::ZERO;
        let (mut images, mut hanging) = (Vec::new(), Vec::new());
        for name in ["a", "b"] {
            let new = CreateOptions::new(Format::Qcow2, 1 << 20);
            let image = Image::create(directory.path().join(name), &new).unwrap();
            let image = Arc::new(ImageExport::new(image));
            let disk = ServedDisk::of_image(name, Arc::clone(&image));
            // As a look does that hangs.
            hanging.push(Arc::clone(&disk.look).lock_owned().await);
            controller.add_export(name, disk).await.unwrap();
            images.push(image);
        }
        let idle = Arc::strong_count(&images[1]);
        let controller = Arc::new(controller);
        let lists = Arc::clone(&controller);
        let list = tokio::spawn(async move { lists.list().await });
        let until = async |is_looked_at: bool| {
            let seen = async {
                while (Arc::strong_count(&images[1]) > idle) != is_looked_at {
                    yield_now().await;
                }
            };
            timeout(Duration::from_secs(60), seen).await.expect("it does not wait for 'a'");
        };
        until(true).await;
        drop(hanging.pop());
        until(false).await;
        drop(hanging);
        let listed = list.await.unwrap().unwrap();
        assert!(listed.exports.iter().all(|export| export.problem.is_none()), "{listed:?}");
        // What hangs is left out in the end.
        let mut controller = Arc::into_inner(controller).unwrap();
        controller.time_to_look = Duration::from_millis(1);
        let look = Arc::clone(&controller.disks.lock().await.disks["a"].look);
        let _hanging = look.lock_owned().await;
        let listed = controller.list().await.unwrap();
        let problem = |name: &str| {
            let export = listed.exports.iter().find(|export| export.name == name).unwrap();
            export.problem.clone()
        };
        assert_eq!(problem("a").as_deref(), Some(HANGS));
    }
}
