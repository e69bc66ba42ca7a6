//! The unix socket on which the plugin process serves one host: created so that no other user can ever connect, removed on exit.
//! Never reuses a name, because another plugin process of the same host may still be listening on it.

use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::Gid;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;

/// How long to pause after a failed `accept`.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// Prefix of the names of our sockets.
const PREFIX: &str = "plugin-nspawn-";
/// The longest directory for a socket, in bytes: the kernel accepts socket paths of up to 107 bytes, and the name needs up to 26.
pub(super) const LONGEST_DIR: usize = 107 - 26;
/// A private directory younger than this may belong to a plugin that is just creating its socket.
const STALE_AFTER: Duration = Duration::from_secs(60);

/// Why the socket could not be created.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// A step of creating it failed.
    #[error("{step} {path}")]
    Socket {
        /// The step, as a verb.
        step: &'static str,
        /// The file or directory of the step.
        path: PathBuf,
        /// The error of the step.
        #[source]
        source: io::Error,
    },
    /// The group that the host named does not exist.
    #[error("PLUGIN_UNIX_SOCKET_GROUP: {0:?} is not the name or the number of a group")]
    UnknownGroup(String),
}

/// The path of a socket. Dropping it removes the file.
#[derive(Debug)]
pub(super) struct SocketPath(PathBuf);

impl SocketPath {
    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for SocketPath {
    fn drop(&mut self) {
        // A missing file is the desired state, and on shutdown no other error can be handled.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Creates a listening socket with a new name in `dir`, accessible to this user only, or to `group` as well.
///
/// The socket is bound inside a private directory, gets its mode and group there and is only then moved to its final path. So
/// other users can't connect at any moment, and the umask, which other threads share, need not change.
pub(super) fn listen(
    dir: &Path,
    group: Option<&str>,
) -> Result<(UnixListener, SocketPath), ListenError> {
    let failed = |step, path: &Path| {
        let path = path.to_owned();
        move |source| ListenError::Socket { step, path, source }
    };
    let group = group.map(find_group).transpose()?;
    let template = dir.join(format!("{PREFIX}XXXXXX"));
    let private = nix::unistd::mkdtemp(&template)
        .map_err(io::Error::from)
        .map_err(failed("create a directory from the template", &template))?;
    let inside = private.join("s");
    let made = (|| {
        let listener = UnixListener::bind(&inside).map_err(failed("bind", &inside))?;
        let mode = if group.is_some() { 0o660 } else { 0o600 };
        std::fs::set_permissions(&inside, std::fs::Permissions::from_mode(mode))
            .map_err(failed("set the mode of", &inside))?;
        if let Some(group) = group {
            std::os::unix::fs::chown(&inside, None, Some(group.as_raw()))
                .map_err(failed("set the group of", &inside))?;
        }
        let place = private.with_extension("sock");
        std::fs::rename(&inside, &place).map_err(failed("move the socket to", &place))?;
        Ok((listener, SocketPath(place)))
    })();
    if made.is_err() {
        let _ = std::fs::remove_file(&inside);
    }
    let _ = std::fs::remove_dir(&private);
    made
}

/// Accepted connections, in order. When `accept` fails, for example because no descriptors are left, the connections stay in the
/// backlog and the next attempt follows after [`ACCEPT_RETRY_DELAY`], without a busy loop.
pub(super) fn connections(
    listener: UnixListener,
) -> impl Stream<Item = io::Result<UnixStream>> + Send {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        if sender.send(Ok(stream)).await.is_err() {
                            return;
                        }
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a connection can't be accepted: check the limit of open files");
                        tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
                    }
                },
                () = sender.closed() => return,
            }
        }
    });
    ReceiverStream::new(receiver)
}

/// Removes the sockets that killed plugins left in `dir`: those with our name and owner that refuse connections. A live plugin
/// listens before its socket appears under its final name. Symbolic links are not followed. A private directory in which a socket
/// was being created is removed only if it is old and contains nothing else.
pub(super) fn remove_stale_sockets(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name();
        let removed = match name.to_str().and_then(classify) {
            Some(StaleEntry::Socket) if is_dead(&path) => std::fs::remove_file(&path),
            Some(StaleEntry::Directory)
                if is_old(&path) && is_mine(&path, |kind| kind.is_dir()) =>
            {
                let inside = path.join("s");
                if is_dead(&inside) {
                    let _ = std::fs::remove_file(&inside);
                }
                std::fs::remove_dir(&path)
            }
            _ => continue,
        };
        let path = path.display();
        match removed {
            Ok(()) => tracing::info!(%path, "removed the socket of a plugin that was killed"),
            Err(error) => {
                tracing::warn!(%path, %error, "the socket of a killed plugin can't be removed")
            }
        }
    }
}

enum StaleEntry {
    Directory,
    Socket,
}

/// Which of our leftovers can have this name.
fn classify(name: &str) -> Option<StaleEntry> {
    let rest = name.strip_prefix(PREFIX)?;
    let (unique, made) = match rest.strip_suffix(".sock") {
        Some(unique) => (unique, StaleEntry::Socket),
        None => (rest, StaleEntry::Directory),
    };
    let ours = unique.len() == 6 && unique.bytes().all(|byte| byte.is_ascii_alphanumeric());
    ours.then_some(made)
}

fn is_dead(socket: &Path) -> bool {
    // ECONNREFUSED: the socket is not merely busy, no process listens on it any more.
    let refused = || {
        std::os::unix::net::UnixStream::connect(socket)
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    };
    is_mine(socket, |kind| kind.is_socket()) && refused()
}

fn is_mine(path: &Path, is: impl Fn(std::fs::FileType) -> bool) -> bool {
    path.symlink_metadata()
        .is_ok_and(|about| is(about.file_type()) && about.uid() == nix::unistd::geteuid().as_raw())
}

fn is_old(path: &Path) -> bool {
    let made = path
        .symlink_metadata()
        .and_then(|about| about.modified())
        .map(|made| made.elapsed());
    matches!(made, Ok(Ok(age)) if age > STALE_AFTER)
}

/// A group by number or name. getent(1) knows those of directory services too; a program that is linked statically can't ask them itself.
fn find_group(name: &str) -> Result<Gid, ListenError> {
    if let Ok(number) = name.parse() {
        return Ok(Gid::from_raw(number));
    }
    let listed = std::fs::read_to_string("/etc/group").unwrap_or_default();
    let found = gid_in(&listed, name).or_else(|| gid_in(&getent(name).unwrap_or_default(), name));
    found.ok_or_else(|| ListenError::UnknownGroup(name.to_owned()))
}

/// The number of a group among lines in the form of group(5).
fn gid_in(lines: &str, name: &str) -> Option<Gid> {
    let mut found = lines.lines().filter_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == name).then(|| fields.nth(1)?.parse().ok())?
    });
    found.next().map(Gid::from_raw)
}

#[expect(
    clippy::disallowed_methods,
    reason = "it ends by itself, before there are tasks"
)]
fn getent(name: &str) -> std::io::Result<String> {
    let output = std::process::Command::new("getent")
        .args(["group", name])
        .stdin(std::process::Stdio::null())
        .output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<PathBuf> {
        std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect()
    }

    #[tokio::test]
    async fn the_socket_is_private_reachable_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (listener, place) = listen(dir.path(), None).unwrap();
        assert_eq!(
            names(dir.path()),
            [place.path()],
            "the socket and nothing beside it"
        );
        let mode = std::fs::metadata(place.path())
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        let (client, server) = tokio::join!(UnixStream::connect(place.path()), listener.accept());
        assert!(client.is_ok() && server.is_ok());
        drop(place);
        assert!(names(dir.path()).is_empty());
    }

    #[tokio::test]
    async fn a_group_may_connect_if_the_host_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let own = nix::unistd::getgid().to_string();
        let (_listener, place) = listen(dir.path(), Some(&own)).unwrap();
        let mode = std::fs::metadata(place.path())
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o660);
    }

    #[tokio::test]
    async fn only_stale_sockets_of_this_driver_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let dead = |name: &str| drop(std::os::unix::net::UnixListener::bind(at(name)).unwrap());
        let (_listener, alive) = listen(dir.path(), None).unwrap();
        for name in [
            "plugin-nspawn-Dead01.sock",
            "plugin-nspawn-longer7.sock",
            "plugin-other1.sock",
        ] {
            dead(name);
        }
        std::fs::write(at("plugin-nspawn-File01.sock"), "").unwrap();
        std::os::unix::fs::symlink(
            at("plugin-nspawn-Dead01.sock"),
            at("plugin-nspawn-Link01.sock"),
        )
        .unwrap();
        for name in [
            "plugin-nspawn-Half01",
            "plugin-nspawn-Full01",
            "plugin-nspawn-Young1",
        ] {
            std::fs::create_dir(at(name)).unwrap();
        }
        dead("plugin-nspawn-Half01/s");
        dead("plugin-nspawn-Young1/s");
        std::fs::write(at("plugin-nspawn-Full01/else"), "").unwrap();
        let mut before = names(dir.path());
        for path in &before {
            if path.extension().is_none() && !path.ends_with("plugin-nspawn-Young1") {
                age(path);
            }
        }
        remove_stale_sockets(dir.path());
        let mut after = names(dir.path());
        before.retain(|path| {
            !["plugin-nspawn-Dead01.sock", "plugin-nspawn-Half01"]
                .iter()
                .any(|name| path.ends_with(name))
        });
        before.sort();
        after.sort();
        assert_eq!(after, before);
        assert!(UnixStream::connect(alive.path()).await.is_ok());
    }

    /// Sets the times of a file far into the past.
    fn age(path: &Path) {
        use nix::sys::stat::{UtimensatFlags, utimensat};
        let then = nix::sys::time::TimeSpec::new(1_000_000_000, 0);
        utimensat(
            nix::fcntl::AT_FDCWD,
            path,
            &then,
            &then,
            UtimensatFlags::NoFollowSymlink,
        )
        .unwrap();
    }

    #[test]
    fn a_group_is_found_by_name_or_number() {
        let lines = "root:x:0:\nplugins:x:990:a,b\nbroken:x\n";
        assert_eq!(gid_in(lines, "plugins"), Some(Gid::from_raw(990)));
        for other in ["plug", "broken", "", "990"] {
            assert_eq!(gid_in(lines, other), None, "{other}");
        }
        assert_eq!(find_group("990").unwrap(), Gid::from_raw(990));
        assert_eq!(find_group("root").unwrap(), Gid::from_raw(0));
    }

    #[tokio::test]
    async fn a_failed_listen_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let unknown = listen(dir.path(), Some("no such group")).unwrap_err();
        assert!(matches!(unknown, ListenError::UnknownGroup(_)));
        let deep = dir.path().join("d".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let long = listen(&deep, None).unwrap_err();
        assert!(
            matches!(long, ListenError::Socket { step: "bind", .. }),
            "{long:?}"
        );
        assert!(names(&deep).is_empty());
    }
}
