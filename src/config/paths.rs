//! Resolves the host paths that a job names: where they are looked up, and whether they stay where they must. The task
//! can write to its allocation, so links there are not trusted; what an operator placed elsewhere is. Opens and changes
//! nothing.

use std::io;
use std::path::{Component, Path, PathBuf};

use super::decode::quoted;
use super::values::has_control;
use super::{ConfigError, ImageSearchPath, TaskContext};

/// The directory of an allocation that all of its tasks share.
pub(super) const SHARED: &str = "alloc";
/// The directories of a task that are visible to it, and the one that is not.
pub(super) const LOCAL: &str = "local";
pub(super) const SECRETS: &str = "secrets";
const PRIVATE: &str = "private";

/// The kernel's limit for a path, without the terminating NUL.
const PATH_MAX: usize = 4095;

/// The directories of an allocation on the host.
#[derive(Debug)]
pub(super) struct Allocation {
    /// The path as Nomad writes it.
    written: PathBuf,
    /// The path with all links resolved.
    root: PathBuf,
    task: String,
}

/// Why a path could not be resolved; the option is added later.
enum PathError {
    Missing(PathBuf),
    Leaves(PathBuf),
    Unreadable(PathBuf, io::Error),
}

impl PathError {
    fn on(self, option: &str, text: &str) -> ConfigError {
        let text = quoted(text);
        let reason = match self {
            Self::Missing(looked) => {
                format!(
                    "{text} does not exist; looked at {}",
                    quoted(&looked.to_string_lossy())
                )
            }
            Self::Leaves(base) => {
                format!("{text} leads outside {}", quoted(&base.to_string_lossy()))
            }
            Self::Unreadable(path, error) => {
                let path = quoted(&path.to_string_lossy());
                let reason = format!("{text} can't be examined at {path}: {error}");
                return ConfigError::on_host(option, reason, &error);
            }
        };
        ConfigError::new(option, reason)
    }
}

impl Allocation {
    /// The allocation of this start. Its directories must exist.
    pub(super) fn of(context: &TaskContext) -> Result<Self, ConfigError> {
        let option = "task.alloc_dir";
        let written = context.alloc_dir.clone();
        let text = written.to_string_lossy().into_owned();
        if !written.is_absolute() {
            let reason = format!("{} is not an absolute path", quoted(&text));
            return Err(ConfigError::new(option, reason));
        }
        let root = real(&written).map_err(|fault| fault.on(option, &text))?;
        let allocation = Self {
            written,
            root,
            task: context.task.clone(),
        };
        for (directory, _) in allocation.visible_dirs() {
            let found = real(&directory).map_err(|fault| fault.on(option, &text))?;
            if found != directory {
                return Err(PathError::Leaves(allocation.root).on(option, &text));
            }
        }
        Ok(allocation)
    }

    fn task_dir(&self) -> PathBuf {
        self.root.join(&self.task)
    }

    /// Nomad's directories on the host, and the paths at which the task sees them.
    pub(super) fn visible_dirs(&self) -> [(PathBuf, &'static Path); 3] {
        [
            (self.root.join(SHARED), Path::new("/alloc")),
            (self.task_dir().join(LOCAL), Path::new("/local")),
            (self.task_dir().join(SECRETS), Path::new("/secrets")),
        ]
    }

    /// Whether a path without links lies in this allocation.
    pub(super) fn contains(&self, path: &Path) -> bool {
        path.starts_with(&self.root)
    }

    /// The host path that an absolute path of a job refers to: a path below one of Nomad's directories as the task sees
    /// them is first looked up in the host directory behind it.
    fn absolute(&self, path: &Path) -> Result<PathBuf, PathError> {
        for (host, inside) in self.visible_dirs() {
            if let Ok(rest) = path.strip_prefix(inside) {
                match below(&host, rest) {
                    Err(PathError::Missing(_)) => {}
                    found => return found,
                }
            }
        }
        let rest = [&self.written, &self.root]
            .into_iter()
            .find_map(|root| path.strip_prefix(root).ok());
        let Some(mut parts) = rest.map(Path::components) else {
            return real(path);
        };
        match parts.next() {
            Some(Component::Normal(first)) => below(&self.root.join(first), parts.as_path()),
            Some(_) => Err(PathError::Leaves(self.root.clone())),
            None => Ok(self.root.clone()),
        }
    }

    /// Rejects what no task may see: Nomad's private directories, and the directories of other tasks that are not
    /// shared.
    fn deny_private_dirs(&self, option: &str, text: &str, path: &Path) -> Result<(), ConfigError> {
        let Ok(rest) = path.strip_prefix(&self.root) else {
            return Ok(());
        };
        let parts: Vec<_> = rest.components().map(Component::as_os_str).collect();
        let hidden = match parts.as_slice() {
            [] => true,
            [first, ..] if *first == SHARED => false,
            [owner] => {
                path.join(PRIVATE).exists()
                    || (*owner != self.task.as_str() && path.join(SECRETS).exists())
            }
            [owner, part, ..] => {
                *part == PRIVATE || (*part == SECRETS && *owner != self.task.as_str())
            }
        };
        if !hidden {
            return Ok(());
        }
        let reason = format!(
            "{} is or contains a directory that Nomad hides from tasks",
            quoted(text)
        );
        Err(ConfigError::new(option, reason))
    }

    /// The host path of the source of a bind, with links resolved.
    pub(super) fn source(&self, option: &str, text: &str) -> Result<PathBuf, ConfigError> {
        validate_path_text(option, text)?;
        let found = self.find(Path::new(text));
        self.visible(option, text, found)
    }

    /// The same for a directory that may be missing, and whether it is. The part that exists has its links resolved.
    pub(super) fn source_to_create(
        &self,
        option: &str,
        text: &str,
    ) -> Result<(PathBuf, bool), ConfigError> {
        validate_path_text(option, text)?;
        let path = Path::new(text);
        match self.find(path) {
            Err(PathError::Missing(_)) => {
                let found = self.visible(option, text, self.missing(path))?;
                self.deny_foreign_dirs(option, text, &found)?;
                Ok((found, true))
            }
            found => Ok((self.visible(option, text, found)?, false)),
        }
    }

    fn find(&self, path: &Path) -> Result<PathBuf, PathError> {
        match path.is_absolute() {
            true => self.absolute(path),
            false => below(&self.task_dir(), path),
        }
    }

    /// Where a directory that is missing has to be created.
    fn missing(&self, path: &Path) -> Result<PathBuf, PathError> {
        if !path.is_absolute() {
            return missing_below(&self.task_dir(), path);
        }
        for (host, inside) in self.visible_dirs() {
            if let Ok(rest) = path.strip_prefix(inside) {
                return missing_below(&host, rest);
            }
        }
        let rest = [&self.written, &self.root]
            .into_iter()
            .find_map(|root| path.strip_prefix(root).ok());
        let Some(mut parts) = rest.map(Path::components) else {
            let root = Path::new("/");
            return missing_below(root, path.strip_prefix(root).unwrap_or(path));
        };
        match parts.next() {
            Some(Component::Normal(first)) => {
                missing_below(&self.root.join(first), parts.as_path())
            }
            _ => Err(PathError::Leaves(self.root.clone())),
        }
    }

    /// The path that was found, unless no task may see it.
    fn visible(
        &self,
        option: &str,
        text: &str,
        found: Result<PathBuf, PathError>,
    ) -> Result<PathBuf, ConfigError> {
        let found = found.map_err(|fault| fault.on(option, text))?;
        validate_path_text(option, &found.to_string_lossy())?;
        self.deny_private_dirs(option, text, &found)?;
        Ok(found)
    }

    /// Rejects what Nomad or another task has to create.
    fn deny_foreign_dirs(&self, option: &str, text: &str, path: &Path) -> Result<(), ConfigError> {
        let own = [self.root.join(SHARED), self.task_dir()];
        if !self.contains(path) || own.iter().any(|own| path.starts_with(own)) {
            return Ok(());
        }
        let reason = format!(
            "{} does not exist, and is not created outside the shared directory of the allocation and that of this task",
            quoted(text)
        );
        Err(ConfigError::new(option, reason))
    }

    /// The host path of an image, with links resolved.
    pub(super) fn image(
        &self,
        option: &str,
        text: &str,
        search_path: &ImageSearchPath,
    ) -> Result<PathBuf, ConfigError> {
        validate_path_text(option, text)?;
        let path = Path::new(text);
        let found = if path.is_absolute() {
            self.absolute(path)
                .map_err(|fault| fault.on(option, text))?
        } else {
            relative_image(option, text, search_path)?
        };
        validate_path_text(option, &found.to_string_lossy())?;
        self.deny_private_dirs(option, text, &found)?;
        Ok(found)
    }
}

/// An image below the plugin's directory, or a registered machine image.
fn relative_image(
    option: &str,
    text: &str,
    search_path: &ImageSearchPath,
) -> Result<PathBuf, ConfigError> {
    let mut looked = match below(&search_path.plugin_dir, Path::new(text)) {
        Err(PathError::Missing(path)) => vec![path],
        found => return found.map_err(|fault| fault.on(option, text)),
    };
    if !text.contains('/') && text != "." && text != ".." {
        for directory in &search_path.machine_dirs {
            for name in [text.to_owned(), format!("{text}.raw")] {
                match real(&directory.join(name)) {
                    Err(PathError::Missing(path)) => looked.push(path),
                    found => return found.map_err(|fault| fault.on(option, text)),
                }
            }
        }
    }
    let looked: Vec<_> = looked
        .iter()
        .map(|path| quoted(&path.to_string_lossy()))
        .collect();
    let reason = format!(
        "{} does not exist; looked at {}",
        quoted(text),
        looked.join(", ")
    );
    Err(ConfigError::new(option, reason))
}

/// Resolves `rest` below `base`, following links; an error if the result is outside `base`.
fn below(base: &Path, rest: &Path) -> Result<PathBuf, PathError> {
    let mut depth = 0_usize;
    for part in rest.components() {
        let deeper = match part {
            Component::Normal(_) => depth.checked_add(1),
            Component::ParentDir => depth.checked_sub(1),
            _ => Some(depth),
        };
        depth = deeper.ok_or_else(|| PathError::Leaves(base.to_owned()))?;
    }
    let found = real(&base.join(rest))?;
    match found.starts_with(real(base)?) {
        true => Ok(found),
        false => Err(PathError::Leaves(base.to_owned())),
    }
}

/// Where the directory `rest`, which is missing below `base`, has to be created: links are followed as far as the path exists. Fails if
/// the rest is more than names, and if its first part is a link that leads nowhere.
fn missing_below(base: &Path, rest: &Path) -> Result<PathBuf, PathError> {
    let parts: Vec<_> = rest.components().collect();
    for count in (0..parts.len()).rev() {
        let (known, missing) = parts.split_at(count);
        let found = match below(base, &known.iter().collect::<PathBuf>()) {
            Err(PathError::Missing(_)) => continue,
            found => found?,
        };
        let names: PathBuf = missing.iter().collect();
        let next = found.join(parts[count]);
        let is_free = match next.symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => true,
            Err(error) if error.kind() != io::ErrorKind::NotADirectory => {
                return Err(PathError::Unreadable(next, error));
            }
            _ => false,
        };
        let named = |part: &Component<'_>| matches!(part, Component::Normal(_));
        return match is_free && missing.iter().all(named) {
            true => Ok(found.join(names)),
            false => Err(PathError::Missing(next)),
        };
    }
    Err(PathError::Missing(base.to_owned()))
}

fn real(path: &Path) -> Result<PathBuf, PathError> {
    path.canonicalize().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
            PathError::Missing(path.to_owned())
        }
        _ => PathError::Unreadable(path.to_owned(), error),
    })
}

/// Rejects text that can't be a path on a command line.
pub(super) fn validate_path_text(option: &str, text: &str) -> Result<(), ConfigError> {
    let fault = if text.is_empty() {
        "is empty"
    } else if has_control(text) {
        "contains a control character"
    } else if text.len() > PATH_MAX {
        "is longer than 4095 bytes"
    } else {
        return Ok(());
    };
    Err(ConfigError::new(
        option,
        format!("{} {fault}", quoted(text)),
    ))
}

/// An absolute path inside the container, without `.` and doubled slashes.
pub(super) fn inside(option: &str, text: &str) -> Result<PathBuf, ConfigError> {
    validate_path_text(option, text)?;
    let path = Path::new(text);
    if !path.is_absolute() {
        let reason = format!("{} is not an absolute path", quoted(text));
        return Err(ConfigError::new(option, reason));
    }
    if path.components().any(|part| part == Component::ParentDir) {
        let reason = format!("{} contains ..", quoted(text));
        return Err(ConfigError::new(option, reason));
    }
    Ok(path.components().collect())
}
