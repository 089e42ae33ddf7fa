# A Ceph of one monitor, one OSD and one gateway, in the current directory, until the standard input
# ends. Says "ready" when there are the bucket `bucket` and the pool `rbd`.
set -eu
tree=$1 modules=$2 monitor=$3 old_monitor=$4 gateway=$5
here=$PWD
daemons=
# However this ends.
trap 'exec 3>&-; kill -KILL $daemons 2>/dev/null; wait; cd /; rm -rf "$here"' EXIT
trap 'exit 1' INT TERM HUP
exec 3>&1 >start.log 2>&1

libraries=$tree/usr/lib/$(uname -m)-linux-gnu
path=$libraries:$libraries/ceph:$tree/lib/$(uname -m)-linux-gnu
environment="LD_LIBRARY_PATH='$path' CEPH_CONF='$here/ceph.conf'
    PYTHONPATH='$tree/usr/lib/python3/dist-packages' QEMU_MODULE_DIR='$modules' HOME='$here'"
cat >ceph.conf <<END
[global]
fsid = $(cat /proc/sys/kernel/random/uuid)
mon_host = [v2:127.0.0.1:$monitor,v1:127.0.0.1:$old_monitor]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
# The gateway wants others, which take keys.
ms_mon_client_mode = crc
keyring = $here/keyring
run_dir = $here
admin_socket =
log_file = $here/\$name.log
crash_dir = $here
plugin_dir = $libraries/ceph
erasure_code_dir = $libraries/ceph/erasure-code
osd_class_dir = $libraries/rados-classes
mon_data = $here/mon
osd_data = $here/osd
mon_cluster_log_to_file = false
mon_data_avail_crit = 1
mon_data_avail_warn = 1
mon_allow_pool_size_one = true
osd_objectstore = bluestore
bluestore_block_size = 10737418240
osd_memory_target = 939524096
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
rgw_data = $here/gateway
# Without the last one, small replies wait for 40 ms.
rgw_frontends = beast endpoint=127.0.0.1:$gateway tcp_nodelay=1
[client]
log_file =
END

# The programs of clients, with what they need.
mkdir bin
for program in ceph ceph-authtool ceph-mon ceph-osd monmaptool qemu-nbd radosgw radosgw-admin rbd; do
    path=$tree/usr/bin/$program
    test -x "$path" || path=$(command -v "$program")
    printf '#!/bin/sh\nexport %s\nexec %s "$@"\n' "$(echo $environment)" "'$path'" >"bin/$program"
    chmod +x "bin/$program"
done
PATH=$here/bin:$PATH

fsid=$(sed -n 's/^fsid = //p' ceph.conf)
monmaptool --create --fsid "$fsid" \
    --addv a "[v2:127.0.0.1:$monitor,v1:127.0.0.1:$old_monitor]" monmap
ceph-mon --mkfs -i a --monmap monmap
ceph-mon -f -i a </dev/null 3>&- &
daemons=$!
identity=$(cat /proc/sys/kernel/random/uuid)
ceph --connect-timeout 60 osd new "$identity"
mkdir osd
ceph-osd --mkfs -i 0 --osd-uuid "$identity"
ceph-osd -f -i 0 </dev/null 3>&- &
daemons="$daemons $!"
ceph osd pool create rbd 8
rbd pool init rbd
radosgw-admin user create --uid=tests --display-name=tests \
    --access-key="$AWS_ACCESS_KEY_ID" --secret="$AWS_SECRET_ACCESS_KEY"
radosgw -f -n client.admin --log-file="$here/gateway.log" </dev/null 3>&- &
daemons="$daemons $!"
/usr/bin/python3 - "$gateway" <<'END'
import base64, email.utils, hmac, http.client, os, sys, time

date = email.utils.formatdate(usegmt=True)
key, secret = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
text = f"PUT\n\n\n{date}\n/bucket"
signature = base64.b64encode(hmac.digest(secret.encode(), text.encode(), "sha1")).decode()
while True:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
        headers = {"Date": date, "Authorization": f"AWS {key}:{signature}"}
        connection.request("PUT", "/bucket", headers=headers)
        reply = connection.getresponse()
        break
    except ConnectionError:
        time.sleep(0.1)
if reply.status != 200:
    sys.exit(f"no bucket: {reply.status}: {reply.read()}")
END
echo ready >&3
cat >/dev/null
