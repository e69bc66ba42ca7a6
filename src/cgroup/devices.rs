//! Which devices the processes of a container may open and make: the rules, and how each cgroup version expresses them. In cgroup v1 they
//! are lines for the devices controller, in cgroup v2 a BPF program. Does not make device nodes.
//!
//! The devices are those that systemd-nspawn allows where it makes a scope of its own, so also for mknod: docker lets a container make every
//! node, because it still can't open it. But a node in a directory of the host, such as that of an allocation or the tree of an image, is
//! one that users of the host can open.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File, Metadata};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use rustix::fs::{major, minor};
use serde::{Deserialize, Serialize};

use crate::container::{Device, Mount, Root};
use crate::sys::mount_tree;

/// Letters of access: reading, writing and making the node. The bits of the kernel's `BPF_DEVCG_ACC_…`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Access(u8);

impl Access {
    pub(super) const NONE: Self = Self(0);
    pub(super) const MKNOD: Self = Self(1);
    pub(super) const READ: Self = Self(2);
    pub(super) const WRITE: Self = Self(4);
    const READ_WRITE: Self = Self::READ.and(Self::WRITE);
    const ALL: Self = Self::READ_WRITE.and(Self::MKNOD);

    pub(super) const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    fn of(device: &Device) -> Self {
        let letters = [
            (device.read, Self::READ),
            (device.write, Self::WRITE),
            (device.mknod, Self::MKNOD),
        ];
        let allowed = letters.iter().filter(|(allowed, _)| *allowed);
        allowed.fold(Self::NONE, |all, (_, one)| all.and(*one))
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letters = [(Self::READ, "r"), (Self::WRITE, "w"), (Self::MKNOD, "m")];
        for (bit, letter) in letters {
            if self.0 & bit.0 != 0 {
                f.write_str(letter)?;
            }
        }
        Ok(())
    }
}

/// The two kinds of devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    Block,
    Character,
}

/// One device, or all with the same major number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Devices {
    pub(super) kind: Kind,
    pub(super) major: u32,
    /// `None` for every minor number.
    pub(super) minor: Option<u32>,
}

impl Devices {
    const fn character(major: u32, minor: u32) -> Self {
        Self {
            kind: Kind::Character,
            major,
            minor: Some(minor),
        }
    }

    const fn block(major: u32) -> Self {
        Self {
            kind: Kind::Block,
            major,
            minor: None,
        }
    }

    /// The device of a node, links followed. `None` for everything else, and for what can't be examined: systemd-nspawn says so if it
    /// needs it.
    fn of_node(path: &Path) -> Option<Self> {
        Self::of(&fs::metadata(path).ok()?)
    }

    /// The device of a node at a path without links: a task that can put one there must not get what it names.
    fn of_place(path: &Path) -> Option<Self> {
        let found = File::from(mount_tree::place(path).ok()?);
        Self::of(&found.metadata().ok()?)
    }

    fn of(found: &Metadata) -> Option<Self> {
        let kind = match found.file_type() {
            kind if kind.is_char_device() => Kind::Character,
            kind if kind.is_block_device() => Kind::Block,
            _ => return None,
        };
        Some(Self {
            kind,
            major: major(found.rdev()),
            minor: Some(minor(found.rdev())),
        })
    }
}

/// What is allowed with which devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Rule {
    pub(super) devices: Devices,
    pub(super) access: Access,
}

/// As the devices controller of cgroup v1 reads and shows it: `c 1:3 rwm`.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Devices { kind, major, minor } = self.devices;
        let kind = match kind {
            Kind::Block => "b",
            Kind::Character => "c",
        };
        match minor {
            Some(minor) => write!(f, "{kind} {major}:{minor} {}", self.access),
            None => write!(f, "{kind} {major}:* {}", self.access),
        }
    }
}

const fn rule(devices: Devices, access: Access) -> Rule {
    Rule { devices, access }
}

/// The devices of every container, with what they are called in the documentation: those that systemd-nspawn makes, those of pseudo
/// terminals, and the inaccessible nodes with which a systemd in the container hides paths from its services. The numbers are assigned
/// in the kernel's `devices.txt`.
pub(super) const EVERY_CONTAINER: [(&str, Rule); 12] = [
    ("`/dev/null`", rule(Devices::character(1, 3), Access::ALL)),
    ("`/dev/zero`", rule(Devices::character(1, 5), Access::ALL)),
    ("`/dev/full`", rule(Devices::character(1, 7), Access::ALL)),
    ("`/dev/random`", rule(Devices::character(1, 8), Access::ALL)),
    (
        "`/dev/urandom`",
        rule(Devices::character(1, 9), Access::ALL),
    ),
    ("`/dev/tty`", rule(Devices::character(5, 0), Access::ALL)),
    ("`/dev/ptmx`", rule(Devices::character(5, 2), Access::ALL)),
    (
        "`/dev/pts/*`",
        rule(
            Devices {
                kind: Kind::Character,
                major: 136,
                minor: None,
            },
            Access::READ_WRITE,
        ),
    ),
    (
        "`/dev/net/tun`",
        rule(Devices::character(10, 200), Access::ALL),
    ),
    (
        "`/dev/fuse`",
        rule(Devices::character(10, 229), Access::ALL),
    ),
    (
        "`/run/systemd/inaccessible/chr`",
        rule(Devices::character(0, 0), Access::ALL),
    ),
    (
        "`/run/systemd/inaccessible/blk`",
        rule(
            Devices {
                kind: Kind::Block,
                major: 0,
                minor: Some(0),
            },
            Access::ALL,
        ),
    ),
];

/// What systemd-nspawn opens to mount a disk image.
const LOOP_CONTROL: Devices = Devices::character(10, 237);
const DEVICE_MAPPER_CONTROL: Devices = Devices::character(10, 236);
const LOOP: Devices = Devices::block(7);
const BLOCK_EXTENDED: Devices = Devices::block(259);

/// The most devices that one mount brings into a container. A `/dev` has some hundred at most.
const MAX_BOUND: usize = 1024;
/// The most files that are looked at for that: `/dev/shm` may have any number.
const MAX_SEEN: usize = 10_000;

/// The devices that one start needs, beside those of every container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceRules {
    /// What the container may use.
    container: Vec<Rule>,
    /// What systemd-nspawn uses until the container is up.
    nspawn: Vec<Rule>,
}

impl DeviceRules {
    /// The rules for these devices of the job and of device plugins, the device nodes among these mounts, and this root.
    pub fn new(devices: &[Device], mounts: &[Mount], root: &Root) -> Self {
        let named = devices
            .iter()
            .filter_map(|device| Some(rule(Devices::of_node(&device.host)?, Access::of(device))));
        // Nodes that are bound one by one are allowed as systemd-nspawn allows them in a scope of its own.
        let bound = mounts.iter().flat_map(|mount| {
            let access = match mount.read_only {
                true => Access::READ,
                false => Access::READ_WRITE,
            };
            let nodes = bound_devices(&mount.source).into_iter();
            nodes.map(move |devices| rule(devices, access))
        });
        Self {
            container: named.chain(bound).collect(),
            nspawn: match root {
                Root::Directory(_) => Vec::new(),
                Root::Image(image) => of_image(image),
            },
        }
    }

    /// Everything that the container may use.
    pub(super) fn container(&self) -> Vec<Rule> {
        let every = EVERY_CONTAINER.iter().map(|(_, rule)| *rule);
        merged(every.chain(self.container.iter().copied()))
    }

    /// What systemd-nspawn may use beyond that until the container is up.
    pub(super) fn only_nspawn(&self) -> Vec<Rule> {
        let own = self.container();
        let allowed = |devices| own.iter().find(|rule| rule.devices == devices);
        let beyond = merged(self.nspawn.iter().copied())
            .into_iter()
            .map(|wanted| {
                let allowed = allowed(wanted.devices).map_or(Access::NONE, |rule| rule.access);
                rule(wanted.devices, wanted.access.without(allowed))
            });
        beyond.filter(|rule| rule.access != Access::NONE).collect()
    }
}

/// The devices that a mount brings into the container: the node itself, or those in a directory of the host's `/dev`, such as `/dev/dri`. Links
/// in it are not followed: what they name is not in the container.
fn bound_devices(source: &Path) -> Vec<Devices> {
    let (mut found, mut seen) = (Vec::from_iter(Devices::of_place(source)), 0);
    let mut pending = Vec::from_iter(source.starts_with("/dev").then(|| source.to_owned()));
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(data) if data.is_dir() => pending.push(entry.path()),
                Ok(data) => found.extend(Devices::of(&data)),
                Err(_) => {}
            }
            seen += 1;
            if found.len() == MAX_BOUND || seen == MAX_SEEN {
                return found;
            }
        }
    }
    found
}

/// What systemd-nspawn needs for a disk image, as its unit template `systemd-nspawn@.service` has it, or for a block device with its
/// partitions.
fn of_image(image: &Path) -> Vec<Rule> {
    let devices = fs::read_to_string("/proc/devices").unwrap_or_default();
    let mapper = block_major(&devices, "device-mapper").map(Devices::block);
    let disk = Devices::of_node(image).map(|disk| Devices {
        minor: None,
        ..disk
    });
    let fixed = [LOOP_CONTROL, LOOP, BLOCK_EXTENDED, DEVICE_MAPPER_CONTROL];
    let all = fixed.into_iter().chain(mapper).chain(disk);
    all.map(|devices| rule(devices, Access::READ_WRITE))
        .collect()
}

/// The major number of a driver of block devices, from the text of `/proc/devices`.
fn block_major(text: &str, driver: &str) -> Option<u32> {
    let (_, block) = text.split_once("Block devices:")?;
    block.lines().find_map(|line| {
        let (number, name) = line.trim().split_once(' ')?;
        (name == driver).then(|| number.parse().ok())?
    })
}

/// The same rules with one for each device, in the order of the devices. One for a single device has what one for all of its major number
/// has: cgroup v1 allows only what one rule allows as a whole.
fn merged(rules: impl Iterator<Item = Rule>) -> Vec<Rule> {
    let mut all: BTreeMap<Devices, Access> = BTreeMap::new();
    for rule in rules {
        let access = all.entry(rule.devices).or_insert(Access::NONE);
        *access = access.and(rule.access);
    }
    let complete = all.iter().map(|(devices, access)| {
        let every_minor = Devices {
            minor: None,
            ..*devices
        };
        let more = all.get(&every_minor).copied().unwrap_or(Access::NONE);
        rule(*devices, access.and(more))
    });
    complete
        .filter(|rule| rule.access != Access::NONE)
        .collect()
}

/// A program that allows exactly what these rules allow together, as instructions of the kernel's BPF machine.
///
/// Its input is `struct bpf_cgroup_dev_ctx` of `linux/bpf.h`: kind of device and access in one number, then the major and the minor number.
/// It calculates what is allowed with the device without a jump for each rule: when a program is loaded the kernel follows both ways of
/// every jump, and would need several times as long.
pub(super) fn program(rules: &[Rule]) -> Vec<u64> {
    let mut program = vec![
        load(KIND, INPUT, 0),
        register(MOVE, ACCESS, KIND),
        number(AND, KIND, 0xffff),
        number(SHIFT_RIGHT, ACCESS, 16),
        load(MAJOR, INPUT, 4),
        load(MINOR, INPUT, 8),
        register(MOVE, DEVICE, MAJOR),
        number(SHIFT_LEFT, DEVICE, MINOR_BITS),
        register(OR, DEVICE, MINOR),
        number(MOVE, ALLOWED_BLOCK, 0),
        number(MOVE, ALLOWED_CHARACTER, 0),
    ];
    program.extend(rules.iter().filter_map(adding).flatten());
    program.extend([
        jump_if(EQUAL, KIND, BLOCK, 2),
        jump_if(NOT_EQUAL, KIND, CHARACTER, 6),
        register(MOVE, ALLOWED_BLOCK, ALLOWED_CHARACTER),
        // Any other access is denied, also one that no kernel has yet.
        number(XOR, ALLOWED_BLOCK, u32::MAX),
        register(AND, ACCESS, ALLOWED_BLOCK),
        jump_if(NOT_EQUAL, ACCESS, 0, 2),
        number(MOVE, RESULT, 1),
        EXIT,
        number(MOVE, RESULT, 0),
        EXIT,
    ]);
    program
}

/// Adds what a rule allows if the device is one of its devices. `None` for a device that the kernel can't have.
fn adding(rule: &Rule) -> Option<[u64; 6]> {
    let Devices { kind, major, minor } = rule.devices;
    if major >= 1 << (32 - MINOR_BITS) || minor.is_some_and(|minor| minor >= 1 << MINOR_BITS) {
        return None;
    }
    let (what, wanted) = match minor {
        Some(minor) => (DEVICE, major << MINOR_BITS | minor),
        None => (MAJOR, major),
    };
    let allowed = match kind {
        Kind::Block => ALLOWED_BLOCK,
        Kind::Character => ALLOWED_CHARACTER,
    };
    Some([
        register(MOVE, MATCHES, what),
        // The difference: 0, or a positive number of at most 32 bits. One less has its highest bit set only for 0.
        number(XOR_32, MATCHES, wanted),
        number(SUBTRACT, MATCHES, 1),
        number(SHIFT_RIGHT, MATCHES, 63),
        number(MULTIPLY, MATCHES, u32::from(rule.access.0)),
        register(OR, allowed, MATCHES),
    ])
}

/// How many bits a minor number has; a major number has the rest of 32.
const MINOR_BITS: u32 = 20;

/// The kernel's numbers of the kinds.
const BLOCK: u32 = 1;
const CHARACTER: u32 = 2;

/// The registers of the program.
const RESULT: u8 = 0;
const INPUT: u8 = 1;
const ACCESS: u8 = 2;
const KIND: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const DEVICE: u8 = 6;
const ALLOWED_BLOCK: u8 = 7;
const ALLOWED_CHARACTER: u8 = 8;
const MATCHES: u8 = 9;

/// Operations of the BPF machine: their codes in `linux/bpf.h`, on 64 bits unless they say otherwise, with a number as second operand.
const SUBTRACT: u8 = 0x17;
const MULTIPLY: u8 = 0x27;
const OR: u8 = 0x47;
const AND: u8 = 0x57;
const SHIFT_LEFT: u8 = 0x67;
const SHIFT_RIGHT: u8 = 0x77;
const XOR: u8 = 0xa7;
const MOVE: u8 = 0xb7;
/// The upper half of the result is 0.
const XOR_32: u8 = 0xa4;
const EQUAL: u8 = 0x15;
const NOT_EQUAL: u8 = 0x55;
/// Added to an operation: the second operand is a register.
const REGISTER: u8 = 0x08;
const EXIT: u64 = instruction(0x95, 0, 0, 0, 0);

/// Loads 32 bits at this offset from what `source` points to.
const fn load(target: u8, source: u8, offset: u16) -> u64 {
    instruction(0x61, target, source, offset, 0)
}

const fn register(operation: u8, target: u8, source: u8) -> u64 {
    instruction(operation | REGISTER, target, source, 0, 0)
}

/// The number is extended to 64 bits with its sign.
const fn number(operation: u8, target: u8, value: u32) -> u64 {
    instruction(operation, target, 0, 0, value)
}

/// Skips this many instructions.
const fn jump_if(comparison: u8, compared: u8, value: u32, skipped: u16) -> u64 {
    instruction(comparison, compared, 0, skipped, value)
}

/// `struct bpf_insn` as one number, on machines whose bytes are in little-endian order.
const fn instruction(operation: u8, target: u8, source: u8, offset: u16, value: u32) -> u64 {
    let registers = (target | source << 4) as u64;
    operation as u64 | registers << 8 | (offset as u64) << 16 | (value as u64) << 32
}

#[cfg(test)]
#[path = "devices_tests.rs"]
mod tests;
