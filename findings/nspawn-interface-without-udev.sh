#!/usr/bin/env bash
# systemd-nspawn 252 uses interfaces of a host without udev only if /sys is read-only.
#
# Package: systemd-container 252.39-1~deb12u2 and libsystemd-shared of the same version (Debian 12), run as root where no udev runs.
# --network-macvlan=, --network-ipvlan= and --network-interface= ask udev's database whether it has finished with the interface. Whether there is a
# udev that could have is judged by /sys being writable, not by /run/udev. On a host or in a container without udev but with a writable /sys:
#
#   $ systemd-nspawn --network-macvlan=test0 … /bin/true
#   Network interface test0 is not initialized yet.           (exit status 1)
#
# however long one waits. With /sys mounted read-only, and nothing else changed, the container starts and has mv-test0.
#
# Prints what it sees. Exit status 0: as described; 1: the behaviour has changed; 2: can't be run here.
set -euo pipefail

version=252.39-1~deb12u2
busybox=1:1.35.0-4+deb12u1+b1
(($(id -u) == 0)) || { echo "needs root" >&2; exit 2; }
[[ ! -e /run/udev/control ]] || { echo "needs a host without udev" >&2; exit 2; }
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
for name in sh ls; do ln -s busybox "tree/bin/$name"; done
echo 'ID=test' >tree/etc/os-release
LD_LIBRARY_PATH=$(dirname "$(find "$work/root" -name 'libsystemd-shared-*.so' | head -n 1)")
export LD_LIBRARY_PATH work

# nspawn ro|rw: in a network namespace of its own with an interface, and a /sys that is mounted like this: prints the output, then the exit status.
nspawn() {
    # shellcheck disable=SC2016 # the inner shell expands
    unshare --net --mount --propagation private bash -c '
        "$work/root/bin/busybox" ip link add test0 type bridge || exit 2
        # The mount hides the cgroups, which systemd-nspawn needs.
        mkdir -p "$work/cgroup"
        mount --rbind /sys/fs/cgroup "$work/cgroup" || exit 2
        mount -t sysfs -o "$1" sysfs /sys && mount --rbind "$work/cgroup" /sys/fs/cgroup || exit 2
        status=0
        "$work/root/usr/bin/systemd-nspawn" --quiet --register=no --keep-unit --settings=no --link-journal=no --console=pipe \
            --directory="$work/tree" --network-macvlan=test0 -- /bin/ls /sys/class/net 2>&1 </dev/null || status=$?
        echo "exit status $status"' bash "$1"
}

expect() {
    local what=$1 wanted=$2 seen=$3
    printf '%s:\n%s\n' "$what" "$seen"
    [[ $seen == *"$wanted"* ]] || { printf 'changed: expected %s\n' "$wanted" >&2; exit 1; }
}

writable=$(nspawn rw)
expect "writable /sys" "test0 is not initialized yet" "$writable"
expect "writable /sys" "exit status 1" "$writable"
read_only=$(nspawn ro)
expect "read-only /sys" "mv-test0" "$read_only"
expect "read-only /sys" "exit status 0" "$read_only"
echo "as described"
