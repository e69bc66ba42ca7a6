//! Interprets a job file for one run of one task. Uses everything that the start of a task depends on; what only a
//! cluster can do is reported as ignored if the task works without it, and rejected otherwise.

use std::collections::BTreeMap;

use job_values::signal::Signal;
use serde_json::Value;

use super::read::{config, integer, label, nested, string, strings, time};
use super::tree::{Entry, JobError, Thing};
use super::verdict::{GROUP, JOB, RESOURCES, SET_BY_SERVER, TASK, Verdict};
use super::{hcl, json};
use crate::TaskSpec;

/// The driver whose tasks can be run.
const DRIVER: &str = "nspawn";

/// A parsed job file.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    id: String,
    name: Option<String>,
    region: Option<String>,
    namespace: Option<String>,
    datacenter: Option<String>,
    meta: BTreeMap<String, String>,
    notes: Vec<Note>,
    groups: Vec<Group>,
}

#[derive(Debug, Clone, Default, PartialEq)]
struct Group {
    name: String,
    meta: BTreeMap<String, String>,
    notes: Vec<Note>,
    tasks: Vec<Task>,
}

#[derive(Debug, Clone, PartialEq)]
struct Task {
    name: String,
    driver: String,
    line: Option<usize>,
    notes: Vec<Note>,
    meta: BTreeMap<String, String>,
    spec: TaskSpec,
}

/// An entry that is not used.
#[derive(Debug, Clone, PartialEq)]
struct Note {
    what: String,
    line: Option<usize>,
    refused: Option<&'static str>,
}

/// A task that is ready to run, and the parts of its job that are ignored.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Picked {
    /// The task.
    pub(super) spec: TaskSpec,
    /// What is ignored, with lines: `group.restart (line 7)`.
    pub(super) ignored: Vec<String>,
}

impl Job {
    /// Parses a job file in either notation: a file that starts with `{` is JSON.
    pub fn read(source: &str) -> Result<Self, JobError> {
        let entries = if source.trim_start().starts_with('{') {
            json::read(source)?
        } else {
            hcl::read(source)?
        };
        let mut job = None;
        for entry in &entries {
            match &entry.thing {
                Thing::Block { labels, body } if entry.name == "job" && job.is_none() => {
                    job = Some(Self::from_entries(label(entry, labels)?, body)?);
                }
                _ if entry.name == "job" => {
                    return Err(JobError::new(entry.line, "a file contains exactly one job"));
                }
                _ => return Err(unknown(entry, "outside of the job")),
            }
        }
        job.ok_or_else(|| JobError::new(None, "not a job: there is no job block"))
    }

    fn from_entries(id: String, entries: &[Entry]) -> Result<Self, JobError> {
        let mut job = Self {
            id,
            name: None,
            region: None,
            namespace: None,
            datacenter: None,
            meta: BTreeMap::new(),
            notes: Vec::new(),
            groups: Vec::new(),
        };
        for entry in entries {
            match (entry.name.as_str(), &entry.thing) {
                ("id", _) => job.id = string(entry)?,
                ("name", _) => job.name = Some(string(entry)?),
                ("region", _) => job.region = Some(string(entry)?),
                ("namespace", _) => job.namespace = Some(string(entry)?),
                ("datacenters", Thing::Value { value, .. }) => {
                    let first = value.get(0).and_then(Value::as_str);
                    job.datacenter = first.filter(|name| !name.contains('*')).map(str::to_owned);
                }
                ("meta", _) => job.meta.extend(strings(entry)?),
                ("group", Thing::Block { labels, body }) => {
                    job.groups
                        .push(Group::from_entries(label(entry, labels)?, body)?);
                }
                // Nomad makes a group of its own for a task directly in the job.
                ("task", Thing::Block { labels, body }) => {
                    let task = Task::from_entries(label(entry, labels)?, entry.line, body)?;
                    job.groups.push(Group {
                        name: task.name.clone(),
                        tasks: vec![task],
                        ..Group::default()
                    });
                }
                _ => note(entry, "job", JOB, &mut job.notes)?,
            }
        }
        Ok(job)
    }

    /// All its tasks of the driver, also those that can't be run here.
    pub fn tasks(&self) -> impl Iterator<Item = &TaskSpec> {
        let tasks = self.groups.iter().flat_map(|group| &group.tasks);
        tasks
            .filter(|task| task.driver == DRIVER)
            .map(|task| &task.spec)
    }

    /// Selects the task to run: the named one, as `TASK` or `GROUP/TASK`, or the only one with this driver. `meta`
    /// overrides the metadata of the file, and replaces the metadata of the client node, which does not exist here.
    pub(super) fn pick(
        &self,
        wanted: Option<&str>,
        meta: &BTreeMap<String, String>,
    ) -> Result<Picked, JobError> {
        let all = || {
            self.groups
                .iter()
                .flat_map(|group| group.tasks.iter().map(move |task| (group, task)))
        };
        let full = |(group, task): &(&Group, &Task)| format!("{}/{}", group.name, task.name);
        let list =
            |tasks: &[(&Group, &Task)]| tasks.iter().map(full).collect::<Vec<_>>().join(", ");
        let candidates: Vec<_> = match wanted {
            Some(wanted) => all()
                .filter(|pair| pair.1.name == wanted || full(pair) == wanted)
                .collect(),
            None => all().filter(|(_, task)| task.driver == DRIVER).collect(),
        };
        let (group, task) = match candidates.as_slice() {
            [one] => *one,
            [] => {
                let all: Vec<_> = all().collect();
                let reason = match wanted {
                    Some(wanted) => {
                        format!("there is no task {wanted:?}; the job has {}", list(&all))
                    }
                    None => format!(
                        "no task uses the driver {DRIVER}; the job has {}",
                        list(&all)
                    ),
                };
                return Err(JobError::new(None, reason));
            }
            several => {
                let reason = format!("use --task with one of {}", list(several));
                return Err(JobError::new(None, reason));
            }
        };
        if task.driver != DRIVER {
            let reason = format!(
                "task {}: the driver {:?} is not {DRIVER}",
                full(&(group, task)),
                task.driver
            );
            return Err(JobError::new(task.line, reason));
        }
        let notes = || self.notes.iter().chain(&group.notes).chain(&task.notes);
        if let Some((note, why)) = notes().find_map(|note| Some((note, note.refused?))) {
            let reason = format!("`run` does not support {}: {why}", note.what);
            return Err(JobError::new(note.line, reason));
        }
        let mut ignored: Vec<_> = notes().map(Note::to_string).collect();
        let others = all().filter(|other| !std::ptr::eq(other.1, task));
        ignored.extend(others.map(|other| format!("task {}", full(&other))));
        Ok(Picked {
            spec: self.spec(group, task, meta),
            ignored,
        })
    }

    fn spec(&self, group: &Group, task: &Task, meta: &BTreeMap<String, String>) -> TaskSpec {
        let mut merged = self.meta.clone();
        for level in [&group.meta, &task.meta, meta] {
            merged.extend(level.clone());
        }
        let or = |value: &Option<String>, default: &str| {
            value.clone().unwrap_or_else(|| default.to_owned())
        };
        TaskSpec {
            job_id: self.id.clone(),
            job_name: or(&self.name, &self.id),
            namespace: or(&self.namespace, "default"),
            region: or(&self.region, "global"),
            datacenter: or(&self.datacenter, "dc1"),
            group: group.name.clone(),
            meta: merged,
            node: meta
                .iter()
                .map(|(key, value)| (format!("meta.{key}"), value.clone()))
                .collect(),
            ..task.spec.clone()
        }
    }
}

impl Group {
    fn from_entries(name: String, entries: &[Entry]) -> Result<Self, JobError> {
        let mut group = Self {
            name,
            ..Self::default()
        };
        for entry in entries {
            match (entry.name.as_str(), &entry.thing) {
                ("name", _) => group.name = string(entry)?,
                ("meta", _) => group.meta.extend(strings(entry)?),
                ("count", _) if integer(entry)? == 1 => {}
                ("count", _) => group.notes.push(Note::new(entry, "group", None)),
                ("network", _) => group.notes.extend(network(entry)),
                ("task", Thing::Block { labels, body }) => {
                    group
                        .tasks
                        .push(Task::from_entries(label(entry, labels)?, entry.line, body)?);
                }
                _ => note(entry, "group", GROUP, &mut group.notes)?,
            }
        }
        Ok(group)
    }
}

impl Task {
    fn from_entries(
        name: String,
        line: Option<usize>,
        entries: &[Entry],
    ) -> Result<Self, JobError> {
        // Nomad's own rule, because the name is a directory beside `alloc`.
        if name.is_empty()
            || name == "alloc"
            || name.starts_with('.')
            || name.contains(['/', '\\', '\0'])
        {
            return Err(JobError::new(
                line,
                format!("{name:?} is not a valid task name"),
            ));
        }
        let mut task = Self {
            spec: TaskSpec::new(&name, Value::Object(serde_json::Map::new())),
            name,
            driver: String::new(),
            line,
            notes: Vec::new(),
            meta: BTreeMap::new(),
        };
        let mut configured = false;
        for entry in entries {
            let spec = &mut task.spec;
            match (entry.name.as_str(), &entry.thing) {
                // The name was already taken from the label.
                ("name", _) => {}
                ("driver", _) => task.driver = string(entry)?,
                ("config", _) if configured => {
                    return Err(JobError::new(entry.line, "config is set twice"));
                }
                ("config", thing) => {
                    spec.config = config(thing)
                        .ok_or_else(|| JobError::new(entry.line, "config is not a block"))?;
                    configured = true;
                }
                ("env", _) => spec.env.extend(strings(entry)?),
                ("meta", _) => task.meta.extend(strings(entry)?),
                ("user", _) => spec.user = string(entry)?,
                ("kill_timeout", _) => spec.kill_timeout = time(entry)?,
                ("kill_signal", _) => {
                    spec.kill_signal = string(entry)?;
                    let known: Result<Signal, _> = spec.kill_signal.parse();
                    known.map_err(|error| {
                        JobError::new(entry.line, format!("kill_signal: {error}"))
                    })?;
                }
                ("resources", _) => resources(entry, spec, &mut task.notes)?,
                _ => note(entry, "task", TASK, &mut task.notes)?,
            }
        }
        Ok(task)
    }
}

impl Note {
    fn new(entry: &Entry, level: &str, refused: Option<&'static str>) -> Self {
        Self {
            what: format!("{level}.{}", entry.name),
            line: entry.line,
            refused,
        }
    }
}

impl std::fmt::Display for Note {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.what)?;
        self.line.map_or(Ok(()), |line| write!(f, " (line {line})"))
    }
}

fn note(
    entry: &Entry,
    level: &str,
    verdicts: &[(&str, Verdict)],
    notes: &mut Vec<Note>,
) -> Result<(), JobError> {
    let verdict = verdicts.iter().find(|(name, _)| *name == entry.name);
    match verdict.map(|(_, verdict)| verdict) {
        Some(Verdict::Quiet) => {}
        Some(Verdict::Ignored) => notes.push(Note::new(entry, level, None)),
        Some(Verdict::Refused(why)) => notes.push(Note::new(entry, level, Some(why))),
        // Unknown JSON keys are tolerated if the API may have added them: the API grows, and a server adds keys to a
        // job that were never in its file. HCL is written by hand, so there an unknown key is a mistake.
        None if entry.line.is_none() => {
            if !SET_BY_SERVER.contains(&entry.name.as_str()) {
                notes.push(Note::new(entry, level, None));
            }
        }
        None => return Err(unknown(entry, &format!("in a {level}"))),
    }
    Ok(())
}

fn unknown(entry: &Entry, place: &str) -> JobError {
    JobError::new(entry.line, format!("{:?} is not known {place}", entry.name))
}

/// A group's network. The host's network without ports is what a task has anyway.
fn network(entry: &Entry) -> Option<Note> {
    let (mode, ports) = match &entry.thing {
        Thing::Block { body, .. } => {
            let mode = body.iter().find(|entry| entry.name == "mode");
            let mode = mode.and_then(|entry| string(entry).ok());
            (mode, body.iter().any(|entry| entry.name == "port"))
        }
        Thing::Value { value, .. } => {
            let networks: Vec<_> = value.as_array().into_iter().flatten().collect();
            let mode = networks
                .iter()
                .find_map(|network| network.get("Mode")?.as_str());
            let ports = |network: &&Value| {
                ["DynamicPorts", "ReservedPorts"].iter().any(|key| {
                    network
                        .get(key)
                        .and_then(Value::as_array)
                        .is_some_and(|list| !list.is_empty())
                })
            };
            (mode.map(str::to_owned), networks.iter().any(ports))
        }
    };
    let why = match mode.as_deref() {
        None | Some("" | "host") if ports => "no ports are allocated",
        None | Some("" | "host") => return None,
        Some(_) => "network namespaces are not created: leave mode unset, or set it to host",
    };
    Some(Note::new(entry, "group", Some(why)))
}

fn resources(entry: &Entry, spec: &mut TaskSpec, notes: &mut Vec<Note>) -> Result<(), JobError> {
    let mut shared = false;
    for entry in &nested(entry)? {
        match entry.name.as_str() {
            "cpu" => {
                spec.cpu_mhz = integer(entry)?;
                shared = spec.cpu_mhz != 0;
            }
            "cores" => {
                let reason = "resources: cores is not a number of processors";
                let wrong = |_| JobError::new(entry.line, reason);
                spec.cores = integer(entry)?.try_into().map_err(wrong)?;
            }
            "memory" => spec.memory_mb = integer(entry)?,
            "memory_max" => spec.memory_max_mb = integer(entry)?,
            _ => note(entry, "resources", RESOURCES, notes)?,
        }
    }
    if !(0..=i64::from(u32::MAX)).contains(&spec.memory_mb)
        || !(-1..=i64::from(u32::MAX)).contains(&spec.memory_max_mb)
    {
        return Err(JobError::new(
            entry.line,
            "resources: memory is out of range",
        ));
    }
    if shared && spec.cores > 0 {
        let reason = "resources: a task has either cpu or cores, not both";
        return Err(JobError::new(entry.line, reason));
    }
    Ok(())
}

#[cfg(test)]
#[path = "job_tests.rs"]
mod tests;
