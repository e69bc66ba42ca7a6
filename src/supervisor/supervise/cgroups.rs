//! The cgroups of the container during its life: limits before and at the start, OOM kills while it runs. What a limit is written to
//! is in `cgroup`.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::event_loop::{EventLoop, Interest, Source, Token};
use super::{State, Supervisor, failure};
use crate::cgroup::{CgroupPlan, Group, Limit, OomCounter, Unenforced, unenforced_note};
use crate::container::Cause;
use crate::state::task_dir::LaunchSpec;
use crate::supervisor::protocol::{Event, StartFailure, StartStep};
use crate::sys::process::set_oom_score_adj;

/// How long after an OOM kill it is reported, unless the container has exited by then: the exit says it too. In cgroup v1 the kernel
/// notifies before it counts.
const OOM_REPORT_DELAY: Duration = Duration::from_millis(200);

/// The cgroups of one container.
#[derive(Debug, Default)]
pub(super) struct Cgroups {
    oom: Option<Source<OomCounter>>,
    /// The last count of OOM kills that could be read.
    oom_kills: u64,
    /// How many of them a client has been sent.
    oom_kills_reported: u64,
    report_at: Option<Instant>,
    /// The limits that the kernel has refused.
    refused: Vec<Limit>,
    /// The same for the user.
    notes: Vec<String>,
}

impl Cgroups {
    /// Makes the cgroups of a start with their limits. If that fails, none is left.
    pub(super) fn create(
        launch_spec: &LaunchSpec,
        events: &EventLoop,
    ) -> Result<Self, StartFailure> {
        let created = Self::try_create(launch_spec, events);
        created.inspect_err(|_| remove(launch_spec))
    }

    fn try_create(launch_spec: &LaunchSpec, events: &EventLoop) -> Result<Self, StartFailure> {
        let mut cgroups = Self::default();
        let Some(group) = launch_spec.cgroup() else {
            return Ok(cgroups);
        };
        let step = |error: io::Error| failure(StartStep::Cgroup, &error);
        let none = CgroupPlan::default();
        let plan = launch_spec.cgroups.as_ref().unwrap_or(&none);
        let unenforced = plan.create(group).map_err(step)?;
        cgroups.note(unenforced, plan.required)?;
        cgroups.oom = plan.oom.as_ref().and_then(|file| watch_oom(file, events));
        Ok(cgroups)
    }

    /// Keeps what the kernel has refused for the user, once for each limit, or fails if it is required.
    fn note(
        &mut self,
        mut unenforced: Vec<Unenforced>,
        required: bool,
    ) -> Result<(), StartFailure> {
        unenforced.retain(|one| !self.refused.contains(&one.limit));
        self.refused.extend(unenforced.iter().map(|one| one.limit));
        match unenforced_note(&unenforced) {
            Some(note) if required => {
                Err(StartFailure::new(StartStep::Cgroup, Cause::Config, note))
            }
            note => {
                self.notes.extend(note);
                Ok(())
            }
        }
    }

    /// Writes what can be written only once systemd-nspawn has made the container's own cgroup.
    pub(super) fn settle(&mut self, launch_spec: &LaunchSpec) -> Result<(), StartFailure> {
        match &launch_spec.cgroups {
            Some(plan) => self.note(plan.settle(), plan.required),
            None => Ok(()),
        }
    }

    /// The limits that the kernel has refused, for the user.
    pub(super) fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The number of processes that the kernel has killed because the container's memory was used up. The last known one if the
    /// cgroup has been removed.
    pub(super) fn oom_kills(&self) -> u64 {
        let now = self.oom.as_ref().and_then(|oom| oom.kills().ok());
        now.unwrap_or(0).max(self.oom_kills)
    }
}

/// Opens the counter before the container runs, so that no kill is missed.
fn watch_oom(file: &std::path::Path, events: &EventLoop) -> Option<Source<OomCounter>> {
    // Without the counter an OOM kill is reported as a kill by a signal, which is true.
    let counter = OomCounter::open(file).ok()?;
    let interest = match counter.is_readable() {
        true => Interest::Readable,
        false => Interest::Exceptional,
    };
    let mut source = events.source(counter, Token::Oom);
    // One that can't be watched is still read at the exit.
    let _ = source.watch(interest);
    Some(source)
}

/// Removes the cgroups of a start that has no process. The plugin does it too, but not if the records are gone.
pub(super) fn remove(launch_spec: &LaunchSpec) {
    let controllers = launch_spec
        .controller_cgroups()
        .iter()
        .map(PathBuf::as_path);
    for group in launch_spec.cgroup().into_iter().chain(controllers) {
        if let Err(error) = Group::new(group).remove() {
            let _ = writeln!(
                io::stderr(),
                "the cgroup {} can't be removed: {error}",
                group.display()
            );
        }
    }
}

impl Supervisor {
    /// The cgroup of each controller, for the handle.
    pub(super) fn controllers(&self) -> BTreeMap<String, PathBuf> {
        let plan = self.launch_spec.cgroups.as_ref();
        plan.map_or_else(BTreeMap::new, |plan| plan.controllers.clone())
    }

    /// Takes systemd-nspawn out of what the kernel chooses OOM victims from, as far as this process may: if it died, the container
    /// would be killed with it. Only now, because the container has inherited its adjustment from it.
    pub(super) fn protect_nspawn(&self) {
        // Needs CAP_SYS_RESOURCE.
        let _ = set_oom_score_adj(self.nspawn.pid, -1000);
    }

    /// Takes systemd-nspawn out of the limits that are the container's alone. After the start has been reported: moving a process can
    /// take milliseconds.
    pub(super) fn release_nspawn(&self) {
        if let Some(plan) = &self.launch_spec.cgroups
            && let Err(error) = plan.release_nspawn(self.nspawn.pid)
            // It has exited, and so has the container.
            && error.raw_os_error() != Some(nix::Error::ESRCH as i32)
        {
            let _ = writeln!(
                io::stderr(),
                "systemd-nspawn can't be moved out of the limits of its container: {error}"
            );
        }
    }

    /// The kernel has killed a process because the container's memory was used up, or is about to.
    pub(super) fn see_oom(&mut self) {
        let Some(oom) = &mut self.cgroups.oom else {
            return;
        };
        oom.acknowledge();
        match oom.kills() {
            Ok(kills) => self.cgroups.oom_kills = kills.max(self.cgroups.oom_kills),
            // The cgroup has been removed. Its descriptor stays ready for ever.
            Err(_) => oom.unwatch(),
        }
        self.cgroups.report_at = Some(Instant::now() + OOM_REPORT_DELAY);
    }

    /// When OOM kills are to be reported.
    pub(super) fn oom_report_time(&self) -> Option<Instant> {
        self.cgroups.report_at
    }

    /// Reports OOM kills that the container has survived.
    pub(super) fn report_oom(&mut self) {
        self.cgroups.report_at = None;
        let kills = self.cgroups.oom_kills();
        self.cgroups.oom_kills = kills;
        let survived = matches!(self.state, State::Running { .. }) && self.exit.reported.is_none();
        let is_new = survived && kills > self.cgroups.oom_kills_reported;
        if is_new && self.clients.broadcast(&Event::OomKills(kills)) {
            self.cgroups.oom_kills_reported = kills;
        }
    }
}
