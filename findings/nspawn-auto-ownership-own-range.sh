#!/usr/bin/env bash
# systemd-nspawn 252 maps the ids of a tree that has them already, if the range is given as a number.
#
# Package: systemd-container 252.39-1~deb12u2 and libsystemd-shared of the same version (Debian 12), run as root on a file system that can map ids
# (ext4, xfs, btrfs). A tree whose files belong to the range from 1179648 on, as systemd-nspawn itself leaves it after a start with
# --private-users-ownership=chown, and three starts from it:
#
#   --private-users=pick           --private-users-ownership=auto   picks 1179648; the files belong to root (0) inside
#   --private-users=1179648:65536  --private-users-ownership=auto   the same ids; the files belong to nobody (65534) inside
#   --private-users=1179648:65536  --private-users-ownership=off    the same ids; the files belong to root (0) inside
#
# So "auto" takes a tree for one that belongs to the ids from 0 on, unless systemd-nspawn has picked the range from the owner of the tree. There is no
# message: the container starts, and its root can't write to its own file system. Whoever gives the range as a number has to look at the owner of
# the tree, and use "off" where it has the range.
#
# Prints what it sees. Exit status 0: as described; 1: the behaviour has changed; 2: can't be run here.
set -euo pipefail

version=252.39-1~deb12u2
busybox=1:1.35.0-4+deb12u1+b1
(($(id -u) == 0)) || { echo "needs root" >&2; exit 2; }
work=$(mktemp -d)
leave() {
    rm -rf --one-file-system "$work"
    # What systemd-nspawn leaves of the cgroups that it makes here. One that is in use stays.
    rmdir /sys/fs/cgroup{,/unified,/systemd}/{payload,supervisor} 2>/dev/null || true
}
trap leave EXIT
chmod 755 "$work"
cd "$work"
mkdir packages root
(cd packages && apt-get download -q "systemd-container=$version" "libsystemd-shared=$version" "busybox-static=$busybox") >&2 || exit 2
for package in packages/*.deb; do dpkg-deb --extract "$package" root; done
mkdir -p tree/{bin,etc,usr,proc,sys,dev,run,tmp}
cp root/bin/busybox tree/bin/busybox
for name in sh stat awk; do ln -s busybox "tree/bin/$name"; done
echo 'ID=test' >tree/etc/os-release
chown -hR 1179648:1179648 tree
LD_LIBRARY_PATH=$(dirname "$(find "$work/root" -name 'libsystemd-shared-*.so' | head -n 1)")
export LD_LIBRARY_PATH

# nspawn OPTION…: prints the owner of /etc inside, and the first id of the range.
nspawn() {
    # shellcheck disable=SC2016 # the inner shell expands
    root/usr/bin/systemd-nspawn --quiet --register=no --keep-unit --settings=no --link-journal=no --console=pipe --machine=finding \
        --directory="$work/tree" "$@" -- /bin/sh -c 'stat -c %u /etc; awk "{print \$2}" /proc/self/uid_map' 2>/dev/null </dev/null | tr '\n' ' '
}

expect() {
    local what=$1 wanted=$2 seen=$3
    printf '%s: owner inside and first id: %s\n' "$what" "$seen"
    [[ $seen == "$wanted" ]] || { printf 'changed: expected %s\n' "$wanted" >&2; exit 1; }
}

expect "pick, auto" "0 1179648 " "$(nspawn --private-users=pick --private-users-ownership=auto)"
expect "number, auto" "65534 1179648 " "$(nspawn --private-users=1179648:65536 --private-users-ownership=auto)"
expect "number, off" "0 1179648 " "$(nspawn --private-users=1179648:65536 --private-users-ownership=off)"
