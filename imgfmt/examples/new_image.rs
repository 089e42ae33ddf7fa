//! Makes a qcow2 image, writes to it and checks it:
//! `cargo run -p imgfmt --example new_image -- disk.qcow2`.

#![allow(clippy::print_stdout)]

use std::path::Path;

use imgfmt::{
    CheckReport, CreateOptions, Durability, Format, GuestOffset, Image, OpenOptions, Repair,
};

/// Makes an image of 1 GiB with a greeting at 1 MiB, and checks it.
pub(crate) fn run(path: &Path) -> imgfmt::Result<CheckReport> {
    let disk = Image::create(path, &CreateOptions::new(Format::Qcow2, 1 << 30))?;
    disk.write_at(GuestOffset::new(1 << 20), b"hello", Durability::Cached)?;
    disk.close()?;
    Image::check_file(path, &OpenOptions::new(), Repair::None)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args_os().nth(1).ok_or("usage: new_image FILE")?;
    let report = run(path.as_ref())?;
    println!(
        "{} of {} clusters allocated, {} leaks, {} corruptions",
        report.allocated_clusters, report.total_clusters, report.leaks, report.corruptions
    );
    Ok(())
}
