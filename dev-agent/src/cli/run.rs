//! `run`: runs one task of a job file in a plugin process of this same binary. Passes on the output of the task,
//! reports everything else on stderr, and exits with the task's code.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{fs, io};

use clap::Args;
use serde_json::Value;
use tokio::sync::mpsc;

use super::directory::Directory;
use super::job::Job;
use super::tree::stored;
use super::{Driver, FAILED, hcl, say, signals};
use crate::log::Level;
use crate::run::chain;
use crate::{HostError, Launch, LogLine, Run, RunEvent, TaskExit, TaskSpec, run_task};

/// The first argument of a plugin that exits together with its `run`; the directories of that `run` follow.
pub const BOUND_PLUGIN: &str = "plugin-of-run";
/// The exit code that a shell reports for a process killed by SIGPIPE: the output was closed before the task exited.
const OUTPUT_CLOSED: u8 = 128 + 13;

/// The arguments of `run`.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit status: that of the task; 128 + n if signal n ended it; 127 if its command does not exist, 126 if it can't be \
executed; 141 if standard output or error was closed and the task was stopped for that reason; 125 if the task could not be \
run or its exit status is not known; 2 for wrong arguments.

SIGINT, SIGTERM and SIGHUP stop the task with its kill_timeout and kill_signal; a second one kills it. If `run` itself is \
killed, its task is killed too.")]
pub(super) struct Arguments {
    /// The job file: HCL, or the JSON that `nomad job run -output` prints; - is standard input
    jobfile: PathBuf,
    /// The task to run, as TASK or GROUP/TASK; needed when the job has several
    #[arg(long, value_name = "NAME")]
    task: Option<String>,
    /// Metadata that overrides the metadata of the job; also the values for ${meta.KEY}
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    meta: Vec<(String, String)>,
    /// The plugin's own options, HCL or JSON: what the agent has in `plugin { config { … } }`
    #[arg(long, value_name = "FILE")]
    plugin_config: Option<PathBuf>,
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE".to_owned()),
    }
}

/// Runs the task, reports, and returns the exit status.
pub(super) fn main(arguments: &Arguments, driver: Driver) -> ExitCode {
    let code = prepare(arguments).and_then(|(spec, config)| {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .map_err(|error| format!("can't start: {error}"))?;
        let code = runtime.block_on(run(spec, config, driver));
        // Do not wait for a pending write to a pipe that has no active reader.
        runtime.shutdown_background();
        code
    });
    match code {
        Ok(code) => ExitCode::from(code),
        Err(reason) => {
            say::line(&format!("error: {reason}"));
            ExitCode::from(FAILED)
        }
    }
}

/// Checks everything that can be checked before anything is started.
fn prepare(arguments: &Arguments) -> Result<(TaskSpec, Value), String> {
    let named = |path: &Path, reason: String| format!("{}: {reason}", path.display());
    let read = |path: &Path| read(path).map_err(|error| named(path, error.to_string()));

    let file = &arguments.jobfile;
    let meta: BTreeMap<_, _> = arguments.meta.iter().cloned().collect();
    let picked = Job::read(&read(file)?)
        .and_then(|job| job.pick(arguments.task.as_deref(), &meta))
        .map_err(|error| named(file, error.to_string()))?;
    if !picked.ignored.is_empty() {
        say::line(&format!(
            "warning: `run` ignores {}",
            picked.ignored.join(", ")
        ));
    }
    let config = match &arguments.plugin_config {
        None => Value::Object(serde_json::Map::new()),
        Some(file) => plugin_config(&read(file)?).map_err(|reason| named(file, reason))?,
    };
    Ok((picked.spec, config))
}

/// Reads a text file, or standard input for `-`. A byte order mark at its beginning is dropped.
fn read(path: &Path) -> io::Result<String> {
    let mut text = if path == Path::new("-") {
        io::read_to_string(io::stdin())?
    } else {
        fs::read_to_string(path)?
    };
    if text.starts_with('\u{feff}') {
        text.remove(0);
    }
    Ok(text)
}

/// The options of a `config` block, alone or within the agent's `plugin` block.
fn plugin_config(source: &str) -> Result<Value, String> {
    if source.trim_start().starts_with('{') {
        let value: Value =
            serde_json::from_str(source).map_err(|error| format!("not JSON: {error}"))?;
        return Ok(value);
    }
    let mut entries = hcl::read(source).map_err(|error| error.to_string())?;
    for name in ["plugin", "config"] {
        if let [only] = entries.as_slice()
            && only.name == name
            && let super::tree::Thing::Block { body, .. } = &only.thing
        {
            entries = body.clone();
        }
    }
    Ok(stored(&entries))
}

async fn run(task: TaskSpec, mut plugin_config: Value, driver: Driver) -> Result<u8, String> {
    // Before anything exists that a signal could leave behind.
    let stops = signals::stops().map_err(|error| format!("can't watch for signals: {error}"))?;
    let directory = Directory::create(driver.max_state_dir)?;
    // Never the state directory of a Nomad agent on this machine, because its plugin cleans up tasks that it does not
    // know. If the user sets that directory all the same, this plugin must not clean up the agent's tasks, which it
    // does not know either.
    if let Value::Object(config) = &mut plugin_config {
        config.insert("reconcile_after".to_owned(), "0".into());
        config
            .entry("state_dir")
            .or_insert_with(|| directory.state().to_string_lossy().into());
        // There is no later start that could use them, and the directory is removed.
        config.entry("seccomp_cache").or_insert(false.into());
    }
    let (log, mut lines) = mpsc::unbounded_channel();
    let binary =
        std::env::current_exe().map_err(|error| format!("can't find this program: {error}"))?;
    let run = Run {
        launch: Launch {
            args: std::iter::once(BOUND_PLUGIN.into())
                .chain(directory.paths().map(Into::into))
                .collect(),
            log: Some(log),
            bound: true,
            ..Launch::new(binary).set("PLUGIN_UNIX_SOCKET_DIR", directory.sockets())
        },
        plugin_config,
        task,
        allocations: directory.allocations().to_owned(),
    };
    let printer = tokio::spawn(async move {
        while let Some(line) = lines.recv().await {
            let line = LogLine::parse(&line);
            match line.level {
                Level::Warn => say::line(&format!("plugin: warning: {line}")),
                Level::Error => say::line(&format!("plugin: error: {line}")),
                // A line that is not in the log format should not be there, so show it.
                _ if !line.structured => say::line(&format!("plugin: {line}")),
                _ => {}
            }
        }
    });
    let end = run_task(run, io::stdout(), io::stderr(), stops, &report).await;
    // The channel closes with the plugin's stderr, which another process may still hold open after a kill.
    drop(tokio::time::timeout(crate::plugin::GRACE, printer).await);
    match end {
        Ok(exit) => status(exit, driver.unknown_end),
        Err(HostError::Output { source, .. }) if source.kind() == io::ErrorKind::BrokenPipe => {
            Ok(OUTPUT_CLOSED)
        }
        Err(error) => Err(chain(&error)),
    }
}

fn report(event: RunEvent) {
    match event {
        RunEvent::Step(text) => say::line(&format!("run: {text}")),
        RunEvent::Task(text) => say::line(&format!("event: {text}")),
        RunEvent::Warning(text) => say::line(&format!("warning: {text}")),
    }
}

fn status(exit: TaskExit, unknown_end: &str) -> Result<u8, String> {
    if let Some(error) = &exit.error {
        if !exit.is_known(unknown_end) {
            return Err(error.clone());
        }
        say::line(&format!("run: {error}"));
    }
    if exit.oom_killed {
        say::line("run: the task was killed by the OOM killer");
    }
    let code = if exit.signal > 0 {
        128 + exit.signal
    } else {
        exit.code
    };
    say::line(&format!("run: the task exited with code {code}"));
    u8::try_from(code)
        .map_err(|_| format!("the task's exit code {code} is not a valid exit status"))
}
