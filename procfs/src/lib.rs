//! The only parser of what the kernel writes about processes: mount tables (`/proc/<pid>/mountinfo`), `/proc/<pid>/status`,
//! `/proc/<pid>/stat` and `/proc/<pid>/limits`, and of the addresses in `/proc/<pid>/net`. A crate, because the driver and the development agent both read them. Mount tables are parsed as bytes, because a
//! path need not be UTF-8.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

mod addresses;
mod limits;

pub use addresses::parse_addresses;
pub use limits::{Limit, parse_limits};

/// One line of `/proc/<pid>/mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The number of the mount.
    pub id: u32,
    /// The number of the mount that its mount point is on. That of the root is not in the table.
    pub parent: u32,
    /// The device of the file system, major and minor number.
    pub device: (u32, u32),
    /// The directory of the file system that is mounted here.
    pub root: PathBuf,
    /// The mount point, as the process sees it.
    pub target: PathBuf,
    /// What the mount forbids, whatever the file system does.
    pub forbids: Forbidden,
    /// The type of the file system, such as `ext4`.
    pub kind: String,
    /// The options of the file system itself, such as `name=systemd` of a cgroup v1 hierarchy.
    pub options: Vec<String>,
}

/// What a mount forbids.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Forbidden {
    /// To write (`ro`).
    pub write: bool,
    /// To gain privileges by executing programs (`nosuid`).
    pub set_user_id: bool,
    /// To use device nodes (`nodev`).
    pub devices: bool,
    /// To execute programs (`noexec`).
    pub execution: bool,
}

impl Forbidden {
    fn by(options: &[u8]) -> Self {
        let has = |option: &[u8]| {
            options
                .split(|byte| *byte == b',')
                .any(|word| word == option)
        };
        Self {
            write: has(b"ro"),
            set_user_id: has(b"nosuid"),
            devices: has(b"nodev"),
            execution: has(b"noexec"),
        }
    }
}

impl Mount {
    /// Whether the file system has this option.
    pub fn has_option(&self, option: &str) -> bool {
        self.options.iter().any(|given| given == option)
    }
}

/// The mounts of the calling process, in the order in which they were made.
pub fn own_mounts() -> io::Result<Vec<Mount>> {
    read_mounts(Path::new("/proc/self/mountinfo"))
}

/// The mounts of another process, in the order in which they were made.
pub fn mounts_of(pid: i32) -> io::Result<Vec<Mount>> {
    read_mounts(&PathBuf::from(format!("/proc/{pid}/mountinfo")))
}

/// The device numbers, major and minor, of every file system that is mounted in the mount namespace of the calling process. Reads
/// nothing else of the table, which has a line for each of the host's mounts.
pub fn own_mounted_devices() -> io::Result<HashSet<(u32, u32)>> {
    Ok(mounted_devices(&std::fs::read("/proc/self/mountinfo")?))
}

fn mounted_devices(table: &[u8]) -> HashSet<(u32, u32)> {
    let of_line = |line: &[u8]| device(line.split(|byte| *byte == b' ').nth(2)?);
    table
        .split(|byte| *byte == b'\n')
        .filter_map(of_line)
        .collect()
}

fn device(word: &[u8]) -> Option<(u32, u32)> {
    let (major, minor) = std::str::from_utf8(word).ok()?.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The mounts of a `mountinfo` file whose mount points are wanted, in the order in which they were made. Holds one line of the others at a time.
pub fn mounts_at(table: &Path, wanted: impl Fn(&Path) -> bool) -> io::Result<Vec<Mount>> {
    wanted_mounts(BufReader::new(File::open(table)?), wanted)
}

fn wanted_mounts(table: impl BufRead, wanted: impl Fn(&Path) -> bool) -> io::Result<Vec<Mount>> {
    let mut found = Vec::new();
    for line in table.split(b'\n') {
        let line = line?;
        let target = line.split(|byte| *byte == b' ').nth(4).map(path);
        if target.is_some_and(|target| wanted(&target)) {
            found.extend(mount(&line));
        }
    }
    Ok(found)
}

fn read_mounts(table: &Path) -> io::Result<Vec<Mount>> {
    Ok(parse_mountinfo(&std::fs::read(table)?))
}

/// Parses the text of a `mountinfo` file. Lines that can't be parsed are skipped.
pub fn parse_mountinfo(table: &[u8]) -> Vec<Mount> {
    table
        .split(|byte| *byte == b'\n')
        .filter_map(mount)
        .collect()
}

/// `36 35 98:0 ROOT TARGET OPTIONS [TAG…] - TYPE SOURCE SUPER-OPTIONS`: any number of tags stands between the options and the
/// dash.
fn mount(line: &[u8]) -> Option<Mount> {
    let words: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let dash = words.iter().position(|word| *word == b"-")?;
    let text = |word: &[u8]| String::from_utf8_lossy(word).into_owned();
    let number = |index: usize| -> Option<u32> { text(words.get(index)?).parse().ok() };
    Some(Mount {
        id: number(0)?,
        parent: number(1)?,
        device: device(words.get(2)?)?,
        root: path(words.get(3)?),
        target: path(words.get(4)?),
        forbids: Forbidden::by(words.get(5)?),
        kind: text(words.get(dash + 1)?),
        options: words
            .get(dash + 3)?
            .split(|byte| *byte == b',')
            .map(text)
            .collect(),
    })
}

fn path(word: &[u8]) -> PathBuf {
    OsString::from_vec(unescape(word)).into()
}

/// The kernel writes blanks, line ends, `#` and backslashes of a path as a backslash and three octal digits.
fn unescape(word: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((&first, after)) = rest.split_first() {
        match (first, after.get(..3).and_then(octal)) {
            (b'\\', Some(byte)) => {
                plain.push(byte);
                rest = &after[3..];
            }
            _ => {
                plain.push(first);
                rest = after;
            }
        }
    }
    plain
}

fn octal(digits: &[u8]) -> Option<u8> {
    let plain = digits.iter().all(u8::is_ascii_digit);
    u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8)
        .ok()
        .filter(|_| plain)
}

/// A field of the text of a `/proc/<pid>/status` file, such as `SigCgt`, without the blanks around it.
pub fn status_field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = status.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = lines.find(|(found, _)| *found == name)?;
    Some(value.trim())
}

/// A set of signals in the text of a `/proc/<pid>/status` file, such as `SigCgt`: signal n is bit n - 1.
pub fn signal_mask(status: &str, name: &str) -> Option<u64> {
    u64::from_str_radix(status_field(status, name)?, 16).ok()
}

/// What is used of a `/proc/<pid>/stat` file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// Its state, such as `S`, or `Z` for one that has exited and has not been waited for.
    pub state: char,
    /// The pid of its parent.
    pub parent: i32,
    /// The id of its session.
    pub session: i32,
    /// CPU time of all its threads in user mode, in clock ticks.
    pub user: u64,
    /// CPU time of all its threads in the kernel, in clock ticks.
    pub system: u64,
    /// When it started, in clock ticks since boot.
    pub start: u64,
    /// How many threads it has; 0 once it has been waited for.
    pub threads: u32,
    /// Whether it does not run, if the reader may see everything about it; otherwise false. From Linux 5.16 on.
    pub is_shown_asleep: bool,
    /// The raw wait status of one that has exited; 0 if the reader may not see it.
    pub status: i32,
}

/// Parses the text of a `/proc/<pid>/stat` file. The second field is the name of the process in parentheses, which may contain
/// anything, so the text is cut at the last closing one.
pub fn parse_stat(stat: &str) -> Option<Stat> {
    let (_, rest) = stat.rsplit_once(')')?;
    // The first of them is the third field.
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3).copied();
    Some(Stat {
        state: field(3)?.chars().next()?,
        parent: field(4)?.parse().ok()?,
        session: field(6)?.parse().ok()?,
        user: field(14)?.parse().ok()?,
        system: field(15)?.parse().ok()?,
        start: field(22)?.parse().ok()?,
        threads: field(20)?.parse().ok()?,
        is_shown_asleep: field(35)? == "1",
        status: field(52)?.parse().ok()?,
    })
}

/// What is used of a `/proc/<pid>/statm` file: the memory of a process, in pages. From Linux 6.17 on it is exact; `stat` has an estimate, which
/// may be 0 for a small process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statm {
    /// Resident memory, shared pages included.
    pub resident: u64,
    /// What is resident without what is backed by a file or shared. The same as `RssAnon` of `status`, which takes the kernel several times as
    /// long to write.
    pub anonymous: u64,
}

/// Parses the text of a `/proc/<pid>/statm` file.
pub fn parse_statm(statm: &str) -> Option<Statm> {
    let mut fields = statm.split_ascii_whitespace().skip(1);
    let resident: u64 = fields.next()?.parse().ok()?;
    let shared: u64 = fields.next()?.parse().ok()?;
    Some(Statm {
        resident,
        anonymous: resident.saturating_sub(shared),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;
    use std::os::unix::ffi::OsStrExt as _;

    #[test]
    fn a_line_is_parsed_with_any_optional_fields() {
        let table = b"24 30 0:22 / /sys/fs/cgroup/systemd rw,nosuid shared:9 master:2 - cgroup cgroup rw,xattr,name=systemd\n\
            36 35 98:0 /mnt1 /mnt2 rw,noatime - ext3 /dev/root rw,errors=continue\n\
            nonsense\n";
        let mounts = parse_mountinfo(table);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].target, Path::new("/sys/fs/cgroup/systemd"));
        assert_eq!(mounts[0].kind, "cgroup");
        assert!(mounts[0].has_option("name=systemd") && !mounts[0].has_option("name"));
        assert_eq!(mounts[1].root, Path::new("/mnt1"));
        assert_eq!(mounts[1].kind, "ext3");
    }

    #[rstest]
    #[case(br"/a\040b", b"/a b")]
    #[case(br"/tab\011line\012", b"/tab\tline\n")]
    #[case(br"/back\134slash\043", br"/back\slash#")]
    #[case(br"/twice\134040", br"/twice\040")]
    #[case(br"/sign\+12", br"/sign\+12")]
    #[case(br"/cut\04", br"/cut\04")]
    #[case(br"/no\999digits\", br"/no\999digits\")]
    #[case(b"/\xff\xfe", b"/\xff\xfe")]
    fn escapes_are_decoded(#[case] written: &[u8], #[case] plain: &[u8]) {
        let line = [b"1 2 0:1 / ", written, b" rw - tmpfs none rw"].concat();
        let mounts = parse_mountinfo(&line);
        assert_eq!(mounts[0].target.as_os_str().as_bytes(), plain);
    }

    #[test]
    fn the_devices_of_all_mounts_are_known() {
        let table = b"24 30 0:22 / /sys rw shared:9 - sysfs sysfs rw\n36 35 98:1048 / /mnt rw - ext3 /dev/root rw\nnonsense 1 2\n";
        assert_eq!(mounted_devices(table), [(0, 22), (98, 1048)].into());
        assert_eq!(
            own_mounted_devices().unwrap().is_empty(),
            own_mounts().unwrap().is_empty()
        );
    }

    #[test]
    fn a_device_is_read_with_its_mount() {
        let table = b"36 35 98:1048 / /mnt rw - ext3 /dev/root rw\n37 35 98 / /bad rw - ext3 /dev/root rw\n";
        let mounts = parse_mountinfo(table);
        assert_eq!(mounts.len(), 1);
        assert_eq!(mounts[0].device, (98, 1048));
    }

    #[test]
    fn only_the_mounts_that_are_wanted_are_kept() {
        let table = b"36 35 98:0 / /a\\040b/c rw - ext3 /dev/root rw\n37 35 98:0 / /a rw - ext3 /dev/root rw\n\nnonsense\n";
        let found = wanted_mounts(&table[..], |target| target.starts_with("/a b")).unwrap();
        let targets: Vec<_> = found.iter().map(|mount| &*mount.target).collect();
        assert_eq!(targets, [Path::new("/a b/c")]);
    }

    #[test]
    fn this_process_has_a_root() {
        let mounts = own_mounts().unwrap();
        assert!(mounts.iter().any(|mount| mount.target == Path::new("/")));
    }

    #[test]
    fn a_process_s_name_may_look_like_the_rest_of_its_line() {
        let line = "7 (a) S 1 (b) Z 3 4 5 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 98765 123 4 5 \
            94000 0 0 0 0 0 0 0 0 1 0 0 17 1 0 0 0 0 0 0 0 0 0 0 0 0 768\n";
        let wanted = Stat {
            state: 'Z',
            parent: 3,
            session: 5,
            user: 5,
            system: 6,
            start: 98765,
            threads: 1,
            is_shown_asleep: true,
            status: 768,
        };
        assert_eq!(parse_stat(line), Some(wanted));
        assert_eq!(parse_stat("7 (a) S 1 2"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[rstest]
    #[case("1500 700 300 20 0 400 0\n", Some((700, 400)))]
    #[case("1500 3 4 20 0 400 0\n", Some((3, 0)))]
    #[case("1500 700", None)]
    #[case("", None)]
    fn anonymous_memory_is_resident_and_not_shared(
        #[case] text: &str,
        #[case] wanted: Option<(u64, u64)>,
    ) {
        let statm = parse_statm(text);
        assert_eq!(statm.map(|found| (found.resident, found.anonymous)), wanted);
    }

    #[test]
    fn a_field_of_the_status_is_found_by_its_whole_name() {
        let status = "Name:\ta: b\nSigCgtX:\t1\nSigCgt:\t0000000000004002\nRssAnon:\t     812 kB\n";
        assert_eq!(status_field(status, "Name"), Some("a: b"));
        assert_eq!(status_field(status, "RssAnon"), Some("812 kB"));
        assert_eq!(status_field(status, "Sig"), None);
        assert_eq!(signal_mask(status, "SigCgt"), Some(0x4002));
        assert_eq!(signal_mask(status, "Name"), None);
    }
}
