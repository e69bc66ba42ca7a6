//! What is said on a lifeline: one JSON object a line, both ways. The supervisor tells every listener how things stand and
//! answers requests; the end of the stream is the end of the supervisor. Refuses lines that are too long or no message, and
//! carries no secret.
//!
//! The two ends can be of different age: a supervisor lives as long as its container, and the plugin is upgraded or put back
//! meanwhile. So the words have no version but a rule: what a word means never changes; a new field is optional; who hears a
//! word that it does not know says so ([`Question::Unknown`]) or passes over it ([`Told::Unknown`]).

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use crate::container::{Cause, Exit, Started};
use crate::signal::Signal;

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
    /// Whether another attempt may succeed with nothing changed: what a plugin reads that knows of no cause.
    transient: bool,
    /// Why, where it was said: a supervisor that knows of no cause does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cause: Option<Cause>,
}

impl Failure {
    /// A failure with a cause.
    pub fn new(step: Step, cause: Cause, reason: impl Into<String>) -> Self {
        Self {
            step,
            reason: reason.into(),
            transient: cause.is_recoverable(),
            cause: Some(cause),
        }
    }

    /// Why it happened, as far as that decides whether Nomad may try again.
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
    /// Send the payload this signal; 0 asks only.
    Signal(#[serde(deserialize_with = "a_signal")] i32),
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

/// What a supervisor hears.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Question {
    /// A request.
    Known(Request),
    /// A request of a later plugin, or one that asks for what does not exist. It can be answered.
    Unknown {
        /// The request's number.
        request: u64,
    },
}

/// What a plugin hears.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Told {
    /// News.
    Known(News),
    /// A word of a later supervisor.
    Unknown(Object),
}

/// Any JSON object, of which nothing is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Object {}

fn a_signal<'de, D: Deserializer<'de>>(from: D) -> Result<i32, D::Error> {
    let number = i32::deserialize(from)?;
    let signal = Signal::from_number(number).ok_or_else(|| D::Error::custom("no such signal"))?;
    Ok(signal.number())
}

/// Takes the next whole line out of what has been received. `Err` if it is too long or no message.
pub fn next<T: for<'a> Deserialize<'a>>(received: &mut Vec<u8>) -> Option<Result<T, Garbage>> {
    let Some(end) = received.iter().position(|byte| *byte == b'\n') else {
        return (received.len() > LONGEST).then_some(Err(Garbage));
    };
    let message = match end {
        0..=LONGEST => serde_json::from_slice(&received[..end]).map_err(|_| Garbage),
        _ => Err(Garbage),
    };
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

    fn heard<T: for<'a> Deserialize<'a>>(bytes: &[u8]) -> Vec<Result<T, Garbage>> {
        let mut received = bytes.to_vec();
        std::iter::from_fn(|| next(&mut received)).collect()
    }

    #[test]
    fn a_line_may_be_this_long_and_no_longer() {
        let padded = |length: usize| {
            let mut line = br#"{"request":1,"verb":"stop"}"#.to_vec();
            line.resize(length, b' ');
            line.push(b'\n');
            line
        };
        assert!(heard::<Request>(&padded(LONGEST))[0].is_ok());
        assert_eq!(heard::<Request>(&padded(LONGEST + 1)), [Err(Garbage)]);
        let mut endless = vec![b'x'; LONGEST];
        assert_eq!(next::<Request>(&mut endless), None);
        endless.push(b'x');
        assert_eq!(next::<Request>(&mut endless), Some(Err(Garbage)));
    }

    /// What released plugins ask, and what released supervisors tell. Never change a line; add one when there is a new word.
    const QUESTIONS: &str = include_str!("frozen/requests.jsonl");
    const NEWS: &str = include_str!("frozen/news.jsonl");

    #[test]
    fn what_was_ever_said_is_understood_and_said_still() {
        let questions = heard::<Question>(QUESTIONS.as_bytes());
        assert_eq!(questions.len(), QUESTIONS.lines().count());
        for (question, text) in questions.into_iter().zip(QUESTIONS.lines()) {
            let Ok(Question::Known(request)) = question else {
                panic!("{text}: {question:?}");
            };
            assert_eq!(line(&request), format!("{text}\n").as_bytes());
        }
        let news = heard::<Told>(NEWS.as_bytes());
        assert_eq!(news.len(), NEWS.lines().count());
        for (told, text) in news.into_iter().zip(NEWS.lines()) {
            let Ok(Told::Known(news)) = told else {
                panic!("{text}: {told:?}");
            };
            assert_eq!(String::from_utf8(line(&news)).unwrap(), format!("{text}\n"));
        }
    }

    #[test]
    fn words_of_another_age_are_no_garbage() {
        let request = |text: &str| heard::<Question>(format!("{text}\n").as_bytes()).remove(0);
        let known = |verb| Ok(Question::Known(Request { request: 7, verb }));
        assert_eq!(
            request(r#"{"request":7,"verb":"kill","later":[1]}"#),
            known(Verb::Kill)
        );
        for unknown in [
            r#"{"request":7,"verb":"freeze"}"#,
            r#"{"request":7,"verb":{"exec":{"command":["a"]}}}"#,
            r#"{"request":7,"verb":{"signal":999}}"#,
            r#"{"request":7,"verb":{"signal":-1}}"#,
            r#"{"request":7,"verb":{"signal":33}}"#,
            r#"{"request":7}"#,
        ] {
            assert_eq!(request(unknown), Ok(Question::Unknown { request: 7 }));
        }
        for garbage in [
            "",
            "7",
            r#"{"request":-7,"verb":"stop"}"#,
            r#"{"verb":"stop"}"#,
        ] {
            assert_eq!(request(garbage), Err(Garbage), "{garbage}");
        }
        let told = |text: &str| heard::<Told>(format!("{text}\n").as_bytes()).remove(0);
        let done = News::Done {
            request: 1,
            error: None,
        };
        assert_eq!(
            told(r#"{"done":{"request":1,"later":{}}}"#),
            Ok(Told::Known(done))
        );
        assert_eq!(told(r#"{"frozen":true}"#), Ok(Told::Unknown(Object {})));
        for garbage in ["", "7", "[1]", r#""started""#] {
            assert_eq!(told(garbage), Err(Garbage), "{garbage}");
        }
    }

    #[test]
    fn a_failure_of_another_age_can_be_judged() {
        let failed = |more: &str| {
            let text = format!(r#"{{"failed":{{"step":"nspawn","reason":"why",{more}}}}}"#);
            match heard::<Told>(format!("{text}\n").as_bytes()).remove(0) {
                Ok(Told::Known(News::Failed(failure))) => failure.cause(),
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

    fn news() -> impl Strategy<Value = News> {
        use crate::supervisor::record::tests::{exit, started};
        let steps = proptest::sample::select(vec![Step::Order, Step::Cgroup, Step::Watch]);
        let causes = proptest::sample::select(Cause::ALL.to_vec());
        prop_oneof![
            started().prop_map(News::Started),
            exit().prop_map(News::Exited),
            (any::<u64>(), any::<Option<String>>())
                .prop_map(|(request, error)| News::Done { request, error }),
            (steps, any::<String>(), causes)
                .prop_map(|(step, reason, cause)| News::Failed(Failure::new(step, cause, reason))),
        ]
    }

    fn verb() -> impl Strategy<Value = Verb> {
        prop_oneof![
            Just(Verb::Stop),
            Just(Verb::Kill),
            (0..=64i32)
                .prop_filter("no signal", |number| Signal::from_number(*number).is_some())
                .prop_map(Verb::Signal),
        ]
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let lines = bytes.iter().filter(|byte| **byte == b'\n').count();
            prop_assert_eq!(heard::<Question>(&bytes).len(), lines);
            prop_assert_eq!(heard::<Told>(&bytes).len(), lines);
        }

        #[test]
        fn every_request_arrives(request: u64, verb in verb()) {
            let request = Request { request, verb };
            prop_assert_eq!(heard(&line(&request)), [Ok(Question::Known(request))]);
        }

        #[test]
        fn all_news_arrive(news in news()) {
            prop_assert_eq!(heard(&line(&news)), [Ok(Told::Known(news))]);
        }

        #[test]
        fn a_changed_byte_is_no_panic(news in news(), at: prop::sample::Index, byte: u8) {
            let mut line = line(&news);
            let at = at.index(line.len());
            line[at] = byte;
            heard::<Told>(&line);
        }
    }
}
