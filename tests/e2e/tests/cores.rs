//! Tier (b): the cores that a real Nomad agent reserves, and those that its tasks share. A program of its own: all agents of a machine use the
//! same cgroups, and each one writes to them which cores are shared by its own tasks. No other agent may run meanwhile.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use e2e::agent::{Agent, Allocation};
use e2e::until;
use nomad_driver_nspawn::cgroup::Layout;
use support::not_applicable;

/// Starts the job, on shared cores or with this number of reserved ones, and waits until its task runs.
fn start<'a>(agent: &'a Agent, name: &str, cores: Option<&str>) -> Allocation<'a> {
    let job = Path::new(env!("CARGO_MANIFEST_DIR")).join("jobs/cores.nomad.hcl");
    let tree = agent.join(name);
    fs::create_dir(&tree).unwrap();
    e2e::busybox_tree(&tree);
    let mut variables = vec![("image", tree.to_str().unwrap())];
    variables.extend(cores.map(|cores| ("cores", cores)));
    let task = agent.run(&job, &variables);
    task.printed("up");
    task
}

/// The cores that the command of a task may run on.
fn cores(task: &Allocation<'_>) -> BTreeSet<u32> {
    let status = fs::read_to_string(format!("/proc/{}/status", task.leader())).unwrap();
    let mut lines = status.lines();
    let list = lines.find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let number = |text: &str| text.trim().parse::<u32>().unwrap();
    let range = |part: &str| match part.split_once('-') {
        Some((first, last)) => number(first)..=number(last),
        None => number(part)..=number(part),
    };
    list.unwrap().split(',').flat_map(range).collect()
}

/// Waits until a running task may use these cores and no others.
fn runs_on(task: &Allocation<'_>, wanted: &BTreeSet<u32>) {
    until(&format!("{wanted:?}"), || {
        (cores(task) == *wanted).then_some(())
    });
    until("what the agent says about it", || {
        (task.task()["State"] == "running").then_some(())
    });
    assert_eq!(task.starts(), 1);
}

/// In cgroup v1 the kernel refuses to take a core out of a cgroup that has a child with it. If the driver made a child in the one with the
/// shared cores, Nomad could reserve none, and no task could be started any more.
#[test]
fn nomad_reserves_a_core_that_a_running_task_shares() {
    if !Layout::of_this_host()
        .usable_controllers()
        .contains("cpuset")
    {
        return not_applicable("needs the cpuset controller");
    }
    if std::thread::available_parallelism().unwrap().get() < 2 {
        return not_applicable("needs two cores, one to reserve and one to share");
    }
    let agent = Agent::new();
    let first = start(&agent, "first", None);
    let all = cores(&first);
    assert!(all.len() > 1, "{all:?}");

    let reserved = start(&agent, "reserved", Some("1"));
    let own = cores(&reserved);
    assert!(own.len() == 1 && own.is_subset(&all), "{own:?} of {all:?}");
    let rest = &all - &own;
    runs_on(&first, &rest);
    // Nomad writes the shared cores again before each start.
    let second = start(&agent, "second", None);
    runs_on(&second, &rest);
    runs_on(&reserved, &own);

    assert_eq!(reserved.stop(), [0]);
    runs_on(&first, &all);
    runs_on(&second, &all);
    assert_eq!(first.stop(), [0]);
    assert_eq!(second.stop(), [0]);
    agent.leave();
}
