//! Limits of memory, processor time and processes, and what happens when memory is used up.

use super::*;
use nomad_driver_nspawn::cgroup::Layout;
use nomad_driver_nspawn::container::{CgroupLayout, CpuQuota, Resources, Swap};

/// So much that the script that uses it up is far larger than any other process in the cgroup when the kernel chooses a victim.
const MEMORY: u64 = 64 << 20;

/// A script whose shell doubles a variable until the kernel kills it.
const HUNGRY: &str = "x=0123456789abcdef; while :; do x=$x$x; done";

/// Whether containers have limits of this controller on this host. Reports the test as not applicable otherwise.
fn has(controller: &str) -> bool {
    let layout = Layout::of_this_host();
    let has = nix::unistd::geteuid().is_root() && layout.usable_controllers().contains(controller);
    if !has {
        not_applicable(&format!("needs root and the {controller} controller"));
    }
    has
}

/// The content of a limit's file: in cgroup v1 in the hierarchy of the controller, in cgroup v2 in the container's own cgroup.
fn limit(started: &Started, controller: &str, version_1: &str, version_2: &str) -> String {
    let file = match started.controllers.get(controller) {
        Some(group) => group.join(version_1),
        None => started.cgroup.as_ref().unwrap().join(version_2),
    };
    let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{file:?}: {error}"));
    text.trim().to_owned()
}

fn memory(resources: &mut Resources) {
    resources.memory.hard = Some(MEMORY);
    resources.memory.swap = Swap::Limit(0);
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_are_written_before_the_command_runs(world: World) {
    if !has("memory") || !has("cpu") || !has("pids") {
        return;
    }
    let started = world
        .up(world.spec(HEARS_TERM).with(|spec| {
            memory(&mut spec.resources);
            spec.resources.memory.reserved = Some(MEMORY / 2);
            spec.resources.cpu.shares = Some(1024);
            spec.resources.cpu.quota = Some(CpuQuota {
                quota: 50_000,
                period: 100_000,
            });
            spec.resources.pids = Some(30);
        }))
        .await;
    assert_eq!(started.notes, Vec::<String>::new());
    let own = |controller, one, two| limit(&started, controller, one, two);
    let hard = MEMORY.to_string();
    assert_eq!(own("memory", "memory.limit_in_bytes", "memory.max"), hard);
    let reserved = (MEMORY / 2).to_string();
    assert_eq!(
        own("memory", "memory.soft_limit_in_bytes", "memory.low"),
        reserved
    );
    let weight = own("cpu", "cpu.shares", "cpu.weight");
    let version_1 = started.controllers.contains_key("cpu");
    assert_eq!(weight, if version_1 { "1024" } else { "100" });
    let quota = own("cpu", "cpu.cfs_quota_us", "cpu.max");
    assert!(quota.starts_with("50000"), "{quota}");
    assert_eq!(own("pids", "pids.max", "payload/pids.max"), "30");
    world.leave(&[&started]).await;
}

/// The files and values of the table in `docs/resources.md`, of the column with this number.
fn documented(column: usize) -> Vec<(String, String)> {
    let text = include_str!("../../docs/resources.md");
    let table = text.split("|---|---|---|---|---|\n").nth(1).unwrap();
    let rows = table.lines().take_while(|line| line.starts_with('|'));
    let cells = rows.map(|row| row.split('|').nth(column + 2).unwrap().trim().to_owned());
    let entries = cells.flat_map(|cell| {
        let entries: Vec<String> = cell.split("<br>").map(str::to_owned).collect();
        entries
    });
    let entry = |entry: String| {
        let (file, value) = entry.strip_prefix('`')?.split_once("` ")?;
        Some((file.to_owned(), value.to_owned()))
    };
    entries.filter_map(entry).collect()
}

/// With Nomad's scope and without it where this host has cgroup v2 alone.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_files_of_a_container_are_those_of_the_documentation(world: World) {
    if !["cpu", "cpuset", "memory", "pids"].into_iter().all(has) {
        return;
    }
    let layout = Layout::of_this_host();
    let columns = match layout.kind {
        CgroupLayout::V2 => vec![0, 1],
        CgroupLayout::Hybrid => vec![2],
        CgroupLayout::V1 | CgroupLayout::None => vec![3],
    };
    let unique = world.spec("").identity.machine;
    let slice = layout.tracking.unwrap().join(format!("{unique}.slice"));
    for column in columns {
        let scope = slice.join("a.t.scope");
        let spec = world.spec(HEARS_TERM).with(|spec| {
            let resources = &mut spec.resources;
            resources.memory.hard = Some(512 << 20);
            resources.memory.reserved = Some(256 << 20);
            resources.memory.swap = Swap::Limit(128 << 20);
            resources.cpu.shares = Some(500);
            resources.cpu.quota = Some(CpuQuota {
                quota: 25_000,
                period: 100_000,
            });
            resources.cpu.cores = Some("0".to_owned());
            resources.pids = Some(100);
            resources.cgroup = (column == 0).then(|| scope.clone());
        });
        if column == 0 {
            fs::create_dir_all(&scope).unwrap();
        }
        let started = world.up(spec).await;
        let own = started.cgroup.clone().unwrap();
        let entries = documented(column);
        assert!(entries.len() >= 8, "{entries:?}");
        for (file, wanted) in entries {
            let controller = file.split('.').next().unwrap();
            let group = started.controllers.get(controller).unwrap_or(&own);
            let value = fs::read_to_string(group.join(&file))
                .unwrap_or_else(|error| panic!("{file} in {}: {error}", group.display()));
            assert_eq!(value.trim(), wanted, "{file}: {:?}", started.notes);
        }
        within(world.backend.remove(&started.id)).await.unwrap();
        fs::write(world.file("stdout"), "").unwrap();
        for group in [&scope, &slice] {
            let _ = fs::remove_dir(group);
        }
    }
    world.leave(&[]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_shares_no_cgroup_with_the_agent(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    if started.cgroup.is_none() {
        not_applicable("needs root and cgroups");
        return world.leave(&[&started]).await;
    }
    let groups = |pid: i32| fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let own = groups(started.supervisor.pid);
    let theirs = groups(started.leader.pid);
    // The named hierarchy of cgroup v1 has no controller. Cgroup v2 is listed even where it is not mounted.
    let is_version_1 = Layout::of_this_host().kind == CgroupLayout::V1;
    let controllers = own.lines().filter(|line| {
        let unmounted = is_version_1 && line.starts_with("0::");
        !line.contains(":name=") && !unmounted
    });
    let shared: Vec<&str> = controllers
        .filter(|line| theirs.lines().any(|their| their == *line))
        .collect();
    assert!(shared.is_empty(), "{shared:?}");
    world.leave(&[&started]).await;
}

/// Fast, and many times: a kill must not be lost between the exit and the removal of the cgroup.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_uses_up_its_memory_is_reported(world: World) {
    if !has("memory") {
        return;
    }
    for mode in [Mode::Plain, Mode::ProcessTwo] {
        for _ in 0..5 {
            let started = world
                .start(world.spec(HUNGRY).with(|spec| {
                    spec.payload.mode = mode;
                    memory(&mut spec.resources);
                }))
                .await;
            let exit = world.end(&started).await;
            let seen = (exit.code, exit.signal, exit.oom_killed);
            assert_eq!(seen, (137, 9, true), "{mode:?}: {exit:?}");
            within(world.backend.remove(&started.id)).await.unwrap();
        }
    }
    world.leave(&[]).await;
}

/// systemd-nspawn and the supervisor are not killed in its place, and the command's own exit is what is reported.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_child_that_is_killed_for_memory_is_reported_while_the_command_runs(world: World) {
    if !has("memory") {
        return;
    }
    let script = format!("(trap - TERM; {HUNGRY}); {HEARS_TERM}");
    let spec = world.spec(&script);
    let started = world
        .up(spec.with(|spec| memory(&mut spec.resources)))
        .await;
    let kills = within(world.backend.oom_kills(&started, 0)).await.unwrap();
    assert!(kills > 0);
    // A plugin that starts later does not report them again.
    let other = NspawnBackend::new(world.settings.clone());
    within(other.attach(&started)).await.unwrap();
    within(world.backend.stop(&started, Some(signal("TERM")), AMPLE))
        .await
        .unwrap();
    let exit = world.end(&started).await;
    assert_eq!((ended(&exit), exit.oom_killed), ((3, 0), false));
    assert_eq!(within(world.backend.oom_kills(&started, kills)).await, None);
    world.leave(&[&started]).await;
}

/// A list of cores that no kernel accepts.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_limit_is_a_note_or_refuses_the_start(world: World) {
    if !has("cpuset") {
        return;
    }
    let with = |required| {
        world.spec(HEARS_TERM).with(|spec| {
            spec.resources.cpu.cores = Some("none".to_owned());
            spec.resources.required = required;
        })
    };
    let started = world.up(with(false)).await;
    let [note] = &*started.notes else {
        panic!("{:?}", started.notes)
    };
    assert!(note.contains("cores (") && note.contains("none"), "{note}");
    within(world.backend.remove(&started.id)).await.unwrap();
    let error = world.refused(with(true)).await;
    assert!(
        error.to_string().contains("can't be set to none"),
        "{error}"
    );
    assert!(!error.is_transient(), "{error}");
    world.leave(&[&started]).await;
}
