//! What is said on a lifeline: one JSON object a line, both ways. The supervisor tells every listener how things stand and
//! answers requests; the end of the stream is the end of the supervisor. Refuses lines that are too long or no message, and
//! carries no secret.

use serde::{Deserialize, Serialize};

use crate::container::{Exit, Started};

/// A longer line was not written by us.
pub const LONGEST: usize = 256 * 1024;

/// What a supervisor tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum News {
    /// The container is up.
    Started(Started),
    /// It did not come up. The last news.
    Failed(Failure),
    /// It has ended. The last news; what it held is being freed until the stream ends.
    Exited(Exit),
    /// A request has been carried out.
    Done {
        /// The request's number.
        request: u64,
        /// Why it was not, if it was not.
        error: Option<String>,
    },
}

/// Why a container did not come up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What was being done.
    pub step: Step,
    /// What happened.
    pub reason: String,
    /// Whether another attempt may succeed with nothing changed.
    pub transient: bool,
}

/// The steps of a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "as_str says it")]
pub enum Step {
    Order,
    Logs,
    Cgroup,
    Notify,
    Nspawn,
    Watch,
}

impl Step {
    /// In words.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Order => "reading the order",
            Self::Logs => "opening the log pipes",
            Self::Cgroup => "making the control group",
            Self::Notify => "listening for systemd-nspawn",
            Self::Nspawn => "starting systemd-nspawn",
            Self::Watch => "watching over the container",
        }
    }
}

/// What a listener asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the listener, repeated in the answer.
    pub request: u64,
    /// What is asked.
    pub verb: Verb,
}

/// The verbs of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verb {
    /// Send the payload this signal.
    Signal(i32),
    /// Ask the payload to end in the way that suits it.
    Stop,
    /// End the container by force.
    Kill,
}

/// A message as the line to send.
pub fn line(message: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(message).unwrap_or_default();
    line.push(b'\n');
    line
}

/// Takes the next whole line out of what has been received. `Err` if it is too long or no message.
pub fn next<T: for<'a> Deserialize<'a>>(received: &mut Vec<u8>) -> Option<Result<T, Garbage>> {
    let Some(end) = received.iter().position(|byte| *byte == b'\n') else {
        return (received.len() > LONGEST).then_some(Err(Garbage));
    };
    let message = serde_json::from_slice(&received[..end]).map_err(|_| Garbage);
    received.drain(..=end);
    Some(message)
}

/// What came is no message of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("what came over the lifeline is no message")]
pub struct Garbage;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn messages_travel_in_pieces() {
        let mut received = line(&Request {
            request: 1,
            verb: Verb::Stop,
        });
        received.extend(line(&Request {
            request: 2,
            verb: Verb::Signal(15),
        }));
        let late = received.split_off(received.len() - 3);
        assert_eq!(
            next(&mut received),
            Some(Ok(Request {
                request: 1,
                verb: Verb::Stop
            }))
        );
        assert_eq!(next::<Request>(&mut received), None);
        received.extend(late);
        assert_eq!(
            next(&mut received),
            Some(Ok(Request {
                request: 2,
                verb: Verb::Signal(15)
            }))
        );
        assert!(received.is_empty());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let length = bytes.len();
            while let Some(message) = next::<Request>(&mut bytes) {
                prop_assert!(message.is_err() || bytes.len() < length);
            }
            prop_assert!(!bytes.contains(&b'\n'));
        }
    }
}
