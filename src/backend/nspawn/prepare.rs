//! Works out a start completely before anything is started: the command line, the mount points that the root lacks, the cgroup, the
//! resources, and what the user should know. The result is the launch spec on disk, so that a failed start has one undo step.

use std::fs;
use std::path::{Path, PathBuf};

use super::filters::StartFilters;
use super::ids::Ids;
use super::mounts::{self, StartMounts};
use super::name_files::{self, NameFiles};
use super::own_network::{self, OwnNetwork};
use super::{Settings, acquire, boot_id, io_error};
use crate::backend::BackendError;
use crate::cgroup::{CgroupPlan, DeviceRules, Layout, Place, Unenforced, unenforced_note};
use crate::container::{
    Console, ContainerSpec, ExecDefaults, Mode, Mount, NetworkNamespace, Readiness, Root,
    SystemOutput,
};
use crate::failpoint::{self, Failpoint};
use crate::lease::{Resource, SharedLocks};
use crate::mounts::MountPlan;
use crate::network::pool;
use crate::nspawn::argv::{self, CommandLine, Target};
use crate::nspawn::version;
use crate::nspawn::{image_init, ownership, skeleton};
use crate::rootfs_path::{Entry, RootDir};
use crate::seccomp::Source;
use crate::state::{LaunchSpec, Pid1, TaskDir};

/// The versions that decide what is possible.
#[derive(Debug, Clone)]
pub(super) struct Host {
    /// Path of systemd-nspawn.
    pub(super) program: PathBuf,
    /// Its version.
    pub(super) version: u32,
    /// The version of the kernel.
    pub(super) kernel: (u32, u32),
}

/// Prepares the start in this task directory with these seccomp filters, and writes its launch spec. Returns the lock of the range of ids that was
/// picked, if one was: to be held until the supervisor holds it.
pub(super) fn prepare(
    spec: &ContainerSpec,
    task_dir: &TaskDir,
    host: Host,
    filters: &StartFilters,
    settings: &Settings,
) -> Result<Option<SharedLocks>, BackendError> {
    let network = own_network::plan(spec, task_dir, settings)?;
    let address = network.plan.as_ref().map(|plan| plan.address);
    let prepared = prepare_in(spec, task_dir, host, filters, network);
    if let (Err(_), Some(address)) = (&prepared, address) {
        // No launch spec names it. One that can't be released now is when a plugin starts.
        let _ = pool::release(&settings.state_dir, task_dir.path(), address);
    }
    prepared
}

/// The same with this network.
fn prepare_in(
    spec: &ContainerSpec,
    task_dir: &TaskDir,
    host: Host,
    filters: &StartFilters,
    network: OwnNetwork,
) -> Result<Option<SharedLocks>, BackendError> {
    let layout = Layout::of_this_host();
    if let Some(reason) = version::unusable(host.version, layout.kind) {
        return Err(unsupported(spec, reason));
    }
    refuse_unbootable(spec, &layout)?;
    let files = name_files::write(spec, network.plan.as_ref(), task_dir)?;
    let (root, of_root) = root(spec, &files, task_dir)?;
    let mut ids = Ids::of(spec, &host)?;
    // Whether they can be mapped depends on where they are.
    mounts::create_sources(spec)?;
    let mounts = StartMounts::plan(
        spec,
        (&root, of_root),
        &files.mounts,
        &mut ids,
        (&host, task_dir.path()),
    )?;
    let mounts = mounts.with_ready_socket(spec, task_dir);
    let (place, cgroups) = cgroups(spec, task_dir, &layout).unzip();
    let mut notes = network.notes;
    let mut line = command_line(spec, &mounts, &ids, &files, (&host, &layout))?;
    notes.extend(mounts.notes);
    notes.extend(files.notes);
    let notify_socket = task_dir.notify_socket().to_string_lossy().into_owned();
    let variable = "NOTIFY_SOCKET".to_owned();
    line.environment.insert(variable, notify_socket);
    if let (Some(captured), Some(init)) = (filters.captured(), &mut line.init) {
        init.filters.clone_from(&captured.filters);
        let variable = "SYSTEMD_SECCOMP".to_owned();
        line.environment.insert(variable, "0".to_owned());
    }
    let (version, kernel) = (host.version, host.kernel);
    notes.extend(ownership::notes(&spec.rootfs, &spec.users, version, kernel));
    let (cgroups, unenforced) = match cgroups {
        Some((plan, unenforced)) => (Some(plan), unenforced_note(&unenforced)),
        None => (None, Some(NO_CGROUPS.to_owned())),
    };
    if spec.resources.required
        && let Some(reason) = unenforced
    {
        return Err(unsupported(spec, reason));
    }
    notes.extend(unenforced);
    let (picked, lock) = ids.picked.unzip();
    let resources = acquire::resources(spec, place.as_ref(), network.plan, picked, &root);
    let limits = (cgroups, resources);
    let launch_spec = LaunchSpec {
        seccomp: filters.source(),
        mounts: mounts.plan,
        ..launch_spec(spec, host.program, &mut line, limits, bounded(notes))?
    };
    failpoint::hit(task_dir, Failpoint::BeforeOrder);
    let exec_defaults = ExecDefaults::of(&spec.payload);
    let written = task_dir.write_exec_defaults(&exec_defaults);
    written
        .and_then(|()| {
            task_dir.write_launch_spec(&launch_spec, &line.environment, line.init.as_ref())
        })
        .map_err(|source| io_error("writing the launch spec in", task_dir.path(), source))?;
    Ok(lock)
}

/// Refuses an image whose init can't run here: the container would end with a code that says nothing.
fn refuse_unbootable(spec: &ContainerSpec, layout: &Layout) -> Result<(), BackendError> {
    let (Mode::Boot, Root::Directory(image)) = (spec.payload.mode, &spec.rootfs.source) else {
        return Ok(());
    };
    let failed = |source| io_error("looking into the image", image, source);
    let mut root = Some(RootDir::open(image).map_err(failed)?);
    if let (Some(tree), Some(pivot)) = (&root, &spec.rootfs.pivot_root) {
        let new = pivot.split(':').next().unwrap_or_default();
        let entry = tree.entry(Path::new(new)).map_err(failed)?;
        root = entry.and_then(Entry::into_root);
    }
    let reason = root.map(|root| image_init::refusal(&root, layout.kind));
    match reason.transpose().map_err(failed)?.flatten() {
        Some(reason) => Err(unsupported(spec, reason)),
        None => Ok(()),
    }
}

const NO_CGROUPS: &str = "this host has no control groups that the driver can use: no limit of this task is enforced, and there are no statistics of it";

/// The maximum length of the notes of one start together, in bytes. The supervisor reports them in one packet, and JSON can make a
/// byte six times as long.
const MAX_NOTES_BYTES: usize = packets::MAX_PACKET_BYTES / 8;

/// The notes up to the maximum length; the last one says what is missing.
fn bounded(notes: Vec<String>) -> Vec<String> {
    let mut left = MAX_NOTES_BYTES;
    let mut kept = Vec::new();
    let mut notes = notes.into_iter();
    while let Some(mut note) = notes.next() {
        let is_whole = note.len() <= left;
        if !is_whole {
            note.truncate(note.floor_char_boundary(left));
            note.push('…');
        }
        left = left.saturating_sub(note.len());
        kept.push(note);
        if !is_whole {
            let more = notes.len();
            kept.push(format!(
                "the notes of this start are cut off at {} KiB; {more} more are left out",
                MAX_NOTES_BYTES / 1024
            ));
            break;
        }
    }
    kept
}

/// The command line of systemd-nspawn.
fn command_line(
    spec: &ContainerSpec,
    mounts: &StartMounts,
    ids: &Ids,
    files: &NameFiles,
    (host, layout): (&Host, &Layout),
) -> Result<CommandLine, BackendError> {
    let mut spec = spec.clone();
    spec.users.clone_from(&ids.users);
    spec.network.resolv_conf.clone_from(&files.resolv_conf);
    let target = Target {
        version: host.version,
        cgroup: layout.kind,
    };
    argv::command_line(&spec, &mounts.root, &mounts.binds, target)
        .map_err(|error| unsupported(&spec, error.to_string()))
}

fn launch_spec(
    spec: &ContainerSpec,
    program: PathBuf,
    line: &mut CommandLine,
    (cgroups, resources): (Option<CgroupPlan>, Vec<Resource>),
    notes: Vec<String>,
) -> Result<LaunchSpec, BackendError> {
    Ok(LaunchSpec {
        id: spec.identity.id.clone(),
        alloc_dir: Some(spec.identity.alloc_dir.clone()),
        machine: spec.identity.machine.clone(),
        mode: spec.payload.mode,
        boot: boot_id()?,
        program,
        arguments: std::mem::take(&mut line.arguments),
        first: line.init.as_ref().map_or(Pid1::Image, |init| Pid1::Driver {
            streams: init.streams,
        }),
        stdout: spec.payload.stdout.clone(),
        stderr: spec.payload.stderr.clone(),
        network_namespace: match &spec.network.namespace {
            NetworkNamespace::Join(path) => Some(path.clone()),
            _ => None,
        },
        network_of: match &spec.network.namespace {
            NetworkNamespace::OfTask { task, leader } => Some(leader.ok_or_else(|| {
                unsupported(
                    spec,
                    format!("the task {task:?}, whose network it joins, was not looked for"),
                )
            })?),
            _ => None,
        },
        cgroups,
        oom_score_adj: spec.resources.oom_score_adj,
        resources,
        inside: spec.resources.inside(),
        seccomp: Source::default(),
        mounts: MountPlan::default(),
        credentials: spec.payload.credentials.clone(),
        output: SystemOutput {
            journal: spec.payload.journal.clone(),
            console: spec.payload.console == Console::Relayed,
        },
        ready_within: match spec.payload.readiness {
            Readiness::Started => None,
            Readiness::Notify(limit) => Some(limit),
        },
        notes,
    })
}

/// Where the cgroups of the start are and what is done to them, with the limits that this host can't enforce. Only root can create
/// cgroups; without them the supervisor identifies the container's processes by their parents.
fn cgroups(
    spec: &ContainerSpec,
    task_dir: &TaskDir,
    layout: &Layout,
) -> Option<(Place, (CgroupPlan, Vec<Unenforced>))> {
    let leaf = task_dir.path().file_name()?.to_str()?;
    let place = layout
        .place(spec.resources.cgroup.as_deref(), leaf)
        .filter(|_| nix::unistd::geteuid().is_root())?;
    let devices = DeviceRules::new(&spec.resources.devices, &spec.mounts, &spec.rootfs.source);
    let plan = CgroupPlan::new(layout, &place, &spec.resources, &devices);
    Some((place, plan))
}

fn root(
    spec: &ContainerSpec,
    files: &NameFiles,
    task_dir: &TaskDir,
) -> Result<(Root, Vec<Mount>), BackendError> {
    let Root::Directory(image) = &spec.rootfs.source else {
        return Ok((spec.rootfs.source.clone(), Vec::new()));
    };
    let mounts = [spec.mounts.as_slice(), files.mounts.as_slice()].concat();
    let missing = skeleton::missing_mount_points(&spec.rootfs, &mounts, &spec.tmpfs)
        .map_err(|source| io_error("looking for mount points in", image, source))?;
    if missing.is_empty() {
        return Ok((spec.rootfs.source.clone(), Vec::new()));
    }
    let skeleton = task_dir.skeleton();
    let made = fs::create_dir(&skeleton)
        .and_then(|()| skeleton::build(image, &skeleton, &missing, spec.rootfs.volatile));
    let binds = made.map_err(|source| io_error("making mount points in", &skeleton, source))?;
    Ok((Root::Directory(skeleton), binds))
}

pub(super) fn unsupported(spec: &ContainerSpec, reason: String) -> BackendError {
    let machine = spec.identity.machine.clone();
    BackendError::Unsupported { machine, reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_kept_up_to_their_maximum_length() {
        let few = vec!["one".to_owned(), "two".to_owned()];
        assert_eq!(bounded(few.clone()), few);
        let exact = vec!["x".repeat(MAX_NOTES_BYTES)];
        assert_eq!(bounded(exact.clone()), exact);
        let many = vec!["ä\u{1}".repeat(1000); 200];
        let kept = bounded(many);
        let report = serde_json::to_vec(&kept).unwrap();
        assert!(report.len() < packets::MAX_PACKET_BYTES, "{}", report.len());
        let [.., cut, last] = kept.as_slice() else {
            panic!("{kept:?}")
        };
        assert!(cut.ends_with('…'));
        assert!(last.contains("194 more are left out"), "{last}");
    }
}
