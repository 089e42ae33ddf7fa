//! The command line as users meet it: every test runs the built program, most of them against the
//! other NBD tools as judges. A tool that is missing is named and its tests pass, unless `CI` is
//! set.

mod bitmap;
mod encrypted;
mod encrypted_create;
mod encrypted_existing;
mod support;

mod backup_after_kill;
mod backup_chain;
mod backup_checkpoint;
mod backup_encrypted;
#[cfg(feature = "object-storage")]
mod backup_from_qemu;
mod backup_identity;
mod backup_interrupted;
mod backup_killed;
mod backup_refused;
mod backup_resume;
mod backup_sums;
mod backup_tls;
mod bad_input;
mod bench;
mod bench_verify;
mod bitmaps_beside_qemu;
mod bitmaps_kept;
mod block_devices;
mod checkpoint_cut_off;
mod checksum;
mod client_tls;
mod completions;
mod control_bitmaps;
mod control_socket;
mod control_stream;
mod control_stream_beside;
mod convert_bitmaps;
mod copy_bad_servers;
mod copy_block_sizes;
mod copy_checksum;
mod copy_holes;
mod copy_peers;
mod copy_progress;
mod copy_sparse;
mod copy_streams;
mod devices;
mod full_disk;
mod help;
mod help_snapshot;
mod image_amend;
mod image_backing_on_server;
mod image_bad_input;
mod image_change;
mod image_circular_chains;
mod image_convert;
mod image_convert_existing;
mod image_convert_nbd;
mod image_convert_output;
mod image_create;
mod image_foreign_formats;
mod image_graph;
mod image_in_use;
mod image_info_details;
mod image_json;
mod image_key;
mod image_long_chains;
mod image_look;
mod image_map_depth;
mod image_on_server;
mod image_options;
mod image_other_formats_made;
mod image_qemu_names;
mod image_stream;
mod image_tls;
mod info_can;
mod info_json;
mod info_list;
mod info_old_servers;
mod info_text;
mod jobs_examples;
mod key_files;
mod list_meta;
mod man_pages;
mod map_chart;
mod map_depth;
mod map_output;
mod map_svg;
mod metrics;
#[cfg(feature = "mount")]
mod mount;
#[cfg(feature = "mount")]
mod mount_files;
mod new_files;
#[cfg(feature = "object-storage")]
mod objects;
mod qemu_img_bench;
mod qemu_img_beside;
mod qemu_img_convert;
mod qemu_img_details;
mod qemu_img_encrypted;
mod qemu_img_export;
mod qemu_img_formats;
mod qemu_img_in_use;
mod qemu_img_parts;
mod qemu_img_tls;
mod qemu_nbd_backing;
mod qemu_nbd_beside;
mod qemu_nbd_chain;
mod qemu_nbd_daemon;
mod qemu_nbd_image;
mod qemu_nbd_tls;
#[cfg(feature = "object-storage")]
mod rbd;
mod readme;
#[cfg(feature = "object-storage")]
mod real_store;
mod reconnect;
#[cfg(feature = "object-storage")]
mod repository;
#[cfg(feature = "object-storage")]
mod repository_export;
#[cfg(feature = "object-storage")]
mod repository_failed;
#[cfg(feature = "object-storage")]
mod repository_import;
#[cfg(feature = "object-storage")]
mod repository_names;
#[cfg(feature = "object-storage")]
mod repository_several;
mod serve_access;
mod serve_bitmaps_survive;
mod serve_cache;
mod serve_cache_killed;
mod serve_config;
mod serve_exports;
mod serve_fio;
mod serve_fork;
mod serve_hanging_layers;
mod serve_hanging_sources;
mod serve_holes;
mod serve_limits;
mod serve_listen;
mod serve_log;
mod serve_nbdcopy;
mod serve_nbdinfo;
mod serve_nbdsh;
#[cfg(feature = "mount")]
mod serve_power_cut;
mod serve_qcow2;
mod serve_qemu_img;
mod serve_qemu_io;
mod serve_qemu_names;
mod serve_read_only;
mod serve_run;
mod serve_service;
mod serve_signals;
mod serve_snapshot;
mod serve_systemd;
mod serve_temporary;
mod serve_tls_psk;
mod serve_tls_x509;
mod serve_trust;
mod serve_upstream;
mod signals;
mod status_page;
#[cfg(feature = "object-storage")]
mod stream_from_backup;
mod takeover;
mod takeover_disks;
mod timeout;
mod tls_authority;
mod tls_key_password;
mod top;
mod verbose;
mod words;
