//! Commands in a running task: ExecTask, and ExecTaskStreaming with its stream of messages.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::error::HostError;
use super::plugin::Plugin;
use nomad_proto::driver::exec_task_streaming_request::{Setup, TerminalSize};
use nomad_proto::driver::{
    ExecTaskRequest, ExecTaskStreamingIoOperation, ExecTaskStreamingRequest,
    ExecTaskStreamingResponse,
};

const STREAMING: &str = "ExecTaskStreaming";
/// How many messages may wait until the connection takes them.
const QUEUE: usize = 4;

/// What a command has written, and how it has exited.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecOutput {
    /// Its stdout; with a terminal, and in ExecTask, everything.
    pub stdout: Vec<u8>,
    /// Its stderr.
    pub stderr: Vec<u8>,
    /// The exit code as in a shell: the status, or 128 + signal.
    pub code: i32,
    /// The signal that killed it, or 0.
    pub signal: i32,
}

/// A command that runs. Dropping it cancels the call.
#[derive(Debug)]
pub struct ExecSession {
    messages: mpsc::Sender<ExecTaskStreamingRequest>,
    responses: Streaming<ExecTaskStreamingResponse>,
}

impl Plugin {
    /// `ExecTask`: runs a command in a task to its end. No `timeout` is none.
    pub async fn exec(
        &self,
        id: &str,
        command: &[&str],
        timeout: Option<Duration>,
    ) -> Result<ExecOutput, HostError> {
        let method = "ExecTask";
        let request = ExecTaskRequest {
            task_id: id.to_owned(),
            command: owned(command),
            timeout: timeout.and_then(|timeout| timeout.try_into().ok()),
        };
        let answer = self.driver().exec_task(request).await;
        let answer = answer.map_err(HostError::call(method))?.into_inner();
        let what = "result";
        let result = answer.result.ok_or(HostError::Answer { method, what })?;
        Ok(ExecOutput {
            stdout: answer.stdout,
            stderr: answer.stderr,
            code: result.exit_code,
            signal: result.signal,
        })
    }

    /// `ExecTaskStreaming`: starts a command in a task, with a terminal of this size (rows and columns) or without one.
    pub async fn exec_streaming(
        &self,
        id: &str,
        command: &[&str],
        terminal: Option<(i32, i32)>,
    ) -> Result<ExecSession, HostError> {
        let (messages, receiver) = mpsc::channel(QUEUE);
        let setup = Setup {
            task_id: id.to_owned(),
            command: owned(command),
            tty: terminal.is_some(),
        };
        let setup = ExecTaskStreamingRequest {
            setup: Some(setup),
            ..ExecTaskStreamingRequest::default()
        };
        let first = [Some(setup), terminal.map(size)];
        for message in first.into_iter().flatten() {
            // The queue is longer than this.
            let _ = messages.try_send(message);
        }
        let receiver = ReceiverStream::new(receiver);
        let answer = self.driver().exec_task_streaming(receiver).await;
        Ok(ExecSession {
            messages,
            responses: answer.map_err(HostError::call(STREAMING))?.into_inner(),
        })
    }
}

fn owned(command: &[&str]) -> Vec<String> {
    command.iter().map(|&word| word.to_owned()).collect()
}

fn size((height, width): (i32, i32)) -> ExecTaskStreamingRequest {
    ExecTaskStreamingRequest {
        tty_size: Some(TerminalSize { height, width }),
        ..ExecTaskStreamingRequest::default()
    }
}

impl ExecSession {
    /// Sends input.
    pub async fn input(&self, data: impl Into<Vec<u8>>) {
        self.stdin(data.into(), false).await;
    }

    /// Ends the input.
    pub async fn close(&self) {
        self.stdin(Vec::new(), true).await;
    }

    /// Sends another size of the terminal: rows and columns.
    pub async fn resize(&self, rows: i32, columns: i32) {
        self.send(size((rows, columns))).await;
    }

    /// Sends an empty message.
    pub async fn heartbeat(&self) {
        self.send(ExecTaskStreamingRequest::default()).await;
    }

    /// A sender of further messages, for input that is sent while output is received.
    pub fn messages(&self) -> mpsc::Sender<ExecTaskStreamingRequest> {
        self.messages.clone()
    }

    async fn stdin(&self, data: Vec<u8>, close: bool) {
        self.send(ExecTaskStreamingRequest {
            stdin: Some(ExecTaskStreamingIoOperation { data, close }),
            ..ExecTaskStreamingRequest::default()
        })
        .await;
    }

    async fn send(&self, message: ExecTaskStreamingRequest) {
        // Fails if the call has ended, which the responses show.
        let _ = self.messages.send(message).await;
    }

    /// The next response; `None` when the call has ended successfully.
    pub async fn next(&mut self) -> Result<Option<ExecTaskStreamingResponse>, HostError> {
        let next = self.responses.message().await;
        next.map_err(HostError::call(STREAMING))
    }

    /// Receives everything until the call has ended.
    pub async fn finish(mut self) -> Result<ExecOutput, HostError> {
        let (mut stdout, mut stderr, mut exit) = (Vec::new(), Vec::new(), None);
        while let Some(response) = self.next().await? {
            stdout.extend(response.stdout.unwrap_or_default().data);
            stderr.extend(response.stderr.unwrap_or_default().data);
            if response.exited {
                exit = response.result;
            }
        }
        let exit = exit.ok_or(HostError::Answer {
            method: STREAMING,
            what: "exit",
        })?;
        Ok(ExecOutput {
            stdout,
            stderr,
            code: exit.exit_code,
            signal: exit.signal,
        })
    }
}
