//! The first program in a container: reads its init spec, prepares the command, then execs it (launcher) or runs it as its child (init).
//! systemd-nspawn starts it through a descriptor, with the descriptors listed in [`nspawn_init`]. Starts nothing else on its own, and has
//! no threads and no configuration.

mod channel;
mod command;
mod init;
mod raw;
mod session;

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
use nspawn_init::session_spec::SESSION;
use nspawn_init::{
    FILTERED, Filter, InitEvent, InitMode, InitSpec, MAX_SPEC_BYTES, NOT_EXECUTABLE, Request,
    StartError, Step, parse_spec,
};
use rustix::process::{WaitStatus, chdir};
use rustix::stdio::{dup2_stderr, dup2_stdout};
use serde::de::DeserializeOwned;

use crate::channel::Channel;
use crate::command::{Environment, environment, execute, start_error};
use crate::init::Init;
use crate::raw::Inherited;

fn main() -> ExitCode {
    match std::env::args_os().nth(1) {
        Some(word) if word == SESSION => return session::main(),
        Some(word) if word == FILTERED => return filtered(),
        _ => {}
    }
    // First of all, so that no signal is lost: PID 1 drops signals that it neither blocks nor handles. Commands are started with no signal
    // blocked.
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
            print_error(
                "this program is the first process of a container and is started only by systemd-nspawn",
            );
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
    // Without filters the start is begun again, and the task should not see the attempt.
    if start_error.step != Step::Filters {
        print_error(&start_error.to_string());
    }
    let status = status(start_error.status());
    channel.send(&InitEvent::Failed(start_error));
    channel.finish();
    status
}

/// The instruction of a seccomp program that ends it: allowed (`BPF_RET`, `SECCOMP_RET_ALLOW`).
const ALLOW: (u16, u8, u8, u32) = (0x06, 0, 0, libc::SECCOMP_RET_ALLOW);

/// Installs a filter that allows everything, says so, and waits for the end of its stdin.
fn filtered() -> ExitCode {
    let installed = raw::install(&Filter(vec![ALLOW]));
    let mut stdout = io::stdout();
    let said = installed
        .and_then(|()| stdout.write_all(b"1"))
        .and_then(|()| stdout.flush());
    let waited = said.and_then(|()| io::copy(&mut io::stdin(), &mut io::sink()));
    waited.map_or(ExitCode::FAILURE, |_| ExitCode::SUCCESS)
}

/// The command to execute, with its environment, directory and filters.
pub(crate) struct Command {
    words: Vec<String>,
    environment: Environment,
    directory: Option<PathBuf>,
    filters: Vec<Filter>,
}

impl Command {
    /// Enters the directory and installs the filters, the last steps before the command can be executed.
    fn prepare(&self) -> Result<(), StartError> {
        enter(self.directory.as_deref())?;
        if self.words.is_empty() && self.directory.is_none() {
            // The same as in systemd-nspawn for a shell: a missing home directory is not an error.
            let home = self.environment.get(OsStr::new("HOME"));
            let _ = chdir(home.map_or_else(|| OsStr::new("/root"), OsString::as_os_str));
        }
        for filter in &self.filters {
            raw::install(filter).map_err(|error| start_error(Step::Filters, "", &error))?;
        }
        Ok(())
    }
}

/// Enters the directory, if there is one.
fn enter(directory: Option<&Path>) -> Result<(), StartError> {
    let Some(directory) = directory else {
        return Ok(());
    };
    chdir(directory).map_err(|error| start_error(Step::Directory, directory, &error.into()))
}

/// Reads the init spec and connects the streams.
fn ready(
    descriptor: OwnedFd,
    stdout: &OwnedFd,
    stderr: &OwnedFd,
) -> Result<(InitMode, Command), StartError> {
    let spec: InitSpec =
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

/// Reads from offset 0: other processes may have moved the offset of the same open file description.
pub(crate) fn read<T: DeserializeOwned>(file: &File) -> io::Result<T> {
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

/// Execs the command after `Go`.
fn launch(channel: &mut Channel, command: &Command) -> Result<Infallible, StartError> {
    command.prepare()?;
    wait_for_start(channel)?;
    execute(&command.words, &command.environment, |command| {
        Err(command.exec())
    })
}

/// Reports `Ready` and waits for `Go`. If the supervisor dies first the command must not run: nothing would supervise it.
fn wait_for_start(channel: &mut Channel) -> Result<(), StartError> {
    channel.send(&InitEvent::Ready);
    while let Some(packet) = channel.await_packet() {
        let is_go = matches!(packet.message(), Ok(Request::Go));
        if is_go && packet.descriptors.take::<0>().is_ok() {
            return Ok(());
        }
    }
    Err(StartError {
        step: Step::Order,
        file: String::new(),
        errno: libc::ECANCELED,
    })
}

/// Runs until the command has exited, and turns its wait status into an exit status as far as that is possible.
fn ended(init: Init) -> ExitCode {
    let ended: WaitStatus = init.run();
    let signal = ended.terminating_signal().map(|signal| 128 + signal);
    status(ended.exit_status().or(signal).unwrap_or(NOT_EXECUTABLE))
}

/// Every status fits: an exit code is one byte, and the highest signal number is 64.
fn status(number: i32) -> ExitCode {
    ExitCode::from(u8::try_from(number).unwrap_or(u8::MAX))
}

/// To the task's stderr, as a shell does.
fn print_error(what: &str) {
    // There is no other place to report the error.
    let _ = writeln!(io::stderr(), "{what}");
}
