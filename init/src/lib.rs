//! The interface of the driver's own init: the descriptors it finds, its spec, the requests and events on its channel. Shared by
//! the program and by the supervisor that starts it. Types and their text form only: reads no descriptor, starts nothing.
//!
//! systemd-nspawn passes descriptors from 3 on to the first process (`sd_listen_fds(3)`); [`Descriptor`] says which is which.
//! The channel is a socket of the `SOCK_SEQPACKET` kind: every message is one packet, and carries one JSON value.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// A longer packet was not written by us.
pub const MAX_PACKET_BYTES: usize = 128 * 1024;

/// A larger order was not written by us. The kernel takes 2 MiB of arguments and environment by default, 6 MiB at most.
pub const MAX_SPEC_BYTES: u64 = 16 * 1024 * 1024;

/// Exit status when the command was found and can't be executed, as shells and docker have it.
pub const NOT_EXECUTABLE: i32 = 126;
/// Exit status when the command was not found, as shells and docker have it.
pub const NOT_FOUND: i32 = 127;

/// The descriptors that the program finds, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Descriptor {
    /// The channel to the supervisor.
    Channel = 3,
    /// What becomes the command's stdout.
    Stdout = 4,
    /// What becomes the command's stderr.
    Stderr = 5,
    /// The program itself: it is executed by this descriptor, so that nothing of it appears in the container's tree.
    Program = 6,
    /// The order, a file to be read from its beginning.
    Spec = 7,
}

/// How many there are: the value of `LISTEN_FDS`.
pub const DESCRIPTORS: i32 = 5;

/// The path by which systemd-nspawn executes the program.
pub const PROGRAM: &str = "/proc/self/fd/6";

/// What the program is to do. Holds secrets, so it travels by descriptor only.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitSpec {
    /// Which life it is to lead.
    #[serde(rename = "life")]
    pub mode: InitMode,
    /// The words of the command. None: the shell of the container, as a login shell.
    pub command: Vec<String>,
    /// Variables set over those that systemd-nspawn gives. Values are secrets.
    pub environment: Vec<(String, String)>,
    /// Absolute directory in which the command starts; none leaves the one it is started in.
    pub directory: Option<String>,
    /// Whether stdout and stderr are to be replaced by [`Descriptor::Stdout`] and [`Descriptor::Stderr`].
    pub streams: bool,
    /// seccomp programs to install before the command starts, in this order.
    #[serde(default)]
    pub filters: Vec<Filter>,
}

/// Not the values of variables.
impl std::fmt::Debug for InitSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self
            .environment
            .iter()
            .map(|(name, _)| name.as_str())
            .collect();
        f.debug_struct("InitSpec")
            .field("mode", &self.mode)
            .field("command", &self.command)
            .field("environment", &names)
            .field("directory", &self.directory)
            .field("streams", &self.streams)
            .field("filters", &self.filters.len())
            .finish()
    }
}

/// What becomes of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InitMode {
    /// It becomes the command.
    Launcher,
    /// It stays the first process, and the command is its child.
    Init,
}

/// A classic BPF program, an instruction each: code, jump if true, jump if false, constant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Filter(pub Vec<(u16, u8, u8, u32)>);

/// What the program tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InitEvent {
    /// Everything is prepared and the command waits for [`Request::Go`]. The first word, unless it is `Failed`.
    Ready,
    /// The command runs. A launcher that has become the command can't say it.
    Running {
        /// Its process id inside the container.
        pid: i32,
    },
    /// The command does not run, and the program exits with [`StartError::status`].
    Failed(StartError),
    /// The command has ended with this raw wait status.
    Ended {
        /// As `wait(2)` gives it: exit code, signal, core flag.
        status: i32,
    },
    /// A further command runs.
    ExecRunning {
        /// The request's number.
        id: u64,
        /// Its process id inside the container.
        pid: i32,
    },
    /// A further command does not run.
    ExecFailed {
        /// The request's number.
        id: u64,
        /// Why.
        #[serde(rename = "trouble")]
        start_error: StartError,
    },
    /// A further command has ended.
    ExecEnded {
        /// The request's number.
        id: u64,
        /// Its raw wait status.
        status: i32,
    },
}

/// What the program is asked. A launcher hears nothing but the first.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Let the command run. Without it the program ends: what nobody watches must not run.
    Go,
    /// Run a further command. Three descriptors come with the packet: its stdin, stdout and stderr.
    Exec {
        /// Chosen by who asks; every word about this command carries it.
        id: u64,
        /// Its words, at least one.
        command: Vec<String>,
        /// Variables set over those of the init's own environment. Values are secrets.
        environment: Vec<(String, String)>,
        /// Absolute directory in which it starts; none: the one of the task's command.
        directory: Option<String>,
    },
    /// Send a signal to a further command that runs.
    Signal {
        /// Which.
        id: u64,
        /// The signal's number.
        signal: i32,
    },
}

/// Not the values of variables.
impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Go => f.write_str("Go"),
            Self::Exec { id, command, .. } => f
                .debug_struct("Exec")
                .field("id", id)
                .field("command", command)
                .finish_non_exhaustive(),
            Self::Signal { id, signal } => f
                .debug_struct("Signal")
                .field("id", id)
                .field("signal", signal)
                .finish(),
        }
    }
}

/// Why a command does not run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartError {
    /// What was being done.
    pub step: Step,
    /// With which file or directory inside the container; empty where there is none.
    pub file: String,
    /// The kernel's error number.
    pub errno: i32,
}

/// What a program does before its command runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Reading its order.
    Order,
    /// Connecting stdout and stderr.
    Streams,
    /// Entering the working directory.
    Directory,
    /// Installing seccomp programs.
    Filters,
    /// Making a process.
    Fork,
    /// Executing the command.
    Execute,
    /// Executing the interpreter or loader that the command's file names: the file is there, and that is not.
    Interpreter,
}

impl StartError {
    /// The exit status that says this to those who only see a number.
    pub fn status(&self) -> i32 {
        const ENOENT: i32 = 2;
        match (self.step, self.errno) {
            (Step::Execute | Step::Interpreter, ENOENT) => NOT_FOUND,
            _ => NOT_EXECUTABLE,
        }
    }
}

/// In words for a person, with the file's name.
impl std::fmt::Display for StartError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let what = match self.step {
            Step::Order => "the container's first program can't read its order",
            Step::Streams => "stdout and stderr can't be connected",
            Step::Directory => "working directory",
            Step::Filters => "seccomp programs can't be installed",
            Step::Fork => "no process for the command",
            Step::Execute | Step::Interpreter => "command",
        };
        let error = std::io::Error::from_raw_os_error(self.errno);
        match (self.step, self.errno) {
            (Step::Execute, 2) => write!(f, "command {:?} not found", self.file),
            (Step::Execute, _) => write!(f, "command {:?} can't be executed: {error}", self.file),
            (Step::Interpreter, _) => write!(
                f,
                "command {:?} names an interpreter or loader that is not there",
                self.file
            ),
            _ if self.file.is_empty() => write!(f, "{what}: {error}"),
            _ => write!(f, "{what} {:?}: {error}", self.file),
        }
    }
}

/// A message as the bytes of one packet.
pub fn packet<T: Serialize>(message: &T) -> Vec<u8> {
    // Strings and numbers always have a JSON form.
    serde_json::to_vec(message).unwrap_or_default()
}

/// The message in one packet. The error says what is wrong with it and not what it holds.
pub fn message<T: DeserializeOwned>(packet: &[u8]) -> Result<T, Malformed> {
    if packet.len() > MAX_PACKET_BYTES {
        return Err(Malformed {
            column: MAX_PACKET_BYTES,
        });
    }
    read(packet)
}

/// The order in these bytes.
pub fn parse_spec(bytes: &[u8]) -> Result<InitSpec, Malformed> {
    read(bytes)
}

fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Malformed> {
    serde_json::from_slice(bytes).map_err(|error| Malformed {
        column: error.column(),
    })
}

/// Bytes that are no message of ours. Names the place and not the bytes: they may hold secrets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed {
    /// At which byte it is seen.
    pub column: usize,
}

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "no message, as byte {} shows", self.column)
    }
}

impl std::error::Error for Malformed {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text() -> impl Strategy<Value = String> {
        any::<String>()
    }

    fn variables() -> impl Strategy<Value = Vec<(String, String)>> {
        prop::collection::vec((text(), text()), 0..4)
    }

    fn specs() -> impl Strategy<Value = InitSpec> {
        let filter = prop::collection::vec(any::<(u16, u8, u8, u32)>(), 0..4).prop_map(Filter);
        (
            prop_oneof![Just(InitMode::Launcher), Just(InitMode::Init)],
            prop::collection::vec(text(), 0..4),
            variables(),
            prop::option::of(text()),
            any::<bool>(),
            prop::collection::vec(filter, 0..3),
        )
            .prop_map(
                |(mode, command, environment, directory, streams, filters)| InitSpec {
                    mode,
                    command,
                    environment,
                    directory,
                    streams,
                    filters,
                },
            )
    }

    fn requests() -> impl Strategy<Value = Request> {
        let exec = (
            any::<u64>(),
            prop::collection::vec(text(), 0..4),
            variables(),
            prop::option::of(text()),
        )
            .prop_map(|(id, command, environment, directory)| Request::Exec {
                id,
                command,
                environment,
                directory,
            });
        let signal =
            (any::<u64>(), any::<i32>()).prop_map(|(id, signal)| Request::Signal { id, signal });
        prop_oneof![Just(Request::Go), exec, signal]
    }

    /// A whole text with a piece of it replaced by something.
    fn damaged(whole: &[u8], at: prop::sample::Index, length: usize, by: &[u8]) -> Vec<u8> {
        let at = at.index(whole.len());
        let end = (at + length).min(whole.len());
        [&whole[..at], by, &whole[end..]].concat()
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(spec in specs(), request in requests()) {
            prop_assert_eq!(parse_spec(&packet(&spec)).unwrap(), spec);
            prop_assert_eq!(message::<Request>(&packet(&request)).unwrap(), request);
        }

        #[test]
        fn no_bytes_do_harm(bytes in any::<Vec<u8>>()) {
            let _ = parse_spec(&bytes);
            let _ = message::<Request>(&bytes);
            let _ = message::<InitEvent>(&bytes);
        }

        #[test]
        fn no_damage_does_harm(
            spec in specs(),
            request in requests(),
            at in any::<prop::sample::Index>(),
            length in 0..9usize,
            by in prop::collection::vec(any::<u8>(), 0..4),
        ) {
            let _ = parse_spec(&damaged(&packet(&spec), at, length, &by));
            let _ = message::<Request>(&damaged(&packet(&request), at, length, &by));
        }
    }

    #[test]
    fn an_order_without_filters_can_be_read() {
        let text =
            br#"{"life":"init","command":[],"environment":[],"directory":null,"streams":false}"#;
        assert!(parse_spec(text).unwrap().filters.is_empty());
    }

    #[test]
    fn what_is_too_long_is_no_message() {
        let running = InitEvent::Running { pid: 2 };
        let event = packet(&running);
        let padded = [&event[..], &vec![b' '; MAX_PACKET_BYTES - event.len()]].concat();
        assert_eq!(message::<InitEvent>(&padded), Ok(running));
        assert!(message::<InitEvent>(&[&padded[..], b" "].concat()).is_err());
    }

    #[test]
    fn no_error_and_no_debug_form_reports_a_value() {
        let secret = vec![("NAME".to_owned(), "s3cret".to_owned())];
        let spec = InitSpec {
            mode: InitMode::Init,
            command: Vec::new(),
            environment: secret.clone(),
            directory: None,
            streams: true,
            filters: Vec::new(),
        };
        let request = Request::Exec {
            id: 1,
            command: Vec::new(),
            environment: secret,
            directory: None,
        };
        let error = parse_spec(br#"{"life":"s3cret"}"#).unwrap_err();
        for text in [
            format!("{spec:?}"),
            format!("{request:?}"),
            format!("{error:?} {error}"),
        ] {
            assert!(!text.contains("s3cret"), "{text}");
        }
    }

    #[test]
    fn troubles_read_well_and_have_their_status() {
        let rows = [
            (Step::Execute, "it", 2, 127, "command \"it\" not found"),
            (
                Step::Execute,
                "/it",
                13,
                126,
                "command \"/it\" can't be executed: Permission denied (os error 13)",
            ),
            (
                Step::Interpreter,
                "/it",
                2,
                127,
                "command \"/it\" names an interpreter or loader that is not there",
            ),
            (
                Step::Directory,
                "/d",
                2,
                126,
                "working directory \"/d\": No such file or directory (os error 2)",
            ),
            (
                Step::Fork,
                "",
                11,
                126,
                "no process for the command: Resource temporarily unavailable (os error 11)",
            ),
        ];
        for (step, file, errno, status, text) in rows {
            let start_error = StartError {
                step,
                file: file.to_owned(),
                errno,
            };
            assert_eq!(
                (start_error.status(), start_error.to_string()),
                (status, text.to_owned())
            );
        }
    }
}
