//! One allocation: what Nomad reports about its task, and what the task leaves on the host.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::Agent;
use crate::until;

/// One allocation with one task.
#[derive(Debug)]
pub struct Allocation<'a> {
    pub(super) agent: &'a Agent,
    pub(super) id: String,
    pub(super) job: String,
    pub(super) task: String,
}

/// An allocation without its agent, so that the agent can be killed and restarted in between.
#[derive(Debug, Clone)]
pub struct Name {
    id: String,
    job: String,
    task: String,
}

impl Allocation<'_> {
    /// Drops the reference to the agent.
    pub fn name(&self) -> Name {
        Name {
            id: self.id.clone(),
            job: self.job.clone(),
            task: self.task.clone(),
        }
    }
}

impl Name {
    /// The same allocation on its agent.
    pub fn on<'a>(&self, agent: &'a Agent) -> Allocation<'a> {
        Allocation {
            agent,
            id: self.id.clone(),
            job: self.job.clone(),
            task: self.task.clone(),
        }
    }
}

impl Allocation<'_> {
    /// What the Nomad client reports about the task.
    pub fn task(&self) -> Value {
        let path = format!("/v1/allocation/{}", self.id);
        self.agent
            .call("GET", &path, None)
            .map_or(Value::Null, |mut reported| {
                reported["TaskStates"][&self.task].take()
            })
    }

    /// The name of the task.
    pub fn task_name(&self) -> &str {
        &self.task
    }

    /// The task's directory on the host.
    pub fn dir(&self) -> PathBuf {
        self.agent
            .join("data/alloc")
            .join(&self.id)
            .join(&self.task)
    }

    /// Everything that the task has printed so far on `stdout` or `stderr`.
    pub fn output(&self, stream: &str) -> String {
        let logs = self
            .agent
            .join("data/alloc")
            .join(&self.id)
            .join("alloc/logs");
        (0..)
            .map(|number| fs::read(logs.join(format!("{}.{stream}.{number}", self.task))))
            .map_while(Result::ok)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .collect()
    }

    /// Waits until stdout contains this text and returns all of stdout.
    pub fn printed(&self, text: &str) -> String {
        self.explain(|| {
            until(text, || {
                Some(self.output("stdout")).filter(|all| all.contains(text))
            })
        })
    }

    /// Waits until the task is dead; returns the exit codes of all its runs, in order.
    pub fn dead(&self) -> Vec<i64> {
        let task = self.explain(|| {
            until("the task's end", || {
                Some(self.task()).filter(|task| task["State"] == "dead")
            })
        });
        exits(&task)
    }

    /// How many times the task was started.
    pub fn starts(&self) -> usize {
        let task = self.task();
        let events = task["Events"].as_array().cloned().unwrap_or_default();
        let started = |event: &&Value| event["Type"] == "Started";
        events.iter().filter(started).count()
    }

    /// The task's last event of this type.
    pub fn event(&self, kind: &str) -> Option<Value> {
        let task = self.task();
        let events = task["Events"].as_array()?;
        events.iter().rfind(|event| event["Type"] == kind).cloned()
    }

    /// Stops the job and waits for the task's exit.
    pub fn stop(&self) -> Vec<i64> {
        let path = format!("/v1/job/{}", self.job);
        self.agent.call("DELETE", &path, None).expect("a stop");
        self.dead()
    }

    /// Waits until the agent has seen the start. The command may be running before that.
    pub fn running(&self) {
        until("the agent's word of the start", || {
            (self.task()["State"] == "running").then_some(())
        });
    }

    /// `nomad alloc signal`, which the agent rejects until it has seen the start.
    pub fn signal(&self, signal: &str) {
        self.running();
        let path = format!("/v1/client/allocation/{}/signal", self.id);
        let request = json!({ "Signal": signal, "Task": self.task });
        self.agent
            .call("PUT", &path, Some(&request))
            .expect("the signal is sent");
    }

    /// The pid of the container's PID 1 on the host.
    pub fn leader(&self) -> i64 {
        self.process("/started/leader/pid")
    }

    /// The pid of a process of the task, by its JSON pointer in the record of the start.
    pub fn process(&self, place: &str) -> i64 {
        let state = fs::read_dir(self.agent.state_dir()).expect("the state directory");
        let mut found = state.flatten().filter_map(|entry| {
            let record = fs::read(entry.path().join("running")).ok()?;
            let record: Value = serde_json::from_slice(&record).ok()?;
            let id = record["started"]["id"].as_str()?;
            id.starts_with(&self.id)
                .then(|| record.pointer(place)?.as_i64())?
        });
        found.next().expect("a running container of the task")
    }

    /// Adds what Nomad knows to the panic of a failed wait.
    fn explain<T>(&self, wait: impl FnOnce() -> T) -> T {
        match std::panic::catch_unwind(std::panic::AssertUnwindSafe(wait)) {
            Ok(found) => found,
            Err(panic) => {
                let reason = panic.downcast_ref::<String>().cloned().unwrap_or_default();
                let task = self.task();
                let events: Vec<_> = task["Events"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .map(|event| format!("{}: {}", event["Type"], event["DisplayMessage"]))
                    .collect();
                panic!(
                    "{reason}\ntask {}: {}\n{}\nstdout: {}\nstderr: {}\nagent's log:\n{}",
                    self.task,
                    task["State"],
                    events.join("\n"),
                    self.output("stdout"),
                    self.output("stderr"),
                    self.agent.log_tail()
                );
            }
        }
    }
}

fn exits(task: &Value) -> Vec<i64> {
    let events = task["Events"].as_array().cloned().unwrap_or_default();
    events
        .iter()
        .filter(|event| event["Type"] == "Terminated")
        .filter_map(|event| event["ExitCode"].as_i64())
        .collect()
}
