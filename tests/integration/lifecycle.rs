//! A task from StartTask to DestroyTask: responses, the call of systemd-nspawn, how an exit is reported, leftovers.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dev_agent::Plugin;
use nomad_driver_nspawn::proto::driver::{Mount, TaskConfig, TaskState};
use rstest::rstest;
use serde_json::json;
use tonic::Code;

use crate::harness::{Host, Running, World as _, argv, environment, refusal, within};

mod arguments;

const DEAF: &str = "trap '' TERM INT; echo up; while :; do sleep 0.05; done";

#[tokio::test] // Conformance check 32.
async fn the_response_of_a_start() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let allocation = Arc::new(host.allocation(host.shell("exec sleep 1000")));
    let mut sent = TaskConfig::default();
    let task = host
        .start_edited(&plugin, allocation, |task| sent = task.clone())
        .await
        .unwrap();
    let handle = &task.started.handle;
    assert!(handle.version >= 1 && !handle.driver_state.is_empty());
    assert_eq!(handle.config.as_ref(), Some(&sent));
    assert_eq!(handle.state(), TaskState::Running);
    task.destroy(&plugin).await;
}

#[tokio::test] // Conformance check 33.
async fn an_id_is_started_once() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let task = host
        .up(&plugin, host.shell("echo up; exec sleep 1000"))
        .await;
    let again = task.started.handle.config.clone().unwrap();
    let status = refusal(within("StartTask", plugin.start(again)).await);
    assert_eq!(status.code(), Code::AlreadyExists);
    assert_eq!(
        task.inspect(&plugin).await.unwrap().task.unwrap().state(),
        TaskState::Running
    );
    assert_eq!(host.starts().len(), 1);
    task.destroy(&plugin).await;
}

#[tokio::test] // Conformance check 38.
async fn every_waiter_receives_the_exit() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let task = host.start(&plugin, host.shell("exit 9")).await;
    let first = task.wait(&plugin).await;
    let (one, two) = tokio::join!(task.wait(&plugin), task.wait(&plugin));
    assert_eq!((first.code, &one, &two), (9, &first, &first));
    task.destroy(&plugin).await;
}

#[tokio::test] // Conformance check 39.
async fn a_wait_can_be_cancelled() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let task = host
        .start(&plugin, host.shell("echo up; exec sleep 1000"))
        .await;
    let id = task.id.clone();
    tokio::select! {
        end = plugin.wait(&id) => panic!("{end:?}"),
        _ = task.stdout.contains("up") => {}
    }
    assert_eq!(
        task.inspect(&plugin).await.unwrap().task.unwrap().state(),
        TaskState::Running
    );
    task.destroy(&plugin).await;
}

#[tokio::test] // Conformance check 42.
async fn stopping_and_destroying_unknown_ids_succeeds() {
    let host = Host::new();
    let plugin = host.plugin().await;
    for id in ["", "never/was/there", "../../etc"] {
        within("StopTask", plugin.stop(id, Duration::ZERO, "SIGTERM"))
            .await
            .unwrap();
        for force in [false, true] {
            within("DestroyTask", plugin.destroy(id, force))
                .await
                .unwrap();
        }
    }
    let task = host.start(&plugin, host.shell("exit 0")).await;
    task.wait(&plugin).await;
    for _ in 0..2 {
        within("StopTask", plugin.stop(&task.id, Duration::ZERO, ""))
            .await
            .unwrap();
    }
    for _ in 0..2 {
        within("DestroyTask", plugin.destroy(&task.id, false))
            .await
            .unwrap();
    }
    within("StopTask", plugin.stop(&task.id, Duration::ZERO, ""))
        .await
        .unwrap();
}

#[tokio::test] // Conformance check 62.
async fn the_response_of_inspect() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let task = host
        .up(&plugin, host.shell("echo up; exec sleep 1000"))
        .await;
    let running = task.inspect(&plugin).await.unwrap().task.unwrap();
    assert_eq!(
        (running.id.as_str(), running.name.as_str(), running.state()),
        (task.id.as_str(), "web", TaskState::Running)
    );
    assert!(running.started_at.unwrap().seconds > 1_500_000_000);
    assert_eq!(running.completed_at.unwrap().seconds, -62_135_596_800);
    assert!(running.result.is_some());
    task.stop(&plugin, Duration::ZERO, "").await;
    let ended = task.inspect(&plugin).await.unwrap().task.unwrap();
    assert_eq!(
        (ended.state(), ended.result.unwrap().signal),
        (TaskState::Exited, 9)
    );
    assert!(ended.completed_at.unwrap().seconds >= ended.started_at.unwrap().seconds);
    task.destroy(&plugin).await;
    let status = task.inspect(&plugin).await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::NotFound, "task not found for given id")
    );
}

#[tokio::test] // Conformance check 63.
async fn destroying_a_running_task_needs_force() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let task = host.up(&plugin, host.shell(DEAF)).await;
    let status = refusal(within("DestroyTask", plugin.destroy(&task.id, false)).await);
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert_eq!(
        task.inspect(&plugin).await.unwrap().task.unwrap().state(),
        TaskState::Running
    );
    task.destroy(&plugin).await;
    assert!(task.inspect(&plugin).await.is_err());
    nothing_left(&host, &plugin).await;
}

/// Checks that only the plugin still runs, and that its state directory is empty.
pub(crate) async fn nothing_left(host: &Host, plugin: &Plugin) {
    host.is_clean(plugin).await;
}

/// What is mounted at this target: the option of systemd-nspawn, and the path on the host. If the driver mounts it for systemd-nspawn, the path is in
/// the launch spec.
fn mounted(words: &[String], target: &str) -> (String, PathBuf) {
    let of_target = words.iter().find_map(|word| {
        let (flag, paths) = word.split_once('=')?;
        let paths = paths.strip_suffix(":rbind,idmap").unwrap_or(paths);
        let source = paths.strip_suffix(target)?.strip_suffix(':')?;
        Some((flag, PathBuf::from(source.replace("\\:", ":"))))
    });
    let (flag, source) = of_target.unwrap_or_else(|| panic!("{target} is not in {words:?}"));
    let staged = source.parent().filter(|dir| dir.ends_with("mounts"));
    let source = match staged {
        None => source.clone(),
        Some(directory) => {
            let order = std::fs::read(directory.with_file_name("order")).unwrap();
            let order: serde_json::Value = serde_json::from_slice(&order).unwrap();
            let index: usize = source
                .file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .parse()
                .unwrap();
            let planned = &order["mounts"]["mounts"][index]["source"];
            PathBuf::from(planned.as_str().unwrap())
        }
    };
    (flag.to_owned(), source)
}

#[tokio::test] // Conformance check 67.
async fn mounts() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let allocation = Arc::new(host.allocation(host.shell("exit 0")));
    let volume = host.join("volume:1");
    std::fs::create_dir(&volume).unwrap();
    let mut number = 0;
    let mut mount = |read_only: bool, propagation: &str| {
        number += 1;
        Mount {
            task_path: format!("/v{number}"),
            host_path: volume.display().to_string(),
            readonly: read_only,
            propagation_mode: propagation.to_owned(),
            ..Mount::default()
        }
    };
    let mounts: Vec<Mount> = ["", "private", "host-to-task"]
        .into_iter()
        .flat_map(|mode| [mount(true, mode), mount(false, mode)])
        .collect();
    let task = host
        .start_edited(&plugin, allocation, |task| task.mounts = mounts.clone())
        .await
        .unwrap();
    let words = argv(&host.starts()[0]);
    let source = volume.canonicalize().unwrap();
    for mount in &mounts {
        let flag = if mount.readonly {
            "--bind-ro"
        } else {
            "--bind"
        };
        let found = mounted(&words, &mount.task_path);
        assert_eq!(found, (flag.to_owned(), source.clone()));
    }
    task.wait(&plugin).await;
    task.destroy(&plugin).await;
    assert!(volume.exists());
}

#[tokio::test] // Conformance check 72.
async fn nomads_directories() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let task = host.start(&plugin, host.shell("exit 0")).await;
    task.wait(&plugin).await;
    let words = argv(&host.starts()[0]);
    let alloc = task.allocation.dir().canonicalize().unwrap();
    for (source, target) in [
        ("alloc", "/alloc"),
        ("web/local", "/local"),
        ("web/secrets", "/secrets"),
    ] {
        let found = mounted(&words, target);
        assert_eq!(found, ("--bind".to_owned(), alloc.join(source)));
    }
    assert!(
        words
            .iter()
            .all(|word| !word.contains("private") || word.starts_with("--private-users")),
        "{words:?}"
    );
    task.destroy(&plugin).await;
}

/// Waits for the task with this number and checks that exit and output are its own.
async fn ends_as_number(plugin: &Plugin, number: usize, task: &Running) {
    let exit = task.wait(plugin).await;
    assert_eq!(usize::try_from(exit.code).unwrap(), number % 100);
    assert_eq!(task.stdout.all().await, format!("out {number}\n"));
    task.destroy(plugin).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)] // Conformance check 84.
async fn many_at_once() {
    let host = Host::new();
    let plugin = Arc::new(host.plugin().await);
    let starts = (0..50).map(|number| {
        // Each has its own tree, because only one container may write to a tree.
        let root = host.tree(&format!("root{number}"));
        let script = format!(
            "trap 'exit {number}' USR1; echo out {number}; while :; do sleep 1; done & wait"
        );
        let job = host
            .shell(&script)
            .named(&format!("t{number}"))
            .with("image", json!(root));
        host.start(&plugin, job)
    });
    let tasks = within("50 starts", futures_of(starts)).await;
    assert_eq!(host.starts().len(), 50);
    // All waits and stats streams stay open at the same time, two per task.
    let mut streams = Vec::new();
    let mut waits = tokio::task::JoinSet::new();
    for task in &tasks {
        for _ in 0..2 {
            streams.push(crate::stats::stream(&plugin, &task.id, Duration::from_secs(10)).await);
            let (plugin, id) = (Arc::clone(&plugin), task.id.clone());
            waits.spawn(async move { (id.clone(), plugin.wait(&id).await.unwrap()) });
        }
    }
    for stream in &mut streams {
        let sample = within("a sample", stream.message()).await.unwrap().unwrap();
        assert!(sample.stats.unwrap().agg_resource_usage.is_some());
    }
    assert!(waits.try_join_next().is_none(), "a wait ended early");
    for (number, task) in tasks.iter().enumerate() {
        task.stdout.contains(&format!("out {number}\n")).await;
        task.signal(&plugin, "SIGUSR1").await.unwrap();
    }
    for (number, task) in tasks.iter().enumerate() {
        ends_as_number(&plugin, number, task).await;
    }
    let mut ended = 0;
    while let Some(end) = within("the waits", waits.join_next()).await {
        let (id, exit) = end.unwrap();
        let number = tasks.iter().position(|task| task.id == id).unwrap();
        assert_eq!(usize::try_from(exit.code).unwrap(), number);
        ended += 1;
    }
    assert_eq!(ended, 100);
    for stream in &mut streams {
        while let Some(sample) = within("the end of the samples", stream.message())
            .await
            .unwrap()
        {
            assert!(sample.stats.is_some());
        }
    }
}

/// Runs all futures concurrently and returns their outputs in order.
async fn futures_of<F: Future>(all: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut pending: Vec<_> = all.map(|one| (Box::pin(one), None)).collect();
    std::future::poll_fn(|context| {
        let mut open = false;
        for (one, done) in &mut pending {
            if done.is_none() {
                match one.as_mut().poll(context) {
                    std::task::Poll::Ready(output) => *done = Some(output),
                    std::task::Poll::Pending => open = true,
                }
            }
        }
        if open {
            std::task::Poll::Pending
        } else {
            std::task::Poll::Ready(())
        }
    })
    .await;
    pending.into_iter().filter_map(|(_, done)| done).collect()
}

#[tokio::test]
async fn nothing_is_left_after_a_full_lifecycle() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let job = host.shell("(sleep 1000 & sleep 1001 &); echo up; exit 0");
    let task = host.start(&plugin, job).await;
    task.wait(&plugin).await;
    task.destroy(&plugin).await;
    nothing_left(&host, &plugin).await;
}
