//! A root directory that has mount points the image lacks. systemd-nspawn makes missing mount points in the image; a root that
//! can't be written it refuses. Then a skeleton stands in for the image: empty directories and links as the image has them,
//! with the image's own directories mounted over, read-only, and the missing mount points between them. Nothing is ever
//! written into the image.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Component, Path, PathBuf};

use crate::container::{ContainerSpec, Mount, Root, Volatile};

/// The targets of mounts for which the image has no mount point, if the root will not be writable, and the directories that
/// systemd-nspawn itself mounts over. Empty means that the image can be used as it is.
pub fn missing_mount_points(spec: &ContainerSpec) -> Vec<PathBuf> {
    let Root::Directory(image) = &spec.root else {
        return Vec::new();
    };
    if !spec.read_only && spec.volatile != Volatile::State {
        return Vec::new();
    }
    let there = |below: &Path| image.join(below).symlink_metadata().is_ok();
    let targets = spec.mounts.iter().map(|mount| mount.target.clone());
    let wanted = targets.filter(|target| new_anyway(spec.volatile, below_root(target)).is_none());
    let bases = always_new(spec.volatile).map(|name| Path::new("/").join(name));
    wanted
        .chain(bases)
        .filter(|target| !there(below_root(target)))
        .collect()
}

/// What systemd-nspawn mounts anew in every container, so that the image's own is not seen.
fn always_new(volatile: Volatile) -> impl Iterator<Item = &'static str> {
    let var = (volatile == Volatile::State).then_some("var");
    ["dev", "proc", "run", "sys", "tmp"].into_iter().chain(var)
}

/// The one of them that a path lies in.
fn new_anyway(volatile: Volatile, below: &Path) -> Option<&'static str> {
    always_new(volatile).find(|name| below.starts_with(name))
}

/// Builds the skeleton of `image` in the empty directory `skeleton`, with a mount point at each of `missing` (those of
/// `mounts` that the image lacks). Returns what has to be mounted over it first.
pub fn skeleton(
    image: &Path,
    skeleton: &Path,
    missing: &[PathBuf],
    mounts: &[Mount],
    volatile: Volatile,
) -> io::Result<Vec<Mount>> {
    let mut builder = Skeleton {
        image,
        skeleton,
        missing,
        volatile,
        binds: Vec::new(),
    };
    builder.directory(Path::new(""))?;
    for target in missing {
        let file = mounts
            .iter()
            .any(|mount| mount.target == *target && mount.source.is_file());
        builder.mount_point(below_root(target), file)?;
    }
    builder.os_release()?;
    Ok(builder.binds)
}

struct Skeleton<'a> {
    image: &'a Path,
    skeleton: &'a Path,
    missing: &'a [PathBuf],
    volatile: Volatile,
    binds: Vec<Mount>,
}

impl Skeleton<'_> {
    /// Repeats one directory of the image: what lies in it is mounted whole, unless a mount point is missing further below.
    fn directory(&mut self, below: &Path) -> io::Result<()> {
        for entry in fs::read_dir(self.image.join(below))? {
            let entry = entry?;
            let inner = below.join(entry.file_name());
            if below.as_os_str().is_empty() && new_anyway(self.volatile, &inner).is_some() {
                make_like(&self.skeleton.join(&inner), &entry.metadata()?)?;
                continue;
            }
            let kind = entry.file_type()?;
            let made = self.skeleton.join(&inner);
            if kind.is_symlink() {
                symlink(fs::read_link(entry.path())?, &made)?;
            } else if kind.is_dir() {
                make_like(&made, &entry.metadata()?)?;
                if self
                    .missing
                    .iter()
                    .any(|target| below_root(target).starts_with(&inner))
                {
                    self.directory(&inner)?;
                } else {
                    self.bind(&inner);
                }
            } else if kind.is_file() {
                fs::File::create(&made)?;
                self.bind(&inner);
            }
        }
        Ok(())
    }

    fn bind(&mut self, inner: &Path) {
        self.binds.push(Mount {
            source: self.image.join(inner),
            target: Path::new("/").join(inner),
            read_only: true,
        });
    }

    /// systemd-nspawn boots nothing without an os-release file, and looks before it mounts anything.
    fn os_release(&self) -> io::Result<()> {
        let here = self.skeleton.join("usr/lib/os-release");
        let known = ["etc/os-release", "usr/lib/os-release"];
        let text = known
            .iter()
            .find_map(|name| fs::read(self.image.join(name)).ok());
        match text {
            Some(text) if !here.exists() => {
                fs::DirBuilder::new()
                    .recursive(true)
                    .mode(0o755)
                    .create(self.skeleton.join("usr/lib"))?;
                fs::write(here, text)
            }
            _ => Ok(()),
        }
    }

    fn mount_point(&self, below: &Path, file: bool) -> io::Result<()> {
        let path = self.skeleton.join(below);
        let directory = if file {
            path.parent().unwrap_or(self.skeleton)
        } else {
            &path
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(directory)?;
        if file {
            fs::File::create(&path)?;
        }
        Ok(())
    }
}

/// A directory with the mode and owner of another.
fn make_like(path: &Path, like: &fs::Metadata) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    chown(path, Some(like.uid()), Some(like.gid()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(like.mode() & 0o7777))
}

/// The path relative to the root. `config` lets only plain absolute paths through; anything else would climb out.
fn below_root(path: &Path) -> &Path {
    let mut components = path.components();
    if components.clone().next() == Some(Component::RootDir) {
        components.next();
    }
    components.as_path()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(target: &str, source: &Path) -> Mount {
        Mount {
            source: source.to_owned(),
            target: target.into(),
            read_only: false,
        }
    }

    #[test]
    fn missing_mount_points_stand_between_the_image_s_own_directories() {
        let temp = tempfile::tempdir().unwrap();
        let image = temp.path().join("image");
        for directory in ["usr/bin", "etc", "srv/data", "proc", "tmp"] {
            fs::create_dir_all(image.join(directory)).unwrap();
        }
        fs::write(image.join("usr/bin/sh"), "").unwrap();
        fs::write(image.join("note"), "").unwrap();
        symlink("usr/bin", image.join("bin")).unwrap();
        let target = temp.path().join("skeleton");
        fs::create_dir(&target).unwrap();
        let mounts = [
            mount("/alloc", &image),
            mount("/srv/more/deep", &image),
            mount("/etc-file", &image.join("note")),
        ];
        let missing: Vec<PathBuf> = mounts.iter().map(|mount| mount.target.clone()).collect();
        let binds = skeleton(&image, &target, &missing, &mounts, Volatile::No).unwrap();
        let mut targets: Vec<_> = binds
            .iter()
            .map(|bind| bind.target.to_str().unwrap())
            .collect();
        targets.sort_unstable();
        assert_eq!(targets, ["/etc", "/note", "/srv/data", "/usr"]);
        assert!(
            binds
                .iter()
                .all(|bind| bind.read_only && bind.source.starts_with(&image))
        );
        for directory in ["alloc", "srv/more/deep", "srv/data", "usr", "proc"] {
            assert!(target.join(directory).is_dir(), "{directory}");
        }
        assert!(target.join("etc-file").is_file());
        assert!(!target.join("usr/lib/os-release").exists());
        assert_eq!(
            fs::read_link(target.join("bin")).unwrap(),
            Path::new("usr/bin")
        );
        assert!(!image.join("alloc").exists(), "the image was written");
    }

    #[test]
    fn an_os_release_is_seen_before_anything_is_mounted() {
        let temp = tempfile::tempdir().unwrap();
        let image = temp.path().join("image");
        fs::create_dir_all(image.join("usr/lib")).unwrap();
        fs::write(image.join("usr/lib/os-release"), "ID=x\n").unwrap();
        let target = temp.path().join("skeleton");
        fs::create_dir(&target).unwrap();
        skeleton(&image, &target, &["/alloc".into()], &[], Volatile::No).unwrap();
        assert_eq!(
            fs::read_to_string(target.join("usr/lib/os-release")).unwrap(),
            "ID=x\n"
        );
    }
}
