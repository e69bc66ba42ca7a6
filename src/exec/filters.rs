//! The seccomp filters of a task, which every session of it gets. They are known if the container was started with captured ones. Reading
//! others interrupts the container's first process, so they are kept as long as the number of its filters is the same: none can be replaced
//! or removed. Where the number at the start is known, those that the task's command has installed itself since then are left out: a command
//! that restricts itself, such as a server that gives up execve(2), would otherwise restrict every shell.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nspawn_init::Filter;

use super::ExecError;
use super::leader::Seccomp;
use crate::container::Process;
use crate::seccomp;
use crate::sys::process::ProcessHandle;
use crate::sys::procfs::status_field;

/// The filters that have been read, by the first process of the container. Equal lists are kept once: all containers of an image have the
/// same.
#[derive(Debug, Default)]
pub struct FilterCache {
    entries: Mutex<HashMap<Process, Entry>>,
    /// Held while filters are read, by pid: a process can have only one tracer, and one that does not stop delays few others.
    reading: [Mutex<()>; 32],
}

#[derive(Debug)]
struct Entry {
    /// How many filters the process had; `None` before Linux 5.9, which does not say.
    count: Option<u32>,
    filters: Arc<[Filter]>,
}

impl FilterCache {
    /// The filters of a container's first process, the oldest first. Blocks, for at most five seconds. If they can't be read, there are none
    /// with `unfiltered` or on a host that is itself a container, and otherwise that is an [`ExecError::Filters`].
    pub(super) fn get(
        &self,
        leader: &ProcessHandle,
        seccomp: Seccomp,
        unfiltered: bool,
    ) -> Result<Arc<[Filter]>, ExecError> {
        let Seccomp::Filters(count) = seccomp else {
            return Ok(Arc::new([]));
        };
        if let Some(known) = self.known(leader.process(), count) {
            return Ok(known);
        }
        let turn = leader.process().pid.unsigned_abs() as usize % self.reading.len();
        let turn = self.reading[turn].lock();
        let _turn = turn.unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = self.known(leader.process(), count) {
            return Ok(known);
        }
        match seccomp::read(leader) {
            Ok(filters) => {
                let filters = oldest(filters, count).map_err(ExecError::Filters)?;
                Ok(self.keep((leader.process(), count), &filters))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(ExecError::NotRunning),
            Err(error) if is_confined() && error.kind() == io::ErrorKind::PermissionDenied => {
                warn(&error);
                let none: Arc<[Filter]> = Arc::new([]);
                let filters = Arc::clone(&none);
                self.lock()
                    .insert(leader.process(), Entry { count, filters });
                Ok(none)
            }
            Err(error) if unfiltered => {
                warn(&error);
                Ok(Arc::new([]))
            }
            Err(error) => Err(ExecError::Filters(error)),
        }
    }

    /// Forgets those of a container that has ended.
    pub fn remove(&self, leader: Process) {
        self.lock().remove(&leader);
    }

    fn known(&self, leader: Process, count: Option<u32>) -> Option<Arc<[Filter]>> {
        let entries = self.lock();
        let entry = entries.get(&leader).filter(|entry| entry.count == count)?;
        Some(Arc::clone(&entry.filters))
    }

    /// Keeps those of a container's first process, and how many it has.
    pub fn keep(
        &self,
        (leader, count): (Process, Option<u32>),
        filters: &[Filter],
    ) -> Arc<[Filter]> {
        let mut entries = self.lock();
        let mut kept = entries.values().map(|entry| &entry.filters);
        let filters = match kept.find(|kept| ***kept == *filters) {
            Some(equal) => Arc::clone(equal),
            None => filters.into(),
        };
        let entry = Entry {
            count,
            filters: Arc::clone(&filters),
        };
        entries.insert(leader, entry);
        filters
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Process, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether this process has seccomp filters itself: the agent runs in a container. The kernel shows filters to no process there, so what
/// those of a task restrict beyond those of the agent, which hold for tasks and commands alike, is out of reach on such a host.
fn is_confined() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status_field(&status, "Seccomp").is_some_and(|mode| mode != "0")
}

/// So many of them, the oldest first; all if the number is not known.
fn oldest(mut filters: Vec<Filter>, count: Option<u32>) -> io::Result<Vec<Filter>> {
    let Some(count) = count else {
        return Ok(filters);
    };
    let wanted = usize::try_from(count).unwrap_or(usize::MAX);
    if filters.len() < wanted {
        let text = format!("{} of {count} filters are shown", filters.len());
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    filters.truncate(wanted);
    Ok(filters)
}

fn warn(error: &io::Error) {
    tracing::warn!(
        %error,
        "commands run without the seccomp filters of their task, which can't be read, and with those of the agent, if it has any"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: i32) -> Process {
        Process { pid, start: 7 }
    }

    fn filters(constants: &[u32]) -> Vec<Filter> {
        let one = |constant: &u32| Filter(vec![(6, 0, 0, *constant)]);
        constants.iter().map(one).collect()
    }

    #[test]
    fn equal_filters_are_kept_once() {
        let cache = FilterCache::default();
        let first = cache.keep((process(1), Some(2)), &filters(&[1, 2]));
        let second = cache.keep((process(2), Some(2)), &filters(&[1, 2]));
        let other = cache.keep((process(3), None), &filters(&[2, 1]));
        assert!(Arc::ptr_eq(&first, &second) && !Arc::ptr_eq(&first, &other));
        assert_eq!(cache.known(process(3), None), Some(other));
        cache.remove(process(1));
        assert_eq!(cache.known(process(1), Some(2)), None);
        assert_eq!(cache.known(process(2), Some(2)), Some(first));
    }

    #[test]
    fn kept_filters_are_those_of_a_process_that_has_installed_no_more() {
        let cache = FilterCache::default();
        cache.keep((process(1), Some(2)), &filters(&[1, 2]));
        assert_eq!(cache.known(process(1), Some(3)), None);
        let reused = Process { pid: 1, start: 8 };
        assert_eq!(cache.known(reused, Some(2)), None);
        assert!(cache.known(process(1), Some(2)).is_some());
    }

    #[test]
    fn filters_that_were_installed_later_are_left_out() {
        let all = || filters(&[1, 2, 3]);
        assert_eq!(oldest(all(), Some(2)).unwrap(), filters(&[1, 2]));
        for count in [Some(3), None] {
            assert_eq!(oldest(all(), count).unwrap(), all());
        }
        let missing = oldest(all(), Some(4)).unwrap_err();
        assert_eq!(missing.to_string(), "3 of 4 filters are shown");
    }

    /// This process can't trace itself, so reading is refused everywhere.
    #[test]
    fn without_its_filters_a_command_runs_only_if_the_operator_allows_it() {
        let me = ProcessHandle::open(nix::unistd::getpid().as_raw()).unwrap();
        let cache = FilterCache::default();
        let some = Seccomp::Filters(Some(1));
        if is_confined() {
            return support::not_applicable("runs in a container with seccomp filters");
        }
        let refused = cache.get(&me, some, false).unwrap_err();
        assert!(matches!(refused, ExecError::Filters(_)), "{refused}");
        assert!(cache.get(&me, some, true).unwrap().is_empty());
        assert!(cache.get(&me, Seccomp::Off, false).unwrap().is_empty());
        assert_eq!(cache.known(me.process(), Some(1)), None);
    }

    #[expect(clippy::disallowed_methods, reason = "a process that has exited")]
    #[test]
    fn a_task_that_has_ended_has_no_filters() {
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let leader = ProcessHandle::open(i32::try_from(child.id()).unwrap()).unwrap();
        drop(child.stdin.take());
        child.wait().unwrap();
        let some = Seccomp::Filters(None);
        let refused = FilterCache::default().get(&leader, some, true).unwrap_err();
        assert!(matches!(refused, ExecError::NotRunning), "{refused}");
    }
}
