//! Cleanup of a start without a supervisor: kills its processes and releases the resources in its launch spec. It kills and
//! releases only what the records of that start name, and may be repeated at any time. Runs in the plugin; the supervisor process
//! uses parts of it at the container's exit.

use std::io;
use std::time::Duration;

use crate::cgroup::{Group, Layout};
use crate::lease::{Context, UidRange, release_all};
use crate::signal::Signal;
use crate::state::task_dir::{LaunchSpec, Running, TaskDir, is_of_later_form};
use crate::sys::kernel;
use crate::sys::process::ProcessHandle;

mod kill;
pub mod orphans;

use kill::kill_with_descendants;
pub use kill::{kill, kill_descendants, kill_group};

/// Kills every process that belongs to the start in this task directory and releases what it held on the host. The directory
/// itself stays. The error names what is left.
pub fn kill_and_release(task_dir: &TaskDir) -> io::Result<()> {
    let boot = kernel::boot_id()?;
    let running = task_dir.running().ok();
    // After a reboot the same pids may belong to any process, even with the same start time.
    if let Some(running) = running
        .as_ref()
        .filter(|running| running.started.boot == boot)
    {
        // The leader first: everything in its pid namespace dies with it, and systemd-nspawn cleans up after itself when it sees
        // the leader exit, unless it has been SIGSTOPped.
        kill(running.started.leader);
        if let Some(group) = &running.started.cgroup {
            Group::new(group).thaw();
        }
        let watched = ProcessHandle::open_checked(running.nspawn);
        if let Ok(nspawn) = &watched {
            let _ = nspawn.signal(Signal::CONT);
        }
        match watched.map(|nspawn| nspawn.wait(Duration::from_secs(2))) {
            // Without this mark its locks are looked at once more, which is harmless; stopping here would leave processes.
            Ok(true) => drop(task_dir.write_released()),
            _ => kill(running.nspawn),
        }
    } else if let Ok(nspawn) = task_dir.nspawn_pid()
        && task_dir
            .launch_spec()
            .map_or(true, |launch_spec| launch_spec.boot == boot)
    {
        kill_with_descendants(nspawn);
    }
    // Nothing reads them any more, and what follows may fail and leave the directory.
    task_dir.discard_secrets();
    let launch_spec = match task_dir.launch_spec() {
        Ok(launch_spec) => launch_spec,
        // The plugin was killed while it prepared the start.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return remove_unrecorded_range(task_dir);
        }
        // Its supervisor has released everything.
        Err(error) if is_of_later_form(&error) && task_dir.is_freed() => return Ok(()),
        // Its resources can't be known, but its processes can: no other cgroup has this name.
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            let leaf = task_dir.path().file_name().and_then(|name| name.to_str());
            let leaf = leaf.filter(|leaf| TaskDir::is_name(leaf)).ok_or(error)?;
            let groups = Layout::of_this_host().find(leaf);
            groups
                .iter()
                .try_for_each(|group| kill_group(group, true))?;
            return remove_unrecorded_range(task_dir);
        }
        Err(error) => return Err(error),
    };
    if let Some(group) = launch_spec.cgroup().filter(|_| launch_spec.boot == boot) {
        kill_group(group, false)?;
    }
    if task_dir.is_freed() {
        return Ok(());
    }
    release(task_dir, &launch_spec, running.as_ref())
}

/// Removes what a start without a readable launch spec can have acquired: the lock of a range of ids, which is picked before the launch spec is written.
fn remove_unrecorded_range(task_dir: &TaskDir) -> io::Result<()> {
    let Ok(directory) = task_dir.path().metadata() else {
        return Ok(());
    };
    // Not every file system has the time of creation.
    let begun_at = directory.created().or_else(|_| directory.modified())?;
    UidRange::remove_unrecorded(begun_at)
}

/// Releases what the host holds for a container whose processes have been killed. A resource that can't be released does not keep the
/// others from being released; the error names all of those and has the kind of the first one.
pub fn release(
    task_dir: &TaskDir,
    launch_spec: &LaunchSpec,
    running: Option<&Running>,
) -> io::Result<()> {
    let context = Context {
        task_dir: task_dir.path(),
        skeleton: &task_dir.skeleton(),
        ordered_at: task_dir.ordered_at().ok(),
        machine: &launch_spec.machine,
        first_uid: running.and_then(|running| running.uids),
        copy: running.and_then(|running| running.copy.as_deref()),
        same_boot: kernel::boot_id().is_ok_and(|boot| boot == launch_spec.boot),
        by_itself: matches!(task_dir.exit(), Ok(Some(exit)) if exit.error.is_none()),
        killed: !task_dir.has_released(),
    };
    let errors = release_all(&launch_spec.resources, &context);
    let Some(first) = errors.first() else {
        // Without this mark they are released once more, which is harmless.
        let _ = task_dir.write_freed();
        return Ok(());
    };
    let kind = first.source.kind();
    let texts: Vec<_> = errors.iter().map(ToString::to_string).collect();
    Err(io::Error::new(kind, texts.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{Cgroup, Resource};
    use crate::state::task_dir::tests::an_order;
    use std::collections::BTreeMap;
    use std::fs;

    fn ordered(resources: Vec<Resource>) -> (tempfile::TempDir, TaskDir, LaunchSpec) {
        let temp = tempfile::tempdir().unwrap();
        let task_dir = TaskDir::new(temp.path().join("records"));
        task_dir.create().unwrap();
        let launch_spec = LaunchSpec {
            resources,
            ..an_order("a/t/1")
        };
        task_dir
            .write_launch_spec(&launch_spec, &BTreeMap::new(), None)
            .unwrap();
        (temp, task_dir, launch_spec)
    }

    fn newer() -> Resource {
        Resource::Unknown(serde_json::json!({"kind": "address"}))
    }

    #[test]
    fn an_unreleased_resource_is_an_error_until_it_is_gone() {
        let temp = tempfile::tempdir().unwrap();
        let group = temp.path().join("group");
        fs::create_dir(&group).unwrap();
        fs::write(group.join("file"), "").unwrap();
        let resource = Resource::Cgroup(Cgroup {
            group: group.clone(),
        });
        let (_records, task_dir, launch_spec) = ordered(vec![resource, newer()]);
        let error = release(&task_dir, &launch_spec, None).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("address: acquired by a newer driver") && text.contains("cgroup: "),
            "{text}"
        );
        assert!(!task_dir.is_freed());
    }

    #[test]
    fn secrets_are_removed_even_if_a_resource_stays() {
        let (_temp, task_dir, _) = ordered(vec![newer()]);
        let environment = task_dir.path().join("environment");
        assert!(environment.exists());
        kill_and_release(&task_dir).unwrap_err();
        assert!(!environment.exists());
    }

    /// Otherwise every task of the newer driver would stay forever after a downgrade. Its supervisor knows the kind and has
    /// released it.
    #[test]
    fn resources_released_by_the_supervisor_are_not_released_again() {
        let (_temp, task_dir, _) = ordered(vec![newer()]);
        kill_and_release(&task_dir).unwrap_err();
        task_dir.write_freed().unwrap();
        kill_and_release(&task_dir).unwrap();
    }
}
