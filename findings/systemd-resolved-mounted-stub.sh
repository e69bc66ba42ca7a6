#!/usr/bin/env bash
# systemd-resolved in a container does not start when the container's /etc/resolv.conf is bind-mounted read-only over the usual link to
# ../run/systemd/resolve/stub-resolv.conf.
#
# Packages: systemd-container, systemd and systemd-resolved 252.39-1~deb12u2 (Debian 12), run as root; debootstrap for the tree.
# systemd-nspawn follows the link and mounts at its target, so the directory /run/systemd/resolve belongs to root and has a read-only file
# in it before the container's systemd runs. systemd then can't give the service its RuntimeDirectory=:
#
#   $ systemd-nspawn --boot --bind-ro=…/resolv.conf:/etc/resolv.conf …
#   Result=exit-code  ExecMainStatus=233            (233 is RUNTIME_DIRECTORY)
#
# Without the mount the same tree has Result=success ExecMainStatus=0.
#
# Prints what it sees. Exit status 0: as described; 1: the behaviour has changed; 2: can't be run here.
set -euo pipefail

version=252.39-1~deb12u2
(($(id -u) == 0)) || { echo "needs root" >&2; exit 2; }
command -v debootstrap >/dev/null || { echo "needs debootstrap" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf --one-file-system "$work"' EXIT
chmod 755 "$work"
cd "$work"
mkdir packages root
(cd packages && apt-get download -q "systemd-container=$version" "libsystemd-shared=$version") >&2 || exit 2
for package in packages/*.deb; do dpkg-deb --extract "$package" root; done
debootstrap --variant=minbase --include=systemd-sysv,systemd-resolved,dbus bookworm tree >&2 || exit 2
for package in systemd systemd-resolved; do
    seen=$(chroot tree dpkg-query --show --showformat='${Version}' "$package")
    [[ $seen == "$version" ]] || { echo "$package is $seen, not $version" >&2; exit 2; }
done
ln -sfn ../run/systemd/resolve/stub-resolv.conf tree/etc/resolv.conf
cat >tree/etc/systemd/system/report.service <<'UNIT'
[Unit]
After=systemd-resolved.service
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'sleep 2; systemctl show --property=Result,ExecMainStatus systemd-resolved | sort >/report; systemctl poweroff --no-block'
UNIT
mkdir -p tree/etc/systemd/system/multi-user.target.wants
ln -s ../report.service tree/etc/systemd/system/multi-user.target.wants/report.service
echo 'nameserver 192.0.2.53' >resolv.conf

# boot OPTION…: prints what the container reports about systemd-resolved.
boot() {
    rm -f tree/report
    LD_LIBRARY_PATH=$(dirname "$(find "$work/root" -name 'libsystemd-shared-*.so' | head -n 1)") timeout 60 \
        "$work/root/usr/bin/systemd-nspawn" --quiet --register=no --keep-unit --settings=no --link-journal=no --console=pipe \
        --private-network --resolv-conf=off --directory="$work/tree" "$@" --boot >&2 </dev/null || true
    tr '\n' ' ' <tree/report
}

expect() {
    local what=$1 wanted=$2 seen=$3
    printf '%s: %s\n' "$what" "$seen"
    [[ $seen == "$wanted" ]] || { printf 'changed: expected %s\n' "$wanted" >&2; exit 1; }
}

expect "without the mount" "ExecMainStatus=0 Result=success " "$(boot)"
expect "with the mount" "ExecMainStatus=233 Result=exit-code " "$(boot --bind-ro="$work/resolv.conf:/etc/resolv.conf")"
echo "as described"
