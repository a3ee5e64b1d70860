#!/bin/sh
# make-initrd.sh KERNEL-TREE OUT: busybox-static's binary, the modules and init, as a newc archive.
set -e
root=$(mktemp -d)
mkdir -p $root/bin $root/lib $root/proc $root/sys $root/dev $root/tmp
cp /usr/bin/busybox $root/bin/busybox
for m in virtio virtio_ring virtio_mmio virtio_mem virtio_balloon; do
  f=$(find $1 -name $m.ko -o -name $m.ko.xz | head -1)
  case $f in *.xz) xz -dc $f > $root/lib/$m.ko;; *.ko) cp $f $root/lib/$m.ko;; esac
done
cp "$(dirname "$0")/init" $root/init; chmod 755 $root/init
mknod $root/dev/console c 5 1
(cd $root && find . | busybox cpio -o -H newc | gzip -1) > $2
rm -r $root
