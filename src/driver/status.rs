//! The only place where our errors become gRPC statuses. Nomad reads three things from a status: whether it may retry (a detail
//! that only transient host errors carry), the text, which people read, and the two codes UNAVAILABLE and CANCELLED, which it
//! takes for the exit of this process; those two are never returned.

use std::time::Duration;

use prost::Message as _;
use tonic::{Code, Status};

use crate::backend::{BackendError, chain};
use crate::config::ConfigError;
use crate::exec::ExecError;
use crate::proto::{rpc, structs};
use crate::signal::UnknownSignal;
use crate::task::TaskError;
use crate::task::handle::HandleError;

/// The output of a tool can be long; a gRPC trailer can't.
const MAX_MESSAGE_BYTES: usize = 4 * 1024;
/// How long the text of an error of exec may be.
const MAX_EXEC_MESSAGE_BYTES: usize = 85;
/// How long it may be together with what gRPC puts in front of it: the text of a close frame, without its status code.
const MAX_FRAME_BYTES: usize = 123;
const RECOVERABLE_TYPE: &str =
    "type.googleapis.com/hashicorp.nomad.plugins.shared.structs.RecoverableError";

/// Why a call fails.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Signal(#[from] UnknownSignal),
    #[error("the request has no {0}")]
    Missing(&'static str),
    #[error("{0}")]
    Request(String),
    #[error(transparent)]
    Handle(#[from] HandleError),
    #[error(transparent)]
    Task(#[from] TaskError),
    #[error("the plugin is shutting down and does not start tasks")]
    Closing,
    #[error("{0} is not supported by this driver")]
    Unsupported(&'static str),
    #[error("internal error, see the agent's log")]
    Panicked,
    /// In the middle of a session.
    #[error("the task has ended")]
    TaskEnded,
    /// In the middle of a session.
    #[error("the command was killed from outside, or the task is being stopped")]
    SessionLost,
    /// In the middle of a session.
    #[error("the client has sent nothing for {} s", .0.as_secs())]
    ClientGone(Duration),
    /// In the middle of a session.
    #[error("the connection to the client is lost")]
    Disconnected,
}

impl CallError {
    /// The status of a call for exec. Its text reaches the user in a websocket frame of limited size: Nomad replaces a longer one by
    /// "unexpected EOF".
    pub(super) fn into_short_status(self) -> Status {
        let status = Status::from(self);
        // The names of tonic are those of Go, except for `CANCELLED`, which is never returned.
        let frame = format!("rpc error: code = {:?} desc = ", status.code()).len();
        let most = MAX_EXEC_MESSAGE_BYTES.min(MAX_FRAME_BYTES.saturating_sub(frame));
        Status::new(status.code(), shortened(status.message(), most))
    }
}

/// At most `most` bytes of a text, cut between two characters.
fn shortened(text: &str, most: usize) -> String {
    const CUT: &str = "…";
    if text.len() <= most {
        return text.to_owned();
    }
    let end = text.floor_char_boundary(most.saturating_sub(CUT.len()));
    format!("{}{CUT}", &text[..end])
}

impl From<CallError> for Status {
    fn from(error: CallError) -> Self {
        let (code, retry) = match &error {
            CallError::Config(error) if error.cause.is_recoverable() => {
                (Code::FailedPrecondition, true)
            }
            CallError::Config(_)
            | CallError::Signal(_)
            | CallError::Missing(_)
            | CallError::Request(_) => (Code::InvalidArgument, false),
            CallError::Handle(_) => (Code::FailedPrecondition, false),
            CallError::Closing | CallError::Task(TaskError::ShuttingDown) => {
                (Code::FailedPrecondition, true)
            }
            CallError::Unsupported(_) => (Code::Unimplemented, false),
            CallError::Panicked
            | CallError::Task(
                TaskError::Panicked | TaskError::AttachTimeout(_) | TaskError::ExecTimeout(_),
            ) => (Code::Internal, false),
            CallError::TaskEnded => (Code::FailedPrecondition, false),
            CallError::SessionLost | CallError::ClientGone(_) | CallError::Disconnected => {
                (Code::Aborted, false)
            }
            CallError::Task(TaskError::AlreadyKnown(_)) => (Code::AlreadyExists, false),
            CallError::Task(TaskError::Unknown) => (Code::NotFound, false),
            CallError::Task(TaskError::NotRunning | TaskError::StillRunning) => {
                (Code::FailedPrecondition, false)
            }
            CallError::Task(TaskError::Backend(cause)) => match cause {
                cause if cause.is_transient() => (Code::FailedPrecondition, true),
                BackendError::Exec(ExecError::EmptyCommand) => (Code::InvalidArgument, false),
                BackendError::Unsupported { .. } | BackendError::Exec(ExecError::NotRunning) => {
                    (Code::FailedPrecondition, false)
                }
                _ => (Code::Internal, false),
            },
        };
        let mut message = chain(&error);
        message.truncate(message.floor_char_boundary(MAX_MESSAGE_BYTES));
        if retry {
            let details = recoverable(code, &message);
            return Self::with_details(code, message, details.into());
        }
        Self::new(code, message)
    }
}

/// The rich status that allows a retry.
fn recoverable(code: Code, message: &str) -> Vec<u8> {
    let mark = structs::RecoverableError { recoverable: true };
    rpc::Status {
        code: code.into(),
        message: message.to_owned(),
        details: vec![prost_types::Any {
            type_url: RECOVERABLE_TYPE.to_owned(),
            value: mark.encode_to_vec(),
        }],
    }
    .encode_to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::Cause;
    use crate::driver::tests::hex;
    use rstest::rstest;

    fn start(cause: Cause) -> CallError {
        let error = BackendError::Start {
            machine: "m".to_owned(),
            step: "boot",
            reason: "no".to_owned(),
            cause,
        };
        TaskError::from(error).into()
    }

    #[test]
    fn the_retry_mark_has_the_golden_bytes() {
        let golden = "08091204626f6f6d1a510a4b747970652e676f6f676c65617069732e636f6d2f6861736869636f72702e6e6f6d61642e706c7567696e732e7368617265642e737472756374732e5265636f76657261626c654572726f7212020801";
        assert_eq!(hex(&recoverable(Code::FailedPrecondition, "boom")), golden);
    }

    #[test]
    fn only_transient_failures_are_recoverable() {
        let transient = Status::from(start(Cause::Busy));
        assert_eq!(transient.code(), Code::FailedPrecondition);
        let details = rpc::Status::decode(transient.details()).unwrap();
        assert_eq!(details.message, transient.message());
        assert_eq!(details.details[0].type_url, RECOVERABLE_TYPE);

        let lasting = Status::from(start(Cause::Config));
        assert_eq!(lasting.code(), Code::Internal);
        assert!(lasting.details().is_empty());
        assert_eq!(lasting.message(), "machine m: boot failed: no");
    }

    #[test]
    fn a_configuration_error_is_final_and_reported_in_one_line() {
        let status = Status::from(CallError::from(ConfigError {
            option: "config.volatile".to_owned(),
            reason: "\"maybe\" is not one of yes, state, overlay, no".to_owned(),
            cause: Cause::Config,
        }));
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.details().is_empty());
        assert_eq!(
            status.message(),
            "config.volatile: \"maybe\" is not one of yes, state, overlay, no"
        );
    }

    #[test]
    fn a_value_that_the_host_could_not_check_may_be_tried_again() {
        let status = Status::from(CallError::from(ConfigError {
            option: "config.image".to_owned(),
            reason: "\"/srv/web\" can't be examined: Too many open files (os error 24)".to_owned(),
            cause: Cause::Resources,
        }));
        assert_eq!(status.code(), Code::FailedPrecondition);
        let details = rpc::Status::decode(status.details()).unwrap();
        assert_eq!(details.details[0].type_url, RECOVERABLE_TYPE);
    }

    #[test]
    fn a_message_reports_its_causes_once_and_stays_short() {
        let io = |cause: String| {
            let error = BackendError::Io {
                step: "write",
                path: "/run/x".into(),
                source: std::io::Error::other(cause),
            };
            Status::from(CallError::from(TaskError::from(error)))
        };
        assert_eq!(io("full".to_owned()).message(), "write /run/x: full");
        assert!(io("ä".repeat(9000)).message().len() <= MAX_MESSAGE_BYTES);
    }

    #[rstest]
    #[case::ascii("x".repeat(200))]
    #[case::two_bytes(format!("x{}", "ä".repeat(200)))]
    #[case::four_bytes(format!("xx{}", "🦀".repeat(200)))]
    fn an_error_of_exec_fits_into_the_frame_that_carries_it(#[case] text: String) {
        let step = text.leak();
        let source = std::io::Error::other("a long story");
        let host = ExecError::Host { step, source };
        for error in [
            CallError::Request(step.to_owned()),
            TaskError::from(BackendError::Exec(host)).into(),
            CallError::TaskEnded,
            CallError::SessionLost,
            CallError::ClientGone(Duration::from_secs(60)),
            CallError::Closing,
        ] {
            let whole = error.to_string();
            let status = error.into_short_status();
            let (code, message) = (status.code(), status.message());
            let frame = format!("rpc error: code = {code:?} desc = {message}");
            assert!(frame.len() <= 123, "{} bytes: {frame}", frame.len());
            assert!(message.len() <= 85, "{message}");
            match message.strip_suffix('…') {
                Some(start) => {
                    assert!(whole.starts_with(start), "{message}");
                    assert!(
                        message.len() > 85 - 10,
                        "more is lost than has to: {message}"
                    );
                }
                None => assert_eq!(message, whole),
            }
            assert!(status.details().is_empty());
        }
    }

    #[rstest]
    #[case(TaskError::Unknown.into(), Code::NotFound, "task not found for given id")]
    #[case(TaskError::AlreadyKnown("i".into()).into(), Code::AlreadyExists, "task \"i\" already exists")]
    #[case(TaskError::NotRunning.into(), Code::FailedPrecondition, "the task is not running")]
    #[case(HandleError::Version(9).into(), Code::FailedPrecondition, "handle version 9 is not supported: this driver reads version 2")]
    #[case(
        CallError::Missing("task"),
        Code::InvalidArgument,
        "the request has no task"
    )]
    #[case(
        CallError::Unsupported("exec"),
        Code::Unimplemented,
        "exec is not supported by this driver"
    )]
    fn every_error_has_its_code(
        #[case] error: CallError,
        #[case] code: Code,
        #[case] message: &str,
    ) {
        let status = Status::from(error);
        assert_eq!((status.code(), status.message()), (code, message));
    }
}
