//! What the client of a session sends: input, sizes of the terminal, and heartbeats.

use std::collections::VecDeque;
use std::future::pending;
use std::io;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::net::unix::pipe;
use tokio::time::{Instant, sleep_until};
use tokio_stream::{Stream, StreamExt as _};
use tonic::Status;

use crate::exec::{Terminal, TerminalSize};
use crate::proto::driver::ExecTaskStreamingRequest;

/// How much input may wait for the command before no further message is read.
const MAX_QUEUED_BYTES: usize = 256 * 1024;
/// Input in shorter messages is joined, so that the memory of the queue stays in proportion to its length.
const SHORT_BYTES: usize = 1024;
/// How long a client that sends heartbeats, one in ten seconds, may be silent.
const SILENCE: Duration = Duration::from_secs(60);
/// What a terminal takes for the end of the input (Ctrl-D).
const END_OF_INPUT: u8 = 4;

/// Why no more input is passed on. Neither is the end of the command's input, which has a message of its own.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum InputEnd {
    /// The connection to the client is lost, or the client has cancelled the call.
    Failed,
    /// The client has sent nothing for this long, although it has sent heartbeats before.
    Silent(Duration),
}

/// Where input goes.
#[derive(Debug)]
pub(super) enum Sink<'a> {
    Pipe(pipe::Sender),
    Terminal(&'a Terminal),
    /// It is discarded.
    Nothing,
}

impl Sink<'_> {
    /// Cancel safe: nothing has been written if it is cancelled.
    async fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => pipe.write(bytes).await,
            Self::Terminal(terminal) => terminal.write(bytes).await,
            Self::Nothing => Ok(bytes.len()),
        }
    }
}

/// Input that the command has not read yet.
#[derive(Debug, Default)]
struct Queue {
    chunks: VecDeque<Vec<u8>>,
    /// How much of the first chunk has been written.
    written: usize,
    /// How much has not.
    bytes: usize,
}

impl Queue {
    fn push(&mut self, data: Vec<u8>) {
        self.bytes += data.len();
        match self.chunks.back_mut() {
            Some(last) if data.len() + last.len() <= SHORT_BYTES => last.extend(data),
            _ if data.is_empty() => {}
            _ => self.chunks.push_back(data),
        }
    }

    /// What is to be written next.
    fn front(&self) -> &[u8] {
        let first = self.chunks.front();
        first.map_or(&[], |first| &first[self.written..])
    }

    fn consume(&mut self, count: usize) {
        self.written += count;
        self.bytes -= count;
        if self.front().is_empty() {
            self.chunks.pop_front();
            self.written = 0;
        }
    }
}

/// The input of one session.
#[derive(Debug)]
pub(super) struct Input<'a, R> {
    requests: R,
    sink: Sink<'a>,
    queue: Queue,
    /// Whether the pipe is closed after what is in the queue.
    close: bool,
    /// Whether more messages may follow.
    open: bool,
    /// When a client that sends heartbeats counts as gone.
    deadline: Option<Instant>,
}

impl<'a, R> Input<'a, R>
where
    R: Stream<Item = Result<ExecTaskStreamingRequest, Status>> + Unpin,
{
    pub(super) fn new(requests: R, sink: Sink<'a>) -> Self {
        Self {
            requests,
            sink,
            queue: Queue::default(),
            close: false,
            open: true,
            deadline: None,
        }
    }

    /// Passes input on until the client is gone. The end of the messages is not that: after it everything stays as it is. When this
    /// returns or is dropped, a pipe is closed.
    pub(super) async fn run(mut self) -> InputEnd {
        let mut was_reading = true;
        loop {
            let reading = self.open && self.queue.bytes < MAX_QUEUED_BYTES;
            if reading && !was_reading {
                self.heard();
            }
            was_reading = reading;
            tokio::select! {
                message = self.requests.next(), if reading => match message {
                    Some(Ok(message)) => self.take(message),
                    Some(Err(_)) => return InputEnd::Failed,
                    None => self.open = false,
                },
                written = self.sink.write(self.queue.front()), if self.queue.bytes > 0 => {
                    self.written(written);
                }
                () = until(self.deadline), if reading => return InputEnd::Silent(SILENCE),
                else => return pending().await,
            }
        }
    }

    fn take(&mut self, message: ExecTaskStreamingRequest) {
        self.heard();
        let is_heartbeat =
            message.setup.is_none() && message.tty_size.is_none() && message.stdin.is_none();
        if is_heartbeat {
            self.deadline = Some(Instant::now() + SILENCE);
        }
        if let (Some(size), Sink::Terminal(terminal)) = (size_of(&message), &self.sink)
            && let Err(error) = terminal.resize(size)
        {
            tracing::debug!(%error, "the size of a terminal can't be changed");
        }
        let Some(stdin) = message.stdin else {
            return;
        };
        if !self.close {
            self.queue.push(stdin.data);
        }
        match &self.sink {
            Sink::Terminal(_) if stdin.close => self.queue.push(vec![END_OF_INPUT]),
            Sink::Pipe(_) if stdin.close => self.close = true,
            _ => {}
        }
        self.close_if_written();
    }

    fn written(&mut self, written: io::Result<usize>) {
        match written {
            Ok(count @ 1..) => self.queue.consume(count),
            // No process has the terminal open, which may change.
            _ if matches!(self.sink, Sink::Terminal(_)) => self.queue = Queue::default(),
            // The command has closed its stdin. Further input is discarded.
            _ => {
                self.queue = Queue::default();
                self.sink = Sink::Nothing;
            }
        }
        self.close_if_written();
    }

    fn close_if_written(&mut self) {
        if self.close && self.queue.bytes == 0 {
            self.sink = Sink::Nothing;
        }
    }

    /// Starts the wait for the next message again, if heartbeats are sent.
    fn heard(&mut self) {
        let until = Instant::now() + SILENCE;
        self.deadline = self.deadline.map(|_| until);
    }
}

/// The size of a terminal in a message. One that is larger than a terminal can be is reduced; none if it is zero or negative.
pub(super) fn size_of(message: &ExecTaskStreamingRequest) -> Option<TerminalSize> {
    let size = message.tty_size.as_ref()?;
    let clamped = |value: i32| u16::try_from(value.clamp(0, u16::MAX.into())).ok();
    Some(TerminalSize {
        rows: clamped(size.height).filter(|rows| *rows > 0)?,
        columns: clamped(size.width).filter(|columns| *columns > 0)?,
    })
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => pending().await,
    }
}
