#!/usr/bin/env bash
# PTRACE_SECCOMP_GET_FILTER counts a process's filters from the oldest; ptrace(2) says that the most recently installed one has index 0.
#
# Package: manpages-dev 6.03-2 (Debian 12), whose ptrace(2) says so; the kernel is the running one (seen with Linux 6.18). Needs root,
# without seccomp filters of its own, and python3.
#
# A process installs three filters that allow everything, each with its own number of instructions: first 1, then 2, then 3. Its tracer
# asks for the filters with index 0, 1 and 2:
#
#   index 0: 1 instruction(s)
#   index 1: 2 instruction(s)
#   index 2: 3 instruction(s)
#   index 3: ENOENT
#
# So a tracer that installs copies in the order of the manual page's indices, the highest first, reverses them. The order decides which
# error a call gets that two filters refuse.
#
# Prints what it sees. Exit status 0: as described; 1: the behaviour has changed; 2: can't be run here.
set -euo pipefail

version=6.03-2
(($(id -u) == 0)) || { echo "needs root" >&2; exit 2; }
command -v python3 >/dev/null || { echo "needs python3" >&2; exit 2; }
grep -q '^Seccomp:[[:space:]]*0$' /proc/self/status || { echo "has seccomp filters itself" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf --one-file-system "$work"' EXIT
cd "$work"
apt-get download -q "manpages-dev=$version" >&2 || exit 2
dpkg-deb --extract manpages-dev_*.deb root
page=$(zcat root/usr/share/man/man2/ptrace.2.gz | tr '\n' ' ')
said='The most recently installed filter has the index 0.'
[[ $page == *"$said"* ]] || { echo "changed: ptrace(2) does not say: $said" >&2; exit 1; }
echo "ptrace(2): $said"

seen=$(python3 - <<'PYTHON'
import ctypes, errno, os, signal

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.restype = ctypes.c_long
SET_SECCOMP, FILTER, NO_NEW_PRIVILEGES = 22, 2, 38
ATTACH, DETACH, GET_FILTER = 16, 17, 0x420C


class Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint)]


class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.POINTER(Instruction))]


def install(length):
    """A filter of this length: loads the number of the call, again and again, then allows it."""
    load, allow = Instruction(0x20, 0, 0, 0), Instruction(0x06, 0, 0, 0x7FFF0000)
    instructions = (Instruction * length)(*[load] * (length - 1), allow)
    program = Program(length, instructions)
    if libc.prctl(SET_SECCOMP, ctypes.c_ulong(FILTER), ctypes.byref(program), 0, 0):
        os._exit(1)


told, tell = os.pipe()
child = os.fork()
if child == 0:
    libc.prctl(NO_NEW_PRIVILEGES, ctypes.c_ulong(1), 0, 0, 0)
    for length in (1, 2, 3):
        install(length)
    os.write(tell, b"1")
    signal.pause()
    os._exit(0)
os.close(tell)
if os.read(told, 1) == b"1":
    libc.ptrace(ctypes.c_long(ATTACH), child, None, None)
    os.waitpid(child, 0)
    for index in range(4):
        length = libc.ptrace(ctypes.c_long(GET_FILTER), child, ctypes.c_void_p(index), None)
        print(f"index {index}:", errno.errorcode[ctypes.get_errno()] if length < 0 else f"{length} instruction(s)")
    libc.ptrace(ctypes.c_long(DETACH), child, None, None)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
PYTHON
)
echo "$seen"
wanted='index 0: 1 instruction(s)
index 1: 2 instruction(s)
index 2: 3 instruction(s)
index 3: ENOENT'
[[ $seen == "$wanted" ]] || { printf 'changed: expected\n%s\n' "$wanted" >&2; exit 1; }
echo "as described"
