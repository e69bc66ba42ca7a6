//! Finds and executes a command the way execvp(3) does, with precise errors. Runs in the container's init. Neither execs nor forks itself:
//! the caller decides which.

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

/// The search path of execvp(3) when `PATH` is unset.
const DEFAULT_PATH: &str = "/bin:/usr/bin";
const SHELL: &str = "/bin/sh";
/// The shells of a container and their argv[0] as login shells, the same as in systemd-nspawn.
const LOGIN_SHELLS: [(&str, &str); 2] = [("/bin/bash", "-bash"), (SHELL, "-sh")];

/// Longer file names are truncated, so that a name can't make an event exceed the packet limit.
const MAX_NAME_BYTES: usize = 4096;

/// This process's environment without the variables that were meant for the init itself, overridden by `over`.
pub(crate) fn environment(over: Vec<(String, String)>) -> Environment {
    #[expect(
        clippy::disallowed_methods,
        reason = "the command inherits what systemd-nspawn sets"
    )]
    let given = std::env::vars_os();
    let mut environment: Environment = given.collect();
    for ours in ["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"] {
        environment.remove(OsStr::new(ours));
    }
    set_over(&mut environment, over);
    environment
}

/// Adds the variables in `over`, replacing existing ones.
pub(crate) fn set_over(environment: &mut Environment, over: Vec<(String, String)>) {
    let over = over
        .into_iter()
        .map(|(name, value)| (name.into(), value.into()));
    environment.extend(over);
}

/// A [`StartError`] with the errno of `error`.
pub(crate) fn start_error(step: Step, file: impl AsRef<OsStr>, error: &io::Error) -> StartError {
    let mut file = file.as_ref().to_string_lossy().into_owned();
    file.truncate(file.floor_char_boundary(MAX_NAME_BYTES));
    StartError {
        step,
        file,
        // An error without an errno comes from before the system call: an argument with a NUL byte.
        errno: error.raw_os_error().unwrap_or(libc::EINVAL),
    }
}

/// Looks the command up and passes it to `by`, which executes it. Tries the next file along `PATH` if one can't be executed. An empty
/// argument list means a login shell.
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
            // A file that can't be executed explains more than one that does not exist.
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

/// One file and the arguments it is executed with.
struct Invocation<'a> {
    file: &'a Path,
    /// argv[0].
    name: &'a OsStr,
    rest: &'a [String],
    environment: &'a Environment,
}

impl Invocation<'_> {
    fn attempt<T>(
        &self,
        by: &mut impl FnMut(&mut Command) -> io::Result<T>,
    ) -> Result<T, StartError> {
        // Saves a fork per directory of `PATH`, and distinguishes a missing file from a file whose interpreter is missing.
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
            // glibc's execvp has this fallback itself and has tried it already.
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
    reason = "this program starts the container's command"
)]
fn command(file: &Path, environment: &Environment) -> Command {
    let mut command = Command::new(file);
    command.env_clear().envs(environment);
    with_default_signals_and_limits(&mut command);
    command
}

/// A script without a `#!` line is run by the shell.
fn command_of_shell(file: &Path, environment: &Environment) -> Command {
    let mut shell = command(Path::new(SHELL), environment);
    shell.arg(file);
    shell
}

/// The paths to try for a command name. Each contains a slash, so that exec does not search `PATH` again.
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

/// The errors after which execvp(3) continues along `PATH`.
fn is_passed_over(errno: i32) -> bool {
    matches!(
        errno,
        libc::EACCES | libc::ENOENT | libc::ENOTDIR | libc::ESTALE | libc::ENODEV | libc::ETIMEDOUT
    )
}

/// How much an error says about why a command does not run: higher is more specific.
fn rank(start_error: &StartError) -> u8 {
    match (start_error.step, start_error.errno) {
        (Step::Execute, libc::ENOENT | libc::ENOTDIR) => 0,
        (Step::Interpreter, _) => 1,
        _ => 2,
    }
}
