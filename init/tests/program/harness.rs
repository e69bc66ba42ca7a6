//! Starts the init as systemd-nspawn does: through a descriptor, with its five inherited descriptors. A wait that exceeds its limit fails
//! the test.

use std::fs::File;
use std::io::{IoSlice, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use command_fds::{CommandFdExt, FdMapping};
use nspawn_init::{Descriptor, InitEvent, InitMode, InitSpec, PROGRAM, Request, StartError};
use packets::encode;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Pid, Signal, kill_process};

const LIMIT: Duration = Duration::from_secs(30);

/// A typical default `PATH`.
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The running init, and the supervisor's end of its descriptors.
pub(crate) struct Program {
    child: Child,
    channel: Option<OwnedFd>,
    pub(crate) stdin: Option<std::process::ChildStdin>,
    stdout: File,
    stderr: File,
}

/// What the init has left after its exit.
#[derive(Debug)]
pub(crate) struct Left {
    pub(crate) words: Vec<InitEvent>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    /// Its own raw wait status.
    pub(crate) status: i32,
}

/// A minimal init spec.
pub(crate) fn spec(mode: InitMode, command: &[&str]) -> InitSpec {
    InitSpec {
        mode,
        command: command.iter().map(|event| (*event).to_owned()).collect(),
        environment: Vec::new(),
        directory: None,
        streams: true,
        filters: Vec::new(),
    }
}

/// Shell script: waits until it reads `end`. A signal may interrupt the read for a moment.
pub(crate) const UNTIL_END: &str = "until [ \"$line\" = end ]; do read line; done";

pub(crate) fn shell(mode: InitMode, script: &str) -> InitSpec {
    spec(mode, &["/bin/sh", "-c", script])
}

/// A file with this content.
pub(crate) fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    // Not at offset 0: the init must not rely on the file offset.
    file.seek(std::io::SeekFrom::End(0)).unwrap();
    file
}

/// A pipe: read end, write end.
pub(crate) fn pipe() -> (File, OwnedFd) {
    let (read, write) = std::io::pipe().unwrap();
    (File::from(OwnedFd::from(read)), write.into())
}

/// An init that is about to be started.
pub(crate) struct Launch {
    command: Command,
    spec: Vec<u8>,
    go: bool,
}

impl Launch {
    pub(crate) fn new(spec: &InitSpec) -> Self {
        Self::of_bytes(encode(spec))
    }

    pub(crate) fn of_bytes(spec: Vec<u8>) -> Self {
        Self::by(Command::new(PROGRAM), spec)
    }

    /// Started by another program, which executes the init.
    pub(crate) fn by(mut command: Command, spec: Vec<u8>) -> Self {
        command.env_clear().env("PATH", PATH);
        Self {
            command,
            spec,
            go: true,
        }
    }

    /// A variable set by systemd-nspawn.
    pub(crate) fn environment(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    pub(crate) fn directory(mut self, directory: &Path) -> Self {
        self.command.current_dir(directory);
        self
    }

    /// Does not send `Go` yet.
    pub(crate) fn without_go(mut self) -> Self {
        self.go = false;
        self
    }

    pub(crate) fn start(mut self) -> Program {
        let (ours, theirs) = packets::pair().unwrap();
        // A request waits for space in the socket buffer.
        rustix::io::ioctl_fionbio(&ours, false).unwrap();
        let (stdout, their_stdout) = pipe();
        let (stderr, their_stderr) = pipe();
        let descriptors: [(OwnedFd, Descriptor); 5] = [
            (theirs, Descriptor::Channel),
            (their_stdout, Descriptor::Stdout),
            (their_stderr, Descriptor::Stderr),
            (
                File::open(env!("CARGO_BIN_EXE_nspawn-init"))
                    .unwrap()
                    .into(),
                Descriptor::Program,
            ),
            (file(&self.spec).into(), Descriptor::Spec),
        ];
        let mappings = descriptors
            .into_iter()
            .map(|(parent_fd, child)| FdMapping {
                parent_fd,
                child_fd: child as i32,
            })
            .collect();
        self.command.fd_mappings(mappings).unwrap();
        let mut child = self
            .command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let program = Program {
            stdin: child.stdin.take(),
            child,
            channel: Some(ours),
            stdout,
            stderr,
        };
        if self.go {
            // An init that has already failed may have exited; its events can still be read.
            program.try_ask(&Request::Go, &[]);
        }
        program
    }

    /// Starts it and waits for its exit.
    pub(crate) fn run(self) -> Left {
        self.start().end()
    }
}

/// Runs an init with this spec until it exits.
pub(crate) fn run(spec: &InitSpec) -> Left {
    Launch::new(spec).run()
}

impl Program {
    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// Its only child: the command of an init.
    pub(crate) fn command(&self) -> i32 {
        let children = self.children();
        assert_eq!(children.len(), 1, "{children:?}");
        children[0]
    }

    pub(crate) fn children(&self) -> Vec<i32> {
        let pid = self.pid();
        let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        text.split_ascii_whitespace()
            .map(|pid| pid.parse().unwrap())
            .collect()
    }

    /// The next event; none if the channel is closed.
    pub(crate) fn event(&self) -> Option<InitEvent> {
        let channel = self.channel.as_ref().unwrap();
        wait_for("a word", channel.as_fd());
        match packets::receive(channel) {
            Ok(packet) => Some(packet.message().unwrap()),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => None,
            Err(error) => panic!("{error}"),
        }
    }

    pub(crate) fn expect_running(&self) {
        assert_eq!(self.event(), Some(InitEvent::Ready));
        let event = self.event();
        assert!(
            matches!(event, Some(InitEvent::Running { .. })),
            "{event:?}"
        );
    }

    /// Sends a request with these descriptors.
    pub(crate) fn ask(&self, request: &Request, descriptors: &[BorrowedFd<'_>]) {
        self.send(&encode(request), descriptors);
    }

    pub(crate) fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        self.try_send(bytes, descriptors, SendFlags::empty())
            .unwrap();
    }

    /// Sends a request unless the socket buffer is full or the init has closed the channel.
    pub(crate) fn try_ask(&self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> bool {
        match self.try_send(&encode(request), descriptors, SendFlags::DONTWAIT) {
            Ok(_) => true,
            Err(Errno::AGAIN | Errno::PIPE) => false,
            Err(error) => panic!("{error}"),
        }
    }

    fn try_send(
        &self,
        bytes: &[u8],
        descriptors: &[BorrowedFd<'_>],
        flags: SendFlags,
    ) -> rustix::io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        let socket = self.channel.as_ref().unwrap();
        let slices = [IoSlice::new(bytes)];
        sendmsg(socket, &slices, &mut control, flags | SendFlags::NOSIGNAL)
    }

    /// Writes a line to the command's stdin; ignored if the command has exited.
    pub(crate) fn tell(&mut self, line: &str) {
        let _ = writeln!(self.stdin.as_mut().unwrap(), "{line}");
    }

    /// The same effect as the supervisor's death.
    pub(crate) fn close_channel(&mut self) {
        self.channel = None;
    }

    pub(crate) fn signal(&self, number: i32) {
        use rustix_libc_wrappers::process::SignalExt;
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::from_raw(number).unwrap()).unwrap();
    }

    /// The next line of the command's stdout.
    pub(crate) fn line(&mut self) -> String {
        line(&mut self.stdout)
    }

    /// Whether the command prints something within this many milliseconds.
    pub(crate) fn writes_within(&self, milliseconds: i64) -> bool {
        is_ready(
            self.stdout.as_fd(),
            Duration::from_millis(milliseconds.cast_unsigned()),
        )
    }

    /// Closes the command's stdin, reads everything to the end and waits for the exit.
    pub(crate) fn end(mut self) -> Left {
        drop(self.stdin.take());
        let mut streams = [self.stdout.try_clone(), self.stderr.try_clone()].map(Result::unwrap);
        let (words, [stdout, stderr]) = std::thread::scope(|scope| {
            let streams = streams
                .each_mut()
                .map(|stream| scope.spawn(|| rest(stream)));
            let mut words = Vec::new();
            if self.channel.is_some() {
                while let Some(event) = self.event() {
                    words.push(event);
                }
            }
            (words, streams.map(|stream| stream.join().unwrap()))
        });
        let status = self.child.wait().unwrap().into_raw();
        Left {
            words,
            stdout,
            stderr,
            status,
        }
    }
}

/// A failed test leaves no process running.
impl Drop for Program {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            for child in self.children() {
                let _ = kill_process(Pid::from_raw(child).unwrap(), Signal::KILL);
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Left {
    /// The start error in its last event.
    pub(crate) fn start_error(&self) -> &StartError {
        match self.words.last() {
            Some(InitEvent::Failed(start_error)) => start_error,
            _ => panic!("no trouble: {self:?}"),
        }
    }

    /// Its exit code.
    pub(crate) fn code(&self) -> i32 {
        std::process::ExitStatus::from_raw(self.status)
            .code()
            .unwrap_or_else(|| panic!("no exit status: {self:?}"))
    }
}

pub(crate) fn line(from: &mut File) -> String {
    let mut line = Vec::new();
    loop {
        wait_for("a line", from.as_fd());
        let mut byte = [0];
        match from.read(&mut byte).unwrap() {
            0 => panic!("the end after {:?}", String::from_utf8_lossy(&line)),
            _ if byte[0] == b'\n' => return String::from_utf8(line).unwrap(),
            _ => line.push(byte[0]),
        }
    }
}

pub(crate) fn rest(from: &mut File) -> String {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        wait_for("the end of the stream", from.as_fd());
        match from.read(&mut buffer).unwrap() {
            0 => return String::from_utf8_lossy(&bytes).into_owned(),
            length => bytes.extend(&buffer[..length]),
        }
    }
}

fn wait_for(what: &str, descriptor: BorrowedFd<'_>) {
    assert!(is_ready(descriptor, LIMIT), "{what}: not within {LIMIT:?}");
}

fn is_ready(descriptor: BorrowedFd<'_>, limit: Duration) -> bool {
    let mut descriptors = [PollFd::from_borrowed_fd(descriptor, PollFlags::IN)];
    let limit = Timespec::try_from(limit).unwrap();
    poll(&mut descriptors, Some(&limit)).unwrap() > 0
}

/// Polls a condition that has no notification.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {LIMIT:?}");
        std::thread::yield_now();
    }
}

/// The stdout and wait status of a command that runs as an ordinary child of the test.
pub(crate) fn directly(command: &[&str], directory: &Path) -> (String, i32) {
    let output = Command::new(command[0])
        .args(&command[1..])
        .env_clear()
        .env("PATH", PATH)
        .current_dir(directory)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    (
        String::from_utf8(output.stdout).unwrap(),
        output.status.into_raw(),
    )
}

/// Writes an executable file.
pub(crate) fn executable(path: &Path, content: &[u8], mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::write(path, content).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// A temporary directory.
pub(crate) fn directory() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}
