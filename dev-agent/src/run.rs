//! Drives one task from configuration to cleanup, in the order of Nomad's agent. If a plugin crashes while the task
//! runs, it is started again and recovers the task; an earlier stop request is then repeated. Retries nothing else.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, timeout};
use tonic::Streaming;

use super::allocation::{Allocation, TaskSpec};
use super::calls::TaskExit;
use super::error::HostError;
use super::plugin::{Launch, Plugin};
use nomad_proto::driver::{
    DriverTaskEvent, StopTaskRequest, StopTaskResponse, TaskConfig, TaskHandle,
};

/// How long to wait for the rest of a task's output once the task has exited.
const DRAIN: Duration = Duration::from_secs(2);
/// How often a plugin that crashes while a task runs is started again.
const RESTARTS: usize = 3;
/// How long to wait until the task of a start that failed or was given up has been destroyed.
const GIVE_UP: Duration = Duration::from_secs(10);

/// One run of one task.
#[derive(Debug)]
pub struct Run {
    /// How to start the plugin.
    pub launch: Launch,
    /// The plugin's own configuration.
    pub plugin_config: Value,
    /// The task.
    pub task: TaskSpec,
    /// An existing directory in which the allocation is created.
    pub allocations: PathBuf,
}

/// Something that happened during a run, as text for the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunEvent {
    /// The run reached this step.
    Step(String),
    /// The driver reported this event of the task.
    Task(String),
    /// Something went wrong; the run continues.
    Warning(String),
}

type Report = dyn Fn(RunEvent) + Sync;

/// Runs a task from start to exit. Its output is written to `stdout` and `stderr` unchanged, events are passed to
/// `report`. Each message on `stops` requests a stop: the first one with the task's own kill timeout and signal, later
/// ones without a timeout. Before the task is started, the first one ends the run with [`HostError::Stopped`].
///
/// When a write to `stdout` or `stderr` fails while the task runs, the task is stopped and [`HostError::Output`]
/// returned. Leaves nothing behind, not even after an error.
pub async fn run_task<O, E>(
    run: Run,
    stdout: O,
    stderr: E,
    stops: mpsc::Receiver<()>,
    report: &Report,
) -> Result<TaskExit, HostError>
where
    O: Write + Send + 'static,
    E: Write + Send + 'static,
{
    let mut stops = Stops::new(stops, run.task.kill_timeout);
    let mut plugin = prepare(&run, report, stops.next()).await?;
    let allocation = match Allocation::create(&run.allocations, run.task.clone()) {
        Ok(allocation) => allocation,
        Err(error) => {
            plugin.shutdown().await;
            return Err(error);
        }
    };
    report(RunEvent::Step(format!("allocation {}", allocation.id())));
    let mut drive = Drive {
        run: &run,
        allocation: &allocation,
        report,
        stops,
        broken: None,
    };
    let end = drive.task(&mut plugin, stdout, stderr).await;
    let stopped = plugin.shutdown().await;
    if stopped.killed {
        report(RunEvent::Warning(
            "the plugin did not exit within 2 s and was killed".to_owned(),
        ));
    }
    if let Err(error) = allocation.remove() {
        report(RunEvent::Warning(chain(&error)));
    }
    end
}

/// Starts the plugin and waits until it accepts tasks, unless `stopped` completes first.
async fn prepare(
    run: &Run,
    report: &Report,
    stopped: impl Future<Output = Duration>,
) -> Result<Plugin, HostError> {
    tokio::pin!(stopped);
    let plugin = tokio::select! {
        biased;
        _ = &mut stopped => return Err(HostError::Stopped),
        launched = Plugin::launch(run.launch.clone()) => launched?,
    };
    let ready = async {
        let info = plugin.identify().await?;
        plugin.configure(&run.plugin_config).await?;
        let fingerprint = plugin.healthy().await?;
        report(RunEvent::Step(format!(
            "plugin {} {}: {}",
            info.name, info.plugin_version, fingerprint.health_description
        )));
        Ok(())
    };
    let ready = tokio::select! {
        biased;
        _ = &mut stopped => Err(HostError::Stopped),
        ready = ready => ready,
    };
    match ready {
        Ok(()) => Ok(plugin),
        Err(error) => {
            plugin.shutdown().await;
            Err(error)
        }
    }
}

/// Counts stop requests, so that a request to a plugin that crashed can be repeated to the next one.
#[derive(Debug)]
struct Stops {
    requests: mpsc::Receiver<()>,
    kill_timeout: Duration,
    count: usize,
    /// When the task is killed, once a stop was requested.
    deadline: Option<Instant>,
}

impl Stops {
    fn new(requests: mpsc::Receiver<()>, kill_timeout: Duration) -> Self {
        Self {
            requests,
            kill_timeout,
            count: 0,
            deadline: None,
        }
    }

    /// Waits for the next request and returns how long the task then has; waits indefinitely if no sender is left.
    async fn next(&mut self) -> Duration {
        match self.requests.recv().await {
            Some(()) => self.request(),
            None => std::future::pending().await,
        }
    }

    fn request(&mut self) -> Duration {
        self.count += 1;
        let grace = if self.count == 1 {
            self.kill_timeout
        } else {
            Duration::ZERO
        };
        // A timeout beyond the clock's range means no deadline.
        self.deadline = Instant::now().checked_add(grace);
        grace
    }

    /// How long the task has left, if a stop was requested.
    fn left(&self) -> Option<Duration> {
        (self.count > 0).then(|| match self.deadline {
            Some(deadline) => deadline.saturating_duration_since(Instant::now()),
            None => self.kill_timeout,
        })
    }
}

/// A stream of the task's output that could not be written.
#[derive(Debug)]
struct Broken {
    stream: &'static str,
    source: io::Error,
}

/// One task, whose plugin process may be replaced.
struct Drive<'a> {
    run: &'a Run,
    allocation: &'a Allocation,
    report: &'a Report,
    stops: Stops,
    /// The first output that could not be written while the task ran.
    broken: Option<Broken>,
}

impl Drive<'_> {
    async fn task<O, E>(
        &mut self,
        plugin: &mut Plugin,
        stdout: O,
        stderr: E,
    ) -> Result<TaskExit, HostError>
    where
        O: Write + Send + 'static,
        E: Write + Send + 'static,
    {
        let task = plugin.task_config(self.allocation).await?;
        let id = task.id.clone();
        let mut events = plugin.events().await?;
        let logs = self.allocation.open_logs()?;
        let (failed, mut failures) = mpsc::channel(2);
        let copies = [
            tokio::spawn(copy("stdout", logs.stdout, stdout, failed.clone())),
            tokio::spawn(copy("stderr", logs.stderr, stderr, failed)),
        ];
        let handle = match self.start(plugin, task, &mut events).await {
            Ok(handle) => handle,
            Err(error) => {
                copies.iter().for_each(JoinHandle::abort);
                self.undo_start(plugin, &id, &error).await;
                return Err(error);
            }
        };
        self.step(format!("task {} is running", self.run.task.task));
        let mut end = self.follow(plugin, &id, &mut events, &mut failures).await;
        for _ in 0..RESTARTS {
            if end.is_ok() || timeout(DRAIN, plugin.gone()).await.is_err() {
                break;
            }
            end = match self.recover(plugin, handle.clone()).await {
                Ok(mut events) => self.follow(plugin, &id, &mut events, &mut failures).await,
                Err(error) => Err(error),
            };
        }
        self.drain(copies, &mut failures).await;
        self.destroy(plugin, &id).await;
        match self.broken.take() {
            Some(Broken { stream, source }) => Err(HostError::Output { stream, source }),
            None => end,
        }
    }

    /// Starts the task. A stop request that comes meanwhile takes effect once the task runs; a second one, or the end
    /// of the kill timeout, gives up the start with [`HostError::Stopped`].
    async fn start(
        &mut self,
        plugin: &Plugin,
        task: TaskConfig,
        events: &mut Streaming<DriverTaskEvent>,
    ) -> Result<TaskHandle, HostError> {
        let start = plugin.start(task);
        tokio::pin!(start);
        loop {
            let deadline = self.stops.deadline;
            let late = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                started = &mut start => return Ok(started?.handle),
                Ok(Some(event)) = events.message() => self.task_event(&event),
                _ = self.stops.next() => {}
                () = late => return Err(HostError::Stopped),
            }
        }
    }

    /// Removes what a start left that failed or was given up.
    async fn undo_start(&self, plugin: &mut Plugin, id: &str, error: &HostError) {
        let undo = async {
            if matches!(error, HostError::Stopped) {
                self.step("the start is cancelled".to_owned());
                // The driver destroys a task only when its start is over, which may take long. A start whose plugin is
                // gone is undone at once.
                plugin.kill().await;
            }
            // A plugin that died may have left a container that it did not report.
            self.destroy(plugin, id).await;
        };
        if timeout(GIVE_UP, undo).await.is_err() {
            let seconds = GIVE_UP.as_secs();
            self.warn(format!(
                "the task may still exist: it was not destroyed within {seconds} s"
            ));
        }
    }

    /// Waits for the exit of the task, passes on the driver's events, and forwards stop requests.
    async fn follow(
        &mut self,
        plugin: &Plugin,
        id: &str,
        events: &mut Streaming<DriverTaskEvent>,
        failures: &mut mpsc::Receiver<Broken>,
    ) -> Result<TaskExit, HostError> {
        let wait = plugin.wait(id);
        tokio::pin!(wait);
        // Stop requests are concurrent: the second one must not wait for the first.
        let mut stopping = JoinSet::new();
        if let Some(left) = self.stops.left() {
            self.stop(plugin, id, left, &mut stopping);
        }
        loop {
            tokio::select! {
                end = &mut wait => return end,
                Ok(Some(event)) = events.message() => self.task_event(&event),
                grace = self.stops.next() => self.stop(plugin, id, grace, &mut stopping),
                Some(broken) = failures.recv() => {
                    let Broken { stream, source } = &broken;
                    self.warn(format!("{stream} can't be written ({source}): stopping the task"));
                    if self.broken.is_none() && self.stops.count == 0 {
                        self.broken = Some(broken);
                        let grace = self.stops.request();
                        self.stop(plugin, id, grace, &mut stopping);
                    }
                }
                Some(stopped) = stopping.join_next() => if let Ok(Err(status)) = stopped {
                    self.warn(chain(&HostError::call("StopTask")(status)));
                },
            }
        }
    }

    /// Requests the plugin to stop the task, and to kill it after `grace`.
    fn stop(
        &self,
        plugin: &Plugin,
        id: &str,
        grace: Duration,
        stopping: &mut JoinSet<Result<tonic::Response<StopTaskResponse>, tonic::Status>>,
    ) {
        let tenths = (grace.as_secs_f64() * 10.0).round();
        self.step(format!("stopping, kill timeout {} s", tenths / 10.0));
        let mut client = plugin.driver();
        let request = StopTaskRequest {
            task_id: id.to_owned(),
            timeout: grace.try_into().ok(),
            signal: self.run.task.kill_signal.clone(),
        };
        stopping.spawn(async move { client.stop_task(request).await });
    }

    /// Starts a new plugin in place of one that crashed, and recovers the task with it.
    async fn recover(
        &self,
        plugin: &mut Plugin,
        handle: TaskHandle,
    ) -> Result<Streaming<DriverTaskEvent>, HostError> {
        self.warn("the plugin died; starting another one to recover the task".to_owned());
        *plugin = prepare(self.run, self.report, std::future::pending()).await?;
        plugin.recover(handle).await?;
        let events = plugin.events().await?;
        self.step("recovered the task".to_owned());
        Ok(events)
    }

    /// Waits until all output of the task has been written.
    async fn drain(&self, copies: [JoinHandle<()>; 2], failures: &mut mpsc::Receiver<Broken>) {
        for copy in copies {
            let abort = copy.abort_handle();
            match timeout(DRAIN, copy).await {
                Ok(Ok(())) => {}
                Ok(Err(panicked)) => self.warn(panicked.to_string()),
                Err(_) => {
                    abort.abort();
                    self.warn(
                        "the task has exited, but its output is not read or is still held open; the rest of it is lost"
                            .to_owned(),
                    );
                }
            }
        }
        while let Ok(Broken { stream, source }) = failures.try_recv() {
            // A closed pipe at this point loses nothing that its reader wanted.
            if source.kind() != io::ErrorKind::BrokenPipe {
                self.warn(format!("{stream} can't be written: {source}"));
            }
        }
    }

    /// Destroys the task; if the plugin has crashed, with a new one. Succeeds if there is no such task.
    async fn destroy(&self, plugin: &mut Plugin, id: &str) {
        let Err(error) = plugin.destroy(id, true).await else {
            return;
        };
        let again = async {
            if timeout(DRAIN, plugin.gone()).await.is_err() {
                return Err(error);
            }
            *plugin = prepare(self.run, self.report, std::future::pending()).await?;
            plugin.destroy(id, true).await
        };
        if let Err(error) = again.await {
            self.warn(format!("the task may still exist: {}", chain(&error)));
        }
    }

    fn step(&self, text: String) {
        (self.report)(RunEvent::Step(text));
    }

    fn warn(&self, text: String) {
        (self.report)(RunEvent::Warning(text));
    }

    fn task_event(&self, event: &DriverTaskEvent) {
        let allocation = self.allocation;
        if event.alloc_id == allocation.id() && event.task_name == allocation.spec().task {
            (self.report)(RunEvent::Task(event.message.clone()));
        }
    }
}

/// Copies each piece of output as it arrives until the last writer closes, or until the output can't be written: the
/// task then gets SIGPIPE or EPIPE, as a process in a pipeline does.
async fn copy(
    stream: &'static str,
    from: pipe::Receiver,
    to: impl Write + Send + 'static,
    failed: mpsc::Sender<Broken>,
) {
    if let Err(source) = copy_all(from, to).await {
        drop(failed.try_send(Broken { stream, source }));
    }
}

async fn copy_all(mut from: pipe::Receiver, mut to: impl Write + Send + 'static) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let n = from.read(&mut buffer).await?;
        if n == 0 {
            return Ok(());
        }
        // Blocking, so that a slow reader of our output does not delay everything else.
        let written = tokio::task::spawn_blocking(move || {
            to.write_all(&buffer[..n])?;
            to.flush()?;
            Ok::<_, io::Error>((to, buffer))
        });
        (to, buffer) = written.await.map_err(io::Error::other)??;
    }
}

/// Formats an error with its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}
