//! The first program in a container: reads its order, gets ready, and becomes the command or stays as its init. It is started by
//! descriptor with what [`nspawn_init`] says; starts nothing else of its own accord, and has no thread and no configuration.

mod channel;
mod command;
mod init;
mod raw;

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::libc;
use nix::sys::signal::SigSet;
use nspawn_init::{
    Filter, InitEvent, InitMode, InitSpec, MAX_SPEC_BYTES, NOT_EXECUTABLE, Request, StartError,
    Step, message, parse_spec,
};
use rustix::process::{WaitStatus, chdir};
use rustix::stdio::{dup2_stderr, dup2_stdout};

use crate::channel::Channel;
use crate::command::{Environment, environment, execute, start_error};
use crate::init::Init;
use crate::raw::Inherited;

fn main() -> ExitCode {
    // First, so that no signal is lost: a first process keeps only those that it blocks. A command starts with none blocked.
    let _ = SigSet::all().thread_block();
    raw::dump_no_core();
    let Inherited {
        channel,
        stdout,
        stderr,
        program,
        spec,
    } = match raw::inherited() {
        Ok(inherited) => inherited,
        Err(_) => {
            print_error("this is the first program of a container, and starts there only");
            return status(NOT_EXECUTABLE);
        }
    };
    drop(program);
    let mut channel = Channel::new(channel);
    let start_error = match ready(spec, &stdout, &stderr) {
        Ok((InitMode::Launcher, command)) => {
            drop((stdout, stderr));
            match launch(&mut channel, &command) {
                Ok(never) => match never {},
                Err(start_error) => start_error,
            }
        }
        Ok((InitMode::Init, command)) => {
            drop((stdout, stderr));
            match init::start(channel, command) {
                Ok(init) => return ended(init),
                Err((back, start_error)) => {
                    channel = back;
                    start_error
                }
            }
        }
        Err(start_error) => start_error,
    };
    print_error(&start_error.to_string());
    let status = status(start_error.status());
    channel.send(&InitEvent::Failed(start_error));
    channel.finish();
    status
}

/// What is to be executed, and in what surroundings.
pub(crate) struct Command {
    words: Vec<String>,
    environment: Environment,
    directory: Option<PathBuf>,
    filters: Vec<Filter>,
}

impl Command {
    /// Enters the directory and installs the filters, which is all that is left before the command can be executed.
    fn prepare(&self) -> Result<(), StartError> {
        enter(self.directory.as_deref())?;
        if self.words.is_empty() && self.directory.is_none() {
            // As systemd-nspawn does for a shell: a home that is not there is no trouble.
            let home = self.environment.get(OsStr::new("HOME"));
            let _ = chdir(home.map_or_else(|| OsStr::new("/root"), OsString::as_os_str));
        }
        for filter in &self.filters {
            raw::install(filter).map_err(|error| start_error(Step::Filters, "", &error))?;
        }
        Ok(())
    }
}

/// Enters a directory, if there is one to enter.
fn enter(directory: Option<&Path>) -> Result<(), StartError> {
    let Some(directory) = directory else {
        return Ok(());
    };
    chdir(directory).map_err(|error| start_error(Step::Directory, directory, &error.into()))
}

/// Reads the order and connects the streams.
fn ready(
    descriptor: OwnedFd,
    stdout: &OwnedFd,
    stderr: &OwnedFd,
) -> Result<(InitMode, Command), StartError> {
    let spec =
        read(&File::from(descriptor)).map_err(|error| start_error(Step::Order, "", &error))?;
    if spec.streams {
        dup2_stdout(stdout)
            .and_then(|()| dup2_stderr(stderr))
            .map_err(|error| start_error(Step::Streams, "", &error.into()))?;
    }
    let command = Command {
        words: spec.command,
        environment: environment(spec.environment),
        directory: spec.directory.map(PathBuf::from),
        filters: spec.filters,
    };
    Ok((spec.mode, command))
}

/// Reads from the file's beginning, wherever it stands: others have read from the same description.
fn read(file: &File) -> io::Result<InitSpec> {
    struct FromStart<'a>(&'a File, u64);
    impl Read for FromStart<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            let length = self.0.read_at(into, self.1)?;
            self.1 += length as u64;
            Ok(length)
        }
    }
    let mut bytes = Vec::new();
    FromStart(file, 0)
        .take(MAX_SPEC_BYTES + 1)
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_SPEC_BYTES {
        return Err(io::Error::from_raw_os_error(libc::EFBIG));
    }
    parse_spec(&bytes).map_err(|_| io::Error::from_raw_os_error(libc::EBADMSG))
}

/// Becomes the command, once it may.
fn launch(channel: &mut Channel, command: &Command) -> Result<Infallible, StartError> {
    command.prepare()?;
    wait_for_start(channel)?;
    execute(&command.words, &command.environment, |command| {
        Err(command.exec())
    })
}

/// Says that everything is ready, and waits for the word to go. A supervisor that dies instead wants no command to run: nobody
/// would watch over it.
fn wait_for_start(channel: &mut Channel) -> Result<(), StartError> {
    channel.send(&InitEvent::Ready);
    while let Some(packet) = channel.await_packet() {
        if matches!(message(&packet.bytes), Ok(Request::Go)) {
            return Ok(());
        }
    }
    Err(StartError {
        step: Step::Order,
        file: String::new(),
        errno: libc::ECANCELED,
    })
}

/// Stays until the command has ended, and says with its own status what it can of how.
fn ended(init: Init) -> ExitCode {
    let ended: WaitStatus = init.run();
    let signal = ended.terminating_signal().map(|signal| 128 + signal);
    status(ended.exit_status().or(signal).unwrap_or(NOT_EXECUTABLE))
}

/// No status is out of range: a code is a byte, and 64 the last signal.
fn status(number: i32) -> ExitCode {
    ExitCode::from(u8::try_from(number).unwrap_or(u8::MAX))
}

/// To the task's stderr, as a shell would.
fn print_error(what: &str) {
    // There is nobody to tell that it can't be told.
    let _ = writeln!(io::stderr(), "{what}");
}
