//! The unix socket on which one host is served: made so that nobody else can ever connect, removed at the end. Refuses to
//! reuse a name, because another plugin process of the same host may still be alive behind it.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::{Gid, Group};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;

/// How long nobody is let in after somebody could not be.
const BREATH: Duration = Duration::from_millis(100);

/// Why the socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// A step of making it failed.
    #[error("{step} {path}")]
    Socket {
        /// What was being done, as a verb.
        step: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The group the host named does not exist.
    #[error("PLUGIN_UNIX_SOCKET_GROUP: {0:?} is neither a group nor a number")]
    UnknownGroup(String),
}

/// The path of a socket; dropping it removes the file.
#[derive(Debug)]
pub(super) struct SocketPath(PathBuf);

impl SocketPath {
    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for SocketPath {
    fn drop(&mut self) {
        // A file that is gone already is what is wanted; nobody is left to tell about any other trouble.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Makes a listening socket of a new name in `dir`, for this user alone or for `group` as well.
///
/// It is bound inside a private directory, given its mode and owner there and only then moved to its place, so that there is
/// no moment in which others could connect, and no umask to change under other threads.
pub(super) fn listen(
    dir: &Path,
    group: Option<&str>,
) -> Result<(UnixListener, SocketPath), ListenError> {
    let failed = |step, path: &Path| {
        let path = path.to_owned();
        move |source| ListenError::Socket { step, path, source }
    };
    let group = group.map(find_group).transpose()?;
    let template = dir.join("plugin-nspawn-XXXXXX");
    let private = nix::unistd::mkdtemp(&template)
        .map_err(io::Error::from)
        .map_err(failed("make a directory like", &template))?;
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

/// Everybody who connects, in their order. Who can't be let in, as when there are no descriptors left, waits and keeps nobody
/// awake.
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
                        tracing::warn!(%error, "nobody can be let in");
                        tokio::time::sleep(BREATH).await;
                    }
                },
                () = sender.closed() => return,
            }
        }
    });
    ReceiverStream::new(receiver)
}

fn find_group(name: &str) -> Result<Gid, ListenError> {
    if let Ok(number) = name.parse() {
        return Ok(Gid::from_raw(number));
    }
    match Group::from_name(name) {
        Ok(Some(group)) => Ok(group.gid),
        _ => Err(ListenError::UnknownGroup(name.to_owned())),
    }
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
    async fn a_group_may_connect_when_the_host_says_so() {
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
    async fn what_fails_leaves_nothing() {
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
