//! `run`: one task of a job file, started through a plugin of this very binary. Streams what the task prints, tells the rest
//! on stderr, ends with the task's code.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::job::Job;
use super::tree::stored;
use super::{FAILED, hcl, say};
use crate::host::log::Level;
use crate::host::run::{Happening, chain};
use crate::host::{HostError, Launch, LogLine, Run, TaskExit, TaskSpec, run_task};

/// What `run` is told.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit status: the task's own; 128 + n when signal n ended it; 125 when the task could not be run or how it ended is not \
known; 2 for wrong arguments.

SIGINT and SIGTERM stop the task with its kill_timeout and kill_signal; a second one kills it.")]
pub(super) struct Arguments {
    /// The job file: HCL, or the JSON that `nomad job run -output` prints
    jobfile: PathBuf,
    /// The task to run, as TASK or GROUP/TASK; needed when the job has several
    #[arg(long, value_name = "NAME")]
    task: Option<String>,
    /// Metadata put over that of the job; also what ${meta.KEY} stands for
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    meta: Vec<(String, String)>,
    /// The plugin's own options, HCL or JSON: what the agent has in `plugin { config { … } }`
    #[arg(long, value_name = "FILE")]
    plugin_config: Option<PathBuf>,
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("it is not KEY=VALUE".to_owned()),
    }
}

/// Runs, tells, and gives the status to end with.
pub(super) fn main(arguments: &Arguments) -> ExitCode {
    let exit = prepare(arguments).and_then(|(spec, config)| {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .map_err(|error| format!("can't start: {error}"))?;
        runtime.block_on(run(spec, config))
    });
    match exit.and_then(status) {
        Ok(code) => ExitCode::from(code),
        Err(reason) => {
            say::line(&format!("error: {reason}"));
            ExitCode::from(FAILED)
        }
    }
}

/// Everything that can be known to be wrong before anything is started.
fn prepare(arguments: &Arguments) -> Result<(TaskSpec, Value), String> {
    let named = |path: &Path, reason: String| format!("{}: {reason}", path.display());
    let read =
        |path: &Path| fs::read_to_string(path).map_err(|error| named(path, error.to_string()));

    let file = &arguments.jobfile;
    let meta: BTreeMap<_, _> = arguments.meta.iter().cloned().collect();
    let picked = Job::read(&read(file)?)
        .and_then(|job| job.pick(arguments.task.as_deref(), &meta))
        .map_err(|error| named(file, error.to_string()))?;
    if !picked.ignored.is_empty() {
        say::line(&format!(
            "warning: `run` does not do {}",
            picked.ignored.join(", ")
        ));
    }
    let config = match &arguments.plugin_config {
        None => Value::Object(serde_json::Map::new()),
        Some(file) => plugin_config(&read(file)?).map_err(|reason| named(file, reason))?,
    };
    Ok((picked.spec, config))
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

async fn run(task: TaskSpec, mut plugin_config: Value) -> Result<TaskExit, String> {
    let directory = Directory::create()?;
    // Never that of a Nomad agent on this machine: its plugin clears what it does not know. Where somebody names that one all the
    // same, this plugin must not clear away the agent's tasks, which it does not know either.
    if let Value::Object(config) = &mut plugin_config {
        config.insert("reconcile_after".to_owned(), "0".into());
        config
            .entry("state_dir")
            .or_insert_with(|| directory.0.join("state").to_string_lossy().into());
    }
    let (log, mut lines) = mpsc::unbounded_channel();
    let binary =
        std::env::current_exe().map_err(|error| format!("can't find this program: {error}"))?;
    let run = Run {
        launch: Launch {
            log: Some(log),
            ..Launch::new(binary)
        },
        plugin_config,
        task,
        allocations: directory.0.clone(),
    };
    let teller = tokio::spawn(async move {
        while let Some(line) = lines.recv().await {
            let line = LogLine::parse(&line);
            match line.level {
                Level::Warn => say::line(&format!("plugin: warning: {line}")),
                Level::Error => say::line(&format!("plugin: error: {line}")),
                // A line that is no log line is something that should not be there.
                _ if !line.structured => say::line(&format!("plugin: {line}")),
                _ => {}
            }
        }
    });
    let stops = stops().map_err(|error| format!("can't watch for signals: {error}"))?;
    let end = run_task(run, std::io::stdout(), std::io::stderr(), stops, &tell).await;
    // The channel ends with the plugin's stderr; after a kill somebody may still hold that.
    drop(tokio::time::timeout(crate::host::plugin::GRACE, teller).await);
    end.map_err(|error: HostError| chain(&error))
}

fn tell(happening: Happening) {
    match happening {
        Happening::Step(text) => say::line(&format!("run: {text}")),
        Happening::Event(text) => say::line(&format!("event: {text}")),
        Happening::Trouble(text) => say::line(&format!("warning: {text}")),
    }
}

/// A message for each SIGINT and SIGTERM.
fn stops() -> std::io::Result<mpsc::Receiver<()>> {
    let (sender, stops) = mpsc::channel(4);
    for kind in [SignalKind::interrupt(), SignalKind::terminate()] {
        let mut signals = signal(kind)?;
        let sender = sender.clone();
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                // Full means that more stops are waiting than make a difference.
                let _ = sender.try_send(());
            }
        });
    }
    Ok(stops)
}

fn status(exit: TaskExit) -> Result<u8, String> {
    if let Some(error) = exit.error {
        return Err(format!("how the task ended is not known: {error}"));
    }
    if exit.oom_killed {
        say::line("run: the task was killed for want of memory");
    }
    let code = if exit.signal > 0 {
        128 + exit.signal
    } else {
        exit.code
    };
    say::line(&format!("run: the task ended with {code}"));
    u8::try_from(code).map_err(|_| format!("the task's code {code} is no exit status"))
}

/// A directory for this run alone, removed at its end.
#[derive(Debug)]
struct Directory(PathBuf);

impl Directory {
    fn create() -> Result<Self, String> {
        let parent = std::env::temp_dir();
        let path = parent.join(format!("nomad-driver-nspawn-{}", std::process::id()));
        let make = || {
            // Left by a run of the same pid that was killed: only an empty one can be taken over.
            drop(fs::remove_dir(&path));
            fs::create_dir(&path)?;
            fs::set_permissions(&path, Permissions::from_mode(0o700))
        };
        make().map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // The state directory is the plugin's, empty once every task is destroyed. The allocation is gone unless something is
        // mounted in it, and then nothing may be deleted.
        drop(fs::remove_dir(self.0.join("state")));
        if let Err(error) = fs::remove_dir(&self.0) {
            say::line(&format!("warning: {} is left: {error}", self.0.display()));
        }
    }
}
