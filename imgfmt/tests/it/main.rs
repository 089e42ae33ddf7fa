//! The tests of images, in one program: a file is a module, named after what it guards. The seed
//! and the rounds of random tests come from the environment (see `common`).
#![allow(clippy::unwrap_used, clippy::print_stdout)] // A test may fail, and says what it skips.

// What the test programs of this crate share.
#[path = "../common/mod.rs"]
mod common;
#[path = "../damage/mod.rs"]
mod damage;
#[path = "../damaged/mod.rs"]
mod damaged;
#[path = "../judge/mod.rs"]
mod judge;
#[path = "../structure/mod.rs"]
mod structure;
#[path = "../survival/mod.rs"]
mod survival;
// What they share with the fuzz targets.
#[path = "../../fuzz/src/bodies.rs"]
#[allow(clippy::expect_used)]
mod bodies;

mod amend_kinds;
mod archives;
mod backing_ignored;
mod backup_identity;
mod bad_paths;
mod bitmap_commands_vs_qemu;
mod bitmaps_began_after;
mod bitmaps_frozen;
mod bitmaps_frozen_beside_qemu;
mod bitmaps_resized;
mod bitmaps_survive;
mod bitmaps_survive_restart;
mod bitmaps_survive_sigkill;
mod bitmaps_that_alias;
mod bitmaps_vs_qemu;
mod block_device;
mod chains_vs_qemu;
mod check_vs_qemu;
mod circular_chains;
mod closing;
mod contradicting_features;
mod crash_at_any_instant;
mod crash_at_every_step;
mod crash_in_changes_of_structure;
mod crash_of_bitmaps;
mod crash_with_sidecar;
mod direct_io;
mod direct_io_of_images;
mod encrypted_create;
mod entries_that_alias;
mod errors_at_every_call;
mod examples;
mod extended_files;
mod extents;
mod formats_by_hand;
mod formats_damaged;
mod formats_large;
mod formats_vhdx;
mod formats_vmdk;
mod formats_vmdk_written;
mod formats_vs_qemu;
mod formats_written;
mod full_disk;
mod full_disk_bitmaps;
mod fuzz_corpus;
mod holes;
mod holes_in_blocks;
mod jobs;
mod jobs_compare;
mod jobs_salvage;
mod large_disks;
mod late_io;
mod locks;
mod long_chains;
mod luks_faults;
mod luks_keys;
mod luks_vs_peers;
mod malformed_headers;
mod malformed_resize;
mod malformed_snapshots;
mod malformed_tables;
mod malformed_writes;
mod model_of_every_kind;
mod over_marking;
mod qcow2_amend;
mod qcow2_bad_images;
mod qcow2_check;
mod qcow2_compress;
mod qcow2_corrupt_bit;
mod qcow2_create;
mod qcow2_data_file;
mod qcow2_encrypted;
mod qcow2_old_aes;
mod qcow2_read;
mod qcow2_snapshots;
mod qcow2_write;
mod qcow2_write_at_once;
mod raw_file;
mod raw_model;
mod raw_probed;
mod refcounts_that_lie;
mod repair_interrupted;
mod repair_keeps_data;
mod sidecar_locked;
mod stream_beside_qemu;
mod stream_in_place;
mod stream_order;
mod sync_that_fails_elsewhere;
mod sync_that_loses_writes;
mod syncing;
mod unfinished;
mod write_map;
mod zeroes_vs_qemu;

use bodies::handmade;
