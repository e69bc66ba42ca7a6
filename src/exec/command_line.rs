//! The `exec` command for people: a session without a plugin, with the streams or the terminal of this process. It finds the task in the
//! state directory.

use std::io::{self, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, copy, stderr, stdin, stdout};
use tokio::net::unix::pipe;
use tokio::signal::unix::{SignalKind, signal};

use super::{
    Control, End, ExecError, ExecRequest, Host, Session, Streams, Terminal, TerminalSize, start,
};
use crate::container::Started;
use crate::state::{TaskDir, state_dir};
use crate::supervisor::init_channel::init_binary;
use crate::sys::{kernel, process};

/// The exit code if the command could not be run, as in docker: it differs from the codes that commands use.
const FAILED: u8 = 125;

/// What the user has asked for.
#[derive(Debug)]
pub struct Arguments {
    /// The allocation id or the beginning of it, `ALLOCATION/TASK`, or the machine name.
    pub task: String,
    /// What is run; `terminal` is filled in here.
    pub request: ExecRequest,
    /// Whether the command gets a terminal; by default if this process has one.
    pub tty: Option<bool>,
    /// The state directory.
    pub state_dir: PathBuf,
    /// Whether it may run without the task's seccomp filters.
    pub unfiltered: bool,
}

/// Runs the command, and returns its exit code.
pub fn main(arguments: Arguments) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let code = runtime
        .map_err(|error| format!("can't start: {error}"))
        .and_then(|runtime| {
            let code = runtime.block_on(run(arguments));
            // Do not wait for a read from standard input.
            runtime.shutdown_background();
            code
        });
    match code {
        Ok(code) => ExitCode::from(code),
        Err(reason) => {
            say(&format!("error: {reason}"));
            ExitCode::from(FAILED)
        }
    }
}

/// To stderr; it is not an error if that is gone.
fn say(text: &str) {
    drop(writeln!(io::stderr(), "{text}"));
}

async fn run(arguments: Arguments) -> Result<u8, String> {
    state_dir::check(&arguments.state_dir).map_err(with_causes)?;
    let started = find(&arguments.state_dir, &arguments.task)?;
    let terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
    let terminal = arguments.tty.unwrap_or(terminal).then(own_size);
    let request = ExecRequest {
        terminal,
        ..arguments.request
    };
    let program = init_binary(&arguments.state_dir)
        .map_err(|error| format!("making the program for the session: {error}"))?;
    let host = Host {
        program,
        filters: std::sync::Arc::default(),
        unfiltered: arguments.unfiltered,
    };
    let Session {
        streams,
        mut control,
    } = match start(host, &started, request).await {
        Err(ExecError::NotRun(start_error)) => return Ok(not_run(&start_error)),
        started => started.map_err(with_causes)?,
    };
    let end = match streams {
        Streams::Pipes {
            stdin,
            stdout,
            stderr,
        } => {
            pass(stdin, stdout, stderr).await;
            control.ended().await
        }
        Streams::Terminal(terminal) => connect(&terminal, &mut control).await?,
    };
    control.end().await;
    match end {
        End::Exited(ended) => Ok(u8::try_from(ended.code).unwrap_or(u8::MAX)),
        End::NotRun(start_error) => Ok(not_run(&start_error)),
        End::Lost => Err("the task has ended, or the session was killed".to_owned()),
    }
}

fn with_causes(error: impl std::error::Error + Send + Sync + 'static) -> String {
    format!("{:#}", anyhow::Error::from(error))
}

fn not_run(start_error: &nspawn_init::StartError) -> u8 {
    say(&format!("error: {start_error}"));
    u8::try_from(start_error.status()).unwrap_or(FAILED)
}

/// The running task that is meant.
fn find(state_dir: &Path, wanted: &str) -> Result<Started, String> {
    let running =
        running(state_dir).map_err(|error| format!("{}: {error}", state_dir.display()))?;
    let name = |started: &Started| {
        let name = started
            .id
            .rsplit_once('/')
            .map_or(&*started.id, |(name, _)| name);
        name.to_owned()
    };
    let exact = |started: &&Started| {
        [&started.id, &started.machine, &name(started)].contains(&&wanted.to_owned())
    };
    let begins = |started: &&Started| !wanted.is_empty() && started.id.starts_with(wanted);
    let mut found: Vec<_> = running.iter().filter(exact).collect();
    if found.is_empty() {
        found = running.iter().filter(begins).collect();
    }
    let names = |tasks: &[&Started]| {
        let names: Vec<_> = tasks.iter().map(|task| name(task)).collect();
        names.join(", ")
    };
    match found.as_slice() {
        [one] => Ok((*one).clone()),
        [] if running.is_empty() => {
            let place = state_dir.display();
            Err(format!("no task runs whose records are in {place}"))
        }
        [] => {
            let all: Vec<_> = running.iter().collect();
            Err(format!(
                "no task {wanted:?} runs here; those that do: {}",
                names(&all)
            ))
        }
        several => Err(format!(
            "{wanted:?} is more than one task: {}",
            names(several)
        )),
    }
}

fn running(state_dir: &Path) -> io::Result<Vec<Started>> {
    let boot = kernel::boot_id()?;
    let mut running = Vec::new();
    for entry in std::fs::read_dir(state_dir)? {
        let entry = entry?;
        // The directory may contain files of others, and starts that are just coming or going.
        if !entry.file_name().to_str().is_some_and(TaskDir::is_name) {
            continue;
        }
        let task_dir = TaskDir::new(entry.path());
        if let Ok(record) = task_dir.running()
            && record.started.boot == boot
            && record.started.state == entry.path()
            // An exit is reported a moment before the leader is gone.
            && !matches!(task_dir.exit(), Ok(Some(_)))
            && process::is_alive(record.started.leader)
        {
            running.push(record.started);
        }
    }
    running.sort_by(|one, other| one.id.cmp(&other.id));
    Ok(running)
}

/// Passes the streams of this process on until nothing has the command's output open.
async fn pass(mut input: pipe::Sender, output: pipe::Receiver, errors: pipe::Receiver) {
    let read = async move {
        // Whether the command reads no more or nothing is left to read: its input ends here.
        let _ = copy(&mut stdin(), &mut input).await;
        drop(input);
        std::future::pending::<()>().await;
    };
    let write = async { tokio::join!(pass_out(output, stdout()), pass_out(errors, stderr())) };
    tokio::select! {
        _ = write => {}
        () = read => {}
    }
}

/// Passes one stream of the command on. If nobody reads it any more, the command gets SIGPIPE, because the pipe is closed when this returns,
/// even if another stream is still open.
async fn pass_out(mut from: pipe::Receiver, mut to: impl AsyncWrite + Unpin) {
    let _ = copy(&mut from, &mut to).await;
    let _ = to.flush().await;
}

/// Connects this process's terminal until the command has ended.
async fn connect(terminal: &Terminal, control: &mut Control) -> Result<End, String> {
    let _raw = RawMode::enter();
    let mut resized = signal(SignalKind::window_change()).map_err(|error| error.to_string())?;
    let mut out = stdout();
    let mut buffer = vec![0; 8192];
    let typed = type_in(terminal);
    tokio::pin!(typed);
    let end = loop {
        tokio::select! {
            end = control.ended() => break end,
            read = terminal.read(&mut buffer) => match read {
                Ok(length) if length > 0 => show(&mut out, &buffer[..length]).await,
                // No process has it open any more, so the command has ended or will.
                _ => break control.ended().await,
            },
            () = &mut typed => {}
            _ = resized.recv() => drop(terminal.resize(own_size())),
        }
    };
    while let Ok(length @ 1..) = terminal.try_read(&mut buffer) {
        show(&mut out, &buffer[..length]).await;
    }
    Ok(end)
}

async fn show(out: &mut tokio::io::Stdout, bytes: &[u8]) {
    let _ = out.write_all(bytes).await;
    let _ = out.flush().await;
}

/// Writes what is typed to the terminal; never completes.
async fn type_in(terminal: &Terminal) {
    const END_OF_INPUT: &[u8] = b"\x04";
    let mut input = stdin();
    let mut buffer = vec![0; 4096];
    loop {
        let length = input.read(&mut buffer).await.unwrap_or_default();
        let typed = match length {
            0 => END_OF_INPUT,
            _ => &buffer[..length],
        };
        let mut rest = typed;
        while !rest.is_empty() {
            match terminal.write(rest).await {
                Ok(written) => rest = &rest[written..],
                Err(_) => break,
            }
        }
        if length == 0 {
            std::future::pending().await
        }
    }
}

/// The size of this process's terminal.
fn own_size() -> TerminalSize {
    let size = tcgetwinsize(io::stdout()).or_else(|_| tcgetwinsize(io::stdin()));
    size.ok()
        .filter(|size| size.ws_row > 0 && size.ws_col > 0)
        .map_or_else(TerminalSize::default, |size| TerminalSize {
            rows: size.ws_row,
            columns: size.ws_col,
        })
}

/// While it lives, this process's terminal passes every key on, and echoes none: the command's terminal does.
struct RawMode(Option<Termios>);

impl RawMode {
    fn enter() -> Self {
        let before = tcgetattr(io::stdin()).ok();
        if let Some(mut raw) = before.clone() {
            raw.make_raw();
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, &raw);
        }
        Self(before)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
        }
    }
}
