//! Which Nomad agent a recorded start belongs to. Several agents may share a state directory, so a plugin must not kill a task
//! that its own agent does not ask for before it knows that no other agent will. An agent is identified by the directory that
//! holds its allocations, which no two agents share. Reads records and looks at directories; changes nothing. Runs in the plugin.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::task_dir::{LaunchSpec, TaskDir};

/// Which agent may ask for a start again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// No agent: the start never came up, the host has rebooted since, or its allocation has been removed.
    Nobody,
    /// The agent whose allocations are in this directory.
    Agent(PathBuf),
    /// An agent that the records do not name.
    Unknown,
}

/// The owner of a start, where `boot` is the id of the present boot.
pub fn of(task_dir: &TaskDir, boot: &str) -> Owner {
    let alloc_dir = match (task_dir.launch_spec(), task_dir.running()) {
        // A start without a running record can't be recovered.
        (_, Err(error)) if error.kind() == io::ErrorKind::NotFound => return Owner::Nobody,
        (Ok(launch_spec), _) if launch_spec.boot != boot => return Owner::Nobody,
        (Ok(launch_spec), _) => alloc_dir(&launch_spec),
        // RecoverTask accepts a running container without a launch spec.
        (Err(_), Ok(running)) if running.started.boot != boot => return Owner::Nobody,
        (Err(_), Ok(running)) => running.alloc_dir,
        (Err(_), Err(_)) => None,
    };
    let Some(alloc_dir) = alloc_dir else {
        return Owner::Unknown;
    };
    match alloc_dir.parent() {
        // If the parent is missing too, its file system may just not be mounted.
        Some(root) if root.is_dir() && is_missing(&alloc_dir) => Owner::Nobody,
        Some(root) => Owner::Agent(root.to_owned()),
        None => Owner::Unknown,
    }
}

/// The allocation directory. Launch specs of drivers that did not record it name the agent's log FIFOs, which are inside it.
fn alloc_dir(launch_spec: &LaunchSpec) -> Option<PathBuf> {
    let streams = [&launch_spec.stdout, &launch_spec.stderr];
    let derived = || streams.into_iter().flatten().find_map(|path| above(path));
    launch_spec.alloc_dir.clone().or_else(derived)
}

/// The allocation directory in `<alloc_dir>/alloc/logs/.<task>.stdout.fifo`.
fn above(fifo: &Path) -> Option<PathBuf> {
    let logs = fifo
        .parent()
        .filter(|_| fifo.extension().is_some_and(|end| end == "fifo"))?;
    let alloc_dir = logs.parent()?.parent()?;
    (logs == alloc_dir.join("alloc/logs") && alloc_dir.is_absolute()).then(|| alloc_dir.to_owned())
}

fn is_missing(path: &Path) -> bool {
    fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::super::task_dir::tests::{a_running, an_order};
    use super::*;
    use std::collections::BTreeMap;

    struct Start {
        temp: tempfile::TempDir,
        task_dir: TaskDir,
    }

    /// A running start of the boot `b` whose allocation exists.
    fn start(change: impl FnOnce(&mut LaunchSpec, &Path)) -> Start {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path().join("allocs");
        fs::create_dir_all(root.join("a")).unwrap();
        let task_dir = TaskDir::new(temp.path().join("records"));
        task_dir.create().unwrap();
        let mut launch_spec = an_order("a/t/1");
        change(&mut launch_spec, &root);
        task_dir
            .write_launch_spec(&launch_spec, &BTreeMap::new(), None)
            .unwrap();
        let mut running = a_running("a/t/1", "b");
        running.alloc_dir = launch_spec.alloc_dir;
        task_dir.write_running(&running).unwrap();
        Start { temp, task_dir }
    }

    fn recorded() -> Start {
        start(|launch_spec, root| launch_spec.alloc_dir = Some(root.join("a")))
    }

    impl Start {
        fn owner(&self) -> Owner {
            of(&self.task_dir, "b")
        }

        fn agent(&self) -> Owner {
            Owner::Agent(self.temp.path().join("allocs"))
        }
    }

    #[test]
    fn a_start_belongs_to_the_agent_with_its_directory_of_allocations() {
        let start = recorded();
        assert_eq!(start.owner(), start.agent());
        assert_eq!(of(&start.task_dir, "another boot"), Owner::Nobody);
        fs::write(start.task_dir.path().join("order"), "{").unwrap();
        assert_eq!(start.owner(), start.agent());
        assert_eq!(of(&start.task_dir, "another boot"), Owner::Nobody);
        fs::remove_file(start.task_dir.path().join("running")).unwrap();
        assert_eq!(start.owner(), Owner::Nobody);
    }

    #[test]
    fn a_removed_allocation_has_no_owner_and_an_unmounted_one_has() {
        let start = recorded();
        fs::remove_dir(start.temp.path().join("allocs/a")).unwrap();
        assert_eq!(start.owner(), Owner::Nobody);
        fs::remove_dir(start.temp.path().join("allocs")).unwrap();
        assert_eq!(start.owner(), start.agent());
    }

    #[test]
    fn an_older_launch_spec_names_its_agent_by_the_log_fifos() {
        let older = |stdout: Option<&str>, stderr: Option<&str>| {
            start(|launch_spec, root| {
                launch_spec.stdout = stdout.map(|path| root.join(path));
                launch_spec.stderr = stderr.map(|path| root.join(path));
            })
        };
        for (stdout, stderr) in [
            (Some("a/alloc/logs/.t.stdout.fifo"), None),
            (Some("/dev/null"), Some("a/alloc/logs/.t.stderr.fifo")),
        ] {
            let start = older(stdout, stderr);
            assert_eq!(start.owner(), start.agent());
        }
        for stdout in [
            None,
            Some("/dev/null"),
            Some("a/logs/.t.stdout.fifo"),
            Some("/x.fifo"),
        ] {
            assert_eq!(older(stdout, None).owner(), Owner::Unknown, "{stdout:?}");
        }
    }
}
