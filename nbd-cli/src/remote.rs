//! Exports of NBD servers as storage of images or layers.

use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;

use imgfmt::{BackingFile, BackingOptions, NameTarget, OpenPolicy};
use nbd_client::{Connector, ExportStorage, LocalFiles};
use nbd_jobs::qemu_name::{BackingInName, JSON_SCHEME, NameInImage, SCHEMES, from_name_in_image};
use nbd_proto::NbdUri;

use crate::async_runtime::runtime;
use crate::connect::{ServerArgs, explain_unknown_export};
use crate::error::CommandError;
use crate::signals;

/// Connections to a server that allows several.
const CONNECTIONS: NonZeroUsize = NonZeroUsize::new(4).expect("it is not zero");

/// Allows images to name exports as their backing or data files.
pub(crate) fn allow_exports(policy: OpenPolicy, server: &ServerArgs) -> OpenPolicy {
    SCHEMES.iter().chain([&JSON_SCHEME]).fold(policy, |policy, scheme| {
        let server = server.clone();
        let reader = move |name: &str| {
            let (name, backing) = from_name_in_image(name).map_err(io::Error::other)?;
            let target = |name| target_in_image(name, &server);
            Ok(above(target(name)?, backing_file(backing, &target)?))
        };
        policy.read_scheme(*scheme, Arc::new(reader))
    })
}

/// Allows images to name files by the options of QEMU's driver `file` if the policy allows the
/// file.
pub(crate) fn allow_json_files(policy: OpenPolicy) -> OpenPolicy {
    let reader = |name: &str| {
        let (name, backing) = from_name_in_image(name).map_err(io::Error::other)?;
        let target = |name| {
            io::Result::Ok(match name {
                NameInImage::File(path) => NameTarget::File(path),
                NameInImage::Export(_) => NameTarget::Denied,
            })
        };
        Ok(above(target(name)?, backing_file(backing, &target)?))
    };
    policy.read_scheme(JSON_SCHEME, Arc::new(reader))
}

fn above(target: NameTarget, backing: BackingFile) -> NameTarget {
    match backing {
        BackingFile::AsNamed => target,
        backing => NameTarget::WithBacking(Box::new(target), backing),
    }
}

/// Opens what an image names.
fn target_in_image(name: NameInImage, server: &ServerArgs) -> io::Result<NameTarget> {
    let uri = match name {
        NameInImage::File(path) => return Ok(NameTarget::File(path)),
        NameInImage::Export(uri) => uri,
    };
    let storage = open_named_by_image(&uri, server);
    let storage = storage.map_err(|error| io::Error::other(error.to_string()))?;
    Ok(NameTarget::Storage(Arc::new(storage)))
}

/// Returns the backing file that a name gives; `target` opens the exports in it.
pub(crate) fn backing_file<E>(
    backing: BackingInName,
    target: &impl Fn(NameInImage) -> Result<NameTarget, E>,
) -> Result<BackingFile, E> {
    let given = match backing {
        BackingInName::AsNamed => return Ok(BackingFile::AsNamed),
        BackingInName::Ignored => return Ok(BackingFile::Ignored),
        BackingInName::Given(given) => given,
    };
    let mut options = BackingOptions::default();
    options.target = given.name.map(target).transpose()?;
    options.format = given.format.known();
    options.backing = backing_file(given.backing, target)?;
    Ok(BackingFile::Given(Box::new(options)))
}

/// Connects to an export that an image names.
pub(crate) fn open_named_by_image(
    uri: &NbdUri,
    server: &ServerArgs,
) -> Result<ExportStorage, CommandError> {
    // The image contains this URI: it must not choose local files to read.
    let connector = server.connector(uri).local_files(LocalFiles::Refused);
    open_export(connector)
}

/// Connects to an export; a signal interrupts this and all later requests. Blocks, so asynchronous
/// tasks must not call it.
pub(crate) fn open_export(connector: Connector) -> Result<ExportStorage, CommandError> {
    let connector = connector.connections(CONNECTIONS);
    ExportStorage::open_interruptible(&connector, signals::interrupter()).or_else(|error| {
        // Also if the thread itself drives tasks of another runtime, as in `restore`.
        tokio::task::block_in_place(|| {
            let explained = explain_unknown_export(&connector, connector.uri(), error);
            Err(runtime()?.block_on(explained))
        })
    })
}
