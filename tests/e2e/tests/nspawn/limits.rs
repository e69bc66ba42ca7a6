//! What a container sees of its limits. Real only: cgroup namespaces, and the kernel's limits.

use nomad_driver_nspawn::cgroup::Layout;
use support::wire::Task;

use super::*;

/// A task with 64 MiB of memory.
fn limited(stage: &Stage, script: &str) -> Task {
    stage.shell(script).with_memory(64)
}

/// A program that sizes itself by its limit reads it at the root of its cgroup namespace. Not even root may change it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_limit_that_holds_is_the_one_that_is_seen_inside() {
    let stage = Stage::new();
    let usable = Layout::of_this_host().usable_controllers();
    if !usable.contains("memory") || !usable.contains("pids") {
        return support::not_applicable("needs the controllers memory and pids");
    }
    let plugin = stage.plugin().await;
    let script = "for file in memory.max memory/memory.limit_in_bytes pids.max pids/pids.max; do
            test -e /sys/fs/cgroup/$file || continue
            cat /sys/fs/cgroup/$file
            (echo 999999999 > /sys/fs/cgroup/$file) 2>/dev/null && echo raised
        done
        true";
    for users in [false, true] {
        for two in [false, true] {
            let task = limited(&stage, script)
                .with("process_two", two)
                .with("user_namespacing", users)
                .with("pids_limit", 50);
            let ended = stage.run_on(&plugin, task).await;
            assert_eq!(ended.exit.code, 0, "{ended:?}");
            let limit = (64 << 20).to_string();
            let seen: Vec<&str> = ended.stdout.lines().collect();
            assert_eq!(seen, [&*limit, "50"], "users: {users}, two: {two}");
        }
    }
    end(plugin).await;
    stage.leave();
}

/// Half of the memory limit, so that the file system is full before the memory is used up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn filling_a_temporary_file_system_is_no_oom_kill() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let script = "for place in /tmp /dev/shm; do
            dd if=/dev/zero of=$place/full bs=1M count=200 2>&1 | grep -o 'No space left on device'
            rm $place/full
        done";
    for users in [false, true] {
        let task = limited(&stage, script).with("user_namespacing", users);
        let ended = stage.run_on(&plugin, task).await;
        assert_eq!(
            (ended.exit.oom_killed, &*ended.stdout),
            (false, "No space left on device\nNo space left on device\n"),
            "{ended:?}"
        );
    }
    end(plugin).await;
    stage.leave();
}

/// The agent's own may be -1000, with which no limit of memory would end a process. Real only: it is systemd-nspawn that sets it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_processes_have_the_badness_adjustment_of_the_job() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    for (option, seen) in [(None, "0\n"), (Some(300), "300\n")] {
        for users in [false, true] {
            let task = limited(&stage, "cat /proc/self/oom_score_adj");
            let task = task.with("user_namespacing", users);
            let task = match option {
                Some(number) => task.with("oom_score_adj", number),
                None => task,
            };
            let ended = stage.run_on(&plugin, task).await;
            assert_eq!((ended.said(), &*ended.stderr), (seen, ""), "{users}");
        }
    }
    end(plugin).await;
    stage.leave();
}
