//! A further command in the task: the one that runs when the victim is killed, and those after it.

use dev_agent::ExecSession;

use super::*;

/// The exit code of a command that runs after the kill.
const LATER: i32 = 7;

/// A command that runs, with another process in a session of its own. Both ignore the signals that would end them.
pub(super) struct Command {
    session: ExecSession,
    /// A word in the command lines of both processes.
    mark: String,
}

impl<W: World> Game<'_, W> {
    pub(super) async fn run_command(&mut self) {
        let mark = format!("command of {}", self.id());
        let script = format!(
            "trap '' HUP INT TERM; setsid /bin/sh -c 'sleep 1000; :' '{mark}' & echo up; wait"
        );
        let (id, command) = (self.id(), ["/bin/sh", "-c", &script]);
        let session = within(
            "ExecTaskStreaming",
            self.line.exec_streaming(&id, &command, None),
        );
        let mut session = session.await.unwrap();
        let mut printed = Vec::new();
        while printed != b"up\n" {
            let response = within("the command's first word", session.next()).await;
            let response = response.unwrap().expect("it has ended");
            printed.extend(response.stdout.unwrap_or_default().data);
        }
        let both = || (marked(&mark) == 2).then_some(());
        eventually("both processes of the command", both).await;
        let started = self.started.as_ref().unwrap();
        let groups = groups_of_sessions(started);
        assert_eq!(groups.is_empty(), group_of(started).is_none(), "{groups:?}");
        self.command = Some(Command { session, mark });
    }

    /// The command has ended with everything that it has started, before anything else is done to the task.
    pub(super) async fn command_has_ended(&mut self) {
        let Some(Command { session, mark }) = self.command.take() else {
            return;
        };
        match self.cell.victim {
            Victim::Agent => drop(session),
            victim => {
                let answer = within("the end of the session", session.finish()).await;
                let error = answer.unwrap_err().to_string();
                let is_told = error.contains("the task has ended");
                assert_eq!(is_told, victim != Victim::Plugin, "{error}");
            }
        }
        let no_process = || (marked(&mark) == 0).then_some(());
        eventually("the end of the command's processes", no_process).await;
        let started = self.started.as_ref().unwrap();
        let no_group = || groups_of_sessions(started).is_empty().then_some(());
        eventually("the removal of the session's cgroup", no_group).await;
    }

    /// Another command runs in a task that still runs.
    pub(super) async fn runs_commands(&self) {
        if self.cell.step == Step::Exec {
            let output = self.later_command().await.unwrap();
            assert_eq!((output.code, output.signal), (LATER, 0), "{output:?}");
        }
    }

    /// A task that has ended refuses a command.
    pub(super) async fn runs_no_command(&self) {
        if self.cell.step == Step::Exec {
            let error = self.later_command().await.unwrap_err().to_string();
            assert!(error.contains("the task is not running"), "{error}");
        }
    }

    async fn later_command(&self) -> Result<dev_agent::ExecOutput, HostError> {
        let (id, script) = (self.id(), format!("exit {LATER}"));
        let command = ["/bin/sh", "-c", &script];
        within("ExecTask", self.line.exec(&id, &command, None)).await
    }
}

/// How many processes of this host have these words in their command line.
fn marked(words: &str) -> usize {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = entries.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    lines
        .filter(|line| String::from_utf8_lossy(line).contains(words))
        .count()
}

/// The cgroup of a task, if it was started with one.
fn group_of(started: &StartedTask) -> Option<PathBuf> {
    let state: serde_json::Value = serde_json::from_slice(&started.handle.driver_state).unwrap();
    state["started"]["cgroup"].as_str().map(PathBuf::from)
}

/// The cgroups of sessions in the cgroup of a task, in every hierarchy.
fn groups_of_sessions(started: &StartedTask) -> Vec<PathBuf> {
    let name = group_of(started);
    let Some(name) = name.as_deref().and_then(Path::file_name) else {
        return Vec::new();
    };
    let mut pending = Layout::of_this_host().find(name.to_str().unwrap());
    let mut found = Vec::new();
    while let Some(group) = pending.pop() {
        let entries = std::fs::read_dir(group).into_iter().flatten().flatten();
        let below = entries
            .map(|entry| entry.path())
            .filter(|path| path.is_dir());
        let (sessions, others): (Vec<_>, Vec<_>) = below.partition(|path| {
            let name = path.file_name().unwrap().to_string_lossy();
            name.starts_with("nomad-exec-")
        });
        found.extend(sessions);
        pending.extend(others);
    }
    found
}
