//! Sessions over the driver's calls, with a test on the other side of the session.

use std::io::ErrorKind;
use std::pin::Pin;
use std::task::{Context, Poll};

use nspawn_init::session_spec::SessionEvent;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::*;
use crate::driver::ExecStream;
use crate::exec::{ExecError, ExecRequest, Session, TerminalSize};
use crate::proto::driver::ExecTaskStreamingRequest as Message;
use crate::proto::driver::exec_task_streaming_request as parts;

mod client;
mod ends;
pub(crate) mod other_side;
mod terminal;
mod to_end;

use other_side::{OtherSide, not_found, piped};

const CHUNK: usize = 64 * 1024;
/// How much of what is written to a pipe waits in the kernel.
const PIPE: usize = 64 * 1024;

/// A client that reads the responses of one session, and the other side.
struct Exec {
    driver: Driver,
    task_end: watch::Sender<Option<Exit>>,
    messages: mpsc::Sender<Result<Message, Status>>,
    responses: ExecStream,
    request: ExecRequest,
    other: OtherSide,
}

/// What a client has received until the end of the stream.
#[derive(Debug, Default, PartialEq, Eq)]
struct Received {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    /// The ends of streams and the exit, in their order.
    ends: Vec<String>,
    error: Option<(Code, String)>,
}

impl Received {
    fn text(&self) -> (&str, &str) {
        let text = |bytes| std::str::from_utf8(bytes).unwrap();
        (text(&self.stdout), text(&self.stderr))
    }
}

pub(crate) fn setup(command: &[&str], tty: bool) -> Message {
    Message {
        setup: Some(parts::Setup {
            task_id: ID.to_owned(),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            tty,
        }),
        ..Message::default()
    }
}

pub(crate) fn data(data: impl Into<Vec<u8>>) -> Message {
    let data = data.into();
    Message {
        stdin: Some(proto::ExecTaskStreamingIoOperation { data, close: false }),
        ..Message::default()
    }
}

fn close(data: &str) -> Message {
    Message {
        stdin: Some(proto::ExecTaskStreamingIoOperation {
            data: data.as_bytes().to_vec(),
            close: true,
        }),
        ..Message::default()
    }
}

fn size(height: i32, width: i32) -> Message {
    Message {
        tty_size: Some(parts::TerminalSize { height, width }),
        ..Message::default()
    }
}

fn heartbeat() -> Message {
    Message::default()
}

/// A backend whose sessions are made by `make`, and the other sides of the sessions.
pub(crate) fn sessions(
    make: impl Fn() -> (Session, OtherSide) + Send + 'static,
) -> (
    MockContainerBackend,
    mpsc::UnboundedReceiver<(ExecRequest, OtherSide)>,
) {
    let (made, others) = mpsc::unbounded_channel();
    let mut mock = starts();
    mock.expect_exec().returning(move |_, request| {
        let (session, other) = make();
        made.send((request, other)).unwrap();
        Ok(session)
    });
    (mock, others)
}

/// A backend that can't start a session, for this reason.
fn refusing(reason: impl Fn() -> ExecError + Send + 'static) -> MockContainerBackend {
    let mut mock = starts();
    mock.expect_exec()
        .returning(move |_, _| Err(BackendError::Exec(reason())));
    mock
}

/// Opens a stream on which these messages have been sent already.
async fn open(
    driver: &Driver,
    messages: impl IntoIterator<Item = Message>,
) -> (
    mpsc::Sender<Result<Message, Status>>,
    Result<ExecStream, Status>,
) {
    let (sender, receiver) = mpsc::channel(16);
    for message in messages {
        sender.try_send(Ok(message)).unwrap();
    }
    let responses = driver.exec_stream(ReceiverStream::new(receiver)).await;
    (sender, responses)
}

async fn received(
    mut responses: impl tokio_stream::Stream<Item = Result<proto::ExecTaskStreamingResponse, Status>>
    + Unpin,
) -> Received {
    let mut received = Received::default();
    while let Some(response) = responses.next().await {
        match response {
            Ok(response) => received.add(response),
            Err(status) => {
                received.error = Some((status.code(), status.message().to_owned()));
            }
        }
    }
    received
}

impl Received {
    fn add(&mut self, response: proto::ExecTaskStreamingResponse) {
        assert!(
            !self.ends.iter().any(|end| end.starts_with("exit")),
            "the exit is last"
        );
        let streams = [
            ("stdout", response.stdout, &mut self.stdout),
            ("stderr", response.stderr, &mut self.stderr),
        ];
        for (name, operation, all) in streams {
            let Some(operation) = operation else {
                continue;
            };
            assert!(!self.ends.contains(&name.to_owned()), "{name} has ended");
            assert!(!response.exited, "output in the message of the exit");
            assert!(operation.data.len() <= CHUNK);
            all.extend(operation.data);
            if operation.close {
                self.ends.push(name.to_owned());
            }
        }
        if response.exited {
            let result = response.result.unwrap();
            self.ends
                .push(format!("exit {} {}", result.exit_code, result.signal));
        }
    }
}

impl Exec {
    /// A session without a terminal, in which these messages follow the setup.
    async fn start(messages: impl IntoIterator<Item = Message>) -> Self {
        Self::of(piped, false, messages).await
    }

    async fn of(
        make: impl Fn() -> (Session, OtherSide) + Send + 'static,
        tty: bool,
        messages: impl IntoIterator<Item = Message>,
    ) -> Self {
        let (mock, mut others) = sessions(make);
        let (driver, task_end) = running(mock).await;
        let messages = std::iter::once(setup(&["cat", "-"], tty)).chain(messages);
        let (messages, responses) = open(&driver, messages).await;
        let (request, other) = others.recv().await.unwrap();
        Self {
            driver,
            task_end,
            messages,
            responses: responses.unwrap(),
            request,
            other,
        }
    }

    async fn send(&self, message: Message) {
        self.messages.send(Ok(message)).await.unwrap();
    }

    /// Everything until the end of the stream. The client sends nothing more.
    async fn received(self) -> Received {
        received(self.responses).await
    }

    /// What the command reads until the end of its input.
    async fn stdin(&mut self) -> Vec<u8> {
        let mut input = Vec::new();
        let stdin = self.other.stdin.as_mut().unwrap();
        let read = timeout(LIMIT, stdin.read_to_end(&mut input));
        in_real_time(read).await.unwrap().unwrap();
        input
    }
}

/// Waits for a pipe while paused time stands still, as it does while a blocking task runs. Another test of this process that forks has a copy
/// of the pipe's other end until it executes a program; with nothing else to do, paused time would pass the limit at once.
async fn in_real_time<T>(wait: impl Future<Output = T>) -> T {
    let (done, waiting) = std::sync::mpsc::channel::<()>();
    let blocks = tokio::task::spawn_blocking(move || {
        let _ = waiting.recv_timeout(LIMIT);
    });
    let result = wait.await;
    drop(done);
    blocks.await.unwrap();
    result
}

#[tokio::test]
async fn a_session_begins_with_its_setup() {
    let (driver, _end) = running(starts()).await;
    for messages in [
        vec![],
        vec![heartbeat(), setup(&["x"], false)],
        vec![data("x")],
    ] {
        let (sender, responses) = {
            let (sender, receiver) = mpsc::channel(4);
            for message in messages {
                sender.try_send(Ok(message)).unwrap();
            }
            drop(sender);
            ((), driver.exec_stream(ReceiverStream::new(receiver)).await)
        };
        let () = sender;
        let status = responses.unwrap_err();
        assert_eq!(
            (status.code(), status.message()),
            (Code::InvalidArgument, "the request has no setup")
        );
    }
}

#[tokio::test]
async fn output_is_passed_on_in_chunks_with_streams_apart_and_the_exit_last() {
    let mut exec = Exec::start([]).await;
    assert_eq!(exec.request.command, ["cat", "-"]);
    assert_eq!(exec.request.terminal, None);
    let long: Vec<u8> = (0..1_000_000_u32)
        .map(|number| (number % 251) as u8)
        .collect();
    let expected = long.clone();
    let mut other = exec.other;
    exec.other = piped().1;
    let command = async move {
        other
            .stderr
            .as_mut()
            .unwrap()
            .write_all(b"warn")
            .await
            .unwrap();
        other
            .stdout
            .as_mut()
            .unwrap()
            .write_all(&long)
            .await
            .unwrap();
        other.exit(43);
        other
    };
    let (received, _other) = timeout(LIMIT, async { tokio::join!(exec.received(), command) })
        .await
        .unwrap();
    assert_eq!(received.stdout, expected);
    assert_eq!(received.stderr, b"warn");
    assert_eq!(received.ends.last().unwrap(), "exit 43 0");
    assert_eq!(received.ends.len(), 3, "{:?}", received.ends);
    assert_eq!(received.error, None);
}

#[tokio::test]
async fn a_short_output_is_passed_on_at_once() {
    let mut exec = Exec::start([]).await;
    for line in ["one\n", "two\n"] {
        let stdout = exec.other.stdout.as_mut().unwrap();
        stdout.write_all(line.as_bytes()).await.unwrap();
        let response = timeout(LIMIT, exec.responses.next()).await.unwrap();
        let operation = response.unwrap().unwrap().stdout.unwrap();
        assert_eq!(operation.data, line.as_bytes());
    }
}

/// A process that the command has left may write more.
#[tokio::test]
async fn the_exit_is_reported_after_the_end_of_all_output() {
    let mut exec = Exec::start([]).await;
    exec.other.report(&SessionEvent::Ended { status: 0 });
    exec.other.stdout = None;
    let response = timeout(LIMIT, exec.responses.next()).await.unwrap();
    assert!(response.unwrap().unwrap().stdout.unwrap().close);
    let stderr = exec.other.stderr.as_mut().unwrap();
    stderr.write_all(b"late").await.unwrap();
    let response = timeout(LIMIT, exec.responses.next()).await.unwrap();
    assert_eq!(response.unwrap().unwrap().stderr.unwrap().data, b"late");
    exec.other.stderr = None;
    exec.other.rest = None;
    let received = timeout(LIMIT, exec.received()).await.unwrap();
    assert_eq!(received.ends, ["stderr", "exit 0 0"]);
}

#[tokio::test]
async fn input_has_an_end() {
    let messages = [
        heartbeat(),
        data("one "),
        data(""),
        size(3, 4),
        close("two"),
        data("no"),
    ];
    let mut exec = Exec::start(messages).await;
    assert_eq!(exec.stdin().await, b"one two");
    exec.other.exit(0);
    assert_eq!(exec.received().await.ends.last().unwrap(), "exit 0 0");
}

/// Nomad never ends its side of the stream, but its conformance tests do.
#[tokio::test]
async fn the_end_of_the_messages_is_not_the_end_of_the_input() {
    let mut exec = Exec::start([data("x")]).await;
    let (sender, _) = mpsc::channel(1);
    drop(std::mem::replace(&mut exec.messages, sender));
    let mut byte = [0; 2];
    let stdin = exec.other.stdin.as_mut().unwrap();
    assert_eq!(
        timeout(LIMIT, stdin.read(&mut byte))
            .await
            .unwrap()
            .unwrap(),
        1
    );
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    let nothing = stdin.try_read(&mut byte).unwrap_err();
    assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
    assert!(!exec.other.is_ended());
    exec.other.exit(3);
    let received = timeout(LIMIT, exec.received()).await.unwrap();
    assert_eq!(received.ends.last().unwrap(), "exit 3 0");
}

/// Sends input until the plugin reads no more of it. Returns how much was sent.
async fn fill(exec: &Exec, bytes: usize) -> usize {
    let mut sent = 0;
    while timeout(Duration::from_millis(1), exec.send(data(vec![7; bytes])))
        .await
        .is_ok()
    {
        sent += bytes;
        assert!(sent < 1 << 24, "unlimited");
    }
    sent
}

#[tokio::test(start_paused = true)]
async fn input_that_is_not_read_is_limited_and_delays_no_output() {
    const BOUND: usize = 256 * 1024;
    for bytes in [1, 1000, 32 * 1024] {
        let mut exec = Exec::start([]).await;
        // Below the bound everything is still read.
        let below = BOUND / bytes;
        for _ in 0..below {
            exec.send(data(vec![7; bytes])).await;
        }
        exec.send(heartbeat()).await;
        let stdout = exec.other.stdout.as_mut().unwrap();
        stdout.write_all(b"still here").await.unwrap();
        let response = exec.responses.next().await.unwrap().unwrap();
        assert_eq!(response.stdout.unwrap().data, b"still here");
        let sent = below * bytes + fill(&exec, bytes).await;
        // The kernel counts pages of a pipe, and the test has a queue of its own.
        let most = BOUND + PIPE + 18 * bytes;
        assert!((BOUND..=most).contains(&sent), "{sent} with {bytes}");
        let stdout = exec.other.stdout.as_mut().unwrap();
        stdout.write_all(b"output").await.unwrap();
        let response = exec.responses.next().await.unwrap().unwrap();
        assert_eq!(response.stdout.unwrap().data, b"output");
        // It is read again as soon as the command reads.
        let stdin = exec.other.stdin.as_mut().unwrap();
        let mut all = vec![0; sent];
        stdin.read_exact(&mut all).await.unwrap();
        assert!(all.iter().all(|byte| *byte == 7));
        exec.send(close("")).await;
        assert_eq!(exec.stdin().await, b"");
    }
}

#[tokio::test(start_paused = true)]
async fn input_of_a_command_that_has_closed_its_stdin_is_discarded() {
    let mut exec = Exec::start([]).await;
    exec.other.stdin = None;
    for _ in 0..100 {
        exec.send(data(vec![7; CHUNK])).await;
    }
    exec.other.exit(0);
    let received = exec.received().await;
    assert_eq!(received.ends.last().unwrap(), "exit 0 0");
}

#[tokio::test(start_paused = true)]
async fn output_waits_for_a_client_that_does_not_read() {
    let mut exec = Exec::start([]).await;
    let stdout = exec.other.stdout.as_mut().unwrap();
    let mut written = 0;
    let second = Duration::from_secs(1);
    while let Ok(result) = timeout(second, stdout.write(&[7; CHUNK])).await {
        written += result.unwrap();
        assert!(written < 1 << 24, "unlimited");
    }
    assert!(written <= 6 * CHUNK, "{written}");
    exec.other.exit(0);
    let received = exec.received().await;
    assert_eq!(received.stdout.len(), written);
}

/// As fast as it can while the memory of both directions is limited by the tests above.
#[tokio::test]
async fn much_data_passes_in_both_directions_at_the_same_time() {
    const TOTAL: usize = 64 << 20;
    let mut exec = Exec::start([]).await;
    let mut other = std::mem::replace(&mut exec.other, piped().1);
    let messages = exec.messages.clone();
    let client = async move {
        let chunk: Vec<u8> = (0..=252).cycle().take(CHUNK).collect();
        for _ in 0..TOTAL / CHUNK {
            messages.send(Ok(data(chunk.clone()))).await.unwrap();
        }
        messages.send(Ok(close(""))).await.unwrap();
    };
    let cat = async move {
        let (mut stdin, mut stdout) = (other.stdin.take().unwrap(), other.stdout.take().unwrap());
        tokio::io::copy(&mut stdin, &mut stdout).await.unwrap();
        drop(stdout);
        other.exit(0);
        other
    };
    let (received, _, _) = timeout(LIMIT, async { tokio::join!(exec.received(), client, cat) })
        .await
        .unwrap();
    assert_eq!(received.stdout.len(), TOTAL);
    let intact = |chunk: &[u8]| {
        let bytes = chunk.iter().enumerate();
        bytes
            .into_iter()
            .all(|(at, byte)| usize::from(*byte) == at % 253)
    };
    assert!(received.stdout.chunks(CHUNK).all(intact));
}
