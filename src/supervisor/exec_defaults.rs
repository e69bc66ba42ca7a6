//! The plugin's request for what further commands in a container have in common with the task's own. On a connection of its own, because
//! the answer carries a descriptor.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use packets::Packet;

use super::protocol::{Action, Event, IncomingEvent, Request};
use crate::container::ExecDefaults;
use crate::state::{TaskDir, task_dir};

/// How long to wait for the answer. It comes within a millisecond.
const LIMIT: Duration = Duration::from_secs(10);

const REQUEST: Request = Request {
    request: 1,
    verb: Action::ExecDefaults,
};

/// What the supervisor of this task directory keeps for further commands. `None` if it keeps nothing: it is of a driver that did not, or its
/// container has ended. Blocks, for at most ten seconds: fails with [`io::ErrorKind::TimedOut`] if a supervisor that is stopped does not
/// answer.
pub fn fetch(task_dir: &TaskDir) -> io::Result<Option<ExecDefaults>> {
    match ask(task_dir) {
        Ok(file) => file.map(task_dir::read_exec_defaults).transpose(),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether there is no supervisor at the other end, or none that knows packets.
fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::UnexpectedEof
    )
}

fn ask(task_dir: &TaskDir) -> io::Result<Option<File>> {
    let until = Instant::now() + LIMIT;
    let socket = packets::connect(&task_dir.control_socket())?;
    packets::send(&socket, &packets::encode(&REQUEST), &[])?;
    loop {
        let packet = receive(&socket, until)?;
        let event = packet.message().map_err(io::Error::other)?;
        // What comes before the answer is the state of the container.
        if let IncomingEvent::Known(event) = event
            && let Event::Done { request, error } = *event
            && request == REQUEST.request
        {
            return match error {
                Some(_) => Ok(None),
                None => {
                    let file = packet.descriptors.take::<1>().map_err(io::Error::other)?;
                    Ok(file.into_iter().next().map(File::from))
                }
            };
        }
    }
}

fn receive(socket: &OwnedFd, until: Instant) -> io::Result<Packet> {
    loop {
        match packets::receive(socket) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            received => return received,
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // Rounded up: 0 would not wait at all.
        let left = PollTimeout::try_from(left + Duration::from_millis(1));
        let mut descriptors = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut descriptors, left.unwrap_or(PollTimeout::ZERO)) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;
    use serde_json::json;
    use std::io::{Seek, Write};

    /// A task directory whose supervisor sends these packets, and then closes the connection.
    fn answered(
        packets: Vec<(serde_json::Value, Option<File>)>,
    ) -> io::Result<Option<ExecDefaults>> {
        let temp = tempfile::tempdir().unwrap();
        let task_dir = TaskDir::new(temp.path());
        let listener = packets::listen(&task_dir.control_socket()).unwrap();
        let supervisor = std::thread::spawn(move || {
            let mut waiting = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
            poll(&mut waiting, PollTimeout::NONE).unwrap();
            let connection = packets::accept(&listener).unwrap();
            let request = receive(&connection, Instant::now() + Duration::from_secs(60)).unwrap();
            assert_eq!(request.message::<Request>(), Ok(REQUEST));
            for (message, file) in packets {
                let descriptors: Vec<_> = file.iter().map(AsFd::as_fd).collect();
                packets::send(&connection, &packets::encode(&message), &descriptors).unwrap();
            }
        });
        let fetched = fetch(&task_dir);
        supervisor.join().unwrap();
        fetched
    }

    fn file(content: &str) -> Option<File> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content.as_bytes()).unwrap();
        file.rewind().unwrap();
        Some(file)
    }

    #[test]
    fn the_answer_is_the_one_with_the_descriptor() {
        let events = vec![
            (json!({"oom_kills": 3}), None),
            (json!({"later": 1}), file("other")),
            (json!({"done": {"request": 2, "error": null}}), None),
            (
                json!({"done": {"request": 1, "error": null}}),
                file(r#"{"user":"web","environment":{"A":"b"},"later":1}"#),
            ),
        ];
        let wanted = ExecDefaults {
            user: Some("web".to_owned()),
            directory: None,
            environment: [("A".to_owned(), "b".to_owned())].into(),
        };
        assert_eq!(answered(events).unwrap(), Some(wanted));
    }

    #[rstest]
    #[case::unknown_request(vec![(json!({"done": {"request": 1, "error": "unknown"}}), None)])]
    #[case::closed(vec![(json!({"oom_kills": 3}), None)])]
    fn a_supervisor_that_keeps_nothing_has_no_defaults(
        #[case] events: Vec<(serde_json::Value, Option<File>)>,
    ) {
        assert_eq!(answered(events).unwrap(), None);
    }

    #[rstest]
    #[case::no_descriptor(None)]
    #[case::no_record(file("s3cret"))]
    #[case::later_format(file(r#"{"form":2,"environment":{}}"#))]
    fn an_answer_that_cannot_be_read_is_an_error(#[case] file: Option<File>) {
        let events = vec![(json!({"done": {"request": 1, "error": null}}), file)];
        let error = answered(events).unwrap_err().to_string();
        assert!(!error.contains("s3cret"), "{error}");
    }

    #[test]
    fn without_a_supervisor_there_are_no_defaults() {
        let temp = tempfile::tempdir().unwrap();
        let task_dir = TaskDir::new(temp.path());
        assert_eq!(fetch(&task_dir).unwrap(), None);
        drop(packets::listen(&task_dir.control_socket()).unwrap());
        assert_eq!(fetch(&task_dir).unwrap(), None);
    }

    #[test]
    fn a_supervisor_that_does_not_answer_is_an_error() {
        let temp = tempfile::tempdir().unwrap();
        let task_dir = TaskDir::new(temp.path());
        let _listener = packets::listen(&task_dir.control_socket()).unwrap();
        let error = fetch(&task_dir).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
