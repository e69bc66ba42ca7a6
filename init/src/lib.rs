//! The interface of the driver's own init: its inherited descriptors, its init spec, and the requests and events on its channel. Used by
//! the init in the container and by the supervisor that starts it. Only types: reads no descriptor, starts nothing.
//!
//! systemd-nspawn passes descriptors from 3 on to the container's first process (`sd_listen_fds(3)`); [`Descriptor`] lists them. Each
//! message on the channel is one of the [`packets`].

use packets::Malformed;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub mod session_spec;

/// The driver never writes a larger init spec. The kernel's limit for arguments and environment is 2 MiB by default, 6 MiB at most.
pub const MAX_SPEC_BYTES: u64 = 16 * 1024 * 1024;

/// Exit status if the command was found but can't be executed, the same as in shells and Docker.
pub const NOT_EXECUTABLE: i32 = 126;
/// Exit status if the command was not found, the same as in shells and Docker.
pub const NOT_FOUND: i32 = 127;

/// The descriptors that the init inherits, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Descriptor {
    /// The channel to the supervisor.
    Channel = 3,
    /// Becomes the command's stdout.
    Stdout = 4,
    /// Becomes the command's stderr.
    Stderr = 5,
    /// The init binary itself. It is executed through this descriptor, so that no file of it appears in the container's root file system.
    Program = 6,
    /// The init spec, a file that is read from offset 0.
    Spec = 7,
}

/// The argument that makes this program, outside any container, a process with one seccomp filter that allows everything. It writes a byte to
/// stdout when it has installed that, and exits when its stdin ends. Only to find out whether the kernel shows filters.
pub const FILTERED: &str = "filtered";

/// The number of inherited descriptors: the value of `LISTEN_FDS`.
pub const DESCRIPTORS: i32 = 5;

/// The path through which systemd-nspawn executes the init.
pub const PROGRAM: &str = "/proc/self/fd/6";

/// What the init has to do. Contains secrets, so it is passed by descriptor only.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitSpec {
    /// Launcher or init.
    #[serde(rename = "life")]
    pub mode: InitMode,
    /// The command and its arguments. Empty: the container's shell, as a login shell.
    pub command: Vec<String>,
    /// Variables that override those set by systemd-nspawn. Values are secrets.
    pub environment: Vec<(String, String)>,
    /// Absolute working directory of the command; `None` keeps the one in which the init starts.
    pub directory: Option<String>,
    /// Whether to replace stdout and stderr by [`Descriptor::Stdout`] and [`Descriptor::Stderr`].
    pub streams: bool,
    /// seccomp programs to install before the command starts, in this order.
    #[serde(default)]
    pub filters: Vec<Filter>,
}

/// Leaves out the values of variables.
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

/// How the init runs the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InitMode {
    /// It execs the command.
    Launcher,
    /// It stays PID 1 and runs the command as its child.
    Init,
}

/// A classic BPF program. Each instruction: code, jump if true, jump if false, constant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Filter(pub Vec<(u16, u8, u8, u32)>);

/// What the init reports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InitEvent {
    /// Everything is prepared and the command waits for [`Request::Go`]. The first event, unless that is `Failed`.
    Ready,
    /// The command runs. A launcher never sends it: it has become the command.
    Running {
        /// The command's pid inside the container.
        pid: i32,
    },
    /// The command does not run; the init exits with [`StartError::status`].
    Failed(StartError),
    /// The command has exited with this raw wait status.
    Ended {
        /// As returned by `wait(2)`: exit code, signal, core dump flag.
        status: i32,
    },
}

/// What the supervisor can request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Run the command. If the channel closes without it the init exits: a command must not run without a supervisor.
    Go,
}

/// Why a command does not run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartError {
    /// The step that failed.
    pub step: Step,
    /// The file or directory involved, as a path inside the container; empty if there is none.
    pub file: String,
    /// The errno.
    pub errno: i32,
}

/// The steps before the command runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Reading the init spec.
    Order,
    /// Connecting stdout and stderr.
    Streams,
    /// Joining the container's namespaces and cgroups.
    Join,
    /// Opening a terminal.
    Terminal,
    /// Looking up the user.
    User,
    /// Entering the working directory.
    Directory,
    /// Limiting privileges and resources.
    Confine,
    /// Installing seccomp programs.
    Filters,
    /// Forking.
    Fork,
    /// Executing the command.
    Execute,
    /// Executing the interpreter or loader that the command's file names: the file exists, its interpreter does not.
    Interpreter,
}

impl StartError {
    /// The exit status that stands for this error where only a number can be passed on.
    pub fn status(&self) -> i32 {
        const ENOENT: i32 = 2;
        match (self.step, self.errno) {
            (Step::Execute | Step::Interpreter, ENOENT) => NOT_FOUND,
            _ => NOT_EXECUTABLE,
        }
    }
}

/// A readable message with the file's name.
impl std::fmt::Display for StartError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let what = match self.step {
            Step::Order => "the container init can't read its init spec",
            Step::Streams => "stdout and stderr can't be connected",
            Step::Join => "the container can't be entered",
            Step::Terminal => "no terminal can be opened in the container",
            Step::User => "user",
            Step::Directory => "working directory",
            Step::Confine => "the command can't be confined",
            Step::Filters => "seccomp programs can't be installed",
            Step::Fork => "the command's process can't be created",
            Step::Execute | Step::Interpreter => "command",
        };
        let error = std::io::Error::from_raw_os_error(self.errno);
        match (self.step, self.errno) {
            (Step::Execute, 2) => write!(f, "command {:?} not found", self.file),
            (Step::Execute, _) => write!(f, "command {:?} can't be executed: {error}", self.file),
            (Step::User, 2) => write!(f, "user {:?} does not exist in the container", self.file),
            (Step::Interpreter, _) => write!(
                f,
                "command {:?} needs an interpreter or loader that does not exist",
                self.file
            ),
            _ if self.file.is_empty() => write!(f, "{what}: {error}"),
            _ => write!(f, "{what} {:?}: {error}", self.file),
        }
    }
}

/// Decodes an init spec or a session spec.
pub fn parse_spec<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Malformed> {
    Ok(serde_json::from_slice(bytes)?)
}

#[cfg(test)]
mod tests {
    use super::session_spec::SessionSpec;
    use super::*;
    use packets::{decode, encode};
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

    /// `whole` with some of its bytes replaced.
    fn damaged(whole: &[u8], at: prop::sample::Index, length: usize, by: &[u8]) -> Vec<u8> {
        let at = at.index(whole.len());
        let end = (at + length).min(whole.len());
        [&whole[..at], by, &whole[end..]].concat()
    }

    proptest! {
        #[test]
        fn a_message_is_read_back(spec in specs()) {
            prop_assert_eq!(parse_spec::<InitSpec>(&encode(&spec)).unwrap(), spec);
        }

        #[test]
        fn arbitrary_bytes_are_no_panic(bytes in any::<Vec<u8>>()) {
            let _ = parse_spec::<InitSpec>(&bytes);
            let _ = parse_spec::<SessionSpec>(&bytes);
            let _ = decode::<Request>(&bytes);
            let _ = decode::<InitEvent>(&bytes);
        }

        #[test]
        fn damaged_messages_are_no_panic(
            spec in specs(),
            at in any::<prop::sample::Index>(),
            length in 0..9usize,
            by in prop::collection::vec(any::<u8>(), 0..4),
        ) {
            let _ = parse_spec::<InitSpec>(&damaged(&encode(&spec), at, length, &by));
            let _ = decode::<Request>(&damaged(&encode(&Request::Go), at, length, &by));
        }
    }

    #[test]
    fn an_init_spec_without_filters_can_be_read() {
        let text =
            br#"{"life":"init","command":[],"environment":[],"directory":null,"streams":false}"#;
        assert!(parse_spec::<InitSpec>(text).unwrap().filters.is_empty());
    }

    #[test]
    fn no_error_and_no_debug_form_reports_a_value() {
        let secret = vec![("NAME".to_owned(), "s3cret".to_owned())];
        let spec = InitSpec {
            mode: InitMode::Init,
            command: Vec::new(),
            environment: secret,
            directory: None,
            streams: true,
            filters: Vec::new(),
        };
        let error = parse_spec::<InitSpec>(br#"{"life":"s3cret"}"#).unwrap_err();
        for text in [format!("{spec:?}"), format!("{error:?} {error}")] {
            assert!(!text.contains("s3cret"), "{text}");
        }
    }

    #[test]
    fn start_errors_have_a_message_and_an_exit_code() {
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
                "command \"/it\" needs an interpreter or loader that does not exist",
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
                "the command's process can't be created: Resource temporarily unavailable (os error 11)",
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
