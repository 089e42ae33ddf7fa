# Uses the program as its packages install it below $1, in a bare Debian root.
set -eux
stop() { pid=$(cat "$1"); kill "$pid"; while kill -0 "$pid" 2> /dev/null; do sleep 0.1; done; }
test "$(command -v nbd-cli)" = "$1/bin/nbd-cli"
nbd-cli --version

cd /root
nbd-cli image create --format qcow2 disk.qcow2 16M
nbd-cli image check disk.qcow2
nbd-cli serve --socket /tmp/disk.sock --fork --pid-file /tmp/disk.pid disk.qcow2
uri='nbd+unix:///?socket=/tmp/disk.sock'
test "$(nbd-cli info --size "$uri")" = 16777216
echo content > content
nbd-cli copy content content.img
truncate -s 16M content.img
nbd-cli copy content.img "$uri"
nbd-cli copy "$uri" copy.img
cmp content.img copy.img
stop /tmp/disk.pid

# In place of QEMU's tools.
PATH="$1/lib/nbd-cli:$PATH"
test "$(command -v qemu-nbd)" = "$1/lib/nbd-cli/qemu-nbd"
qemu-img info --output=json disk.qcow2 | grep '"virtual-size": 16777216'
qemu-nbd --persistent --fork --pid-file=/tmp/qemu.pid --socket=/tmp/qemu.sock --format=qcow2 disk.qcow2
nbd-cli copy 'nbd+unix:///?socket=/tmp/qemu.sock' again.img
cmp content.img again.img
stop /tmp/qemu.pid

# Manual pages, completions, unit files and documents.
man nbd-cli-serve | grep -i 'export disk images'
bash -ec ". $1/share/bash-completion/completions/nbd-cli; complete -p nbd-cli"
test -s "$1/share/doc/nbd-cli/docs/serve.md"
unit="$1/lib/systemd/system/nbd-cli@.service"
test -z "$(systemd-analyze verify "$unit" "${unit%.service}.socket" 2>&1)"
