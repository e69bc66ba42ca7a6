//! How a command is found and executed: as execvp(3) does, and with the truth about what went wrong. Becomes nothing and starts
//! nothing itself: whoever calls says which.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::libc;
use nspawn_init::{StartError, Step};

use crate::raw::with_default_signals_and_limits;

/// Variables by name.
pub(crate) type Environment = BTreeMap<OsString, OsString>;

/// Where execvp(3) looks if there is no `PATH`.
const DEFAULT_PATH: &str = "/bin:/usr/bin";
const SHELL: &str = "/bin/sh";
/// The shells of a container and how they are called as login shells, as systemd-nspawn has it.
const LOGIN_SHELLS: [(&str, &str); 2] = [("/bin/bash", "-bash"), (SHELL, "-sh")];

/// A longer name of a file is cut: it must not be what makes a message too long.
const MAX_NAME_BYTES: usize = 4096;

/// This process's variables without those that were meant for it, and these set over them.
pub(crate) fn environment(over: Vec<(String, String)>) -> Environment {
    #[expect(
        clippy::disallowed_methods,
        reason = "what systemd-nspawn gives is the command's"
    )]
    let given = std::env::vars_os();
    let mut environment: Environment = given.collect();
    for ours in ["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"] {
        environment.remove(OsStr::new(ours));
    }
    set_over(&mut environment, over);
    environment
}

/// Sets these variables over those.
pub(crate) fn set_over(environment: &mut Environment, over: Vec<(String, String)>) {
    let over = over
        .into_iter()
        .map(|(name, value)| (name.into(), value.into()));
    environment.extend(over);
}

/// A trouble with this error's number.
pub(crate) fn start_error(step: Step, file: impl AsRef<OsStr>, error: &io::Error) -> StartError {
    let mut file = file.as_ref().to_string_lossy().into_owned();
    file.truncate(file.floor_char_boundary(MAX_NAME_BYTES));
    StartError {
        step,
        file,
        // Without a number there was no call: a word with a NUL byte.
        errno: error.raw_os_error().unwrap_or(libc::EINVAL),
    }
}

/// Looks the command up and has it executed by `by`, which gets it ready with words and variables and is called again for the
/// next file along `PATH` where one can't be executed. No words: a login shell.
pub(crate) fn execute<T>(
    words: &[String],
    environment: &Environment,
    mut by: impl FnMut(&mut Command) -> io::Result<T>,
) -> Result<T, StartError> {
    let Some((name, rest)) = words.split_first() else {
        return login_shell(environment, by);
    };
    let mut seen = not_found(name);
    for file in candidates(name, environment.get(OsStr::new("PATH"))) {
        let invocation = Invocation {
            file: &file,
            name: OsStr::new(name),
            rest,
            environment,
        };
        match invocation.attempt(&mut by) {
            Ok(done) => return Ok(done),
            Err(start_error) if name.contains('/') || !is_passed_over(start_error.errno) => {
                return Err(start_error);
            }
            // A file that may not be executed says more than one that is not there.
            Err(start_error) => {
                if rank(&start_error) > rank(&seen) {
                    seen = start_error;
                }
            }
        }
    }
    Err(seen)
}

fn login_shell<T>(
    environment: &Environment,
    mut by: impl FnMut(&mut Command) -> io::Result<T>,
) -> Result<T, StartError> {
    let mut seen = not_found(SHELL);
    for (file, name) in LOGIN_SHELLS {
        let invocation = Invocation {
            file: Path::new(file),
            name: OsStr::new(name),
            rest: &[],
            environment,
        };
        match invocation.attempt(&mut by) {
            Ok(done) => return Ok(done),
            Err(start_error) if rank(&start_error) > rank(&seen) => seen = start_error,
            Err(_) => {}
        }
    }
    Err(seen)
}

/// One file, as it is to be executed.
struct Invocation<'a> {
    file: &'a Path,
    /// The zeroth argument.
    name: &'a OsStr,
    rest: &'a [String],
    environment: &'a Environment,
}

impl Invocation<'_> {
    fn attempt<T>(
        &self,
        by: &mut impl FnMut(&mut Command) -> io::Result<T>,
    ) -> Result<T, StartError> {
        // Saves a process for each directory of `PATH`, and tells this case from a file whose interpreter is not there.
        if let Err(error) = fs::metadata(self.file)
            && is_missing(error.raw_os_error())
        {
            return Err(start_error(Step::Execute, self.file, &error));
        }
        let mut command = command(self.file, self.environment);
        command.arg0(self.name).args(self.rest);
        let error = match by(&mut command) {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        match error.raw_os_error() {
            // The GNU C library has been that way already.
            Some(libc::ENOEXEC) => {
                let mut script = command_of_shell(self.file, self.environment);
                script.args(self.rest);
                by(&mut script).map_err(|_| start_error(Step::Execute, self.file, &error))
            }
            Some(libc::ENOENT) => Err(start_error(Step::Interpreter, self.file, &error)),
            _ => Err(start_error(Step::Execute, self.file, &error)),
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the container's command is what this program is for"
)]
fn command(file: &Path, environment: &Environment) -> Command {
    let mut command = Command::new(file);
    command.env_clear().envs(environment);
    with_default_signals_and_limits(&mut command);
    command
}

/// A script without a first line that says whose it is belongs to the shell.
fn command_of_shell(file: &Path, environment: &Environment) -> Command {
    let mut shell = command(Path::new(SHELL), environment);
    shell.arg(file);
    shell
}

/// Where a command of this name may be, each with a slash so that nobody looks it up again.
fn candidates(name: &str, path: Option<&OsString>) -> Vec<PathBuf> {
    if name.is_empty() {
        return Vec::new();
    }
    if name.contains('/') {
        return vec![name.into()];
    }
    let path = path.map_or_else(|| OsStr::new(DEFAULT_PATH), OsString::as_os_str);
    path.as_bytes()
        .split(|byte| *byte == b':')
        .map(|directory| match directory {
            [] => Path::new(".").join(name),
            directory => Path::new(OsStr::from_bytes(directory)).join(name),
        })
        .collect()
}

fn not_found(name: &str) -> StartError {
    start_error(
        Step::Execute,
        name,
        &io::Error::from_raw_os_error(libc::ENOENT),
    )
}

fn is_missing(errno: Option<i32>) -> bool {
    matches!(errno, Some(libc::ENOENT | libc::ENOTDIR))
}

/// After which errors execvp(3) looks further along `PATH`.
fn is_passed_over(errno: i32) -> bool {
    matches!(
        errno,
        libc::EACCES | libc::ENOENT | libc::ENOTDIR | libc::ESTALE | libc::ENODEV | libc::ETIMEDOUT
    )
}

/// How much a trouble says about why a command does not run.
fn rank(start_error: &StartError) -> u8 {
    match (start_error.step, start_error.errno) {
        (Step::Execute, libc::ENOENT | libc::ENOTDIR) => 0,
        (Step::Interpreter, _) => 1,
        _ => 2,
    }
}
