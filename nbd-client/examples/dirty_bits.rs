//! Prints the ranges that a dirty bitmap marks, without an async runtime:
//! `cargo run -p nbd-client --example dirty_bits -- nbd://localhost/disk monday`.

#![allow(clippy::print_stdout)]

use std::ops::Range;

use nbd_client::blocking::Client;
use nbd_client::{Connector, MetaContextName};

/// The ranges of an export that the bitmap marks as dirty, in bytes.
pub(crate) fn run(uri: &str, bitmap: &str) -> Result<Vec<Range<u64>>, Box<dyn std::error::Error>> {
    let context = MetaContextName::qemu_dirty_bitmap(bitmap)?;
    let connector = uri.parse::<Connector>()?.meta_contexts([context.clone()]);
    let client = Client::connect(&connector)?;
    let mut dirty = Vec::new();
    for extent in client.extents(&context, 0..client.info().size) {
        let extent = extent?;
        if extent.is_dirty() {
            dirty.push(extent.range());
        }
    }
    client.disconnect()?;
    Ok(dirty)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(uri), Some(bitmap)) = (arguments.next(), arguments.next()) else {
        return Err("usage: dirty_bits URI BITMAP".into());
    };
    for range in run(&uri, &bitmap)? {
        println!("{}\t{}", range.start, range.end - range.start);
    }
    Ok(())
}
