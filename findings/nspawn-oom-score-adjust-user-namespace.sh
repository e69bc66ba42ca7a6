#!/usr/bin/env bash
# systemd-nspawn 252 can't start a container that has both a user namespace and --oom-score-adjust=.
#
# Package: systemd-container 252.39-1~deb12u2 and libsystemd-shared of the same version (Debian 12), run as root.
# Each option works alone. Together, although a higher value needs no privilege:
#
#   $ systemd-nspawn --private-users=65536000:65536 --oom-score-adjust=300 … /bin/cat /proc/self/oom_score_adj
#   Failed to adjust OOM score: Permission denied
#   Child died too early.                                  (exit status 1)
#
# With --private-users= alone it prints 0, with --oom-score-adjust=300 alone 300, both with exit status 0.
#
# Prints what it sees. Exit status 0: as described; 1: the behaviour has changed; 2: can't be run here.
set -euo pipefail

version=252.39-1~deb12u2
busybox=1:1.35.0-4+deb12u1+b1
(($(id -u) == 0)) || { echo "needs root" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf --one-file-system "$work"' EXIT
chmod 755 "$work"
cd "$work"
mkdir packages root
(cd packages && apt-get download -q "systemd-container=$version" "libsystemd-shared=$version" "busybox-static=$busybox") >&2 || exit 2
for package in packages/*.deb; do dpkg-deb --extract "$package" root; done
mkdir -p tree/{bin,etc,usr,proc,sys,dev,run,tmp}
cp root/bin/busybox tree/bin/busybox
for name in sh true cat; do ln -s busybox "tree/bin/$name"; done
echo 'ID=test' >tree/etc/os-release

# nspawn OPTION…: prints the output, then the exit status.
nspawn() {
    local status=0
    LD_LIBRARY_PATH=$(dirname "$(find "$work/root" -name 'libsystemd-shared-*.so' | head -n 1)") \
        "$work/root/usr/bin/systemd-nspawn" --quiet --register=no --keep-unit --settings=no --link-journal=no --console=pipe \
        --directory="$work/tree" "$@" -- /bin/cat /proc/self/oom_score_adj 2>&1 </dev/null || status=$?
    echo "exit status $status"
}

expect() {
    local what=$1 wanted=$2 seen=$3
    printf '%s:\n%s\n' "$what" "$seen"
    [[ $seen == *"$wanted"* ]] || { printf 'changed: expected %s\n' "$wanted" >&2; exit 1; }
}

users=--private-users=65536000:65536
chown -R 65536000:65536000 tree
expect "user namespace alone" "exit status 0" "$(nspawn "$users")"
expect "both" "Failed to adjust OOM score: Permission denied" "$(nspawn "$users" --oom-score-adjust=300)"
expect "both" "exit status 1" "$(nspawn "$users" --oom-score-adjust=300)"
chown -R 0:0 tree
expect "adjustment alone" $'300\n' "$(nspawn --oom-score-adjust=300)"
echo "as described"
