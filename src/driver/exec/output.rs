//! What a session sends to its client: output, the end of each stream, and the exit. Waits while the client does not read: nothing is read
//! from a command before there is room for it.

use std::convert::Infallible;
use std::io;
use std::time::Duration;

use nspawn_init::StartError;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::time::sleep;

use super::Response;
use crate::exec::{Ended, Terminal};
use crate::proto::driver::{
    ExecTaskStreamingIoOperation as Operation, ExecTaskStreamingResponse, ExitResult,
};

/// The most output in one message.
const CHUNK_BYTES: usize = 64 * 1024;
/// The most that one read from a terminal returns.
const TERMINAL_READ_BYTES: usize = 4 * 1024;
/// How often a terminal that no process has open is read.
const REOPEN_INTERVAL: Duration = Duration::from_millis(100);

/// One of the streams of a command. With a terminal there is only stdout.
#[derive(Debug, Clone, Copy)]
enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    fn message(self, operation: Operation) -> Response {
        let mut response = ExecTaskStreamingResponse::default();
        match self {
            Self::Stdout => response.stdout = Some(operation),
            Self::Stderr => response.stderr = Some(operation),
        }
        Box::new(Ok(response))
    }

    fn data(self, data: Vec<u8>) -> Response {
        self.message(Operation { data, close: false })
    }

    fn close(self) -> Response {
        let data = Vec::new();
        self.message(Operation { data, close: true })
    }
}

/// Where the output of one session goes. Whatever is sent after the client has gone is discarded.
#[derive(Debug)]
pub(super) struct Output {
    answers: mpsc::Sender<Response>,
    terminal: bool,
}

impl Output {
    /// `terminal`: whether the command has a terminal.
    pub(super) fn new(answers: mpsc::Sender<Response>, terminal: bool) -> Self {
        Self { answers, terminal }
    }

    /// Passes on everything until the end of the stream.
    pub(super) async fn stdout(&self, pipe: pipe::Receiver) {
        self.pipe(pipe, Stream::Stdout).await;
    }

    /// The same.
    pub(super) async fn stderr(&self, pipe: pipe::Receiver) {
        self.pipe(pipe, Stream::Stderr).await;
    }

    async fn pipe(&self, pipe: pipe::Receiver, stream: Stream) {
        while let Ok(room) = self.answers.reserve().await
            && pipe.readable().await.is_ok()
        {
            let mut data = Vec::with_capacity(CHUNK_BYTES);
            match pipe.try_read_buf(&mut data) {
                Ok(1..) => room.send(stream.data(data)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                _ => break,
            }
        }
        self.send(stream.close()).await;
    }

    /// Passes on what the terminal shows. Nothing is lost when this is cancelled.
    pub(super) async fn terminal(&self, terminal: &Terminal) -> Infallible {
        let mut buffer = [0; TERMINAL_READ_BYTES];
        let mut was_closed = false;
        loop {
            let Ok(room) = self.answers.reserve().await else {
                return std::future::pending().await;
            };
            let read = match was_closed {
                false => terminal.read(&mut buffer).await,
                // tokio takes a hang-up for permanent: it would report the terminal as readable without a pause.
                true => terminal.try_read(&mut buffer),
            };
            match read {
                Ok(count @ 1..) => {
                    let mut data = buffer[..count].to_vec();
                    read_more(terminal, &mut data);
                    room.send(Stream::Stdout.data(data));
                }
                // A process of the session can open it again.
                _ => {
                    drop(room);
                    was_closed = true;
                    sleep(REOPEN_INTERVAL).await;
                }
            }
        }
    }

    /// Passes on what a terminal still shows after the end of the command, but waits for nothing: other processes may have it open.
    pub(super) async fn rest_of(&self, terminal: &Terminal) {
        let mut data = Vec::new();
        // More than the kernel keeps for a terminal has been written later.
        read_more(terminal, &mut data);
        if !data.is_empty() {
            self.send(Stream::Stdout.data(data)).await;
        }
        self.send(Stream::Stdout.close()).await;
    }

    /// The exit, after which a client reads nothing.
    pub(super) async fn exited(&self, ended: Ended) {
        let response = ExecTaskStreamingResponse {
            exited: true,
            result: Some(ExitResult {
                exit_code: ended.code,
                signal: ended.signal,
                oom_killed: false,
            }),
            ..ExecTaskStreamingResponse::default()
        };
        self.send(Box::new(Ok(response))).await;
    }

    /// The whole output of a command that does not run: the reason, as a shell prints it.
    pub(super) async fn not_run(&self, start_error: &StartError) {
        let (stream, line_end) = match self.terminal {
            true => (Stream::Stdout, "\r\n"),
            false => (Stream::Stderr, "\n"),
        };
        let text = format!("{start_error}{line_end}");
        self.send(stream.data(text.into_bytes())).await;
        self.send(Stream::Stdout.close()).await;
        if !self.terminal {
            self.send(Stream::Stderr.close()).await;
        }
        let code = start_error.status();
        self.exited(Ended { code, signal: 0 }).await;
    }

    async fn send(&self, response: Response) {
        // Fails if the client has gone.
        let _ = self.answers.send(response).await;
    }
}

/// Reads what can be read without waiting, until `data` is a chunk.
fn read_more(terminal: &Terminal, data: &mut Vec<u8>) {
    let mut buffer = [0; TERMINAL_READ_BYTES];
    while data.len() + buffer.len() <= CHUNK_BYTES {
        match terminal.try_read(&mut buffer) {
            Ok(count @ 1..) => data.extend_from_slice(&buffer[..count]),
            _ => break,
        }
    }
}
