#!/usr/bin/env bash
# nft can't read its own JSON when the rule set has a map whose value is a concatenation, such as an address and a port: what `nft -j list
# ruleset` prints, `nft -j -f` refuses. The same map in nft's own language is accepted and printed back.
#
# Packages: nftables and libnftables1 1.0.6-2+deb12u2 (Debian 12), run as root in a network namespace of its own.
#
#   $ nft 'add table inet t; add map inet t m { type inet_service : ipv4_addr . inet_service; }'
#   $ nft -j list ruleset >saved.json; nft flush ruleset; nft -j -f saved.json
#   internal:0:0-0: Error: Invalid map type 'ipv4_addr . inet_service'.
#
# A map with a plain value is read back. So a program that speaks JSON with this nft can't forward ports by a map to address and port.
#
# Prints what it sees. Exit status 0: as described; 1: the behaviour has changed; 2: can't be run here.
set -euo pipefail

version=1.0.6-2+deb12u2
(($(id -u) == 0)) || { echo "needs root" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf --one-file-system "$work"' EXIT
chmod 755 "$work"
cd "$work"
mkdir packages root
(cd packages && apt-get download -q "nftables=$version" "libnftables1=$version" libnftnl11 libmnl0 libjansson4 libedit2 libbsd0 libmd0 \
    libgmp10 libxtables12) >&2 || exit 2
for package in packages/*.deb; do dpkg-deb --extract "$package" root; done
LD_LIBRARY_PATH=$(dirname "$(find "$work/root" -name 'libnftables.so.1' | head -n 1)")
export LD_LIBRARY_PATH nft=$work/root/usr/sbin/nft

# round_trip VALUE: the exit status of reading back what is printed for a map to values of this type, and what nft says about it.
round_trip() {
    # shellcheck disable=SC2016 # the inner shell expands
    unshare --net bash -c '
        "$nft" "add table inet t; add map inet t m { type inet_service : $1; }"
        "$nft" -j list ruleset >saved.json
        "$nft" flush ruleset
        status=0
        "$nft" -j -f saved.json 2>said || status=$?
        echo "status $status: $(sed -n "s/^.*Error: \(Invalid.*\)$/\1/p" said)"
    ' bash "$1"
}

expect() {
    local what=$1 wanted=$2 seen=$3
    printf '%s: %s\n' "$what" "$seen"
    [[ $seen == "$wanted" ]] || { printf 'changed: expected %s\n' "$wanted" >&2; exit 1; }
}

"$nft" --version
expect "map to an address" "status 0: " "$(round_trip ipv4_addr)"
expect "map to an address and a port" "status 1: Invalid map type 'ipv4_addr . inet_service'." "$(round_trip 'ipv4_addr . inet_service')"
echo "as described"
