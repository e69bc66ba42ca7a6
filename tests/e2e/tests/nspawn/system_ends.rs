//! How a booted system ends, with its true code and what it said about it. Real only: systemd and reboot(2) of a container.

use rstest::rstest;

use super::*;

/// Runs a system that does this once it has started, to its end. Returns its exit and the events of the task.
async fn end_of(does: &str) -> (TaskExit, Vec<String>) {
    let stage = Stage::new();
    let tree = debian_tree(&stage, does, "true");
    let plugin = stage.plugin().await;
    let mut events = plugin.events().await.unwrap();
    let running = stage.start(&plugin, booted(&stage, &tree)).await;
    let exit = running.wait(&plugin).await;
    running.destroy(&plugin).await;
    end(plugin).await;
    let mut seen = Vec::new();
    while let Some(event) = next_event(&mut events).await {
        seen.push(event);
    }
    stage.leave();
    (exit, seen)
}

#[rstest]
#[case::power_off("systemctl --no-block poweroff", "Powering off.")]
#[case::halt("systemctl --no-block halt", "Halting system.")]
#[case::exit("systemctl --no-block exit 0", "Exiting container.")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_system_that_shuts_itself_down_has_succeeded_and_an_event_says_so(
    #[case] does: &str,
    #[case] line: &str,
) {
    let (exit, events) = end_of(does).await;
    assert_eq!((exit.code, exit.signal, &exit.error), (0, 0, &None));
    let event = format!("the system has shut down by itself. The last line of its console: {line}");
    assert_eq!(events, [event]);
}

#[rstest]
#[case::exit("systemctl --no-block exit 7", 7, None)]
#[case::restart(
    "systemctl --no-block reboot",
    133,
    Some("the container has asked for a restart")
)]
#[case::at_once(
    "systemctl -f -f reboot",
    133,
    Some("the container has asked for a restart")
)]
#[case::crash(
    "kill -SEGV 1",
    255,
    Some("the image's init has failed: Caught <SEGV>")
)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_system_that_ends_otherwise_has_failed(
    #[case] does: &str,
    #[case] code: i32,
    #[case] message: Option<&str>,
) {
    let (exit, events) = end_of(does).await;
    assert_eq!((exit.code, exit.signal), (code, 0), "{exit:?}");
    let error = exit.error.as_deref();
    let is_as_expected = match message {
        Some(message) => error.is_some_and(|error| error.starts_with(message)),
        None => error.is_none(),
    };
    assert!(is_as_expected, "{exit:?}");
    assert_eq!(events, Vec::<String>::new());
}

/// The only reason is on its console, because there is no journal yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_init_that_fails_before_its_journal_exists_says_why() {
    let stage = Stage::new();
    let tree = debian_tree(&stage, "true", "true");
    let plugin = stage.plugin().await;
    let task = booted(&stage, &tree).with("command", json!(["--log-target=bogus"]));
    let running = stage.start(&plugin, task).await;
    let exit = running.wait(&plugin).await;
    let message = "the image's init has failed: Failed to parse log target \"bogus\": Invalid argument; \
                   [!!!!!!] Failed to parse commandline arguments.";
    assert_eq!((exit.code, exit.error.as_deref()), (255, Some(message)));
    running.destroy(&plugin).await;
    end(plugin).await;
    stage.leave();
}

/// In the event is the unit's name, and how long it may take.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_unit_that_does_not_stop_is_named_at_half_of_kill_timeout() {
    let stage = Stage::new();
    let tree = debian_tree(&stage, "true", "sleep 600");
    let plugin = stage.plugin().await;
    let mut events = plugin.events().await.unwrap();
    let task = booted(&stage, &tree).with("ready", "notify");
    let running = stage.start(&plugin, task).await;
    let exit = running.stop(&plugin, Duration::from_secs(8), "").await;
    assert_eq!((exit.code, exit.signal), (137, 9), "{exit:?}");
    running.destroy(&plugin).await;
    let event = next_event(&mut events).await.unwrap();
    let begin = "half of kill_timeout is over, and the system has not stopped. \
                 Units that have not stopped: e2e.service. The last it said: ";
    assert!(event.starts_with(begin), "{event}");
    assert!(event.contains("e2e.service/stop running"), "{event}");
    end(plugin).await;
    stage.leave();
}
