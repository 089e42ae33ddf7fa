//! The command line as users meet it: every test runs the built program, most of them against the
//! other NBD tools as judges. A tool that is missing is named and its tests pass, unless `CI` is
//! set.

mod support;

mod backup_chain;
mod backup_refused;
mod backup_resume;
mod bad_input;
mod completions;
mod copy_bad_servers;
mod copy_block_sizes;
mod copy_peers;
mod copy_progress;
mod copy_sparse;
mod copy_streams;
mod help;
mod image_bad_input;
mod image_change;
mod image_convert;
mod image_create;
mod image_look;
mod info_can;
mod info_json;
mod info_list;
mod info_old_servers;
mod info_text;
mod list_meta;
mod map_depth;
mod map_output;
mod map_picture;
mod serve_exports;
mod serve_fio;
mod serve_limits;
mod serve_nbdcopy;
mod serve_nbdinfo;
mod serve_nbdsh;
mod serve_qcow2;
mod serve_qemu_img;
mod serve_qemu_io;
mod serve_read_only;
mod serve_run;
mod serve_signals;
mod serve_snapshot;
mod serve_systemd;
mod serve_temporary;
