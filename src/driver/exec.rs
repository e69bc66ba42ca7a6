//! Running commands in a task: ExecTaskStreaming (`nomad alloc exec`) and ExecTask (script checks, scripts of templates). Converts between
//! the messages and the session of a command, and decides when a session is over. A call owns its session: a call that is dropped or
//! panics ends the command with everything that it has started.

use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::time::Duration;

use futures_util::future::FutureExt as _;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::Driver;
use super::status::CallError;
use super::stream::ProducerStream;
use crate::backend::{BackendError, chain};
use crate::exec::{Control, End, Ended, ExecError, ExecRequest, Session, Streams, TerminalSize};
use crate::proto::driver as proto;
use crate::task::{Task, TaskError};

mod input;
mod output;
mod to_end;

use input::{Input, InputEnd, Sink};
use output::Output;

/// How long a command may take to run once its session has been started.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// How long to wait for the size of the terminal, which Nomad sends in a message of its own.
const SIZE_TIMEOUT: Duration = Duration::from_millis(20);
/// How long a command may take to end by itself after its client has gone.
const HANG_UP_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the last output is waited for where it need not come to an end.
const LAST_OUTPUT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long after the end of a task its session may take to report how its command has ended.
const TASK_END_TIMEOUT: Duration = Duration::from_secs(1);
/// How long to wait for the end of a task after one of its sessions was killed, most likely because of that end.
const LOST_TIMEOUT: Duration = Duration::from_secs(2);
/// The same after a command was killed by SIGKILL, possibly because of that end.
const KILLED_TIMEOUT: Duration = Duration::from_millis(500);

/// The responses of a session.
pub type ExecStream = ProducerStream<proto::ExecTaskStreamingResponse>;

/// What a session answers, and how it is passed to the stream.
type Response = Box<Result<proto::ExecTaskStreamingResponse, Status>>;

/// What a command that was to be started has become.
enum Start {
    Session(Box<Session>),
    NotRun(nspawn_init::StartError),
}

impl Driver {
    /// ExecTaskStreaming. Returns when the session has been started.
    pub(super) async fn exec_stream<R>(&self, mut requests: R) -> Result<ExecStream, Status>
    where
        R: Stream<Item = Result<proto::ExecTaskStreamingRequest, Status>> + Send + Unpin + 'static,
    {
        let setup = match requests.next().await {
            Some(Ok(first)) => first.setup,
            _ => None,
        };
        let setup = setup.ok_or_else(|| CallError::Missing("setup").into_short_status())?;
        let task = self.task_for_exec(&setup.task_id)?;
        let mut requests = requests.fuse();
        let (size, peeked) = match setup.tty {
            true => first_size(&mut requests).await,
            false => (None, None),
        };
        let request = ExecRequest {
            command: setup.command,
            terminal: setup.tty.then(|| size.unwrap_or_default()),
            ..ExecRequest::default()
        };
        let start = self.start_session(&task, request).await?;
        let requests = tokio_stream::iter(peeked).chain(requests);
        let (driver, root) = (self.clone(), self.root.clone());
        Ok(ProducerStream::new(move |answers| async move {
            let answer = answers.clone();
            let serving = async {
                match start {
                    Start::Session(session) => {
                        serve(&task, root, *session, requests, answers).await
                    }
                    Start::NotRun(start_error) => {
                        Output::new(answers, setup.tty).not_run(&start_error).await;
                        Ok(())
                    }
                }
            };
            // Unwind safe, because nothing of a session that has panicked is used again.
            let served = AssertUnwindSafe(serving).catch_unwind().await;
            if let Err(error) = served.unwrap_or(Err(CallError::Panicked)) {
                let _ = answer
                    .send(Box::new(Err(driver.report_exec(&task, error))))
                    .await;
            }
        }))
    }

    /// The task with this id.
    fn task_for_exec(&self, id: &str) -> Result<Task, Status> {
        let task = self.tasks.get(id);
        task.map_err(|error| CallError::from(error).into_short_status())
    }

    async fn start_session(&self, task: &Task, request: ExecRequest) -> Result<Start, Status> {
        match task.exec(request).await {
            Ok(session) => Ok(Start::Session(Box::new(session))),
            Err(TaskError::Backend(BackendError::Exec(ExecError::NotRun(start_error)))) => {
                Ok(Start::NotRun(start_error))
            }
            Err(error) => Err(self.report_exec(task, error.into())),
        }
    }

    /// The status for an error. What does not fit into it is logged and published as an event of the task.
    fn report_exec(&self, task: &Task, error: CallError) -> Status {
        let whole = chain(&error);
        let is_notable = matches!(
            &error,
            CallError::Panicked
                | CallError::SessionLost
                | CallError::ClientGone(_)
                | CallError::Task(TaskError::Panicked | TaskError::ExecTimeout(_))
        );
        let status = error.into_short_status();
        if is_notable || status.message() != whole {
            tracing::warn!(task = task.id(), error = whole, "exec failed");
            let text = format!("exec failed: {whole}");
            self.events.publish(task.info(), text);
        }
        status
    }
}

/// The size of the terminal if it has been sent already or is sent soon, and a message that was read in search of it.
async fn first_size<R>(
    requests: &mut R,
) -> (
    Option<TerminalSize>,
    Option<Result<proto::ExecTaskStreamingRequest, Status>>,
)
where
    R: Stream<Item = Result<proto::ExecTaskStreamingRequest, Status>> + Unpin,
{
    let mut size = None;
    let mut next = timeout(SIZE_TIMEOUT, requests.next()).await.ok().flatten();
    while let Some(Ok(message)) = &next {
        size = input::size_of(message).or(size);
        if message.stdin.is_some() || message.tty_size.is_none() {
            break;
        }
        next = requests.next().now_or_never().flatten();
    }
    (size, next)
}

/// Passes everything between the client and the command, and ends the session. What is returned is the status of the call.
async fn serve<R>(
    task: &Task,
    root: CancellationToken,
    session: Session,
    requests: R,
    answers: mpsc::Sender<Response>,
) -> Result<(), CallError>
where
    R: Stream<Item = Result<proto::ExecTaskStreamingRequest, Status>> + Unpin,
{
    let Session {
        streams,
        mut control,
    } = session;
    let output = Output::new(answers, matches!(streams, Streams::Terminal(_)));
    let result = tokio::select! {
        biased;
        result = pass(&mut control, streams, requests, &output) => result,
        () = root.cancelled() => return Err(TaskError::ShuttingDown.into()),
        // The session usually ends with its task, and then knows more.
        () = async { drop(task.wait().await); sleep(TASK_END_TIMEOUT).await } => Err(CallError::TaskEnded),
    };
    let result = match result {
        Ok(End::Exited(ended)) if was_killed_with(task, ended).await => Err(CallError::TaskEnded),
        Ok(End::Exited(ended)) => {
            output.exited(ended).await;
            Ok(())
        }
        Ok(End::NotRun(start_error)) => {
            output.not_run(&start_error).await;
            Ok(())
        }
        Ok(End::Lost) => Err(lost(task).await),
        Err(error) => Err(error),
    };
    control.end().await;
    result
}

/// The reason for which a command was killed together with the process that watches it.
async fn lost(task: &Task) -> CallError {
    match timeout(LOST_TIMEOUT, task.wait()).await {
        Ok(Some(_)) => CallError::TaskEnded,
        Ok(None) => TaskError::ShuttingDown.into(),
        Err(_) => CallError::SessionLost,
    }
}

/// Whether a command was killed because its task has ended. The process that watches it is killed at the same time, and may still have
/// reported the command's end before.
async fn was_killed_with(task: &Task, ended: Ended) -> bool {
    let is_killed = ended.signal == nix::libc::SIGKILL;
    is_killed && matches!(timeout(KILLED_TIMEOUT, task.wait()).await, Ok(Some(_)))
}

/// Passes everything between the client and the command until the command has ended and its output has been passed on.
async fn pass<R>(
    control: &mut Control,
    streams: Streams,
    requests: R,
    output: &Output,
) -> Result<End, CallError>
where
    R: Stream<Item = Result<proto::ExecTaskStreamingRequest, Status>> + Unpin,
{
    if let Some(end) = not_started(control).await? {
        return Ok(end);
    }
    match streams {
        Streams::Pipes {
            stdin,
            stdout,
            stderr,
        } => {
            let pumps = async {
                let _ = tokio::join!(output.stdout(stdout), output.stderr(stderr));
            };
            let mut ended = pin!(ended_with_output(control, pumps));
            let input = Input::new(requests, Sink::Pipe(stdin));
            let input_end = tokio::select! {
                end = &mut ended => return Ok(end),
                input_end = input.run() => input_end,
            };
            Err(hang_up(input_end, ended).await)
        }
        Streams::Terminal(terminal) => {
            let input = Input::new(requests, Sink::Terminal(&terminal));
            let passed = tokio::select! {
                end = control.ended() => Ok(end),
                input_end = input.run() => Err(input_end),
                never = output.terminal(&terminal) => match never {},
            };
            match passed {
                Ok(end) => {
                    output.rest_of(&terminal).await;
                    Ok(end)
                }
                Err(input_end) => {
                    drop(terminal);
                    Err(hang_up(input_end, control.ended()).await)
                }
            }
        }
    }
}

/// Waits until the command runs, or is lost. Returns its end if it does not run.
async fn not_started(control: &mut Control) -> Result<Option<End>, CallError> {
    let started = timeout(START_TIMEOUT, control.started()).await;
    started.map_err(|_| TaskError::ExecTimeout(START_TIMEOUT))?;
    let end = control.ended().now_or_never();
    Ok(end.filter(|end| matches!(end, End::NotRun(_))))
}

/// Waits for the end of the command and of all its output. The output of a command that was killed may have no end, if the container has
/// passed the pipes to a process elsewhere.
async fn ended_with_output(control: &mut Control, pumps: impl Future<Output = ()>) -> End {
    let mut pumps = pin!(pumps);
    let end = tokio::select! {
        biased;
        () = &mut pumps => return control.ended().await,
        end = control.ended() => end,
    };
    match &end {
        End::Exited(_) => pumps.await,
        // Its error is reported even if the output is incomplete.
        End::NotRun(_) | End::Lost => drop(timeout(LAST_OUTPUT_TIMEOUT, pumps).await),
    }
    end
}

/// Gives a command without a client the time to end by itself. Its input has been closed.
async fn hang_up(input_end: InputEnd, ended: impl Future<Output = End>) -> CallError {
    match input_end {
        InputEnd::Failed => CallError::Disconnected,
        InputEnd::Silent(limit) => {
            // It is killed after that.
            let _ = timeout(HANG_UP_TIMEOUT, ended).await;
            CallError::ClientGone(limit)
        }
    }
}
