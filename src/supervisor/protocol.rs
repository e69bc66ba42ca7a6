//! The messages on the control socket between plugin and supervisor: JSON objects, in both directions. The supervisor sends its
//! state to every client and answers requests; the connection closes when the supervisor exits. Messages that are too long or unlike
//! these are rejected. Carries no secrets but in the file of [`Action::ExecDefaults`].
//!
//! The two ends can be of different versions: a supervisor lives as long as its container, and the plugin may be upgraded or
//! downgraded meanwhile. Messages have no version number but rules: the meaning of a message never changes; a new field is optional;
//! a supervisor answers an unknown request with an error ([`IncomingRequest::Unknown`]), and a plugin ignores an unknown event
//! ([`IncomingEvent::Unknown`]).

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use crate::container::{Cause, Exit, Started};
use crate::signal::Signal;

/// A longer line was not sent by the driver. Packets have a limit of their own, [`packets::MAX_PACKET_BYTES`].
pub const MAX_LINE_BYTES: usize = 256 * 1024;

/// What a supervisor reports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The container is up.
    Started(Started),
    /// It did not come up. The last event.
    Failed(StartFailure),
    /// It has exited. The last event; its resources are being released until the connection closes.
    Exited(Exit),
    /// Processes of the container, which still runs, have been killed because its memory was used up: how many so far.
    OomKills(u64),
    /// Something that the user should know: one sentence.
    Note(String),
    /// A request has been handled.
    Done {
        /// The request's number.
        request: u64,
        /// Why it failed, if it did.
        error: Option<String>,
    },
}

/// Why a container did not come up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartFailure {
    /// The step that failed.
    pub step: StartStep,
    /// What happened.
    pub reason: String,
    /// Whether another attempt may succeed with nothing changed. For plugins that do not know `cause`.
    transient: bool,
    /// The cause, if the supervisor sent one: a supervisor that does not know this field does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cause: Option<Cause>,
}

impl StartFailure {
    /// A failure with a cause.
    pub fn new(step: StartStep, cause: Cause, reason: impl Into<String>) -> Self {
        Self {
            step,
            reason: reason.into(),
            transient: cause.is_recoverable(),
            cause: Some(cause),
        }
    }

    /// The cause, as far as it decides whether Nomad may try again.
    pub fn cause(&self) -> Cause {
        self.cause.unwrap_or(match self.transient {
            true => Cause::Unknown,
            false => Cause::Config,
        })
    }
}

/// The steps of a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "as_str says it")]
pub enum StartStep {
    Order,
    Logs,
    Cgroup,
    Notify,
    Nspawn,
    Watch,
    Inside,
    Filters,
    Network,
    Ready,
}

impl StartStep {
    /// For error messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Order => "reading the launch spec",
            Self::Logs => "opening the log pipes",
            Self::Cgroup => "creating the cgroup",
            Self::Notify => "opening the sockets of the supervisor",
            Self::Nspawn => "starting systemd-nspawn",
            Self::Watch => "supervising the container",
            Self::Inside => "setting up the container",
            Self::Network => "making the network of the container",
            Self::Ready => "waiting until the task is ready",
            Self::Filters => "installing captured seccomp filters",
        }
    }
}

/// What a client requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the client, repeated in the answer.
    pub request: u64,
    /// The action requested.
    pub verb: Action,
}

/// The actions that can be requested.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Send the payload this signal; 0 sends nothing.
    Signal(#[serde(deserialize_with = "a_signal")] i32),
    /// Ask the payload to exit, with the signal that suits it.
    Stop,
    /// Say in a note why a container that was asked to exit still runs, half of the time after which it is killed.
    ExplainStop,
    /// Kill the container.
    Kill,
    /// Send what further commands have in common with the task's own. Its file comes with the answer, which only a packet can carry.
    ExecDefaults,
}

/// Encodes a message as one line.
pub fn encode(message: &impl Serialize) -> Vec<u8> {
    let mut line = packets::encode(message);
    line.push(b'\n');
    line
}

/// A request as the supervisor receives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum IncomingRequest {
    /// A request.
    Known(Request),
    /// A request of a later plugin, or one with an argument that does not exist. It can be answered.
    Unknown {
        /// The request's number.
        request: u64,
    },
}

/// An event as the plugin receives it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum IncomingEvent {
    /// An event.
    Known(Box<Event>),
    /// An event of a later supervisor.
    Unknown(Object),
}

/// Any JSON object; its content is discarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Object {}

fn a_signal<'de, D: Deserializer<'de>>(from: D) -> Result<i32, D::Error> {
    let number = i32::deserialize(from)?;
    let signal = Signal::from_number(number).ok_or_else(|| D::Error::custom("no such signal"))?;
    Ok(signal.number())
}

/// Removes the next complete line from the received bytes. `Err` if it is too long or not a message.
pub fn decode_next<T: for<'a> Deserialize<'a>>(
    received: &mut Vec<u8>,
) -> Option<Result<T, ProtocolError>> {
    let Some(end) = received.iter().position(|byte| *byte == b'\n') else {
        return (received.len() > MAX_LINE_BYTES).then_some(Err(ProtocolError));
    };
    let message = match end {
        0..=MAX_LINE_BYTES => serde_json::from_slice(&received[..end]).map_err(|_| ProtocolError),
        _ => Err(ProtocolError),
    };
    received.drain(..=end);
    Some(message)
}

/// What was received is not a message of this protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a valid message of the control socket")]
pub struct ProtocolError;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn messages_travel_in_pieces() {
        let mut received = encode(&Request {
            request: 1,
            verb: Action::Stop,
        });
        received.extend(encode(&Request {
            request: 2,
            verb: Action::Signal(15),
        }));
        let late = received.split_off(received.len() - 3);
        assert_eq!(
            decode_next(&mut received),
            Some(Ok(Request {
                request: 1,
                verb: Action::Stop
            }))
        );
        assert_eq!(decode_next::<Request>(&mut received), None);
        received.extend(late);
        assert_eq!(
            decode_next(&mut received),
            Some(Ok(Request {
                request: 2,
                verb: Action::Signal(15)
            }))
        );
        assert!(received.is_empty());
    }

    fn received<T: for<'a> Deserialize<'a>>(bytes: &[u8]) -> Vec<Result<T, ProtocolError>> {
        let mut received = bytes.to_vec();
        std::iter::from_fn(|| decode_next(&mut received)).collect()
    }

    #[test]
    fn a_line_may_be_this_long_and_no_longer() {
        let padded = |length: usize| {
            let mut line = br#"{"request":1,"verb":"stop"}"#.to_vec();
            line.resize(length, b' ');
            line.push(b'\n');
            line
        };
        assert!(received::<Request>(&padded(MAX_LINE_BYTES))[0].is_ok());
        assert_eq!(
            received::<Request>(&padded(MAX_LINE_BYTES + 1)),
            [Err(ProtocolError)]
        );
        let mut endless = vec![b'x'; MAX_LINE_BYTES];
        assert_eq!(decode_next::<Request>(&mut endless), None);
        endless.push(b'x');
        assert_eq!(
            decode_next::<Request>(&mut endless),
            Some(Err(ProtocolError))
        );
    }

    /// What released plugins request, and what released supervisors report. Never change a line; add one for every new message.
    const QUESTIONS: &str = include_str!("frozen/requests.jsonl");
    const NEWS: &str = include_str!("frozen/news.jsonl");

    #[test]
    fn what_was_ever_said_is_understood_and_said_still() {
        let questions = received::<IncomingRequest>(QUESTIONS.as_bytes());
        assert_eq!(questions.len(), QUESTIONS.lines().count());
        for (question, text) in questions.into_iter().zip(QUESTIONS.lines()) {
            let Ok(IncomingRequest::Known(request)) = question else {
                panic!("{text}: {question:?}");
            };
            assert_eq!(encode(&request), format!("{text}\n").as_bytes());
        }
        let event = received::<IncomingEvent>(NEWS.as_bytes());
        assert_eq!(event.len(), NEWS.lines().count());
        for (incoming, text) in event.into_iter().zip(NEWS.lines()) {
            let Ok(IncomingEvent::Known(event)) = incoming else {
                panic!("{text}: {incoming:?}");
            };
            assert_eq!(
                String::from_utf8(encode(&event)).unwrap(),
                format!("{text}\n")
            );
        }
    }

    #[test]
    fn words_of_another_age_are_no_garbage() {
        let request =
            |text: &str| received::<IncomingRequest>(format!("{text}\n").as_bytes()).remove(0);
        let known = |verb| Ok(IncomingRequest::Known(Request { request: 7, verb }));
        assert_eq!(
            request(r#"{"request":7,"verb":"kill","later":[1]}"#),
            known(Action::Kill)
        );
        for unknown in [
            r#"{"request":7,"verb":"freeze"}"#,
            r#"{"request":7,"verb":{"exec":{"command":["a"]}}}"#,
            r#"{"request":7,"verb":{"signal":999}}"#,
            r#"{"request":7,"verb":{"signal":-1}}"#,
            r#"{"request":7,"verb":{"signal":33}}"#,
            r#"{"request":7}"#,
        ] {
            assert_eq!(
                request(unknown),
                Ok(IncomingRequest::Unknown { request: 7 })
            );
        }
        for garbage in [
            "",
            "7",
            r#"{"request":-7,"verb":"stop"}"#,
            r#"{"verb":"stop"}"#,
        ] {
            assert_eq!(request(garbage), Err(ProtocolError), "{garbage}");
        }
        let incoming =
            |text: &str| received::<IncomingEvent>(format!("{text}\n").as_bytes()).remove(0);
        let done = Event::Done {
            request: 1,
            error: None,
        };
        assert_eq!(
            incoming(r#"{"done":{"request":1,"later":{}}}"#),
            Ok(IncomingEvent::Known(Box::new(done)))
        );
        assert_eq!(
            incoming(r#"{"frozen":true}"#),
            Ok(IncomingEvent::Unknown(Object {}))
        );
        for garbage in ["", "7", "[1]", r#""started""#] {
            assert_eq!(incoming(garbage), Err(ProtocolError), "{garbage}");
        }
    }

    #[test]
    fn a_failure_of_another_age_can_be_judged() {
        let failed = |more: &str| {
            let text = format!(r#"{{"failed":{{"step":"nspawn","reason":"why",{more}}}}}"#);
            match received::<IncomingEvent>(format!("{text}\n").as_bytes()).remove(0) {
                Ok(IncomingEvent::Known(event)) => match *event {
                    Event::Failed(failure) => failure.cause(),
                    other => panic!("{other:?}"),
                },
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(failed(r#""transient":true"#), Cause::Unknown);
        assert_eq!(failed(r#""transient":false"#), Cause::Config);
        assert_eq!(failed(r#""transient":true,"cause":"busy""#), Cause::Busy);
        assert_eq!(
            failed(r#""transient":true,"cause":"later""#),
            Cause::Unknown
        );
    }

    fn event() -> impl Strategy<Value = Event> {
        use crate::state::task_dir::tests::{exit, started};
        let steps =
            proptest::sample::select(vec![StartStep::Order, StartStep::Cgroup, StartStep::Inside]);
        let causes = proptest::sample::select(Cause::ALL.to_vec());
        prop_oneof![
            started().prop_map(Event::Started),
            exit().prop_map(Event::Exited),
            any::<u64>().prop_map(Event::OomKills),
            any::<String>().prop_map(Event::Note),
            (any::<u64>(), any::<Option<String>>())
                .prop_map(|(request, error)| Event::Done { request, error }),
            (steps, any::<String>(), causes).prop_map(|(step, reason, cause)| Event::Failed(
                StartFailure::new(step, cause, reason)
            )),
        ]
    }

    fn verb() -> impl Strategy<Value = Action> {
        prop_oneof![
            Just(Action::Stop),
            Just(Action::Kill),
            Just(Action::ExecDefaults),
            (0..=64i32)
                .prop_filter("no signal", |number| Signal::from_number(*number).is_some())
                .prop_map(Action::Signal),
        ]
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let lines = bytes.iter().filter(|byte| **byte == b'\n').count();
            prop_assert_eq!(received::<IncomingRequest>(&bytes).len(), lines);
            prop_assert_eq!(received::<IncomingEvent>(&bytes).len(), lines);
        }

        #[test]
        fn every_request_arrives(request: u64, verb in verb()) {
            let request = Request { request, verb };
            prop_assert_eq!(received(&encode(&request)), [Ok(IncomingRequest::Known(request))]);
        }

        #[test]
        fn all_news_arrive(event in event()) {
            prop_assert_eq!(received(&encode(&event)), [Ok(IncomingEvent::Known(Box::new(event)))]);
        }

        #[test]
        fn a_changed_byte_is_no_panic(event in event(), at: prop::sample::Index, byte: u8) {
            let mut line = encode(&event);
            let at = at.index(line.len());
            line[at] = byte;
            received::<IncomingEvent>(&line);
        }
    }
}
