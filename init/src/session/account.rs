//! The user of a session's command, from the user database of the container (`/etc/passwd`, `/etc/group`), which is not trusted: whatever
//! it says, the result is a user of the container. No name service is asked, because an image need not have one.

use std::fs::File;
use std::io::{self, Read};

use nspawn_init::{StartError, Step};
use rustix::fs::{Gid, Uid};
use rustix::process::geteuid;

use super::failed;

const USERS: &str = "/etc/passwd";
const GROUPS: &str = "/etc/group";

/// Longer files are cut off.
const MAX_BYTES: u64 = 16 * 1024 * 1024;

/// A user and the groups it is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Account {
    pub(super) name: String,
    /// `None`: that of this process, which is no root.
    pub(super) uid: Option<Uid>,
    pub(super) gid: Option<Gid>,
    pub(super) groups: Vec<Gid>,
    pub(super) home: String,
    pub(super) shell: String,
}

impl Account {
    /// The user that is requested as `NAME`, `UID`, `NAME:GROUP` and so on; root by default.
    pub(super) fn find(requested: Option<&str>) -> Result<Self, StartError> {
        let Some(requested) = requested else {
            return Ok(match geteuid().is_root() {
                true => Self::root(&read(USERS).unwrap_or_default()),
                // Started without privileges, there is no other user.
                false => Self {
                    uid: None,
                    gid: None,
                    ..Self::root("")
                },
            });
        };
        let unreadable = |file| move |error: io::Error| failed(Step::User, file)(error);
        let users = read(USERS).map_err(unreadable(USERS))?;
        let groups = read(GROUPS).or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => Ok(String::new()),
            _ => Err(unreadable(GROUPS)(error)),
        })?;
        Self::of(requested, &users, &groups)
    }

    fn root(users: &str) -> Self {
        let root = |fields: &Fields<'_>| fields.number(2) == Some(0);
        lines(users).find(root).map_or_else(
            || Self {
                name: "root".to_owned(),
                uid: Some(Uid::ROOT),
                gid: Some(Gid::ROOT),
                groups: Vec::new(),
                home: "/root".to_owned(),
                shell: String::new(),
            },
            |fields| Self::from_fields(&fields, Uid::ROOT),
        )
    }

    fn from_fields(fields: &Fields<'_>, uid: Uid) -> Self {
        Self {
            name: fields.text(0).to_owned(),
            uid: Some(uid),
            gid: Some(gid(fields.number(3)).unwrap_or(Gid::ROOT)),
            groups: Vec::new(),
            home: fields.text(5).to_owned(),
            shell: fields.text(6).to_owned(),
        }
    }

    fn of(requested: &str, users: &str, groups: &str) -> Result<Self, StartError> {
        let unknown = || failed(Step::User, requested)(rustix::io::Errno::NOENT);
        let (user, group) = match requested.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (requested, None),
        };
        let named = |fields: &Fields<'_>| fields.text(0) == user && !user.is_empty();
        let number: Option<u32> = user.parse().ok();
        let numbered = |fields: &Fields<'_>| number.is_some() && fields.number(2) == number;
        let entry = lines(users)
            .find(named)
            .or_else(|| lines(users).find(numbered));
        let mut account = match (entry, uid(number)) {
            (Some(fields), _) => {
                let uid = uid(fields.number(2)).ok_or_else(unknown)?;
                Self::from_fields(&fields, uid)
            }
            (None, Some(uid)) => Self {
                name: String::new(),
                uid: Some(uid),
                gid: Some(Gid::ROOT),
                groups: Vec::new(),
                home: "/".to_owned(),
                shell: String::new(),
            },
            (None, None) => return Err(unknown()),
        };
        match group {
            Some(group) => {
                let named = |fields: &Fields<'_>| fields.text(0) == group && !group.is_empty();
                let entry = lines(groups).find(named);
                let number = entry.map_or_else(|| group.parse().ok(), |fields| fields.number(2));
                account.gid = Some(gid(number).ok_or_else(unknown)?);
                account.groups = account.gid.into_iter().collect();
            }
            None => account.add_groups(groups),
        }
        Ok(account)
    }

    /// The groups that list the user as a member, after the user's own.
    fn add_groups(&mut self, groups: &str) {
        let name = self.name.clone();
        let member = |fields: &Fields<'_>| {
            let mut members = fields.text(3).split(',');
            !name.is_empty() && members.any(|member| member == name)
        };
        let listed = lines(groups).filter(member);
        let listed = listed.filter_map(|fields| gid(fields.number(2)));
        let mut all: Vec<Gid> = self.gid.into_iter().chain(listed).collect();
        all.dedup();
        self.groups = all;
    }
}

/// All ids but the one that means "unchanged" to the kernel.
fn uid(number: Option<u32>) -> Option<Uid> {
    number.filter(|id| *id != u32::MAX).map(Uid::from_raw)
}

fn gid(number: Option<u32>) -> Option<Gid> {
    number.filter(|id| *id != u32::MAX).map(Gid::from_raw)
}

/// A line of a database.
struct Fields<'a>(Vec<&'a str>);

impl Fields<'_> {
    fn text(&self, index: usize) -> &str {
        self.0.get(index).copied().unwrap_or_default()
    }

    fn number(&self, index: usize) -> Option<u32> {
        self.text(index).parse().ok()
    }
}

fn lines(text: &str) -> impl Iterator<Item = Fields<'_>> {
    text.lines().map(|line| Fields(line.split(':').collect()))
}

/// Reads a regular file; opening anything else might block.
fn read(path: &str) -> io::Result<String> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = File::options()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::from_raw_os_error(nix::libc::EINVAL));
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const USERS: &str = "root:x:0:0:root:/root:/bin/bash\nbroken\nwww:x:33:34::/var/www:/bin/false\n4711:x:5:6::/five:\nmax:x:4294967295:1:::\n";
    const GROUPS: &str = "root:x:0:\ntty:x:5:www\nwww:x:34:\naudio:x:29:alice,www\n";

    fn account(requested: &str) -> Option<(u32, u32, Vec<u32>, String)> {
        let account = Account::of(requested, USERS, GROUPS).ok()?;
        Some((
            account.uid?.as_raw(),
            account.gid?.as_raw(),
            account.groups.iter().map(|group| group.as_raw()).collect(),
            account.home,
        ))
    }

    #[test]
    fn a_user_is_found_by_name_or_number() {
        let home = |path: &str| path.to_owned();
        let www = Some((33, 34, vec![34, 5, 29], home("/var/www")));
        for (requested, expected) in [
            ("root", Some((0, 0, vec![0], home("/root")))),
            ("www", www.clone()),
            ("33", www),
            ("www:audio", Some((33, 29, vec![29], home("/var/www")))),
            ("www:7", Some((33, 7, vec![7], home("/var/www")))),
            ("4711", Some((5, 6, vec![6], home("/five")))),
            ("1000", Some((1000, 0, vec![0], home("/")))),
            ("nobody", None),
            ("max", None),
            ("4294967295", None),
            ("www:none", None),
            ("www:", None),
            ("", None),
            (":0", None),
        ] {
            assert_eq!(account(requested), expected, "{requested:?}");
        }
    }

    #[test]
    fn an_image_without_users_has_root() {
        let root = Account::root("");
        assert_eq!((root.uid, root.home), (Some(Uid::ROOT), "/root".to_owned()));
    }
}
