//! The output of `--help`.

pub(super) const HELP: &str = "\
Usage: qemu-nbd [OPTIONS] FILE
  or:  qemu-nbd -L [OPTIONS]
Serve a disk image over the Network Block Device protocol (nbd-cli in place of qemu-nbd)

  -h, --help                print this help
  -V, --version             print the version

Listening and access:
  -p, --port=PORT           TCP port (default 10809)
  -b, --bind=IFACE          address to listen on (default 0.0.0.0)
  -k, --socket=PATH         unix socket, by its absolute path
  -e, --shared=NUM          clients at a time (default 1; 0: any number); one more waits as long as
                            a handshake may take
  -t, --persistent          do not end when the last client has left
      --handshake-limit=N   seconds a handshake may take (default 10; 0: any time)
  -x, --export-name=NAME    name of the export (default: the empty name)
  -D, --description=TEXT    a text about the export, for people
  -v, --verbose             with --fork: keep standard error open

The disk: FILE is a path, an NBD URI, null-co:// (a disk that forgets), or json:{...}
  -f, --format=FORMAT       raw or qcow2; detected unless given
      --image-opts          FILE is a list of options of the drivers raw, qcow2, file, host_device,
                            nbd and null-co, such as driver=raw,offset=1M,file.filename=disk.img;
                            with the driver qcow2 an empty backing= leaves the backing file out,
                            and backing.driver, backing.file.filename... choose another one
  -r, --read-only           refuse writes
  -s, --snapshot            keep writes in a temporary file; the image is only read
  -l, --load-snapshot=SNAPSHOT_PARAM
                            serve an internal snapshot, for reading only: its id or name, or
                            snapshot.id=ID,snapshot.name=NAME
  -o, --offset=OFFSET       leave out that many bytes at the start
  -A, --allocation-depth    offer the metadata context qemu:allocation-depth
  -B, --bitmap=NAME         offer the metadata context qemu:dirty-bitmap:NAME
      --cache=MODE          writeback (default), writethrough, none, directsync or unsafe; with
                            writethrough and directsync every write is durable when it is done;
                            none and directsync bypass the page cache (direct I/O); with unsafe
                            flushes do nothing, and a power cut can destroy the image
  -n, --nocache             the same as --cache=none
      --aio=MODE            threads: read without io_uring; native or io_uring: with it where the
                            system has it (default)
      --discard=MODE        ignore (default) or unmap: give space back
      --detect-zeroes=MODE  off (default), on, or unmap (after --discard=unmap)

The process:
      --fork                serve in the background; returns when clients can connect
      --pid-file=PATH       write the number of the serving process to a file, and lock it
  -T, --trace=PATTERN       log to standard error; there are no single events to choose from

TLS:
      --object=TYPE,id=ID,...
                            define tls-creds-x509, tls-creds-psk, authz-simple, authz-list,
                            authz-list-file or secret
      --tls-creds=ID        nothing without TLS, with the credentials of that --object
      --tls-authz=ID        only clients whose certificate that --object allows
      --tls-hostname=NAME   with -L: the name in the server's certificate

Kernel devices (/dev/nbdX):
  -c, --connect=DEVICE      attach FILE to DEVICE instead of serving it on a socket; without -v in
                            the background
  -d, --disconnect          flush and disconnect the device that is given as FILE; a device in use
                            is refused

Others:
  -L, --list                print the exports of another server (-b, -p, -k)

Not supported, and refused: --selinux-label.
";
