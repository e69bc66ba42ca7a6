//! The init mode: runs as the container's PID 1 with the command as its child. Forwards every signal to the command, reaps all children,
//! runs exec sessions on request and exits when the command does. Reports wait statuses unchanged and does not interpret them.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::libc;
use nix::sys::prctl;
use nix::sys::signal::SigSet;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nspawn_init::{InitEvent, Request, StartError, Step};
use packets::{Descriptors, Packet};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, fchdir, kill_process, wait};
use rustix_libc_wrappers::process::SignalExt;
use serde::Deserialize;

use crate::channel::Channel;
use crate::command::{Environment, execute, set_over, start_error};
use crate::{Command as Task, enter, wait_for_start};

/// The container's PID 1 while its command runs.
pub(crate) struct Init {
    channel: Channel,
    signals: SignalFd,
    /// The command's environment, the base for exec sessions.
    environment: Environment,
    directory: Option<PathBuf>,
    /// This process's own working directory. Staying in the command's directory would keep that one busy.
    home: Option<OwnedFd>,
    command: Pid,
    /// Running exec sessions by request id.
    exec_sessions: BTreeMap<u64, Pid>,
}

/// Starts the command and reports that it runs. On an error nothing has been reported; the caller gets the channel back to do so.
pub(crate) fn start(mut channel: Channel, task: Task) -> Result<Init, (Channel, StartError)> {
    let home = open(
        ".",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .ok();
    match start_command(&task, &mut channel, home.as_ref()) {
        Ok((signals, command)) => {
            let pid = command.as_raw_pid();
            channel.send(&InitEvent::Running { pid });
            Ok(Init {
                channel,
                signals,
                environment: task.environment,
                directory: task.directory,
                home,
                command,
                exec_sessions: BTreeMap::new(),
            })
        }
        Err(start_error) => Err((channel, start_error)),
    }
}

fn start_command(
    task: &Task,
    channel: &mut Channel,
    home: Option<&OwnedFd>,
) -> Result<(SignalFd, Pid), StartError> {
    let fork = |error: nix::Error| start_error(Step::Fork, "", &error.into());
    prctl::set_name(c"nspawn-init").map_err(fork)?;
    // The kernel reparents orphans to PID 1; a process that is not PID 1, as in a test, has to become a subreaper.
    prctl::set_child_subreaper(true).map_err(fork)?;
    let signals = SignalFd::with_flags(
        &SigSet::all(),
        SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK,
    )
    .map_err(fork)?;
    task.prepare()?;
    wait_for_start(channel)?;
    let command = spawn(&task.words, &task.environment, |_| Ok(()))?;
    restore_directory(home);
    Ok((signals, command))
}

/// Starts a child.
fn spawn(
    words: &[String],
    environment: &Environment,
    connect: impl Fn(&mut Command) -> io::Result<()>,
) -> Result<Pid, StartError> {
    execute(words, environment, |command| {
        connect(command)?;
        let child = command.process_group(0).spawn()?;
        Ok(Pid::from_child(&child))
    })
}

fn restore_directory(home: Option<&OwnedFd>) {
    // The init works in any directory, and every exec session enters its own.
    let _ = home.map(fchdir);
}

impl Init {
    /// Runs until the command has exited, reports its wait status and returns it.
    pub(crate) fn run(mut self) -> WaitStatus {
        loop {
            let channel = self.poll();
            self.pass_signals_on();
            if let Some(status) = self.reap() {
                self.channel.send(&InitEvent::Ended {
                    status: status.as_raw(),
                });
                self.channel.finish();
                return status;
            }
            if channel.contains(PollFlags::OUT) {
                self.channel.flush();
            } else if !channel.is_empty()
                && let Some(packet) = self.channel.next()
            {
                self.answer(packet);
            }
        }
    }

    /// Waits for signals and the channel. Returns the poll events of the channel.
    fn poll(&self) -> PollFlags {
        let mut descriptors = vec![PollFd::new(&self.signals, PollFlags::IN)];
        if let Some((socket, flags)) = self.channel.interest() {
            descriptors.push(PollFd::from_borrowed_fd(socket, flags));
        }
        match poll(&mut descriptors, None) {
            Ok(_) => descriptors
                .get(1)
                .map_or(PollFlags::empty(), PollFd::revents),
            // All signals are blocked, so only a debugger can interrupt the poll.
            Err(_) => PollFlags::empty(),
        }
    }

    /// Forwards all pending signals to the command. The command has not been reaped yet, so its pid can't have been reused.
    fn pass_signals_on(&self) {
        while let Ok(Some(information)) = self.signals.read_signal() {
            let number = i32::try_from(information.ssi_signo).unwrap_or_default();
            if number != libc::SIGCHLD {
                send(self.command, number);
            }
        }
    }

    /// Reaps all exited children. Returns the command's wait status if it is among them.
    fn reap(&mut self) -> Option<WaitStatus> {
        let mut ended = None;
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if pid == self.command => ended = Some(status),
                Ok(Some((pid, status))) => self.report_exec_end(pid, status),
                Err(Errno::INTR) => {}
                Ok(None) | Err(_) => return ended,
            }
        }
    }

    fn report_exec_end(&mut self, pid: Pid, status: WaitStatus) {
        let found = self
            .exec_sessions
            .iter()
            .find(|(_, running)| **running == pid);
        if let Some(id) = found.map(|(id, _)| *id) {
            self.exec_sessions.remove(&id);
            self.channel.send(&InitEvent::ExecEnded {
                id,
                status: status.as_raw(),
            });
        }
    }

    fn answer(&mut self, packet: Packet) {
        match packet.message() {
            Ok(Request::Exec {
                id,
                command,
                environment,
                directory,
            }) => {
                let directory = directory.map(PathBuf::from);
                let event = match self.start_exec_session(
                    id,
                    &command,
                    environment,
                    directory,
                    packet.descriptors,
                ) {
                    Ok(pid) => {
                        self.exec_sessions.insert(id, pid);
                        let pid = pid.as_raw_pid();
                        InitEvent::ExecRunning { id, pid }
                    }
                    Err(start_error) => InitEvent::ExecFailed { id, start_error },
                };
                self.channel.send(&event);
            }
            Ok(Request::Signal { id, signal }) => {
                if let Some(pid) = self.exec_sessions.get(&id)
                    && packet.descriptors.take::<0>().is_ok()
                {
                    send(*pid, signal);
                }
            }
            // The command has been running for a while.
            Ok(Request::Go) => {}
            Err(_) => {
                if let Some(id) = number_of(&packet) {
                    let start_error = refused(libc::EBADMSG);
                    self.channel
                        .send(&InitEvent::ExecFailed { id, start_error });
                }
            }
        }
    }

    fn start_exec_session(
        &self,
        id: u64,
        command: &[String],
        over: Vec<(String, String)>,
        directory: Option<PathBuf>,
        descriptors: Descriptors,
    ) -> Result<Pid, StartError> {
        let [stdin, stdout, stderr] = descriptors.take().map_err(|_| refused(libc::EBADF))?;
        if command.is_empty() {
            return Err(refused(libc::EINVAL));
        }
        if self.exec_sessions.contains_key(&id) {
            return Err(refused(libc::EEXIST));
        }
        let mut environment = self.environment.clone();
        set_over(&mut environment, over);
        let entered = enter(directory.as_deref().or(self.directory.as_deref()));
        let started = entered.and_then(|()| {
            spawn(command, &environment, |command| {
                command
                    .stdin(Stdio::from(stdin.try_clone()?))
                    .stdout(Stdio::from(stdout.try_clone()?))
                    .stderr(Stdio::from(stderr.try_clone()?));
                Ok(())
            })
        });
        restore_directory(self.home.as_ref());
        started
    }
}

/// Sends a signal to a child that has not been reaped; it may be a zombie. Invalid signal numbers are ignored.
fn send(pid: Pid, number: i32) {
    if let Some(signal) = Signal::from_raw(number) {
        // The only remaining error is EPERM: the program changed its user and the init is not privileged.
        let _ = kill_process(pid, signal);
    }
}

fn refused(errno: i32) -> StartError {
    start_error(Step::Order, "", &io::Error::from_raw_os_error(errno))
}

/// The id of an exec request that can't be decoded otherwise.
fn number_of(packet: &Packet) -> Option<u64> {
    #[derive(Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Numbered {
        Exec { id: u64 },
    }
    let Numbered::Exec { id } = packet.message().ok()?;
    Some(id)
}
