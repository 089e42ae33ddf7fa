//! Changes and lists of the dirty bitmaps of an image that no server has open.
//!
//! ```
//! use imgfmt::{Access, BitmapChange, CreateOptions, Format, Image, OpenOptions, Recording};
//! use nbd_jobs::JobContext;
//! use nbd_jobs::bitmaps::{BitmapList, change_bitmaps, granularity_default};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("disk.qcow2");
//! Image::create(&path, &CreateOptions::new(Format::Qcow2, 1 << 20))?;
//! let image = Image::open(&path, &OpenOptions::new().access(Access::ReadWrite))?;
//! let (name, recording) = ("monday".to_owned(), Recording::Enabled);
//! let add = BitmapChange::Add { name, granularity: granularity_default(&image)?, recording };
//! let changes = |_: &Image| Ok::<_, Box<dyn std::error::Error>>(vec![add]);
//! change_bitmaps(&image, &*JobContext::default().observer, changes)?;
//! println!("{}", serde_json::to_string(&BitmapList::of(&image))?);
//! image.close()?;
//! # Ok(())
//! # }
//! ```

mod change;
mod list;

pub use self::change::{change_bitmaps, check_all_complete, granularity_default, merges_from};
pub use self::list::{BitmapList, ListedBitmap};
