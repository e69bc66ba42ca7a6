# Says which units have failed, and starts a unit with each restriction: its name and why the unit is not as on a host.
systemctl is-system-running --wait > /dev/null
systemctl list-units --state=failed --plain --no-legend | sed 's/ .*//; s/^/failed /'
echo secret > /etc/secret
touch /tmp/outer
export NETWORK=$(readlink /proc/self/ns/net) HOST_NAME=$(readlink /proc/self/ns/uts) USERS=$(readlink /proc/self/ns/user) DEV=$(stat -c %d /dev)

# probe "PROPERTY…" SCRIPT: the script ends with 3 if the restriction has no effect, as it has to without it.
probe() {
    /bin/sh -c "$2" > /dev/null 2>&1 && echo "unproven $1"
    options=
    for property in $1; do options="$options --property=$property"; done
    said=$(systemd-run --collect --wait --pipe -E NETWORK -E HOST_NAME -E USERS -E DEV $options /bin/sh -c "$2" 2>&1)
    code=$?
    case $code in
        0) echo "works $1" ;;
        3) echo "limited $1: without effect" ;;
        4) echo "limited $1: its loopback device is down" ;;
        *) echo "limited $1: fails, $(echo "$said" | sed -n 's/.*status=//p')" ;;
    esac
}

IN_NETWORK='test $(readlink /proc/self/ns/net) != $NETWORK && test $(grep -c : /proc/net/dev) = 1 || exit 3'
LOOPBACK='grep -q 127.0.0.1 /proc/net/fib_trie || exit 4'
IN_DEVICES='test $(stat -c %d /dev) != $DEV && echo > /dev/null && test -c /dev/urandom && test ! -e /dev/net || exit 3'
IN_TMP='test ! -e /tmp/outer && touch /tmp/inner || exit 3'
IN_SYSTEM='for place in / /etc /usr /var; do ! test -w $place || exit 3; done'
IN_TUNABLES='for file in /proc/sys/kernel/hostname /proc/sys/net/ipv4/ip_forward /proc/sysrq-trigger /sys/kernel/uevent_helper; do ! test -w $file || exit 3; done'
IN_PROC='test ! -e /proc/1 && test -e /proc/self/stat || exit 3'
IN_USER='test $(id -u) -ge 61184 && touch /var/lib/probe/file || exit 3'
IN_USERS='test $(readlink /proc/self/ns/user) != $USERS && test $(wc -l < /proc/self/uid_map) = 1 || exit 3'
IN_CREDENTIALS='cd $CREDENTIALS_DIRECTORY && test $(cat set) = value && test $(cat loaded) = secret && ! touch new || exit 3'
IN_PRIVILEGES='grep -q NoNewPrivs:.1 /proc/self/status || exit 3'
IN_CALLS='touch /tmp/own; ! chown 1 /tmp/own || exit 3'
IN_GROUPS='for group in /sys/fs/cgroup/init.scope /sys/fs/cgroup/*/init.scope; do ! test -w $group || exit 3; done'
IN_HOST_NAME='test $(readlink /proc/self/ns/uts) != $HOST_NAME || exit 3'
IN_NAMESPACES='! unshare --uts true || exit 3'
IN_ADDRESSES='bash -c "echo > /dev/udp/127.0.0.1/9" 2>&1 | grep -q "not permitted" || exit 3'

probe PrivateNetwork=yes "$IN_NETWORK; $LOOPBACK"
probe PrivateDevices=yes "$IN_DEVICES"
probe PrivateTmp=yes "$IN_TMP"
probe ProtectSystem=strict "$IN_SYSTEM"
probe ProtectKernelTunables=yes "$IN_TUNABLES"
probe "ProtectProc=invisible User=daemon" "$IN_PROC"
probe "DynamicUser=yes StateDirectory=probe" "$IN_USER"
probe PrivateUsers=yes "$IN_USERS"
probe "SetCredential=set:value LoadCredential=loaded:/etc/secret" "$IN_CREDENTIALS"
probe NoNewPrivileges=yes "$IN_PRIVILEGES"
probe "SystemCallFilter=~@chown SystemCallErrorNumber=EPERM" "$IN_CALLS"
probe ProtectControlGroups=yes "$IN_GROUPS"
probe ProtectHostname=yes "$IN_HOST_NAME"
probe RestrictNamespaces=yes "$IN_NAMESPACES"
probe IPAddressDeny=any "$IN_ADDRESSES"
for name in hostname locale timedate; do
    busctl call org.freedesktop.${name}1 /org/freedesktop/${name}1 org.freedesktop.DBus.Peer Ping > /dev/null 2>&1 &&
        echo "works systemd-${name}d" || echo "limited systemd-${name}d: does not start"
done
