//! Storages of tests that are only read.

/// The methods of a [`Storage`](imgfmt::Storage) that change it: they fail.
macro_rules! refuses_changes {
    () => {
        fn write_at(&self, _: HostOffset, _: &[u8], _: Durability) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn set_len(&self, _: u64) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn punch_hole(&self, _: HostOffset, _: u64) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn sync(&self) -> io::Result<()> {
            Ok(())
        }
    };
}

pub(crate) use refuses_changes;
