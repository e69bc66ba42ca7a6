//! As much of udev as a systemd-nspawn before 258 needs for a disk image without partitions, where the machine has none: somebody
//! who listens in the same network namespace. Seen by one plugin and its containers alone; the machine's `/run` is not touched.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use nomad_driver_nspawn::host::Plugin;

use crate::stage::Stage;

/// Where systemd-nspawn looks for udev.
const CONTROL: &str = "/run/udev/control";

/// A directory with everything that lies in `/run`, and udev.
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
    exec "$0"' "$0" "#;

/// Somebody who listens, until this is dropped.
#[derive(Debug)]
pub struct Udev {
    _listener: Option<OwnedFd>,
}

impl Stage {
    /// A plugin whose containers may be disk images.
    pub async fn plugin_for_images(&self) -> (Plugin, Udev) {
        if Path::new(CONTROL).exists() {
            return (self.plugin().await, Udev { _listener: None });
        }
        let (udev, run) = (self.join("udev"), self.join("run"));
        fs::create_dir(&udev).expect("a directory");
        let listener = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .and_then(|socket| {
            bind(
                std::os::fd::AsRawFd::as_raw_fd(&socket),
                &UnixAddr::new(&udev.join("control"))?,
            )?;
            listen(&socket, Backlog::new(8)?)?;
            Ok(socket)
        });
        let script = format!("{SCRIPT} {} {}", udev.display(), run.display());
        let listener = Some(listener.expect("a socket that listens"));
        let plugin = self.plugin_by(&script).await;
        (
            plugin,
            Udev {
                _listener: listener,
            },
        )
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
