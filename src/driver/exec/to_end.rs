//! ExecTask: a command without input that is run to its end, or killed after a timeout. What it has printed comes with the answer.

use std::pin::{Pin, pin};
use std::time::Duration;

use futures_util::future::{MaybeDone, maybe_done};
use tokio::net::unix::pipe;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;

use super::super::status::CallError;
use super::super::{Driver, convert};
use super::{LAST_OUTPUT_TIMEOUT, Start, lost, not_started, was_killed_with};
use crate::exec::{Control, End, Ended, ExecRequest, Session, Streams};
use crate::proto::driver as proto;
use crate::task::Task;

/// How much of the output is kept.
const MAX_OUTPUT_BYTES: usize = 64 * 1024;
/// How much is read at once.
const READ_BYTES: usize = 16 * 1024;

/// Output, of which only the beginning is kept.
#[derive(Debug, Default)]
struct Kept {
    bytes: Vec<u8>,
    /// How much is not kept.
    cut: usize,
}

impl Kept {
    fn add(&mut self, more: &[u8]) {
        let room = MAX_OUTPUT_BYTES - self.bytes.len();
        let (kept, cut) = more.split_at(more.len().min(room));
        self.bytes.extend_from_slice(kept);
        self.cut += cut.len();
    }

    /// The output, with these lines of the driver's own at its end.
    fn finish(mut self, last: Option<String>) -> Vec<u8> {
        let cut = Some(self.cut).filter(|cut| *cut > 0);
        let cut = cut.map(|cut| format!("({cut} more bytes of output are not shown)"));
        for line in cut.into_iter().chain(last) {
            if !self.bytes.is_empty() && !self.bytes.ends_with(b"\n") {
                self.bytes.push(b'\n');
            }
            self.bytes.extend_from_slice(line.as_bytes());
            self.bytes.push(b'\n');
        }
        self.bytes
    }
}

impl Driver {
    /// ExecTask. Runs in a task of the runtime, so that a panic is an error of this call; that task ends with the call.
    pub(in super::super) async fn exec_to_end(
        &self,
        request: proto::ExecTaskRequest,
    ) -> Result<proto::ExecTaskResponse, Status> {
        let task = self.task_for_exec(&request.task_id)?;
        let limit = Some(convert::duration(request.timeout)).filter(|limit| !limit.is_zero());
        let command = ExecRequest {
            command: request.command,
            ..ExecRequest::default()
        };
        let session = match self.start_session(&task, command).await? {
            Start::Session(session) => session,
            Start::NotRun(start_error) => return Ok(not_run(&start_error)),
        };
        let run = {
            let (task, root) = (task.clone(), self.root.clone());
            async move {
                let run = root.run_until_cancelled_owned(run(&task, *session, limit));
                let shutting_down = || Err(crate::task::TaskError::ShuttingDown.into());
                run.await.unwrap_or_else(shutting_down)
            }
        };
        let answer = AbortOnDropHandle::new(tokio::spawn(run)).await;
        let answer = answer.unwrap_or(Err(CallError::Panicked));
        answer.map_err(|error| self.report_exec(&task, error))
    }
}

async fn run(
    task: &Task,
    session: Session,
    limit: Option<Duration>,
) -> Result<proto::ExecTaskResponse, CallError> {
    let Session {
        streams,
        mut control,
    } = session;
    let Streams::Pipes {
        stdin,
        stdout,
        stderr,
    } = streams
    else {
        // None was asked for.
        return Err(CallError::Panicked);
    };
    drop(stdin);
    let mut output = Kept::default();
    let (ended, last) = {
        let mut reading = pin!(maybe_done(read(stdout, stderr, &mut output)));
        let end = while_reading(end(&mut control, limit), &mut reading).await;
        // A process that the command has left may have them open.
        let rest = async |reading: Pin<&mut MaybeDone<_>>| {
            drop(timeout(LAST_OUTPUT_TIMEOUT, reading).await);
        };
        match end {
            Ok(Some(End::NotRun(start_error))) => return Ok(not_run(&start_error)),
            Ok(Some(End::Lost)) => return Err(lost(task).await),
            Err(error) => return Err(error),
            Ok(Some(End::Exited(ended))) if was_killed_with(task, ended).await => {
                return Err(CallError::TaskEnded);
            }
            Ok(Some(End::Exited(ended))) => {
                rest(reading.as_mut()).await;
                control.end().await;
                (ended, None)
            }
            Ok(None) => {
                while_reading(control.end(), &mut reading).await;
                rest(reading.as_mut()).await;
                let limit = limit.unwrap_or_default();
                let last = format!("the command was killed after its timeout of {limit:?}");
                (KILLED, Some(last))
            }
        }
    };
    Ok(response(output.finish(last), ended))
}

/// The end of the command; `None` if it was still running after `limit`, counted from its start.
async fn end(control: &mut Control, limit: Option<Duration>) -> Result<Option<End>, CallError> {
    if let Some(end) = not_started(control).await? {
        return Ok(Some(end));
    }
    match limit {
        Some(limit) => Ok(timeout(limit, control.ended()).await.ok()),
        None => Ok(Some(control.ended().await)),
    }
}

/// Waits for `other` while the output is being read.
async fn while_reading<T>(
    other: impl Future<Output = T>,
    reading: &mut Pin<&mut MaybeDone<impl Future<Output = ()>>>,
) -> T {
    let mut other = pin!(other);
    tokio::select! {
        biased;
        result = &mut other => result,
        () = reading.as_mut() => other.await,
    }
}

/// Reads both streams to their ends. Their order is that in which the output is seen here.
async fn read(stdout: pipe::Receiver, stderr: pipe::Receiver, output: &mut Kept) {
    let mut buffer = vec![0; READ_BYTES];
    let (mut stdout, mut stderr) = (Some(stdout), Some(stderr));
    while stdout.is_some() || stderr.is_some() {
        let ready = tokio::select! {
            () = readable(stdout.as_ref()) => &mut stdout,
            () = readable(stderr.as_ref()) => &mut stderr,
        };
        let read = ready.as_ref().map(|pipe| pipe.try_read(&mut buffer));
        match read {
            Some(Ok(count @ 1..)) => output.add(&buffer[..count]),
            Some(Err(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            _ => *ready = None,
        }
    }
}

/// Waits until something can be read; for ever if the stream has ended.
async fn readable(pipe: Option<&pipe::Receiver>) {
    match pipe {
        // An error is seen by the following read.
        Some(pipe) => drop(pipe.readable().await),
        None => std::future::pending().await,
    }
}

fn not_run(start_error: &nspawn_init::StartError) -> proto::ExecTaskResponse {
    let text = format!("{start_error}\n");
    let code = start_error.status();
    response(text.into_bytes(), Ended { code, signal: 0 })
}

/// Nomad shows only stdout.
fn response(stdout: Vec<u8>, ended: Ended) -> proto::ExecTaskResponse {
    proto::ExecTaskResponse {
        stdout,
        stderr: Vec::new(),
        result: Some(proto::ExitResult {
            exit_code: ended.code,
            signal: ended.signal,
            oom_killed: false,
        }),
    }
}

/// How a command that was killed has ended.
const KILLED: Ended = Ended {
    code: 137,
    signal: 9,
};
