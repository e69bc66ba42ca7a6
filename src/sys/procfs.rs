//! The only parser of the kernel's mount tables (`/proc/<pid>/mountinfo`). Works on bytes, because a path need not be UTF-8, and
//! decodes the kernel's octal escapes.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

/// One line of `/proc/<pid>/mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The directory of the file system that is mounted here.
    pub root: PathBuf,
    /// The mount point, as the process sees it.
    pub target: PathBuf,
    /// The type of the file system, such as `ext4`.
    pub kind: String,
    /// The options of the file system itself, such as `name=systemd` of a cgroup v1 hierarchy.
    pub options: Vec<String>,
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
    Some(Mount {
        root: path(words.get(3)?),
        target: path(words.get(4)?),
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
    fn this_process_has_a_root() {
        let mounts = own_mounts().unwrap();
        assert!(mounts.iter().any(|mount| mount.target == Path::new("/")));
    }
}
