//! Where the bytes come from.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use imgfmt::storage::{FileIdentity, FileStorage};
use imgfmt::{Access, HostOffset, Locking, Storage as _};
use nbd_client::{Client, Connector};
use nbd_proto::NbdUri;
use nbd_proto::wire::MetaContextName;

use super::CopyArgs;
use super::location::Location;
use super::plan::Extents;
use crate::connect::{connect, failed};
use crate::error::CommandError;

/// An open source.
pub(super) enum Source {
    Nbd {
        client: Client,
        uri: NbdUri,
    },
    File {
        storage: Arc<FileStorage>,
        path: PathBuf,
        size: u64,
    },
    /// Standard input: read once, front to back, of unknown size.
    Standard,
    Null,
}

impl Source {
    pub(super) async fn open(location: &Location, args: &CopyArgs) -> Result<Self, CommandError> {
        match location {
            Location::Nbd(uri) => {
                let mut connector = Connector::new(uri.clone()).connections(args.connections);
                if !args.no_extents {
                    connector = connector.meta_contexts([MetaContextName::base_allocation()]);
                }
                let client = connect(&connector, uri).await?;
                Ok(Self::Nbd { client, uri: uri.clone() })
            }
            Location::File(path) => {
                let storage = FileStorage::open(path, Access::ReadOnly, Locking::On)?;
                let size = storage.len().map_err(|error| read_error(path, 0, &error))?;
                Ok(Self::File { storage: Arc::new(storage), path: path.clone(), size })
            }
            Location::Standard => Ok(Self::Standard),
            Location::Null => Ok(Self::Null),
        }
    }

    /// The size in bytes, if it is known beforehand.
    pub(super) fn size(&self) -> Option<u64> {
        match self {
            Self::Nbd { client, .. } => Some(client.info().size),
            Self::File { size, .. } => Some(*size),
            Self::Standard => None,
            Self::Null => Some(0),
        }
    }

    /// The file behind the source, if it is one.
    pub(super) fn identity(&self) -> Option<FileIdentity> {
        match self {
            Self::File { storage, .. } => storage.identity(),
            _ => None,
        }
    }

    /// Requests must be aligned to this power of two.
    pub(super) fn alignment(&self) -> u64 {
        match self {
            Self::Nbd { client, .. } => {
                client.info().block_sizes.map_or(1, |sizes| u64::from(sizes.minimum()))
            }
            _ => 1,
        }
    }

    /// What is known about holes.
    pub(super) fn extents(&self, args: &CopyArgs) -> Extents {
        match self {
            _ if args.no_extents => Extents::Unknown,
            Self::Nbd { client, .. } => {
                let context = MetaContextName::base_allocation();
                if client.meta_contexts().contains(&context) {
                    Extents::Server(client.extents(&context, 0..client.info().size))
                } else {
                    Extents::Unknown
                }
            }
            Self::File { storage, .. } => Extents::File(storage.clone()),
            Self::Standard | Self::Null => Extents::Unknown,
        }
    }

    /// Reads a part of the disk, into memory that is left over from an earlier part.
    pub(super) async fn read(
        &self,
        offset: u64,
        length: u64,
        mut buffer: BytesMut,
    ) -> Result<Bytes, CommandError> {
        // Lengths are at most the request size.
        let length = length as usize;
        match self {
            Self::Nbd { client, uri } => {
                let read = client.read_reusing(offset, length, buffer).await;
                read.map_err(|error| failed(uri, "read from", &error))
            }
            Self::File { storage, path, .. } => {
                let storage = storage.clone();
                let reading = tokio::task::spawn_blocking(move || {
                    buffer.resize(length, 0);
                    let read = storage.read_exact_at(HostOffset::new(offset), &mut buffer);
                    read.map(|()| buffer.freeze())
                });
                match reading.await {
                    Ok(read) => read.map_err(|error| read_error(path, offset, &error)),
                    Err(error) => Err(CommandError::new(format!("a read was given up: {error}"))),
                }
            }
            Self::Standard | Self::Null => {
                Err(CommandError::new("this source cannot be read at an offset"))
            }
        }
    }

    /// Ends the connection.
    pub(super) async fn close(&self) {
        if let Self::Nbd { client, .. } = self {
            // Everything was read; how the connection ends does not matter.
            let _ = client.clone().disconnect().await;
        }
    }
}

fn read_error(path: &Path, offset: u64, error: &std::io::Error) -> CommandError {
    let why = match error.kind() {
        std::io::ErrorKind::UnexpectedEof => "the file has become shorter".to_owned(),
        _ => error.to_string(),
    };
    CommandError::new(format!("cannot read '{}' at offset {offset}: {why}", path.display()))
}
