//! One systemd-nspawn call: parse, refuse or start, announce, forward signals or kill, exit with the right status. Starts only the leader;
//! `options` and `rootfs` interpret the arguments.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::call_log::{CallLog, Event, Role};
use crate::credentials::Credentials;
use crate::notify;
use crate::options::{self, Options, Parsed, Refusal};
use crate::pid1::{self, End, Plan};
use crate::process;
use crate::rootfs::{self, Prepared};
use crate::scenario::{Call, Scenario};
use crate::tree_lock::TreeLock;

/// The exit status that requests a restart.
const RESTART: i32 = 133;

/// Runs the fake and returns its exit status.
pub(crate) fn run(directory: &Path, words: &[OsString]) -> anyhow::Result<i32> {
    let scenario = Scenario::beside(directory)?;
    let mut call_log = CallLog::beside(directory)?;
    let texts: Vec<String> = words[1..]
        .iter()
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let parsed = options::parse(scenario.version, &texts, |name| std::env::var(name).ok());
    let starts = !matches!(
        parsed,
        Ok(Parsed::Help | Parsed::Version | Parsed::Words(_))
    );
    let number = call_log.call(words, "systemd-nspawn", starts)?;
    let call = scenario.call(number);
    let status = match parsed {
        Ok(Parsed::Help) => say(&options::help(scenario.version)),
        Ok(Parsed::Version) if scenario.version_hangs => loop {
            nix::unistd::pause();
        },
        Ok(Parsed::Version) => say(&version(scenario.version)),
        Ok(Parsed::Words(known)) => say(&format!("{}\n", known.join("\n"))),
        Ok(Parsed::Run(options)) => container(&scenario, &call, &options, &mut call_log)?,
        Err(refusal) => refuse(scenario.version, &refusal),
    };
    call_log.write(&Event::Exit { status })?;
    Ok(status)
}

/// Prints on stdout and returns the status of success.
#[expect(clippy::print_stdout, reason = "the messages of systemd-nspawn")]
fn say(text: &str) -> i32 {
    print!("{text}");
    0
}

/// What `--version` prints.
fn version(number: u32) -> String {
    let package = if number == 252 {
        "252.39-1~deb12u2".to_owned()
    } else {
        format!("{number}-1")
    };
    format!(
        "systemd {number} ({package})\n+PAM +AUDIT +SELINUX +APPARMOR +IMA +SMACK +SECCOMP +GCRYPT -GNUTLS +OPENSSL +ACL +BLKID +CURL +ELFUTILS +FIDO2 +IDN2 -IDN +IPTC +KMOD +LIBCRYPTSETUP +LIBFDISK +PCRE2 -PWQUALITY +P11KIT +QRENCODE +TPM2 +BZIP2 +LZ4 +XZ +ZLIB +ZSTD -BPF_FRAMEWORK -XKBCOMMON +UTMP +SYSVINIT default-hierarchy=unified\n"
    )
}

#[expect(clippy::print_stderr, reason = "the messages of systemd-nspawn")]
fn refuse(version: u32, refusal: &Refusal) -> i32 {
    eprintln!("{refusal}");
    notify_end(version, 1, Some(refusal.errno));
    1
}

/// Sends the final notifications to the service manager.
fn notify_end(version: u32, status: i32, errno: Option<i32>) {
    let doing = if status == RESTART {
        "Restarting"
    } else {
        "Terminating"
    };
    notify::send(&format!("STOPPING=1\nSTATUS={doing}..."));
    if let Some(errno) = errno {
        notify::send(&format!("ERRNO={errno}"));
    }
    if version >= 257 {
        notify::send(&format!("EXIT_STATUS={status}"));
    }
}

#[expect(clippy::print_stderr, reason = "the messages of systemd-nspawn")]
fn container(
    scenario: &Scenario,
    call: &Call,
    options: &Options,
    call_log: &mut CallLog,
) -> anyhow::Result<i32> {
    for warning in &options.warnings {
        eprintln!("{warning}");
    }
    if options.image.is_some() && !scenario.udev && scenario.version <= 257 {
        let words = "Sorry, but --image= requires access to the host's /run/ hierarchy, since we need access to udev.";
        return Ok(refuse(
            scenario.version,
            &Refusal {
                message: words.to_owned(),
                errno: 95,
            },
        ));
    }
    if options.notify_ready {
        // The socket would be at a path that only exists inside a real container.
        let words = "fake-nspawn: --notify-ready=yes is not simulated";
        return Ok(refuse(
            scenario.version,
            &Refusal {
                message: words.to_owned(),
                errno: 95,
            },
        ));
    }
    let mut prepared = match rootfs::prepare(options, scenario) {
        Ok(prepared) => prepared,
        Err(refusal) => return Ok(refuse(scenario.version, &refusal)),
    };
    let place = call_log.path().parent().unwrap_or_else(|| Path::new("/"));
    let credentials = Credentials::read(&options.credential_files, place)?;
    prepared
        .environment
        .splice(0..0, credentials.iter().map(Credentials::variable));
    let _lock = match lock(options, &prepared)? {
        Ok(lock) => lock,
        Err(refusal) => return Ok(refuse(scenario.version, &refusal)),
    };
    if options.scope_settings && options.keep_unit && !options.register {
        eprintln!(
            "Machine and scope registration turned off, --slice= and --property= settings will have no effect."
        );
    }
    if let Some(refusal) = &call.refuse {
        eprintln!("{}", refusal.stderr);
        notify_end(scenario.version, refusal.status, Some(5));
        return Ok(refusal.status);
    }
    if !options.quiet && !options.pipe {
        let root = prepared
            .root
            .as_deref()
            .unwrap_or_else(|| Path::new("image"));
        eprintln!(
            "Spawning container {} on {}.",
            prepared.machine,
            root.display()
        );
        eprintln!("Press ^] three times within 1s to kill container.");
    }
    let mut nspawn = Nspawn {
        scenario,
        call,
        options,
        call_log,
        leader: None,
        asked: false,
    };
    let (status, errno) = nspawn.run(&prepared)?;
    let status = call.exit_status.unwrap_or(status);
    // The remaining cleanup may take long, for example removing an ephemeral copy.
    notify_end(scenario.version, status, errno);
    notify::hold(call.pause_before_exit.as_deref());
    std::thread::sleep(Duration::from_millis(call.delay_before_exit_ms));
    Ok(status)
}

/// One writer or any number of readers of a tree, with the lock file beside the tree. The second lock of the real tool, named by the tree's
/// inode, needs root.
fn lock(
    options: &Options,
    prepared: &Prepared,
) -> anyhow::Result<Result<Option<TreeLock>, Refusal>> {
    let Some(root) = prepared.root.as_deref().filter(|_| !options.ephemeral) else {
        return Ok(Ok(None));
    };
    Ok(match TreeLock::take(root, options.read_only) {
        Ok(lock) => Ok(lock),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(Refusal {
            message: format!("Directory tree {} is currently busy.", root.display()),
            errno: 16,
        }),
        Err(errno) => return Err(errno.into()),
    })
}

struct Nspawn<'a> {
    scenario: &'a Scenario,
    call: &'a Call,
    options: &'a Options,
    call_log: &'a mut CallLog,
    leader: Option<i32>,
    /// The kill signal has been sent.
    asked: bool,
}

impl Nspawn<'_> {
    /// From the container's start to its end. Returns the exit status, and an errno if it failed.
    fn run(&mut self, prepared: &Prepared) -> anyhow::Result<(i32, Option<i32>)> {
        let mut mask = SigSet::empty();
        for signal in [
            Signal::SIGCHLD,
            Signal::SIGTERM,
            Signal::SIGINT,
            Signal::SIGWINCH,
        ] {
            mask.add(signal);
        }
        mask.thread_block()?;
        let events = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        if self.asked_to_end_within(
            &events,
            Duration::from_millis(self.call.delay_before_notify_ms),
        )? {
            return Ok((1, Some(5)));
        }
        if let Some(number) = self.call.die_before_notify {
            match process::die_by(number, None)? {}
        }
        prctl::set_child_subreaper(true)?;
        let report = self.start(prepared)?;
        let seen = self.wait(&events)?;
        process::kill_descendants();
        let end = reported_end(report)?.unwrap_or(seen);
        Ok(self.status(&prepared.machine, end))
    }

    /// Starts the leader and announces it. Returns the read end of the pipe on which the leader reports its end.
    fn start(&mut self, prepared: &Prepared) -> anyhow::Result<File> {
        let (receiver, sender) = nix::unistd::pipe()?;
        fcntl(&receiver, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        let plan = Plan {
            call_log: self.call_log.path().to_owned(),
            mode: self.options.mode,
            root: prepared.root.clone(),
            command: self.options.command.clone(),
            rlimits: self.options.rlimits.clone(),
            cwd: prepared.cwd.clone(),
            instead: self.call.instead.clone(),
            ignore_signals: self.call.ignore_signals.clone(),
            late: self.call.pause_before_signals.clone(),
            uuid: prepared.own_uuid.clone(),
            sender: sender.as_raw_fd(),
            passed: rootfs::passed_descriptors().unwrap_or_default(),
            leader: 0,
            payload: 0,
        };
        let mut command = match plan.late {
            None => pid1::role(pid1::PID1_NAME, &plan)?,
            Some(_) => pid1::ignoring_all_signals(&plan)?,
        };
        command.env_clear().envs(
            prepared
                .environment
                .iter()
                .map(|(name, value)| (name, value)),
        );
        // The leader is announced before it has blocked its signals itself, so it is started with all of them blocked.
        let before = SigSet::thread_get_mask()?;
        SigSet::all().thread_block()?;
        let groups = process::Groups::make();
        if let Some(groups) = &groups {
            groups.enter("payload")?;
        }
        let mut spawn = || -> anyhow::Result<_> { Ok(command.spawn()?) };
        let child = match self.options.private_network {
            true => process::in_new_network(spawn),
            false => spawn(),
        };
        before.thread_set_mask()?;
        let child = child?;
        // Like the real one it keeps none of the descriptors that it passes on.
        for number in 3..3 + plan.passed {
            nix::unistd::close(number).ok();
        }
        if let Some(groups) = &groups {
            groups.enter("supervisor")?;
        }
        let pid = i32::try_from(child.id())?;
        self.leader = Some(pid);
        drop(sender);
        let mut receiver = File::from(receiver);
        // This also returns if the leader dies before it is ready; its death is noticed later.
        receiver.read_exact(&mut [0; pid1::READY.len()]).ok();
        self.call_log.write(&Event::Started { leader: pid })?;
        notify::hold(self.call.pause_before_notify.as_deref());
        if !self.call.never_notify {
            let doing = if self.scenario.version >= 258 {
                "started"
            } else {
                "running"
            };
            notify::send(&format!(
                "STATUS=Container {doing}.\nX_NSPAWN_LEADER_PID={pid}"
            ));
            notify::send("READY=1\n");
        }
        Ok(receiver)
    }

    fn asked_to_end_within(&mut self, events: &SignalFd, time: Duration) -> anyhow::Result<bool> {
        let until = Instant::now() + time;
        while let Some(left) = until
            .checked_duration_since(Instant::now())
            .filter(|left| !left.is_zero())
        {
            ready(
                events,
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX),
            )?;
            if self.take_signals(events)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn wait(&mut self, events: &SignalFd) -> anyhow::Result<End> {
        loop {
            let mut ended = None;
            let leader = self.leader;
            process::reap(|pid, status| {
                if Some(pid) == leader {
                    if status.stopped() {
                        self.freeze(pid, Signal::SIGSTOP);
                    } else if status.continued() {
                        self.freeze(pid, Signal::SIGCONT);
                    } else {
                        ended = End::of(status);
                    }
                }
            });
            if let Some(end) = ended {
                return Ok(end);
            }
            ready(events, PollTimeout::NONE)?;
            self.take_signals(events)?;
        }
    }

    /// Except in plain mode, stopping the leader stops no other process.
    fn freeze(&self, leader: i32, signal: Signal) {
        if self.options.mode == options::Mode::Plain
            && let Some(payload) = process::children(leader).first()
        {
            process::send(*payload, signal as i32);
        }
    }

    /// Handles the pending signals. True if one of them requested the container's end.
    fn take_signals(&mut self, events: &SignalFd) -> anyhow::Result<bool> {
        let mut asked = false;
        while let Some(event) = events.read_signal()? {
            let number = i32::try_from(event.ssi_signo)?;
            if number == Signal::SIGCHLD as i32 {
                continue;
            }
            self.call_log.write(&Event::Signal {
                role: Role::Nspawn,
                signal: number,
            })?;
            if number != Signal::SIGWINCH as i32 {
                asked = true;
                self.end_leader();
            }
        }
        Ok(asked)
    }

    #[expect(clippy::print_stderr, reason = "the messages of systemd-nspawn")]
    fn end_leader(&mut self) {
        let Some(leader) = self.leader else { return };
        match self.options.kill_signal.filter(|_| !self.asked) {
            Some(number) => {
                self.asked = true;
                eprintln!(
                    "Trying to halt container. Send SIGTERM again to trigger immediate termination."
                );
                process::send(leader, number);
            }
            None => process::send(leader, Signal::SIGKILL as i32),
        }
    }

    /// The real tool's exit status and messages for this end of PID 1.
    #[expect(clippy::print_stderr, reason = "the messages of systemd-nspawn")]
    fn status(&self, machine: &str, end: End) -> (i32, Option<i32>) {
        let quiet = self.options.quiet || self.options.pipe;
        let say = |words: String| {
            if !quiet {
                eprintln!("{words}");
            }
        };
        match end {
            End::Exit(0) => say(format!("Container {machine} exited successfully.")),
            End::Exit(code) => say(format!(
                "Container {machine} failed with error code {code}."
            )),
            End::Signal(2) => say(format!("Container {machine} has been shut down.")),
            End::Signal(1) => say(format!("Container {machine} is being rebooted.")),
            End::Signal(number) => {
                eprintln!(
                    "Container {machine} terminated by signal {}.",
                    process::signal_name(number)
                );
            }
        }
        match end {
            End::Exit(RESTART) => (1, None),
            End::Exit(code) => (code, None),
            End::Signal(2) => (0, None),
            End::Signal(1) => (RESTART, None),
            End::Signal(_) => (1, Some(5)),
        }
    }
}

fn ready(events: &SignalFd, timeout: PollTimeout) -> anyhow::Result<()> {
    match poll(
        &mut [PollFd::new(events.as_fd(), PollFlags::POLLIN)],
        timeout,
    ) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn reported_end(mut report: File) -> anyhow::Result<Option<End>> {
    let mut text = Vec::new();
    report.read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text).ok())
}
