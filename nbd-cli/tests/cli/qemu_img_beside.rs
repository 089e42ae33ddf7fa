//! The qemu-img form beside QEMU's own, case by case; and what it does not do.

use std::process::Command;

use crate::support::qemu_img::{compare_all, ours, words};
use crate::support::{PROGRAM, Server, run};
use crate::tools;

#[test]
fn images_are_described_alike() {
    compare_all(
        "
        info disk.qcow2
        info raw.img
        info odd.img
        info old.qcow2
        info top.qcow2
        info longer.qcow2
        info snap.qcow2
        info bitmaps.qcow2
        info data.qcow2
        info sub.qcow2
        info packed.qcow2
        info orphan.qcow2
        info sub/up.qcow2
        info -f qcow2 disk.qcow2
        info -f raw disk.qcow2
        info -U disk.qcow2
        info --backing-chain top.qcow2
        info --backing-chain sub/up.qcow2
        info --backing-chain orphan.qcow2
        info --output=json disk.qcow2
        info --output=json raw.img
        info --output=json odd.img
        info --output json top.qcow2
        info --output=json snap.qcow2
        info --output=json bitmaps.qcow2
        info --output=json data.qcow2
        info --output=json sub.qcow2
        info --output=json sub/up.qcow2
        info --output=json --backing-chain top.qcow2
        info --output=json --backing-chain disk.qcow2
        info --output=json -U --force-share raw.img
        info --output=json --image-opts driver=qcow2,file.filename=disk.qcow2
        info --output=human disk.qcow2
        info --image-opts driver=raw,file.driver=file,file.filename=raw.img
        info --object secret,id=s,data=x disk.qcow2
        info --output=xml disk.qcow2
        info nosuch.img
        info
        info disk.qcow2 raw.img
        info --nosuch disk.qcow2
        info -f nosuch disk.qcow2
        info -f qcow2 raw.img
        info -f
        nosuch
        map disk.qcow2
        map top.qcow2
        map longer.qcow2
        map raw.img
        map -f raw raw.img
        map odd.img
        map --output=json odd.img
        map --output=json -s 512 odd.img
        map packed.qcow2
        map snap.qcow2
        map --output=json disk.qcow2
        map --output=json raw.img
        map --output=json top.qcow2
        map --output=json longer.qcow2
        map --output=json packed.qcow2
        map --output=json old.qcow2
        info --output=json old.qcow2
        map --output=json sub/up.qcow2
        map --output=json -s 64k -l 128k top.qcow2
        map --start-offset=100k --max-length=10k raw.img
        map --output=json -s 0x10000 disk.qcow2
        map --output=json --image-opts driver=qcow2,file.filename=disk.qcow2
        map --output=json -s 2M disk.qcow2
        map --output=json -l 0 disk.qcow2
        map -s 2M disk.qcow2
        map sparse.vmdk
        map --output=json sparse.vmdk
        info a.luks
        info locked.qcow2
        info --output=json a.luks
        info --output=json locked.qcow2
        check a.luks
        check locked.qcow2
        check --object secret,id=s,data=x --image-opts file.filename=locked.qcow2,encrypt.key-secret=s
        compare --object secret,id=s,data=x --image-opts file.filename=a.luks,key-secret=s driver=raw,file.filename=empty.img
        map -s x disk.qcow2
        map nosuch.img
        map
        check disk.qcow2
        check raw.img
        check -f raw disk.qcow2
        check -q disk.qcow2
        check old.qcow2
        check snap.qcow2
        check packed.qcow2
        check bitmaps.qcow2
        check sub.qcow2
        check -U disk.qcow2
        check -T none disk.qcow2
        check -r all disk.qcow2
        check -r leaks disk.qcow2
        check --output=json disk.qcow2
        check --output=json packed.qcow2
        check --output=json -r all snap.qcow2
        check --output=json raw.img
        check -r nosuch disk.qcow2
        check -U -r all disk.qcow2
        check -T nosuch disk.qcow2
        check nosuch.img
        check
        ",
    );
}

#[test]
fn disks_are_compared_and_measured_alike() {
    compare_all(
        "
        compare disk.qcow2 disk.qcow2
        compare disk.qcow2 raw.img
        compare disk.qcow2 packed.qcow2
        compare packed.qcow2 disk.qcow2 -p
        compare -q disk.qcow2 raw.img
        compare empty.img big.img
        compare -s empty.img big.img
        compare raw.img longer.qcow2
        compare longer.qcow2 raw.img
        compare disk.qcow2 top.qcow2
        compare disk.qcow2 big.img
        compare raw.img big.img
        compare -f raw -F raw empty.img big.img
        compare -f raw -F qcow2 raw.img top.qcow2
        compare -U -T none disk.qcow2 disk.qcow2
        compare --image-opts driver=raw,file.filename=raw.img driver=raw,file.filename=empty.img
        compare disk.qcow2
        compare disk.qcow2 nosuch.img
        compare --nosuch disk.qcow2 raw.img
        compare -f nosuch disk.qcow2 raw.img
        compare -T nosuch disk.qcow2 raw.img
        measure raw.img
        measure -O qcow2 raw.img
        measure -O raw disk.qcow2
        measure -O qcow2 disk.qcow2
        measure -O qcow2 top.qcow2
        measure -O qcow2 bitmaps.qcow2
        measure -O qcow2 -o compat=0.10 bitmaps.qcow2
        measure -O qcow2 -o cluster_size=2M --size 1T
        measure -O qcow2 -o refcount_bits=1,extended_l2=on --size 10G
        measure -O qcow2 -o preallocation=metadata --size 1G
        measure -O qcow2 -o preallocation=full --size 1G
        measure -O qcow2 -l first snap.qcow2
        measure -O qcow2 -l snapshot.id=1,snapshot.name=2 crossed.qcow2
        measure -O qcow2 -l snapshot.id=1,snapshot.name=1 crossed.qcow2
        measure --output=json -O qcow2 raw.img
        measure --output=json -O qcow2 bitmaps.qcow2
        measure --output=json --size 1G
        measure --output=json --size 1.5G -O qcow2
        measure --output=json -U -f qcow2 -O raw disk.qcow2
        measure -O vmdk --size 1M
        measure
        measure --size 1M raw.img
        measure --size 1M -l first
        measure --size 1M -f raw
        measure --size 1M --image-opts
        measure --size x
        measure -O qcow2 -o nosuch=1 --size 1M
        measure -O qcow2 -o cluster_size=1000 --size 1M
        ",
    );
}

#[test]
fn images_are_created_and_converted_alike() {
    compare_all(
        "
        create new.img 1M => new.img
        create -f raw new.img 1000 => new.img
        create -f raw -o preallocation=falloc new.img 64k => new.img
        create -f raw -o preallocation=full,nocow=off new.img 64k => new.img
        create -f qcow2 new.qcow2 1M => new.qcow2
        create -q -f qcow2 new.qcow2 1.5G => new.qcow2
        create -f qcow2 -o size=5M new.qcow2 => new.qcow2
        create -f qcow2 -o size=5M new.qcow2 1M
        create -f qcow2 -o cluster_size=4k,compat=0.10 new.qcow2 1M => new.qcow2
        create -f qcow2 -o compat=v3 -o lazy_refcounts=on,refcount_bits=1 new.qcow2 1M => new.qcow2
        create -f qcow2 -o extended_l2=on,compression_type=zstd new.qcow2 1M => new.qcow2
        create -f qcow2 -o preallocation=metadata new.qcow2 1M => new.qcow2
        create -f qcow2 -o preallocation=falloc,nocow=off new.qcow2 1M => new.qcow2
        create -f qcow2 -o preallocation=full new.qcow2 1M => new.qcow2
        create -f qcow2 -o preallocation=off new.qcow2 1M => new.qcow2
        create -f qcow2 -o data_file=new.data new.qcow2 1M => new.qcow2
        create -f qcow2 -o data_file=new.data,data_file_raw=on new.qcow2 1M => new.qcow2
        create -f qcow2 -b disk.qcow2 -F qcow2 new.qcow2 => new.qcow2
        create -f qcow2 -b raw.img -F raw new.qcow2 5M => new.qcow2
        create -f qcow2 -b odd.img -F raw new.qcow2 => new.qcow2
        create -f qcow2 -o backing_file=raw.img,backing_fmt=raw new.qcow2 => new.qcow2
        create -f qcow2 -b ../raw.img -F raw sub/new.qcow2 => sub/new.qcow2
        create -f qcow2 -o backing_file=disk.qcow2,backing_fmt=raw -F qcow2 new.qcow2 => new.qcow2
        create -f qcow2 -b disk.qcow2 -o backing_fmt=qcow2 new.qcow2 => new.qcow2
        create -f qcow2 -o backing_file=disk.qcow2 -F qcow2 new.qcow2 => new.qcow2
        create -f qcow2 -o backing_file=nosuch,backing_fmt=raw -b disk.qcow2 -F qcow2 new.qcow2 => new.qcow2
        create -f qcow2 -o backing_fmt=raw new.qcow2 1M
        create -f qcow2 -F raw new.qcow2 1M
        create -f qcow2 -b '' -F raw new.qcow2 1M
        create -f raw -F raw new.img 1M
        create -u -f qcow2 -b nosuch.img -F raw new.qcow2 1M ; info --output=json new.qcow2 =>
        create -f qcow2 disk.qcow2 2M => disk.qcow2
        create -f raw disk.qcow2 2M => disk.qcow2
        create -f qcow2 raw.img 1M => raw.img
        create -f qcow2 new.qcow2
        create -f qcow2 new.qcow2 x
        create -f qcow2 new.qcow2 -1
        create -f qcow2 new.qcow2 9E
        create -f qcow2 new.qcow2 1M 2M
        create -f qcow2 -b disk.qcow2 new.qcow2
        create -f qcow2 -b nosuch.img -F raw new.qcow2
        create -f qcow2 -b nosuch.img -F nosuch new.qcow2
        create -f raw -b raw.img -F raw new.img
        create -f qcow2 -b disk.qcow2 -F qcow2 disk.qcow2
        create -f qcow2 -o nosuch=1 new.qcow2 1M
        create -f qcow2 -o cluster_size=1000 new.qcow2 1M
        create -f qcow2 -o compat=2 new.qcow2 1M
        create -f qcow2 -o preallocation=nosuch new.qcow2 1M
        create -f raw -o preallocation=metadata new.img 1M
        create -f raw -o cluster_size=64k new.img 1M
        create -f qcow2 -o lazy_refcounts=on,compat=0.10 new.qcow2 1M
        create -f nosuch new.img 1M
        create nosuch/new.img 1M
        create -f qcow2
        create
        convert raw.img new.img => new.img
        convert -O raw disk.qcow2 new.img => new.img
        convert -p -O raw disk.qcow2 new.img => new.img
        convert -O qcow2 raw.img new.qcow2 => new.qcow2
        convert -p -q -O qcow2 raw.img new.qcow2 => new.qcow2
        convert -f raw -O qcow2 disk.qcow2 new.qcow2 => new.qcow2
        convert -c -O qcow2 disk.qcow2 new.qcow2 => new.qcow2
        convert -c -O qcow2 -o compression_type=zstd disk.qcow2 new.qcow2 => new.qcow2
        convert -O qcow2 -o cluster_size=4k,compat=0.10 top.qcow2 new.qcow2 => new.qcow2
        convert -O qcow2 -o preallocation=metadata disk.qcow2 new.qcow2 => new.qcow2
        convert -O qcow2 -o preallocation=full raw.img new.qcow2 => new.qcow2
        convert -O raw -o preallocation=falloc disk.qcow2 new.img => new.img
        convert -p -O qcow2 -t none -T none -W -m 4 raw.img new.qcow2 => new.qcow2
        convert -O raw -t writeback -T writeback -W -m 16 -S 4k disk.qcow2 new.img => new.img
        convert -O raw -S 0 disk.qcow2 new.img => new.img
        convert -O qcow2 -S 0 disk.qcow2 new.qcow2 => new.qcow2
        convert -U -O raw disk.qcow2 new.img => new.img
        convert -r 100M -O raw disk.qcow2 new.img => new.img
        convert -C -O raw disk.qcow2 new.img => new.img
        convert -n -O raw disk.qcow2 raw.img => raw.img
        convert -n -O raw disk.qcow2 big.img => big.img
        convert -n --target-is-zero -O raw disk.qcow2 empty.img => empty.img
        convert -n -O qcow2 raw.img disk.qcow2 => disk.qcow2
        convert -n --target-image-opts disk.qcow2 driver=raw,file.filename=raw.img => raw.img
        convert --image-opts -O raw driver=qcow2,file.filename=disk.qcow2 new.img => new.img
        convert -l first -O raw snap.qcow2 new.img => new.img
        convert -l snapshot.name=second -O qcow2 snap.qcow2 new.qcow2 => new.qcow2
        convert -l snapshot.id=1 -O raw snap.qcow2 new.img => new.img
        convert -l 1 -O raw crossed.qcow2 new.img => new.img
        convert -l snapshot.name=1 -O raw crossed.qcow2 new.img => new.img
        convert -l snapshot.id=1 -O raw crossed.qcow2 new.img => new.img
        convert -l snapshot.id=1,snapshot.name=2 -O raw crossed.qcow2 new.img => new.img
        convert -l snapshot.id=1,snapshot.name=1 -O raw crossed.qcow2 new.img
        convert -l snapshot.nosuch=1 -O raw crossed.qcow2 new.img
        convert --bitmaps -O qcow2 bitmaps.qcow2 new.qcow2 => new.qcow2
        convert -O qcow2 raw.img disk.qcow2 => disk.qcow2
        convert -O raw top.qcow2 raw.img => raw.img
        convert -O raw longer.qcow2 new.img => new.img
        convert odd.img new.img => new.img
        convert -O qcow2 odd.img new.qcow2 => new.qcow2
        convert data.qcow2 new.img => new.img
        convert sub.qcow2 new.img => new.img
        convert -n -O raw disk.qcow2 nosuch.img
        convert -n -O raw big.img raw.img
        convert -n -O raw disk.qcow2 odd.img
        convert --target-is-zero -O raw disk.qcow2 raw.img
        convert -n --target-image-opts -O raw disk.qcow2 driver=raw,file.filename=raw.img
        convert -n --target-image-opts -c disk.qcow2 driver=raw,file.filename=raw.img
        convert -n --target-image-opts --bitmaps bitmaps.qcow2 driver=raw,file.filename=raw.img
        convert -n --target-image-opts raw.img driver=qcow2,file.filename=disk.qcow2 => disk.qcow2
        convert --target-image-opts disk.qcow2 driver=raw,file.filename=raw.img
        convert -c -O raw disk.qcow2 new.img
        convert --bitmaps -O raw bitmaps.qcow2 new.img
        convert --skip-broken-bitmaps -O qcow2 bitmaps.qcow2 new.qcow2
        convert --bitmaps -O qcow2 raw.img new.qcow2
        convert -l nosuch -O raw snap.qcow2 new.img
        convert -l first -O raw raw.img new.img
        convert -m 0 -O raw disk.qcow2 new.img
        convert -m 17 -O raw disk.qcow2 new.img
        convert -S 1000 -O raw disk.qcow2 new.img
        convert -t nosuch -O raw disk.qcow2 new.img
        convert -T nosuch -O raw disk.qcow2 new.img
        convert -r x -O raw disk.qcow2 new.img
        convert -O nosuch disk.qcow2 new.img
        convert -O qcow2 -o nosuch=1 disk.qcow2 new.img
        convert -f nosuch disk.qcow2 new.img
        convert nosuch.img new.img
        convert disk.qcow2 nosuch/new.img
        convert orphan.qcow2 new.img
        convert disk.qcow2
        convert
        ",
    );
}

#[test]
fn images_are_changed_alike() {
    compare_all(
        "
        resize disk.qcow2 2M => disk.qcow2
        resize disk.qcow2 +1M => disk.qcow2
        resize -q -f qcow2 disk.qcow2 1.5M => disk.qcow2
        resize -f raw raw.img 2M => raw.img
        resize --shrink -f raw raw.img 64k => raw.img
        resize --shrink disk.qcow2 512k => disk.qcow2
        resize --shrink disk.qcow2 -512k => disk.qcow2
        resize --shrink disk.qcow2 -- -512k => disk.qcow2
        resize --preallocation=off disk.qcow2 2M => disk.qcow2
        resize --preallocation=falloc -f raw raw.img 2M => raw.img
        resize --preallocation=full -f raw empty.img +512k => empty.img
        resize --preallocation=falloc -f raw odd.img 1M => odd.img
        resize --preallocation=full disk.qcow2 2M => disk.qcow2
        resize --preallocation=falloc disk.qcow2 3M => disk.qcow2
        resize --preallocation=full disk.qcow2 1M
        resize --shrink --preallocation=falloc disk.qcow2 512k
        resize --preallocation=metadata -f raw raw.img 2M
        resize --image-opts driver=qcow2,file.filename=disk.qcow2 2M => disk.qcow2
        resize top.qcow2 3M => top.qcow2
        resize disk.qcow2 512k
        resize disk.qcow2 -2M
        resize --shrink -f raw raw.img 0 => raw.img
        resize --shrink disk.qcow2 0 => disk.qcow2
        resize --shrink -f raw raw.img -1M => raw.img
        resize --shrink disk.qcow2 -1M => disk.qcow2
        resize disk.qcow2 x
        resize disk.qcow2
        resize --preallocation=nosuch disk.qcow2 2M
        resize nosuch.img 2M
        snapshot snap.qcow2
        snapshot -l snap.qcow2
        snapshot -l -U snap.qcow2
        snapshot -l disk.qcow2
        snapshot -c new disk.qcow2 ; snapshot -l disk.qcow2 => disk.qcow2
        snapshot -a first snap.qcow2 => snap.qcow2
        snapshot -q -a 1 snap.qcow2 => snap.qcow2
        snapshot -d first snap.qcow2 ; snapshot snap.qcow2 => snap.qcow2
        snapshot -d 1 crossed.qcow2 ; snapshot crossed.qcow2 => crossed.qcow2
        snapshot -a 1 crossed.qcow2 => crossed.qcow2
        snapshot -d 1 snap.qcow2 => snap.qcow2
        snapshot -d nosuch raw.img
        snapshot -d nosuch snap.qcow2
        snapshot -a nosuch snap.qcow2
        snapshot -c new raw.img
        snapshot -l -c new disk.qcow2
        snapshot -U -c new disk.qcow2
        snapshot nosuch.img
        snapshot
        amend -o compat=0.10 disk.qcow2
        amend -o compat=v2 packed.qcow2 => packed.qcow2
        amend -o compat=1.1 old.qcow2 => old.qcow2
        amend -o compat=1.1,lazy_refcounts=on old.qcow2 => old.qcow2
        amend -p -f qcow2 -o refcount_bits=8 disk.qcow2 => disk.qcow2
        amend -q -t none -o lazy_refcounts=off longer.qcow2 => longer.qcow2
        amend -o size=3M disk.qcow2 => disk.qcow2
        amend disk.qcow2
        amend -o compat=2 disk.qcow2
        amend -o nosuch=1 disk.qcow2
        amend -o cluster_size=4k disk.qcow2
        amend -o backing_file=raw.img disk.qcow2
        amend -o refcount_bits=3 disk.qcow2
        amend -o size=2M raw.img
        bitmap --add disk.qcow2 new => disk.qcow2
        bitmap --add -g 1M disk.qcow2 new => disk.qcow2
        bitmap --add --disable disk.qcow2 new => disk.qcow2
        bitmap --remove bitmaps.qcow2 b0 => bitmaps.qcow2
        bitmap --clear bitmaps.qcow2 b0 => bitmaps.qcow2
        bitmap --enable bitmaps.qcow2 b1 => bitmaps.qcow2
        bitmap --disable bitmaps.qcow2 b0 => bitmaps.qcow2
        bitmap --merge b0 bitmaps.qcow2 b1 => bitmaps.qcow2
        bitmap --add --merge b0 -b bitmaps.qcow2 -F qcow2 disk.qcow2 new => disk.qcow2
        create -f qcow2 -b bitmaps.qcow2 -F qcow2 above.qcow2 ; bitmap --add above.qcow2 new ; bitmap --add --merge new -b above.qcow2 -F qcow2 bitmaps.qcow2 b2 => bitmaps.qcow2 above.qcow2
        bitmap --add bitmaps.qcow2 b0
        bitmap --add -g 1000 disk.qcow2 new
        bitmap --remove disk.qcow2 nosuch
        bitmap --merge nosuch bitmaps.qcow2 b0
        bitmap --add raw.img new
        bitmap --clear -g 64k bitmaps.qcow2 b0
        bitmap --clear -b disk.qcow2 bitmaps.qcow2 b0
        bitmap bitmaps.qcow2 b0
        bitmap --add bitmaps.qcow2
        rebase -b raw.img -F raw top.qcow2 => top.qcow2
        rebase -p -b raw.img -F raw -t none -T none top.qcow2 => top.qcow2
        rebase -b '' top.qcow2 => top.qcow2
        rebase -b disk.qcow2 -F qcow2 -f qcow2 longer.qcow2 => longer.qcow2
        rebase -u -b raw.img -F raw top.qcow2 => top.qcow2
        rebase -u -b '' top.qcow2 => top.qcow2
        rebase -u -b nosuch.img -F raw top.qcow2 ; info --output=json top.qcow2 =>
        rebase -b nosuch.img -F raw top.qcow2
        rebase -u -b raw.img top.qcow2
        rebase -b raw.img -F nosuch top.qcow2
        rebase -b raw.img -F raw empty.img
        rebase -c -b raw.img -F raw top.qcow2 => top.qcow2
        rebase -p -c -b '' -f qcow2 top.qcow2 => top.qcow2
        rebase -c -b big.img -F raw sub.qcow2 => sub.qcow2
        rebase -c -u -b raw.img -F raw top.qcow2 => top.qcow2
        rebase top.qcow2
        rebase -b raw.img -F raw nosuch.img
        dd if=disk.qcow2 of=new.img => new.img
        dd -f raw bs=64k if=raw.img of=new.img => new.img
        dd -O qcow2 bs=1M count=1 if=top.qcow2 of=new.qcow2 => new.qcow2
        dd bs=64k count=8 skip=2 if=raw.img of=new.img => new.img
        dd bs=64k skip=14 if=raw.img of=new.img => new.img
        dd -U --image-opts if=driver=qcow2,file.filename=disk.qcow2 of=new.img => new.img
        dd skip=9 bs=1M if=raw.img of=new.img
        dd count=0 if=raw.img of=new.img
        dd bs=64k if=raw.img of=big.img => big.img
        dd -O qcow2 bs=64k count=3 skip=1 if=raw.img of=disk.qcow2 => disk.qcow2
        dd bs=1000 count=3 skip=1 if=raw.img of=new.img => new.img
        dd bs=700 skip=1 if=odd.img of=new.img => new.img
        dd count=1M if=raw.img of=new.img
        dd skip=1k if=raw.img of=new.img
        dd bs=1k count=0x2 skip=0x1 if=raw.img of=new.img => new.img
        dd bs=0 if=raw.img of=new.img
        dd bs=x if=raw.img of=new.img
        dd if=raw.img
        dd nosuch=1 if=raw.img of=new.img
        dd if=nosuch.img of=new.img
        dd
        commit top.qcow2 => top.qcow2 disk.qcow2
        commit -p -t writeback top.qcow2 => top.qcow2 disk.qcow2
        commit -q -d top.qcow2 => top.qcow2 disk.qcow2
        commit -b disk.qcow2 top.qcow2 => top.qcow2 disk.qcow2
        commit -r 100M longer.qcow2 => longer.qcow2 raw.img
        commit -f qcow2 longer.qcow2 => longer.qcow2 raw.img
        commit disk.qcow2
        commit -f raw raw.img
        commit -b nosuch.img top.qcow2
        convert -O qcow2 -B top.qcow2 -F qcow2 raw.img third.qcow2 ; commit -b disk.qcow2 third.qcow2 => third.qcow2 disk.qcow2
        convert -O qcow2 -B top.qcow2 -F qcow2 big.img third.qcow2 ; commit -d -b disk.qcow2 third.qcow2 => disk.qcow2
        create -f qcow2 -b longer.qcow2 -F qcow2 third.qcow2 ; commit -b raw.img third.qcow2 => third.qcow2 raw.img
        create -f qcow2 -b top.qcow2 -F qcow2 third.qcow2 ; commit -b raw.img third.qcow2
        create -f qcow2 -b ../top.qcow2 -F qcow2 sub/third.qcow2 1M ; commit -q -b disk.qcow2 sub/third.qcow2 => sub/third.qcow2 disk.qcow2
        commit -b sub/raw.img sub/up.qcow2
        create -f qcow2 sub/low.qcow2 1M ; create -f qcow2 -b low.qcow2 -F qcow2 sub/mid.qcow2 ; create -f qcow2 -b mid.qcow2 -F qcow2 sub/high.qcow2 ; commit -b low.qcow2 sub/high.qcow2 => sub/high.qcow2 sub/low.qcow2
        create -f qcow2 sub/low.qcow2 1M ; create -f qcow2 -b low.qcow2 -F qcow2 sub/mid.qcow2 ; create -f qcow2 -b mid.qcow2 -F qcow2 sub/high.qcow2 ; commit -b sub/low.qcow2 sub/high.qcow2
        create -f qcow2 -b ../top.qcow2 -F qcow2 sub/third.qcow2 1M ; commit -b ../disk.qcow2 sub/third.qcow2
        create -f qcow2 -b ../top.qcow2 -F qcow2 sub/third.qcow2 1M ; commit -b top.qcow2 sub/third.qcow2
        create -f qcow2 -b ../top.qcow2 -F qcow2 sub/third.qcow2 1M ; commit -b ./../sub/../top.qcow2 sub/third.qcow2 => sub/third.qcow2 top.qcow2
        commit orphan.qcow2
        commit
        ",
    );
}

#[test]
fn what_is_not_supported_is_refused_by_name_and_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    std::fs::write(here.join("old.img"), [7; 4096]).unwrap();
    std::fs::hard_link(here.join("old.img"), here.join("second-name.img")).unwrap();
    for (line, part) in [
        ("create -f qed new.img 1M", "qed"),
        ("create -f vmdk -o subformat=monolithicFlat,zeroed_grain=on new.img 1M", "zeroed grains"),
        ("create -f vhdx -o preallocation=full new.img 1M", "preallocation"),
        ("create -f qcow2 -o encrypt.format=luks new.img 1M", "encrypt"),
        ("create -f qcow2 -o nocow=on new.img 1M", "nocow"),
        ("create -f qcow2 -o data_file=x sub/new.img 1M", "data_file"),
        ("convert -O qcow2 -o data_file=x old.img sub/new.img", "data_file"),
        ("create old.img 1M", "several names"),
        ("convert --salvage old.img old.img new.img", "--salvage"),
        ("info --object throttle-group,id=a old.img", "throttle-group"),
        ("info --image-opts driver=rbd,pool=a", "rbd"),
        ("resize -f raw --preallocation=metadata old.img 1M", "--preallocation"),
    ] {
        let outcome = ours(here, &words(line));
        assert_eq!(outcome.code, Some(1), "{line}: {outcome:?}");
        let is_named = outcome.stderr.starts_with("qemu-img: ") && outcome.stderr.contains(part);
        assert!(is_named && outcome.stderr.lines().count() == 1, "{line}: {outcome:?}");
        assert_eq!(std::fs::read_dir(here).unwrap().count(), 2, "{line}");
        assert_eq!(std::fs::read(here.join("old.img")).unwrap(), [7; 4096], "{line}");
    }
}

#[test]
fn the_format_of_an_export_is_detected_unless_it_is_given() {
    tools!(_qemu_img = "qemu-img", _qemu_io = "qemu-io");
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    let image = here.join("disk.qcow2").display().to_string();
    for line in
        ["qemu-img create -q -f qcow2 disk.qcow2 1M", "qemu-io -c write_-P_7_64k_64k disk.qcow2"]
    {
        let words = words(line);
        run(Command::new(&words[0]).args(&words[1..]).current_dir(here)).success();
    }
    let server = Server::ours(&["--read-only", "--format", "raw", &image]);
    let length = std::fs::metadata(&image).unwrap().len();
    for (format, detected, size, place) in
        [("", "qcow2", 1 << 20, 327_680), ("-f raw", "raw", length, 0)]
    {
        let ours = |line: &str| ours(here, &words(&line.replace("URI", server.uri())));
        let info = ours(&format!("info {format} --output=json URI")).success();
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!((&info["format"], &info["virtual-size"]), (&detected.into(), &size.into()));
        ours(&format!("convert {format} -O raw URI {detected}.copy")).success();
        let copy = here.join(format!("{detected}.copy"));
        assert_eq!(std::fs::metadata(&copy).unwrap().len(), size, "{detected}");
        ours(&format!("compare {format} -F raw URI {detected}.copy")).success();
        let map = ours(&format!("map {format} --output=json URI")).success();
        assert!(map.contains(&format!("\"offset\": {place}}}")), "{map}");
        assert!(ours(&format!("measure {format} URI")).success().contains(&size.to_string()));
    }
    let checked = ours(here, &words(&format!("check {}", server.uri())));
    assert_eq!(checked.code, Some(0), "{checked:?}");
}

#[test]
fn a_comparison_tells_unreadable_metadata_from_unreadable_data() {
    tools!(_qemu_img = "qemu-img", _qemu_io = "qemu-io");
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    for line in [
        "qemu-img create -q -f qcow2 whole.qcow2 1M",
        "qemu-io -c write_-P_7_0_64k whole.qcow2",
        "qemu-img convert -q -c -O qcow2 whole.qcow2 data.qcow2",
        "qemu-img convert -q -O qcow2 whole.qcow2 metadata.qcow2",
    ] {
        let words = words(line);
        run(Command::new(&words[0]).args(&words[1..]).current_dir(here)).success();
    }
    let number = |bytes: &[u8], at: usize| {
        (u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00) as usize
    };
    for (name, code) in [("metadata.qcow2", 3), ("data.qcow2", 4)] {
        let mut bytes = std::fs::read(here.join(name)).unwrap();
        let table = number(&bytes, number(&bytes, 40));
        let entry = u64::from_be_bytes(bytes[table..table + 8].try_into().unwrap());
        match code {
            // An L2 entry into the middle of a cluster.
            3 => bytes[table..table + 8].copy_from_slice(&(entry | 0x200).to_be_bytes()),
            // The 54 low bits of the entry are the place of a small compressed cluster.
            _ => {
                let place = (entry & ((1 << 54) - 1)) as usize;
                bytes[place..place + 16].fill(0xff);
            }
        }
        std::fs::write(here.join(name), bytes).unwrap();
        let both = ["compare".to_owned(), name.to_owned(), "whole.qcow2".to_owned()];
        let theirs = run(Command::new("qemu-img").args(&both).current_dir(here));
        let ours = ours(here, &both);
        assert_eq!((theirs.code, ours.code), (Some(code), Some(code)), "{theirs:?} {ours:?}");
    }
}

#[test]
fn sigusr1_asks_how_far_a_conversion_is() {
    use std::process::Stdio;
    use std::time::{Duration, Instant};

    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("disk.img"), vec![7; 16 << 20]).unwrap();
    // At this rate it takes longer than the test waits.
    let mut job = Command::new(PROGRAM)
        .args(["qemu-img", "convert", "-r", "64k", "disk.img", "new.img"])
        .current_dir(directory.path())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let partial = directory.path().join("new.img.partial");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !partial.exists() {
        assert!(Instant::now() < deadline, "it does not begin");
        std::thread::sleep(Duration::from_millis(10));
    }
    let id = rustix::process::Pid::from_child(&job);
    let mut stderr = std::io::BufReader::new(job.stderr.take().unwrap());
    let (sender, line) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut text = String::new();
        let _ = std::io::BufRead::read_line(&mut stderr, &mut text);
        let _ = sender.send(text);
    });
    // It answers after its next step.
    let text = loop {
        rustix::process::kill_process(id, rustix::process::Signal::USR1).unwrap();
        match line.recv_timeout(Duration::from_millis(200)) {
            Ok(text) => break text,
            Err(_) => assert!(Instant::now() < deadline, "it does not answer"),
        }
    };
    job.kill().unwrap();
    job.wait().unwrap();
    assert!(text.starts_with("    (") && text.ends_with("/100%)\n"), "{text:?}");
}
