//! Which systemd-nspawn is installed, and its version.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::sync::Mutex;

use super::Settings;
use crate::backend::BackendError;
use crate::blocking;
use crate::container::Cause;
use crate::nspawn::probe;
use crate::nspawn::refusal::cause_of_exec_error;

/// How long systemd-nspawn may take to report its version.
const ANSWER: Duration = Duration::from_secs(10);

/// The program file for which the version was determined.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Program {
    path: PathBuf,
    inode: u64,
    changed: i64,
}

/// The installed systemd-nspawn, as far as it is known.
#[derive(Debug, Default)]
pub(super) struct Installed {
    known: Arc<Mutex<Option<(Program, u32)>>>,
}

impl Installed {
    /// The program and its version, which is queried again only when the file changes.
    pub(super) async fn get(&self, settings: &Arc<Settings>) -> Result<(PathBuf, u32), NoVersion> {
        let answer = tokio::time::timeout(ANSWER, self.query(settings)).await;
        answer.unwrap_or_else(|_| {
            let path = settings.nspawn.as_deref();
            let path = path.unwrap_or_else(|| Path::new("systemd-nspawn"));
            Err(NoVersion {
                cause: Cause::Resources,
                reason: format!(
                    "{} --version does not answer within {} s",
                    path.display(),
                    ANSWER.as_secs()
                ),
            })
        })
    }

    async fn query(&self, settings: &Arc<Settings>) -> Result<(PathBuf, u32), NoVersion> {
        let settings = Arc::clone(settings);
        let known = Arc::clone(&self.known).lock_owned().await;
        // The lock moves into the work, so that on a file system that hangs all queries hold one thread, and not one thread each.
        let (mut known, look) = blocking::run(move || {
            let look = look(&settings, known.as_ref());
            (known, look)
        })
        .await;
        match look? {
            Look::Known(program, version) => Ok((program.path, version)),
            Look::Asked(program, asked) => {
                let version = read_version(&program.path, *asked).await?;
                *known = Some((program.clone(), version));
                Ok((program.path, version))
            }
        }
    }
}

/// Why the version of systemd-nspawn is not known.
#[derive(Debug)]
pub(super) struct NoVersion {
    cause: Cause,
    pub(super) reason: String,
}

impl NoVersion {
    fn config(reason: String) -> Self {
        let cause = Cause::Config;
        Self { cause, reason }
    }

    fn not_run(program: &Path, error: &io::Error) -> Self {
        Self {
            cause: cause_of_exec_error(error),
            reason: format!("{} can't be run: {error}", program.display()),
        }
    }

    pub(super) fn of_start(self, machine: &str) -> BackendError {
        let Self { cause, reason } = self;
        let machine = machine.to_owned();
        match cause {
            Cause::Config => BackendError::Unsupported { machine, reason },
            cause => BackendError::Start {
                machine,
                step: "asking systemd-nspawn for its version",
                reason,
                cause,
            },
        }
    }
}

/// What is known of the installed systemd-nspawn.
#[derive(Debug)]
enum Look {
    /// The version.
    Known(Program, u32),
    /// Not known yet: `--version` is running.
    Asked(Program, Box<Child>),
}

/// Finds the program, and starts it with `--version` if its version is not `known`.
fn look(settings: &Settings, known: Option<&(Program, u32)>) -> Result<Look, NoVersion> {
    let path = match &settings.nspawn {
        None => probe::find("systemd-nspawn", &settings.search).map_err(NoVersion::config)?,
        Some(path) if probe::is_executable(path) => path.clone(),
        Some(path) => {
            return Err(NoVersion::config(format!(
                "nspawn_path {} is not an executable file",
                path.display()
            )));
        }
    };
    let about = fs::metadata(&path)
        .map_err(|error| NoVersion::config(format!("{}: {error}", path.display())))?;
    let program = Program {
        path,
        inode: about.ino(),
        changed: about.ctime(),
    };
    if let Some((_, version)) = known.filter(|(asked, _)| *asked == program) {
        return Ok(Look::Known(program, *version));
    }
    let asked =
        query_version(&program.path).map_err(|error| NoVersion::not_run(&program.path, &error))?;
    Ok(Look::Asked(program, Box::new(asked)))
}

#[expect(
    clippy::disallowed_methods,
    reason = "the one question the backend asks a tool"
)]
fn query_version(program: &Path) -> io::Result<Child> {
    let mut command = Command::new(program);
    command
        .arg("--version")
        .env_clear()
        .env("LC_ALL", "C.UTF-8")
        .kill_on_drop(true);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command.spawn()
}

async fn read_version(program: &Path, asked: Child) -> Result<u32, NoVersion> {
    let said = asked.wait_with_output().await;
    let said = said.map_err(|error| NoVersion::not_run(program, &error))?;
    let text = String::from_utf8_lossy(&said.stdout);
    probe::parse_version(&text).ok_or_else(|| NoVersion {
        // If it succeeds with other output it is not systemd-nspawn. If it fails, an upgrade may be in progress.
        cause: match said.status.success() {
            true => Cause::Config,
            false => Cause::Unknown,
        },
        reason: format!(
            "{} --version ({}) reports no version: {:?}",
            program.display(),
            said.status,
            text.lines().next().unwrap_or("")
        ),
    })
}
