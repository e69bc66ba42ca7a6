//! A minimal udev for a machine without one, sufficient for systemd-nspawn before 258 and a disk image without partitions: a process in the
//! same network namespace that listens on udev's socket. Visible only to one plugin and its containers; the machine's `/run` is not
//! changed.

use std::fs;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;

use dev_agent::Plugin;
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, UnixAddr, bind, listen, shutdown, socket,
};
use serde_json::Value;

use crate::stage::Stage;

/// Where systemd-nspawn looks for udev.
const CONTROL: &str = "/run/udev/control";

/// Mounts a directory over `/run` that has the content of `/run` and the fake udev.
const SCRIPT: &str = r#"exec unshare --mount sh -c '
    set -e
    mkdir -p /run/systemd/nspawn "$2"
    mount --rbind /run "$2"
    mount -t tmpfs -o mode=0755 tmpfs /run
    for place in "$2"/*/; do
        mkdir -p "/run/$(basename "$place")"
        mount --rbind "$place" "/run/$(basename "$place")"
    done
    umount -l "$2"
    rmdir "$2"
    mkdir /run/udev
    mount --bind "$1" /run/udev
    exec "$0"' "$0" "$1" "$2""#;

/// The listening socket; closed on drop.
#[derive(Debug)]
pub struct Udev {
    /// None if the machine has udev itself.
    listener: Option<Arc<UnixListener>>,
}

impl Drop for Udev {
    fn drop(&mut self) {
        if let Some(listener) = &self.listener {
            // Ends the thread that accepts.
            let _ = shutdown(listener.as_raw_fd(), Shutdown::Both);
        }
    }
}

/// Accepts connections for as long as the socket listens, and keeps each until its peer closes it. A connection that waits to be accepted
/// would keep the peer's cgroup from being freed.
fn serve(listener: &UnixListener) {
    for connection in listener.incoming() {
        let Ok(mut connection) = connection else {
            return;
        };
        while connection
            .read(&mut [0; 1024])
            .is_ok_and(|length| length > 0)
        {}
    }
}

impl Stage {
    /// The udev for containers of disk images; pass it to the plugin's start.
    pub fn udev(&self) -> Udev {
        if Path::new(CONTROL).exists() {
            return Udev { listener: None };
        }
        let directory = self.join("udev");
        fs::create_dir(&directory).expect("a directory");
        let listener = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .and_then(|socket| {
            let address = UnixAddr::new(&directory.join("control"))?;
            bind(socket.as_raw_fd(), &address)?;
            listen(&socket, Backlog::MAXCONN)?;
            Ok(socket)
        });
        let listener: OwnedFd = listener.expect("a socket that listens");
        let listener = Arc::new(UnixListener::from(listener));
        let accepting = Arc::clone(&listener);
        thread::spawn(move || serve(&accepting));
        Udev {
            listener: Some(listener),
        }
    }

    /// A plugin with these options whose containers may be disk images. It has a single malloc arena for all threads: glibc creates up to
    /// eight arenas per processor, one for each new thread, and each grows for a while, which would hide how much memory the plugin itself
    /// keeps.
    pub async fn plugin_for_images(&self, udev: &Udev, options: Value) -> Plugin {
        let mut launch = self.launch().set("MALLOC_ARENA_MAX", "1");
        if udev.listener.is_some() {
            let plugin = std::mem::replace(&mut launch.binary, "/bin/sh".into());
            launch.args = ["-c", SCRIPT].map(Into::into).into();
            let places = [plugin, self.join("udev"), self.join("run")];
            launch.args.extend(places.map(Into::into));
        }
        self.launched(launch, &options).await
    }

    /// A disk image of a small tree, without partitions.
    pub fn image(&self, name: &str, tree: &Path) -> PathBuf {
        let image = self.join(name);
        let file = fs::File::create(&image).expect("the image");
        file.set_len(16 << 20).expect("the image");
        let made = Command::new("mkfs.ext4")
            .args(["-q", "-d"])
            .args([tree, &image])
            .output();
        let made = made.expect("mkfs.ext4 is not installed (Debian: e2fsprogs)");
        assert!(made.status.success(), "{made:?}");
        image
    }
}
