//! The machine id where a container's changes to its image are not kept, so that several tasks may use the image at the same time: each gets
//! its own instead of the image's. An image that keeps its changes also keeps its machine id.

use std::io::{self, Read as _};
use std::path::Path;

use super::{Place, Tree};
use crate::container::{ContainerSpec, Mode, Root, Volatile};

pub(super) const MACHINE_ID: &str = "/etc/machine-id";
/// What systemd takes the machine id from where `/etc` has none.
const OF_DBUS: &str = "/var/lib/dbus/machine-id";

/// It would fail, because it expects a file in memory over the image's. The condition is not met.
pub(super) const COMMIT: &str =
    "/etc/systemd/system/systemd-machine-id-commit.service.d/50-nomad.conf";
pub(super) const COMMIT_TEXT: &str = "[Unit]\nConditionPathExists=!/etc/machine-id\n";

/// Longer than any content that is a machine id or stands for one.
const TEXT_MAX: u64 = 64;

/// The files of the image that give it a machine id and have to be replaced, or that it lacks. Not those that make systemd start as for the
/// first time: then it takes the id from systemd-nspawn. A note says where the image can't be looked into.
pub(super) fn to_replace(
    spec: &ContainerSpec,
    tree: &Tree<'_>,
    notes: &mut Vec<String>,
) -> Vec<&'static str> {
    let rootfs = &spec.rootfs;
    let is_shared = rootfs.ephemeral || rootfs.read_only || rootfs.volatile != Volatile::No;
    // Only `/usr` of the image is there.
    if !is_shared || rootfs.volatile == Volatile::Yes {
        return Vec::new();
    }
    if matches!(rootfs.source, Root::Image(_)) {
        if spec.payload.mode == Mode::Boot {
            notes.push("if the disk image has a machine id of its own, all its tasks share it: empty /etc/machine-id in the image and remove /var/lib/dbus/machine-id, to let each task have its own".to_owned());
        }
        return Vec::new();
    }
    let mut files = vec![MACHINE_ID];
    // Something new and empty is mounted over `/var` otherwise.
    if rootfs.volatile != Volatile::State {
        files.push(OF_DBUS);
    }
    files.retain(|file| {
        tree.place(file) != Place::OfTheJob
            && (has_id(tree, Path::new(file)).unwrap_or(false)
                || *file == MACHINE_ID && needs_id(spec, tree))
    });
    files
}

/// Whether the image has no machine id, and no empty file for one, and systemd can't make the file: it would not boot then.
fn needs_id(spec: &ContainerSpec, tree: &Tree<'_>) -> bool {
    let etc_is_read_only = spec.rootfs.read_only || spec.rootfs.volatile == Volatile::State;
    etc_is_read_only
        && spec.payload.mode == Mode::Boot
        && matches!(tree.place(MACHINE_ID), Place::Missing(_))
}

/// Whether there is a file with an id, or an empty one, in place of which systemd makes an id.
fn has_id(tree: &Tree<'_>, path: &Path) -> io::Result<bool> {
    let Some(root) = &tree.root else {
        return Ok(false);
    };
    let found = root.resolve(path)?;
    // A link to the other file.
    if path != Path::new(MACHINE_ID) && Path::new("/").join(&found.below) == Path::new(MACHINE_ID) {
        return Ok(false);
    }
    let Some(entry) = found.entry else {
        return Ok(false);
    };
    let mut text = Vec::new();
    let file = entry.open_file()?;
    file.take(TEXT_MAX).read_to_end(&mut text)?;
    Ok(text.trim_ascii() != b"uninitialized")
}
