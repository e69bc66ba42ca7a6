//! The scenarios. One function each; its name is the promise.

use std::os::unix::fs::PermissionsExt as _;

use nomad_driver_nspawn::cgroup::Group;
use nomad_driver_nspawn::container::{Mount, Process};
use nomad_driver_nspawn::supervisor::process::{Held, children};

use super::*;

pub(crate) use super::exits::*;

const HEARS_TERM: &str = "trap 'echo term; exit 3' TERM; echo up; while :; do sleep 0.05; done";
const DEAF: &str = "trap '' TERM INT; echo up; while :; do sleep 0.05; done";

/// Lists every scenario once; `$each` makes a test of it.
#[macro_export]
macro_rules! scenarios {
    ($each:ident) => {
        $each! {
            a_code_of_0_is_0, a_code_of_42_is_42, a_code_of_255_is_255, a_code_of_a_second_process_is_its_own,
            a_code_of_133_is_told, every_code_is_told, every_signal_is_told, every_fault_is_told, a_core_dump_is_told,
            every_code_is_told_on_an_older_kernel, every_fault_is_told_on_an_older_kernel, stdout_and_stderr_stay_apart, the_environment_arrives_unchanged,
            words_arrive_unchanged, a_command_that_is_not_there_fails_by_name,
            a_command_that_cannot_be_executed_fails_by_name, a_command_that_ends_at_once_has_started,
            many_wait_early_and_late, a_wait_given_up_changes_nothing, a_stop_reaches_a_handler_of_term,
            a_stop_reaches_a_handler_of_int, a_stop_reaches_a_second_process, a_chosen_stop_signal_is_sent,
            a_deaf_payload_is_ended_after_the_grace, no_grace_is_force_at_once, a_stopped_process_is_ended_too,
            what_forked_twice_is_ended_too, a_stop_after_the_end_is_fine, a_signal_reaches_its_handler,
            a_signal_without_a_handler_spares_the_first_process, a_signal_reaches_a_second_process,
            a_killed_payload_is_no_success, removing_ends_what_runs, removing_is_safe_to_repeat, another_backend_finds_it_again,
            an_end_in_the_meantime_is_known, what_was_removed_is_lost, another_boot_is_lost, another_process_is_lost,
            a_killed_supervisor_ends_the_container, a_killed_nspawn_ends_the_container,
            an_nspawn_ended_by_a_real_time_signal_is_noticed, an_identity_mapping_needs_no_mapped_mounts,
            a_read_only_root_without_base_directories_starts, a_tree_that_is_none_is_refused,
            a_mount_without_a_source_is_refused, a_failed_start_can_be_repeated, a_second_start_of_an_id_replaces_the_first,
            several_run_side_by_side, no_output_is_wanted, a_link_for_a_log_is_refused, a_fifo_gets_everything_and_its_end,
            dev_stdout_can_be_opened_anew, an_ephemeral_root_leaves_no_copy, a_read_only_root_needs_no_mount_points,
            usage_can_be_read, a_working_directory_is_where_it_starts, a_listener_that_talks_nonsense_is_dropped,
            what_nobody_claims_is_cleared_away, what_another_backend_started_is_spared, what_was_found_again_is_spared,
            an_end_that_somebody_may_ask_for_is_kept, a_copy_that_nobody_claims_is_cleared_away,
            half_made_starts_are_cleared_away, an_order_that_can_not_be_read_hides_no_container,
            what_the_driver_did_not_make_is_left_alone, nobody_is_mistaken_for_a_process_of_another_boot,
            a_value_of_128_kib_arrives, a_large_environment_arrives, a_name_of_4_kib_arrives,
            more_than_the_kernel_takes_is_refused_with_the_limit, a_value_that_would_be_printed_is_refused_by_name,
            names_that_systemd_reads_arrive,
            a_value_stands_in_no_command_line, a_command_has_three_descriptors, a_command_keeps_the_limit_of_core_dumps,
            a_payload_has_a_group_of_its_own, a_new_session_is_ended_too, a_storm_of_forks_is_ended_too,
            groups_made_below_are_ended_and_removed, a_frozen_payload_is_ended_too, a_container_frozen_as_a_whole_is_ended_too,
            a_container_in_a_freezer_of_version_1_is_ended_too, a_frozen_container_can_be_removed,
            a_stopped_first_process_is_ended_too, a_stopped_second_process_is_ended_too, a_stopped_nspawn_is_ended_too,
            a_stopped_nspawn_hides_no_polite_end, a_stopped_supervisor_still_carries_out_a_stop,
            a_stopped_supervisor_still_passes_signals_on, a_stopped_supervisor_can_be_removed,
            a_stopped_supervisor_is_found_again,
            a_stopped_nspawn_without_a_supervisor_is_ended, a_stop_right_after_the_start_is_carried_out,
            a_signal_right_after_the_start_harms_nobody, two_stops_at_once_end_once, force_overtakes_a_patient_stop,
            an_endless_grace_ends_with_the_task, an_end_during_the_grace_has_its_own_code, a_signal_arrives_as_often_as_it_is_sent,
            signals_during_a_stop_are_no_error, a_payload_is_stopped_and_goes_on, a_signal_to_kill_is_told_as_137,
            a_real_time_signal_reaches_its_handler, a_named_signal_is_sent_though_another_is_handled,
            another_backend_stops_it_politely, a_stop_of_what_was_removed_is_an_error, removing_overtakes_a_patient_stop,
            an_ephemeral_root_that_is_ended_by_force_is_told_once, a_booted_container_has_its_variables_and_is_stopped_in_order,
        }
    };
}

pub(crate) async fn a_code_of_0_is_0(world: World) {
    code(world, Mode::Plain, 0, 0).await;
}

pub(crate) async fn a_code_of_42_is_42(world: World) {
    code(world, Mode::Plain, 42, 42).await;
}

pub(crate) async fn a_code_of_255_is_255(world: World) {
    code(world, Mode::Plain, 255, 255).await;
}

pub(crate) async fn a_code_of_a_second_process_is_its_own(world: World) {
    code(world, Mode::ProcessTwo, 7, 7).await;
}

/// systemd-nspawn has this code for itself and makes 1 of it; the kernel tells the truth from 6.15 on.
pub(crate) async fn a_code_of_133_is_told(world: World) {
    let told = if world.kernel_tells() { 133 } else { 1 };
    code(world, Mode::Plain, 133, told).await;
}

async fn code(world: World, mode: Mode, code: i32, told: i32) {
    let started = world
        .start(ContainerSpec {
            mode,
            ..world.spec(&format!("exit {code}"))
        })
        .await;
    let exit = world.end(&started).await;
    assert_eq!(
        (ended(&exit), exit.oom_killed, exit.error.clone()),
        ((told, 0), false, None)
    );
    world.leave(&[&started]).await;
}

pub(crate) async fn stdout_and_stderr_stay_apart(world: World) {
    let started = world
        .start(world.spec("echo to-out; echo to-err >&2"))
        .await;
    world.end(&started).await;
    assert_eq!(world.said("stdout"), "to-out\n");
    assert!(
        world.said("stderr").starts_with("to-err\n"),
        "{:?}",
        world.said("stderr")
    );
    world.leave(&[&started]).await;
}

const VALUES: [(&str, &str); 6] = [
    ("PLAIN", "x"),
    ("EMPTY", ""),
    ("LINES", "a\nb\n"),
    ("QUOTES", "it's \"so\" \\n"),
    ("EQUALS", "a=b=c"),
    ("WORDS", " a  ü ☃ "),
];

fn values() -> BTreeMap<String, String> {
    let values = VALUES.iter();
    let owned = values.map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    owned.collect()
}

/// What a script says that gets these variables, with a command as the first process and as the second.
async fn says(world: World, environment: BTreeMap<String, String>, script: &str, want: &str) {
    for mode in [Mode::Plain, Mode::ProcessTwo] {
        let started = world
            .start(ContainerSpec {
                mode,
                environment: environment.clone(),
                ..world.named(&format!("{mode:?}").to_lowercase(), script)
            })
            .await;
        world.end(&started).await;
        assert_eq!(world.said("stdout"), want, "{mode:?}");
        within(world.backend.remove(&started.id)).await.unwrap();
        fs::write(world.file("stdout"), "").unwrap();
    }
    world.leave(&[]).await;
}

/// Booted ones: [`a_booted_container_has_its_variables_and_is_stopped_in_order`].
pub(crate) async fn the_environment_arrives_unchanged(world: World) {
    let script = "for n in PLAIN EMPTY LINES QUOTES EQUALS WORDS; do eval printf '%s=%s\\;' $n '\"$'$n'\"'; done; env | grep -c NOMAD_PLUGIN";
    let want: String = VALUES
        .iter()
        .map(|(name, value)| format!("{name}={value};"))
        .collect();
    says(world, values(), script, &format!("{want}0\n")).await;
}

/// The image's init gets them through systemd-nspawn itself, and is asked to end by the signal at which systemd powers off.
pub(crate) async fn a_booted_container_has_its_variables_and_is_stopped_in_order(world: World) {
    // The fake plays an init of its own, and writes down what it was sent.
    let init = world.tree.join("sbin/init");
    fs::create_dir_all(init.parent().unwrap()).unwrap();
    let script = "#!/bin/sh\ntrap 'echo heard; exit 0' 38\nwhile :; do sleep 0.05; done\n";
    fs::write(&init, script).unwrap();
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).unwrap();
    let mut environment = values();
    environment.insert("BIG".to_owned(), longest());
    let started = world
        .start(ContainerSpec {
            mode: Mode::Boot,
            command: Vec::new(),
            environment: environment.clone(),
            ..world.spec("")
        })
        .await;
    let leader = started.leader.pid;
    let ledger = world.scratch.path().join("bin/ledger.jsonl");
    if !ledger.exists() {
        // Until then it may be systemd-nspawn's own child, which is about to become the init.
        world.handles(&started, "SIGRTMIN+4").await;
    }
    within(async {
        let all = |seen: BTreeMap<_, _>| {
            environment
                .iter()
                .all(|(name, value)| seen.get(name) == Some(value))
        };
        while !all(variables(leader)) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    stopped_politely(&world.backend, &started, (0, 0)).await;
    if ledger.exists() {
        let ledger = fs::read_to_string(ledger).unwrap();
        assert!(ledger.contains("\"signal\":38"), "{ledger}");
    } else {
        assert!(world.said("stdout").contains("heard"));
    }
    world.leave(&[&started]).await;
}

/// The environment with which a process was executed last.
fn variables(pid: i32) -> BTreeMap<String, String> {
    let text = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let pairs = text.split_terminator('\0');
    let owned = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
    pairs
        .filter_map(|pair| pair.split_once('=').map(owned))
        .collect()
}

/// The kernel takes 128 KiB with the name, `BIG`, and the end of the string.
fn longest() -> String {
    "x".repeat(128 * 1024 - "BIG=".len() - 1)
}

pub(crate) async fn words_arrive_unchanged(world: World) {
    let words = [
        "two words",
        "",
        "it's",
        "q\"q",
        "$HOME",
        "ü",
        "-x",
        "--",
        "--bind=/etc:/x",
        "%s",
    ];
    let mut spec = world.spec("for a; do printf '<%s>' \"$a\"; done");
    spec.command.push("sh".into());
    spec.command.extend(words.map(String::from));
    let started = world.start(spec).await;
    world.end(&started).await;
    assert_eq!(
        world.said("stdout"),
        words.map(|word| format!("<{word}>")).concat()
    );
    world.leave(&[&started]).await;
}

/// The start is over before the command is executed, so this is an end, not a failed start.
pub(crate) async fn a_command_that_is_not_there_fails_by_name(world: World) {
    for mode in [Mode::Plain, Mode::ProcessTwo] {
        no_command(&world, mode, "/no/such/program", 127).await;
        no_command(&world, mode, "no-such-program", 127).await;
    }
    world.leave(&[]).await;
}

pub(crate) async fn a_command_that_cannot_be_executed_fails_by_name(world: World) {
    for mode in [Mode::Plain, Mode::ProcessTwo] {
        no_command(&world, mode, "/proc/version", 126).await;
        no_command(&world, mode, "/proc", 126).await;
    }
    world.leave(&[]).await;
}

async fn no_command(world: &World, mode: Mode, command: &str, code: i32) {
    let started = world
        .start(ContainerSpec {
            mode,
            command: vec![command.into()],
            ..world.spec("")
        })
        .await;
    let exit = world.end(&started).await;
    assert_eq!(ended(&exit), (code, 0), "{mode:?} {command}");
    let told = exit.error.clone().unwrap_or_default();
    assert!(told.contains(command), "{mode:?}: {told:?}");
    let said = world.said("stderr");
    assert!(said.contains(command), "{mode:?}: {said:?}");
    within(world.backend.remove(&started.id)).await.unwrap();
}

pub(crate) async fn a_command_that_ends_at_once_has_started(world: World) {
    let started = world
        .start(ContainerSpec {
            command: vec!["/bin/true".into()],
            ..world.spec("")
        })
        .await;
    assert!(started.leader.pid > 0);
    assert_eq!(ended(&world.end(&started).await), (0, 0));
    world.leave(&[&started]).await;
}

pub(crate) async fn many_wait_early_and_late(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    let wait = || world.end(&started);
    // All of them wait before the stop is asked for: a join polls in this order.
    let stop = world.backend.stop(&started, Some(signal("TERM")), AMPLE);
    let (first, second, third, stopped) =
        within(async { tokio::join!(wait(), wait(), wait(), stop) }).await;
    stopped.unwrap();
    let late = wait().await;
    assert_eq!(ended(&late), (3, 0));
    for early in [first, second, third] {
        assert_eq!(early, late);
    }
    world.leave(&[&started]).await;
}

pub(crate) async fn a_wait_given_up_changes_nothing(world: World) {
    let started = world.start(world.spec(HEARS_TERM)).await;
    let given_up =
        tokio::time::timeout(Duration::from_millis(50), world.backend.wait(&started)).await;
    assert!(given_up.is_err());
    assert!(is_alive(started.leader));
    world.leave(&[&started]).await;
}

pub(crate) async fn a_stop_reaches_a_handler_of_term(world: World) {
    stopped(world, Mode::Plain, HEARS_TERM, "TERM", None, (3, 0)).await;
}

pub(crate) async fn a_stop_reaches_a_handler_of_int(world: World) {
    stopped(
        world,
        Mode::Plain,
        "trap 'exit 4' INT; echo up; while :; do sleep 0.05; done",
        "INT",
        None,
        (4, 0),
    )
    .await;
}

pub(crate) async fn a_stop_reaches_a_second_process(world: World) {
    stopped(world, Mode::ProcessTwo, HEARS_TERM, "TERM", None, (3, 0)).await;
}

pub(crate) async fn a_chosen_stop_signal_is_sent(world: World) {
    stopped(
        world,
        Mode::Plain,
        "trap 'exit 6' USR1; trap '' TERM INT; echo up; while :; do sleep 0.05; done",
        "USR1",
        Some("SIGUSR1"),
        (6, 0),
    )
    .await;
}

async fn stopped(
    world: World,
    mode: Mode,
    script: &str,
    handled: &str,
    with: Option<&str>,
    want: (i32, i32),
) {
    let started = world
        .up(ContainerSpec {
            mode,
            ..world.spec(script)
        })
        .await;
    if mode == Mode::Plain {
        world.handles(&started, handled).await;
    }
    within(world.backend.stop(&started, with.map(signal), AMPLE))
        .await
        .unwrap();
    assert_eq!(ended(&world.end(&started).await), want);
    world.leave(&[&started]).await;
}

pub(crate) async fn a_deaf_payload_is_ended_after_the_grace(world: World) {
    for mode in [Mode::Plain, Mode::ProcessTwo] {
        let started = world
            .up(ContainerSpec {
                mode,
                ..world.named(&format!("{mode:?}").to_lowercase(), DEAF)
            })
            .await;
        within(
            world
                .backend
                .stop(&started, None, Duration::from_millis(100)),
        )
        .await
        .unwrap();
        assert_eq!(ended(&world.end(&started).await), (137, 9));
        assert!(!is_alive(started.leader));
        within(world.backend.remove(&started.id)).await.unwrap();
        fs::write(world.file("stdout"), "").unwrap();
    }
    world.leave(&[]).await;
}

pub(crate) async fn no_grace_is_force_at_once(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    within(world.backend.stop(&started, None, Duration::ZERO))
        .await
        .unwrap();
    assert_eq!(ended(&world.end(&started).await), (137, 9));
    assert!(!world.said("stdout").contains("term"), "the handler ran");
    world.leave(&[&started]).await;
}

pub(crate) async fn a_stopped_process_is_ended_too(world: World) {
    let started = world
        .up(world.spec("trap '' TERM INT; sleep 600 & kill -STOP $!; echo up; wait"))
        .await;
    let inner = offspring(started.leader.pid);
    assert!(!inner.is_empty());
    within(
        world
            .backend
            .stop(&started, None, Duration::from_millis(50)),
    )
    .await
    .unwrap();
    assert!(
        inner.iter().all(|held| held.wait(LIMIT)),
        "a stopped process lives on"
    );
    world.leave(&[&started]).await;
}

pub(crate) async fn what_forked_twice_is_ended_too(world: World) {
    let started = world
        .up(world.spec(
            "(sleep 600 & sleep 601 &) ; trap '' TERM INT; echo up; while :; do sleep 0.05; done",
        ))
        .await;
    let inner = offspring(started.leader.pid);
    within(
        world
            .backend
            .stop(&started, None, Duration::from_millis(50)),
    )
    .await
    .unwrap();
    assert!(
        inner.iter().all(|held| held.wait(LIMIT)),
        "a grandchild lives on"
    );
    world.leave(&[&started]).await;
}

/// Everything below a leader, held so that its end can be seen.
fn offspring(leader: i32) -> Vec<Held> {
    let mut pending = children(leader);
    let mut found = Vec::new();
    while let Some(pid) = pending.pop() {
        pending.extend(children(pid));
        found.extend(Held::by_pid(pid).ok());
    }
    found
}

pub(crate) async fn a_stop_after_the_end_is_fine(world: World) {
    let started = world.start(world.spec("exit 9")).await;
    world.end(&started).await;
    within(world.backend.stop(&started, None, AMPLE))
        .await
        .unwrap();
    within(world.backend.signal(&started, signal("TERM")))
        .await
        .unwrap();
    assert_eq!(ended(&world.end(&started).await), (9, 0));
    world.leave(&[&started]).await;
}

pub(crate) async fn a_signal_reaches_its_handler(world: World) {
    let started = world.up(world.spec("trap 'echo hup' HUP; trap 'echo usr; exit 8' USR2; echo up; while :; do sleep 0.05; done")).await;
    within(world.backend.signal(&started, signal("SIGHUP")))
        .await
        .unwrap();
    world.heard("hup").await;
    assert!(is_alive(started.leader));
    within(world.backend.signal(&started, signal("SIGUSR2")))
        .await
        .unwrap();
    assert_eq!(ended(&world.end(&started).await), (8, 0));
    world.leave(&[&started]).await;
}

/// The kernel shields the first process of a pid namespace from signals it has no handler for.
pub(crate) async fn a_signal_without_a_handler_spares_the_first_process(world: World) {
    let started = world
        .up(world.spec("trap 'echo hup' HUP; echo up; while :; do sleep 0.05; done"))
        .await;
    within(world.backend.signal(&started, signal("SIGUSR1")))
        .await
        .unwrap();
    within(world.backend.signal(&started, signal("SIGHUP")))
        .await
        .unwrap();
    world.heard("hup").await;
    assert!(is_alive(started.leader));
    world.leave(&[&started]).await;
}

pub(crate) async fn a_signal_reaches_a_second_process(world: World) {
    let script = "trap 'echo got; exit 11' USR1; echo up; while :; do sleep 0.05; done";
    let started = world
        .up(ContainerSpec {
            mode: Mode::ProcessTwo,
            ..world.spec(script)
        })
        .await;
    within(world.backend.signal(&started, signal("SIGUSR1")))
        .await
        .unwrap();
    assert_eq!(ended(&world.end(&started).await), (11, 0));
    world.leave(&[&started]).await;
}

pub(crate) async fn a_killed_payload_is_no_success(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    strike(started.leader.pid, Signal::KILL);
    let exit = world.end(&started).await;
    assert_ne!(exit.code, 0);
    world.leave(&[&started]).await;
}

pub(crate) async fn removing_ends_what_runs(world: World) {
    let started = world.up(world.spec(DEAF)).await;
    world.leave(&[&started]).await;
}

pub(crate) async fn removing_is_safe_to_repeat(world: World) {
    let started = world.start(world.spec("exit 0")).await;
    world.end(&started).await;
    for _ in 0..3 {
        within(world.backend.remove(&started.id)).await.unwrap();
    }
    within(world.backend.remove("never/was/there"))
        .await
        .unwrap();
    world.leave(&[&started]).await;
}

pub(crate) async fn another_backend_finds_it_again(world: World) {
    found_again(world, |_| {}).await;
}

pub(crate) async fn a_stopped_supervisor_is_found_again(world: World) {
    found_again(world, |started| {
        strike(started.supervisor.pid, signal("SIGSTOP"));
    })
    .await;
}

/// By another backend, after what happens in the meantime.
async fn found_again(world: World, meanwhile: impl FnOnce(&Started)) {
    let started = world
        .up(world.spec("trap 'exit 12' USR1; echo up; while :; do sleep 0.05; done"))
        .await;
    meanwhile(&started);
    let other = NspawnBackend::new(world.settings.clone());
    assert_eq!(within(other.attach(&started)).await.unwrap(), started);
    assert_eq!(
        within(other.attach(&started)).await.unwrap(),
        started,
        "attaching twice"
    );
    within(other.signal(&started, signal("SIGUSR1")))
        .await
        .unwrap();
    assert_eq!(ended(&within(other.wait(&started)).await.unwrap()), (12, 0));
    assert_eq!(
        ended(&world.end(&started).await),
        (12, 0),
        "the first one hears it too"
    );
    world.leave(&[&started]).await;
}

pub(crate) async fn an_end_in_the_meantime_is_known(world: World) {
    let started = world.start(world.spec("exit 13")).await;
    world.end(&started).await;
    let other = NspawnBackend::new(world.settings.clone());
    within(other.attach(&started)).await.unwrap();
    assert_eq!(ended(&within(other.wait(&started)).await.unwrap()), (13, 0));
    world.leave(&[&started]).await;
}

pub(crate) async fn what_was_removed_is_lost(world: World) {
    let started = world.start(world.spec("exit 0")).await;
    within(world.backend.remove(&started.id)).await.unwrap();
    lost(&world, &started).await;
    world.leave(&[&started]).await;
}

pub(crate) async fn another_boot_is_lost(world: World) {
    let started = world.start(world.spec(HEARS_TERM)).await;
    lost(
        &world,
        &Started {
            boot: "00000000-0000-0000-0000-000000000000".into(),
            ..started.clone()
        },
    )
    .await;
    assert!(is_alive(started.leader), "what was not meant was touched");
    world.leave(&[&started]).await;
}

pub(crate) async fn another_process_is_lost(world: World) {
    let started = world.start(world.spec(HEARS_TERM)).await;
    let leader = Process {
        start: started.leader.start + 1,
        ..started.leader
    };
    lost(
        &world,
        &Started {
            leader,
            ..started.clone()
        },
    )
    .await;
    lost(
        &world,
        &Started {
            id: "another/one/2".into(),
            ..started.clone()
        },
    )
    .await;
    assert!(is_alive(started.leader), "what was not meant was touched");
    world.leave(&[&started]).await;
}

async fn lost(world: &World, started: &Started) {
    let other = NspawnBackend::new(world.settings.clone());
    let error = within(other.attach(started)).await.unwrap_err();
    assert!(matches!(error, BackendError::Lost { .. }), "{error:?}");
    assert!(!error.is_transient());
}

pub(crate) async fn a_killed_supervisor_ends_the_container(world: World) {
    let started = world.up(world.spec(DEAF)).await;
    strike(started.supervisor.pid, Signal::KILL);
    let exit = world.end(&started).await;
    assert_ne!(exit.code, 0);
    assert!(
        exit.error
            .as_ref()
            .is_some_and(|text| text.contains("supervisor")),
        "{exit:?}"
    );
    assert!(!is_alive(started.leader), "the container runs on unwatched");
    world.leave(&[&started]).await;
}

pub(crate) async fn a_killed_nspawn_ends_the_container(world: World) {
    nspawn_struck_by(world, "SIGKILL").await;
}

/// Up to 252 the signal by which systemd lowers a log level ends systemd-nspawn.
pub(crate) async fn an_nspawn_ended_by_a_real_time_signal_is_noticed(world: World) {
    nspawn_struck_by(world, "SIGRTMIN+25").await;
}

async fn nspawn_struck_by(world: World, name: &str) {
    let started = world.up(world.spec(DEAF)).await;
    let nspawn = Records::at(&started.state).running().unwrap().nspawn;
    strike(nspawn.pid, signal(name));
    let exit = world.end(&started).await;
    let number = signal(name).number();
    assert_eq!(ended(&exit), (128 + number, number));
    assert!(
        exit.error
            .as_ref()
            .is_some_and(|text| text.contains("systemd-nspawn")),
        "{exit:?}"
    );
    assert!(!is_alive(started.leader), "the container runs on unwatched");
    world.leave(&[&started]).await;
}

pub(crate) async fn a_tree_that_is_none_is_refused(world: World) {
    let empty = world.scratch.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let error = world
        .refused(ContainerSpec {
            root: Root::Directory(empty),
            ..world.spec("exit 0")
        })
        .await;
    assert!(matches!(error, BackendError::Start { .. }), "{error:?}");
    assert!(error.to_string().contains("status 1"), "{error}");
    assert!(!error.is_transient());
    world.leave(&[]).await;
}

pub(crate) async fn a_mount_without_a_source_is_refused(world: World) {
    let mounts = vec![Mount {
        source: world.scratch.path().join("none"),
        target: "/mnt".into(),
        read_only: false,
    }];
    let error = world
        .refused(ContainerSpec {
            mounts,
            ..world.spec("exit 0")
        })
        .await;
    assert!(matches!(error, BackendError::Start { .. }), "{error:?}");
    world.leave(&[]).await;
}

pub(crate) async fn a_failed_start_can_be_repeated(world: World) {
    let empty = world.scratch.path().join("empty");
    fs::create_dir(&empty).unwrap();
    world
        .refused(ContainerSpec {
            root: Root::Directory(empty),
            ..world.spec("exit 0")
        })
        .await;
    let started = world.start(world.spec("exit 14")).await;
    assert_eq!(ended(&world.end(&started).await), (14, 0));
    world.leave(&[&started]).await;
}

/// As after a plugin that died between the start and its answer: Nomad asks again with the same id.
pub(crate) async fn a_second_start_of_an_id_replaces_the_first(world: World) {
    let first = world.up(world.spec(DEAF)).await;
    let other = NspawnBackend::new(world.settings.clone());
    let second = within(other.start(world.spec("exit 15"))).await.unwrap();
    assert!(!is_alive(first.leader), "the first one lives on");
    assert_eq!(ended(&within(other.wait(&second)).await.unwrap()), (15, 0));
    world.leave(&[&second]).await;
}

pub(crate) async fn several_run_side_by_side(world: World) {
    let mut all = Vec::new();
    for number in 0..5 {
        let mut spec = world.named(
            &format!("t{number}"),
            &format!("trap 'exit {number}' TERM; echo up{number}; while :; do sleep 0.05; done"),
        );
        spec.volatile = Volatile::Overlay;
        all.push(world.start(spec).await);
    }
    for (number, started) in (0..).zip(&all) {
        world.heard(&format!("up{number}")).await;
        within(world.backend.stop(started, Some(signal("TERM")), AMPLE))
            .await
            .unwrap();
        assert_eq!(ended(&world.end(started).await), (number, 0));
    }
    world.leave(&Vec::from_iter(&all)).await;
}

pub(crate) async fn no_output_is_wanted(world: World) {
    let missing = world.scratch.path().join("missing");
    let started = world
        .start(ContainerSpec {
            stdout: None,
            stderr: Some(missing),
            ..world.spec("echo x; echo y >&2; exit 16")
        })
        .await;
    assert_eq!(ended(&world.end(&started).await), (16, 0));
    world.leave(&[&started]).await;
}

/// The directory of the logs is open to the task: what lies there may have been replaced.
pub(crate) async fn a_link_for_a_log_is_refused(world: World) {
    let link = world.scratch.path().join("link");
    let elsewhere = world.file("elsewhere");
    std::os::unix::fs::symlink(&elsewhere, &link).unwrap();
    let error = world
        .refused(ContainerSpec {
            stdout: Some(link),
            ..world.spec("echo x")
        })
        .await;
    assert!(error.to_string().contains("log"), "{error}");
    assert_eq!(fs::read_to_string(elsewhere).unwrap(), "");
    world.leave(&[]).await;
}

pub(crate) async fn a_fifo_gets_everything_and_its_end(world: World) {
    let fifo = fifo(&world);
    let reader = read_all(fifo.clone());
    let script = "i=0; while [ $i -lt 2000 ]; do i=$((i+1)); echo line-$i; done; printf last";
    let started = world
        .start(ContainerSpec {
            stdout: Some(fifo),
            ..world.spec(script)
        })
        .await;
    world.end(&started).await;
    let text = within(reader).await.unwrap();
    let want: String = (1..=2000)
        .map(|number| format!("line-{number}\n"))
        .collect();
    assert_eq!(text, format!("{want}last"));
    world.leave(&[&started]).await;
}

/// As web servers do it for their logs.
pub(crate) async fn dev_stdout_can_be_opened_anew(world: World) {
    let fifo = fifo(&world);
    let reader = read_all(fifo.clone());
    let script = "echo first; echo second > /proc/self/fd/1; echo third";
    let started = world
        .start(ContainerSpec {
            stdout: Some(fifo),
            ..world.spec(script)
        })
        .await;
    assert_eq!(ended(&world.end(&started).await), (0, 0));
    assert_eq!(within(reader).await.unwrap(), "first\nsecond\nthird\n");
    world.leave(&[&started]).await;
}

fn fifo(world: &World) -> PathBuf {
    let path = world.scratch.path().join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    path
}

/// Reads a FIFO to its end, as Nomad's log collector does.
fn read_all(path: PathBuf) -> tokio::task::JoinHandle<String> {
    tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        let mut file = fs::OpenOptions::new().read(true).open(path).unwrap();
        std::io::Read::read_to_string(&mut file, &mut text).unwrap();
        text
    })
}

pub(crate) async fn an_ephemeral_root_leaves_no_copy(world: World) {
    let started = world
        .up(ContainerSpec {
            ephemeral: true,
            ..world.spec(DEAF)
        })
        .await;
    within(world.backend.stop(&started, None, Duration::ZERO))
        .await
        .unwrap();
    world.leave(&[&started]).await;
}

/// systemd-nspawn makes missing mount points in the image, and fails where it can't.
pub(crate) async fn a_read_only_root_needs_no_mount_points(world: World) {
    let inside = world.scratch.path().join("inside");
    fs::create_dir(&inside).unwrap();
    let mounts = vec![Mount {
        source: inside,
        target: "/no/such/place".into(),
        read_only: false,
    }];
    let started = world
        .start(ContainerSpec {
            read_only: true,
            mounts,
            ..world.spec("exit 17")
        })
        .await;
    assert_eq!(ended(&world.end(&started).await), (17, 0));
    assert!(!world.tree.join("no").exists(), "the image was written");
    world.leave(&[&started]).await;
}

pub(crate) async fn usage_can_be_read(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    let usage = within(world.backend.usage(&started)).await.unwrap();
    let told = usage.cpu_user_ns.is_some() && usage.memory_rss.is_some_and(|bytes| bytes > 0);
    assert_eq!(told, started.cgroup.is_some(), "{usage:?}");
    world.leave(&[&started]).await;
}

pub(crate) async fn a_working_directory_is_where_it_starts(world: World) {
    let started = world
        .start(ContainerSpec {
            working_directory: Some("/usr".into()),
            ..world.spec("basename $(pwd)")
        })
        .await;
    world.end(&started).await;
    assert_eq!(world.said("stdout"), "usr\n");
    world.leave(&[&started]).await;
}

pub(crate) async fn a_listener_that_talks_nonsense_is_dropped(world: World) {
    use std::io::{Read, Write};
    let started = world
        .up(world.spec("trap 'exit 18' TERM; echo up; while :; do sleep 0.05; done"))
        .await;
    let lifeline = Records::at(&started.state).lifeline();
    let dropped = tokio::task::spawn_blocking(move || {
        let mut stream = std::os::unix::net::UnixStream::connect(lifeline).unwrap();
        stream.write_all(b"\x00\xff{\"verb\":\n\n").unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
    });
    within(dropped).await.unwrap();
    within(world.backend.stop(&started, Some(signal("TERM")), AMPLE))
        .await
        .unwrap();
    assert_eq!(ended(&world.end(&started).await), (18, 0));
    world.leave(&[&started]).await;
}

/// Ids are the same inside and outside: there is nothing to map, and the kernel refuses to.
pub(crate) async fn an_identity_mapping_needs_no_mapped_mounts(world: World) {
    let source = world.scratch.path().join("inside");
    fs::create_dir(&source).unwrap();
    let mounts = vec![Mount {
        source,
        target: "/mnt".into(),
        read_only: false,
    }];
    let users = Users::Private {
        range: "identity".into(),
        ownership: None,
    };
    let started = world
        .start(ContainerSpec {
            users,
            mounts,
            ..world.spec("exit 19")
        })
        .await;
    assert_eq!(ended(&world.end(&started).await), (19, 0));
    world.leave(&[&started]).await;
}

/// systemd-nspawn mounts over some directories of every tree, and fails where it can neither find nor make them.
pub(crate) async fn a_read_only_root_without_base_directories_starts(world: World) {
    for base in ["dev", "proc", "run", "sys", "tmp"] {
        let _ = fs::remove_dir_all(world.tree.join(base));
    }
    let started = world
        .start(ContainerSpec {
            read_only: true,
            ..world.spec("exit 20")
        })
        .await;
    assert_eq!(ended(&world.end(&started).await), (20, 0));
    world.leave(&[&started]).await;
}

/// A backend whose process has died, as far as claims go: nobody holds them any more.
async fn abandoned(world: &World, spec: ContainerSpec) -> Started {
    let dead = NspawnBackend::new(world.settings.clone());
    within(dead.start(spec)).await.unwrap()
}

fn is_cleared(started: &Started) -> bool {
    !started.state.exists() && !is_alive(started.leader) && !is_alive(started.supervisor)
}

/// Reconciles until all of these are cleared away. A process that is just being started for another scenario has the dead backend's
/// claims too until its own program runs; what looks claimed is left for the next plugin.
async fn cleared(world: &World, all: &[&Started]) {
    within(async {
        while !all.iter().all(|started| is_cleared(started)) {
            world.backend.reconcile().await;
        }
    })
    .await;
}

pub(crate) async fn what_nobody_claims_is_cleared_away(world: World) {
    let beside = |task: &str, script: &str| ContainerSpec {
        volatile: Volatile::Overlay,
        ..world.named(task, script)
    };
    let deaf = abandoned(&world, beside("deaf", DEAF)).await;
    world.heard("up").await;
    let over = abandoned(&world, beside("over", "exit 1")).await;
    cleared(&world, &[&deaf, &over]).await;
    within(world.backend.reconcile()).await;
    let next = world.start(world.spec("exit 21")).await;
    assert_eq!(ended(&world.end(&next).await), (21, 0));
    world.leave(&[&deaf, &over, &next]).await;
}

pub(crate) async fn what_another_backend_started_is_spared(world: World) {
    let started = world.start(world.spec(HEARS_TERM)).await;
    world.heard("up").await;
    let other = NspawnBackend::new(world.settings.clone());
    within(other.reconcile()).await;
    within(world.backend.reconcile()).await;
    within(world.backend.stop(&started, Some(signal("TERM")), AMPLE))
        .await
        .unwrap();
    assert_eq!(ended(&world.end(&started).await), (3, 0));
    world.leave(&[&started]).await;
}

pub(crate) async fn what_was_found_again_is_spared(world: World) {
    let started = abandoned(&world, world.spec(HEARS_TERM)).await;
    world.heard("up").await;
    within(world.backend.attach(&started)).await.unwrap();
    let other = NspawnBackend::new(world.settings.clone());
    within(other.reconcile()).await;
    within(world.backend.stop(&started, Some(signal("TERM")), AMPLE))
        .await
        .unwrap();
    assert_eq!(ended(&world.end(&started).await), (3, 0));
    world.leave(&[&started]).await;
}

pub(crate) async fn an_end_that_somebody_may_ask_for_is_kept(world: World) {
    let started = world.start(world.spec("exit 22")).await;
    world.end(&started).await;
    let other = NspawnBackend::new(world.settings.clone());
    within(other.reconcile()).await;
    within(other.attach(&started)).await.unwrap();
    assert_eq!(ended(&within(other.wait(&started)).await.unwrap()), (22, 0));
    world.leave(&[&started]).await;
}

pub(crate) async fn a_copy_that_nobody_claims_is_cleared_away(world: World) {
    let spec = ContainerSpec {
        ephemeral: true,
        ..world.spec(DEAF)
    };
    let started = abandoned(&world, spec).await;
    world.heard("up").await;
    cleared(&world, &[&started]).await;
    world.leave(&[&started]).await;
}

/// What a plugin leaves that is killed before it has started the supervisor.
pub(crate) async fn half_made_starts_are_cleared_away(world: World) {
    let bare = world.records("bare");
    bare.create().unwrap();
    let secret = world.records("secret");
    secret.create().unwrap();
    fs::write(secret.path().join("environment.new"), "{").unwrap();
    let started = world.start(world.spec("exit 0")).await;
    world.end(&started).await;
    let ordered = world.copied(&started, "ordered", |_| {});
    fs::remove_file(ordered.path().join("running")).unwrap();
    fs::remove_file(ordered.path().join("exit")).unwrap();
    within(world.backend.reconcile()).await;
    for records in [bare, secret, ordered] {
        assert!(!records.path().exists(), "{}", records.path().display());
    }
    assert!(started.state.exists());
    world.leave(&[&started]).await;
}

pub(crate) async fn an_order_that_can_not_be_read_hides_no_container(world: World) {
    let started = abandoned(&world, world.spec(DEAF)).await;
    world.heard("up").await;
    fs::write(started.state.join("order"), "{\"id\":").unwrap();
    cleared(&world, &[&started]).await;
    world.leave(&[&started]).await;
}

pub(crate) async fn what_the_driver_did_not_make_is_left_alone(world: World) {
    use std::os::unix::fs::symlink;
    let started = world.start(world.spec("exit 0")).await;
    let state = &world.settings.state_dir;
    let elsewhere = world.scratch.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::write(elsewhere.join("order"), "{}").unwrap();
    let strange = world.records("strange");
    strange.create().unwrap();
    let link = world.records("link").path().to_owned();
    symlink(&elsewhere, &link).unwrap();
    let foreign = [
        state.join("note"),
        state.join("else/deep"),
        strange.path().join("order.old"),
        elsewhere.join("order"),
    ];
    fs::create_dir(state.join("else")).unwrap();
    for path in &foreign {
        fs::write(path, "{}").unwrap();
    }
    // An order that would have something foreign removed.
    let hostile = world.copied(&started, "hostile", |order| {
        order["machine"] = "../../../../tmp".into();
    });
    within(world.backend.reconcile()).await;
    for path in foreign.iter().chain([&link]) {
        assert!(path.symlink_metadata().is_ok(), "{}", path.display());
    }
    assert!(hostile.path().join("order").exists());
    fs::remove_file(link).unwrap();
    fs::remove_file(state.join("note")).unwrap();
    for directory in [&state.join("else"), strange.path(), hostile.path()] {
        fs::remove_dir_all(directory).unwrap();
    }
    world.leave(&[&started]).await;
}

/// The same pid with the same start time may be somebody else after a reboot.
pub(crate) async fn nobody_is_mistaken_for_a_process_of_another_boot(world: World) {
    let innocent = world.start(world.spec(HEARS_TERM)).await;
    world.heard("up").await;
    let old = |task: &str| {
        world.copied(&innocent, task, |value| {
            let boot = "00000000-0000-0000-0000-000000000000";
            if value.get("started").is_some() {
                value["started"]["boot"] = boot.into();
            } else {
                value["boot"] = boot.into();
                value["place"] = serde_json::Value::Null;
                value["locks"] = serde_json::Value::Null;
            }
        })
    };
    let (reconciled, removed) = (old("reconciled"), old("removed"));
    let found = Started {
        id: world.named("removed", "").id,
        state: removed.path().to_owned(),
        boot: removed.order().unwrap().boot,
        ..innocent.clone()
    };
    lost(&world, &found).await;
    within(world.backend.remove(&found.id)).await.unwrap();
    assert!(!removed.path().exists());
    within(world.backend.reconcile()).await;
    assert!(!reconciled.path().exists());
    for process in [innocent.leader, innocent.supervisor] {
        assert!(is_alive(process), "another one was ended");
    }
    within(world.backend.stop(&innocent, Some(signal("TERM")), AMPLE))
        .await
        .unwrap();
    assert_eq!(ended(&world.end(&innocent).await), (3, 0));
    world.leave(&[&innocent]).await;
}

/// By it a stop finds everything at once.
pub(crate) async fn a_payload_has_a_group_of_its_own(world: World) {
    let started = world.up(world.spec(DEAF)).await;
    let inner = offspring(started.leader.pid);
    if let Some(group) = &started.cgroup {
        let payload = Group::new(group).child("payload").processes();
        assert!(payload.contains(&started.leader.pid), "{payload:?}");
        let nspawn = Records::at(&started.state).running().unwrap().nspawn;
        assert!(!payload.contains(&nspawn.pid), "{payload:?}");
    }
    ended_by_force(&world, &started, inner).await;
    world.leave(&[&started]).await;
}

/// Force after a short grace, which ends all of these processes.
async fn ended_by_force(world: &World, started: &Started, inner: Vec<Held>) {
    let grace = Duration::from_millis(50);
    within(world.backend.stop(started, None, grace))
        .await
        .unwrap();
    assert_eq!(ended(&world.end(started).await), (137, 9));
    assert!(inner.iter().all(|held| held.wait(LIMIT)), "one lives on");
}

pub(crate) async fn a_new_session_is_ended_too(world: World) {
    let script = "setsid sh -c 'trap \"\" TERM HUP; sleep 600 & setsid sleep 601 & wait' & trap '' TERM INT; echo up; while :; do sleep 0.05; done";
    let started = world.up(world.spec(script)).await;
    let inner = offspring(started.leader.pid);
    assert!(!inner.is_empty());
    ended_by_force(&world, &started, inner).await;
    world.leave(&[&started]).await;
}

/// Faster than a list of them can be read.
pub(crate) async fn a_storm_of_forks_is_ended_too(world: World) {
    let script = "trap '' TERM INT; i=0; while [ $i -lt 20 ]; do (while :; do (:); done) & i=$((i+1)); done; echo up; wait";
    let started = world.up(world.spec(script)).await;
    let inner = offspring(started.leader.pid);
    assert!(inner.len() >= 20);
    ended_by_force(&world, &started, inner).await;
    world.leave(&[&started]).await;
}

/// As a payload makes them that runs containers of its own.
pub(crate) async fn groups_made_below_are_ended_and_removed(world: World) {
    let started = world
        .up(world.spec("sleep 600 & trap '' TERM INT; echo up; while :; do sleep 0.05; done"))
        .await;
    let inner = offspring(started.leader.pid);
    if let Some(group) = &started.cgroup {
        let below = Group::new(group).child("payload").child("a").child("b");
        below.create().unwrap();
        let moved = inner.iter().map(|held| held.process().pid.to_string());
        let moved = moved.filter(|pid| fs::write(below.path().join("cgroup.procs"), pid).is_ok());
        assert!(moved.count() > 0, "nobody could be moved");
    }
    ended_by_force(&world, &started, inner).await;
    world.leave(&[&started]).await;
}

pub(crate) async fn a_frozen_payload_is_ended_too(world: World) {
    let started = world.up(world.spec(DEAF)).await;
    freeze(&started, "payload/cgroup.freeze").await;
    let inner = offspring(started.leader.pid);
    ended_by_force(&world, &started, inner).await;
    world.leave(&[&started]).await;
}

/// systemd-nspawn among it, which could not clear up.
pub(crate) async fn a_container_frozen_as_a_whole_is_ended_too(world: World) {
    let started = world.up(world.spec(DEAF)).await;
    freeze(&started, "cgroup.freeze").await;
    let inner = offspring(started.leader.pid);
    ended_by_force(&world, &started, inner).await;
    world.leave(&[&started]).await;
}

pub(crate) async fn a_frozen_container_can_be_removed(world: World) {
    let started = world.up(world.spec(DEAF)).await;
    freeze(&started, "cgroup.freeze").await;
    world.leave(&[&started]).await;
}

/// Freezes a group of the container. Who is not root has made none, and then there is nothing to hinder the stop.
async fn freeze(started: &Started, file: &str) {
    let Some(group) = &started.cgroup else {
        assert!(!nix::unistd::geteuid().is_root(), "it has no group");
        return;
    };
    let file = group.join(file);
    fs::write(&file, "1").unwrap();
    let events = file.with_file_name("cgroup.events");
    within(async {
        while !fs::read_to_string(&events).unwrap().contains("frozen 1") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// A process in it takes not even SIGKILL. Where the host has no such freezer, or not for this user, there is nothing to hinder the
/// stop.
pub(crate) async fn a_container_in_a_freezer_of_version_1_is_ended_too(world: World) {
    let started = world.up(world.spec(DEAF)).await;
    let nspawn = Records::at(&started.state).running().unwrap().nspawn;
    let inner = offspring(started.leader.pid);
    let top = Path::new("/sys/fs/cgroup/freezer");
    let freezer = top.join(&started.machine);
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let is_freezer = |line: &str| {
        let mut words = line.split(' ').skip(1);
        words.next() == top.to_str() && words.next() == Some("cgroup")
    };
    let frozen = nix::unistd::geteuid().is_root() && mounts.lines().any(is_freezer);
    if frozen {
        fs::create_dir(&freezer).unwrap();
        for pid in [nspawn.pid, started.leader.pid] {
            fs::write(freezer.join("cgroup.procs"), pid.to_string()).unwrap();
        }
        fs::write(freezer.join("freezer.state"), "FROZEN").unwrap();
        within(async {
            while fs::read_to_string(freezer.join("freezer.state")).unwrap() != "FROZEN\n" {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }
    ended_by_force(&world, &started, inner).await;
    if frozen {
        let state = fs::read_to_string(freezer.join("freezer.state")).unwrap();
        assert_eq!(state, "FROZEN\n", "a group of somebody else was changed");
        fs::remove_dir(&freezer).unwrap();
    }
    world.leave(&[&started]).await;
}

pub(crate) async fn a_stopped_first_process_is_ended_too(world: World) {
    let started = world.up(world.spec(DEAF)).await;
    strike(started.leader.pid, signal("SIGSTOP"));
    let inner = offspring(started.leader.pid);
    ended_by_force(&world, &started, inner).await;
    world.leave(&[&started]).await;
}

pub(crate) async fn a_stopped_second_process_is_ended_too(world: World) {
    let started = world
        .up(ContainerSpec {
            mode: Mode::ProcessTwo,
            ..world.spec(DEAF)
        })
        .await;
    within(world.backend.signal(&started, signal("SIGSTOP")))
        .await
        .unwrap();
    let inner = offspring(started.leader.pid);
    ended_by_force(&world, &started, inner).await;
    world.leave(&[&started]).await;
}

pub(crate) async fn a_stopped_nspawn_is_ended_too(world: World) {
    let started = world.up(world.spec(DEAF)).await;
    let nspawn = Records::at(&started.state).running().unwrap().nspawn;
    strike(nspawn.pid, signal("SIGSTOP"));
    let inner = offspring(started.leader.pid);
    ended_by_force(&world, &started, inner).await;
    world.leave(&[&started]).await;
}

/// It has to go on to notice the end.
pub(crate) async fn a_stopped_nspawn_hides_no_polite_end(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    world.handles(&started, "TERM").await;
    let nspawn = Records::at(&started.state).running().unwrap().nspawn;
    strike(nspawn.pid, signal("SIGSTOP"));
    stopped_politely(&world.backend, &started, (3, 0)).await;
    world.leave(&[&started]).await;
}

/// With a grace that never ends, so that only the payload itself can have ended it.
async fn stopped_politely(backend: &NspawnBackend, started: &Started, want: (i32, i32)) {
    within(backend.stop(started, None, Duration::MAX))
        .await
        .unwrap();
    let exit = within(backend.wait(started)).await.unwrap();
    assert_eq!((ended(&exit), &exit.error), (want, &None));
}

pub(crate) async fn a_stopped_supervisor_still_carries_out_a_stop(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    world.handles(&started, "TERM").await;
    strike(started.supervisor.pid, signal("SIGSTOP"));
    stopped_politely(&world.backend, &started, (3, 0)).await;
    world.leave(&[&started]).await;
}

pub(crate) async fn a_stopped_supervisor_still_passes_signals_on(world: World) {
    let started = world
        .up(world.spec("trap 'echo usr' USR1; echo up; while :; do sleep 0.05; done"))
        .await;
    world.handles(&started, "USR1").await;
    strike(started.supervisor.pid, signal("SIGSTOP"));
    within(world.backend.signal(&started, signal("SIGUSR1")))
        .await
        .unwrap();
    world.heard("usr").await;
    world.leave(&[&started]).await;
}

pub(crate) async fn a_stopped_supervisor_can_be_removed(world: World) {
    let started = world.up(world.spec(DEAF)).await;
    strike(started.supervisor.pid, signal("SIGSTOP"));
    world.leave(&[&started]).await;
}

/// Both of those who could clear up are out of action.
pub(crate) async fn a_stopped_nspawn_without_a_supervisor_is_ended(world: World) {
    let started = world.up(world.spec(DEAF)).await;
    let nspawn = Records::at(&started.state).running().unwrap().nspawn;
    let mut all = offspring(started.leader.pid);
    all.extend([nspawn, started.leader].map(|process| Held::again(process).unwrap()));
    strike(nspawn.pid, signal("SIGSTOP"));
    strike(started.supervisor.pid, Signal::KILL);
    let exit = world.end(&started).await;
    assert!(exit.error.is_some(), "{exit:?}");
    assert!(all.iter().all(|held| held.wait(LIMIT)), "one lives on");
    world.leave(&[&started]).await;
}

/// Before the command runs there may be nobody to hear a signal; the grace time ends all the same.
pub(crate) async fn a_stop_right_after_the_start_is_carried_out(world: World) {
    for number in 0..5 {
        let task = format!("t{number}");
        let started = world.start(world.named(&task, HEARS_TERM)).await;
        let grace = Duration::from_millis(20 * number);
        within(world.backend.stop(&started, None, grace))
            .await
            .unwrap();
        let exit = world.end(&started).await;
        // A shell answers SIGINT before it comes to the line that has it hear SIGTERM. It wants to die of the signal then: a first
        // process can't, and ends with 130; the fake's is none, and systemd-nspawn says 0 of that death.
        assert!(
            [(3, 0), (137, 9), (130, 0), (0, 0)].contains(&ended(&exit)),
            "{number}: {exit:?}"
        );
        assert!(!is_alive(started.leader));
        within(world.backend.remove(&started.id)).await.unwrap();
    }
    world.leave(&[]).await;
}

pub(crate) async fn a_signal_right_after_the_start_harms_nobody(world: World) {
    let started = world.start(world.spec(HEARS_TERM)).await;
    for name in ["SIGHUP", "SIGUSR1", "SIGRTMIN+5", "SIGWINCH"] {
        within(world.backend.signal(&started, signal(name)))
            .await
            .unwrap();
    }
    world.heard("up").await;
    world.handles(&started, "TERM").await;
    stopped_politely(&world.backend, &started, (3, 0)).await;
    world.leave(&[&started]).await;
}

pub(crate) async fn two_stops_at_once_end_once(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    world.handles(&started, "TERM").await;
    let stop = || stopped_politely(&world.backend, &started, (3, 0));
    tokio::join!(stop(), stop(), stop());
    world.leave(&[&started]).await;
}

pub(crate) async fn force_overtakes_a_patient_stop(world: World) {
    let started = world.up(world.spec(DEAF)).await;
    let patient = world.backend.stop(&started, None, Duration::MAX);
    let force = world.backend.stop(&started, None, Duration::ZERO);
    let (patient, force) = within(async { tokio::join!(patient, force) }).await;
    patient.unwrap();
    force.unwrap();
    assert_eq!(ended(&world.end(&started).await), (137, 9));
    world.leave(&[&started]).await;
}

pub(crate) async fn an_endless_grace_ends_with_the_task(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    world.handles(&started, "TERM").await;
    stopped_politely(&world.backend, &started, (3, 0)).await;
    world.leave(&[&started]).await;
}

pub(crate) async fn an_end_during_the_grace_has_its_own_code(world: World) {
    let script = "trap 'heard=1' TERM; echo up; while [ -z \"$heard\" ]; do sleep 0.02; done; sleep 0.1; exit 24";
    let started = world.up(world.spec(script)).await;
    world.handles(&started, "TERM").await;
    stopped_politely(&world.backend, &started, (24, 0)).await;
    world.leave(&[&started]).await;
}

pub(crate) async fn a_signal_arrives_as_often_as_it_is_sent(world: World) {
    let script = "n=0; trap 'n=$((n+1)); echo usr-$n' USR1; echo up; while :; do sleep 0.02; done";
    let started = world.up(world.spec(script)).await;
    world.handles(&started, "USR1").await;
    for number in 1..=3 {
        within(world.backend.signal(&started, signal("SIGUSR1")))
            .await
            .unwrap();
        world.heard(&format!("usr-{number}")).await;
    }
    world.leave(&[&started]).await;
}

pub(crate) async fn signals_during_a_stop_are_no_error(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    world.handles(&started, "TERM").await;
    let signals = async {
        for _ in 0..50 {
            world.backend.signal(&started, signal("SIGHUP")).await?;
        }
        Ok::<_, BackendError>(())
    };
    let stop = stopped_politely(&world.backend, &started, (3, 0));
    let (sent, ()) = within(async { tokio::join!(signals, stop) }).await;
    sent.unwrap();
    world.leave(&[&started]).await;
}

pub(crate) async fn a_payload_is_stopped_and_goes_on(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    world.handles(&started, "TERM").await;
    let send = async |name| {
        within(world.backend.signal(&started, signal(name)))
            .await
            .unwrap();
    };
    let path = format!("/proc/{}/stat", started.leader.pid);
    let is_stopped = || fs::read_to_string(&path).unwrap().contains(") T ");
    send("SIGSTOP").await;
    within(async {
        while !is_stopped() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    send("SIGCONT").await;
    stopped_politely(&world.backend, &started, (3, 0)).await;
    world.leave(&[&started]).await;
}

pub(crate) async fn a_signal_to_kill_is_told_as_137(world: World) {
    for mode in [Mode::Plain, Mode::ProcessTwo] {
        let started = world
            .up(ContainerSpec {
                mode,
                ..world.named(&format!("{mode:?}").to_lowercase(), HEARS_TERM)
            })
            .await;
        within(world.backend.signal(&started, Signal::KILL))
            .await
            .unwrap();
        let exit = world.end(&started).await;
        assert_eq!((ended(&exit), exit.error), ((137, 9), None));
        within(world.backend.remove(&started.id)).await.unwrap();
        fs::write(world.file("stdout"), "").unwrap();
    }
    world.leave(&[]).await;
}

pub(crate) async fn a_real_time_signal_reaches_its_handler(world: World) {
    let started = world
        .up(world.spec("trap 'exit 21' 36; echo up; while :; do sleep 0.05; done"))
        .await;
    world.handles(&started, "SIGRTMIN+2").await;
    within(world.backend.signal(&started, signal("SIGRTMIN+2")))
        .await
        .unwrap();
    assert_eq!(ended(&world.end(&started).await), (21, 0));
    world.leave(&[&started]).await;
}

/// What suits the payload is asked only where the job names nothing.
pub(crate) async fn a_named_signal_is_sent_though_another_is_handled(world: World) {
    let script = "trap 'exit 22' INT; trap 'exit 23' TERM; echo up; while :; do sleep 0.05; done";
    stopped(world, Mode::Plain, script, "INT", Some("SIGINT"), (22, 0)).await;
}

/// One that has not heard yet how things stand, as a plugin that has only just been started again.
pub(crate) async fn another_backend_stops_it_politely(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    world.handles(&started, "TERM").await;
    let other = NspawnBackend::new(world.settings.clone());
    stopped_politely(&other, &started, (3, 0)).await;
    world.leave(&[&started]).await;
}

pub(crate) async fn a_stop_of_what_was_removed_is_an_error(world: World) {
    let started = world.start(world.spec("exit 0")).await;
    within(world.backend.remove(&started.id)).await.unwrap();
    let stopped = within(world.backend.stop(&started, None, AMPLE)).await;
    let signalled = within(world.backend.signal(&started, Signal::TERM)).await;
    for error in [stopped.unwrap_err(), signalled.unwrap_err()] {
        assert!(matches!(error, BackendError::Lost { .. }), "{error:?}");
    }
    world.leave(&[&started]).await;
}

pub(crate) async fn removing_overtakes_a_patient_stop(world: World) {
    let started = world.up(world.spec(DEAF)).await;
    let patient = world.backend.stop(&started, None, Duration::MAX);
    let removed = world.backend.remove(&started.id);
    let (patient, removed) = within(async { tokio::join!(patient, removed) }).await;
    patient.unwrap();
    removed.unwrap();
    world.leave(&[&started]).await;
}

/// Its end is known before systemd-nspawn has thrown the root away.
pub(crate) async fn an_ephemeral_root_that_is_ended_by_force_is_told_once(world: World) {
    let started = world
        .up(ContainerSpec {
            ephemeral: true,
            ..world.spec(DEAF)
        })
        .await;
    let inner = offspring(started.leader.pid);
    ended_by_force(&world, &started, inner).await;
    let first = world.end(&started).await;
    let other = NspawnBackend::new(world.settings.clone());
    assert_eq!(within(other.wait(&started)).await.unwrap(), first);
    world.leave(&[&started]).await;
}

/// The longest single string that a program can get.
pub(crate) async fn a_value_of_128_kib_arrives(world: World) {
    let want = format!("{}\n", longest().len());
    let environment = BTreeMap::from([("BIG".to_owned(), longest())]);
    says(world, environment, "echo ${#BIG}", &want).await;
}

/// The kernel takes 2 MiB of words and variables, whoever executes.
pub(crate) async fn a_large_environment_arrives(world: World) {
    const EACH: usize = 131_000;
    for mode in [Mode::Plain, Mode::ProcessTwo] {
        let environment = (0..14)
            .map(|number| (format!("BIG{number}"), number.to_string().repeat(EACH)))
            .map(|(name, value)| (name, value[..EACH].to_owned()))
            .collect();
        let script = "n=0; i=0; while [ $i -lt 14 ]; do eval \"v=\\$BIG$i\"; n=$((n+${#v})); i=$((i+1)); done; echo $n";
        let task = format!("{mode:?}").to_lowercase();
        let started = world
            .start(ContainerSpec {
                mode,
                environment,
                ..world.named(&task, script)
            })
            .await;
        world.end(&started).await;
        assert_eq!(world.said("stdout"), format!("{}\n", 14 * EACH), "{mode:?}");
        within(world.backend.remove(&started.id)).await.unwrap();
        fs::write(world.file("stdout"), "").unwrap();
    }
    world.leave(&[]).await;
}

pub(crate) async fn a_name_of_4_kib_arrives(world: World) {
    let environment = BTreeMap::from([("N".repeat(4096), "arrived".to_owned())]);
    let started = world
        .start(ContainerSpec {
            environment,
            ..world.spec("env | grep -c '^NNNN*=arrived$'")
        })
        .await;
    world.end(&started).await;
    assert_eq!(world.said("stdout"), "1\n");
    world.leave(&[&started]).await;
}

/// In `boot`, where systemd-nspawn itself has to carry everything. No init is ever reached.
pub(crate) async fn more_than_the_kernel_takes_is_refused_with_the_limit(world: World) {
    let (stack, _) =
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_STACK).unwrap();
    let limit = (stack / 4).clamp(128 * 1024, 6 * 1024 * 1024);
    let number = limit / 131_000 + 1;
    let environment = (0..number)
        .map(|number| (format!("BIG{number}"), "s3cret-".repeat(18_714)))
        .collect();
    let error = world
        .refused(ContainerSpec {
            mode: Mode::Boot,
            command: Vec::new(),
            environment,
            ..world.spec("")
        })
        .await;
    let text = error.to_string();
    assert!(text.contains(&limit.to_string()), "{text}");
    assert!(!text.contains("s3cret"), "{text}");
    world.leave(&[]).await;
}

/// In `boot`, by an argument: systemd-nspawn would refuse it, and print it into the task's log.
pub(crate) async fn a_value_that_would_be_printed_is_refused_by_name(world: World) {
    let environment = BTreeMap::from([("LANG".to_owned(), "s3cret\u{fffe}".to_owned())]);
    let error = world
        .refused(ContainerSpec {
            mode: Mode::Boot,
            command: Vec::new(),
            environment,
            ..world.spec("")
        })
        .await;
    assert!(!error.is_transient(), "{error}");
    let text = error.to_string();
    assert!(text.contains("LANG") && text.contains("U+FFFE"), "{text}");
    let told = [text, world.said("stdout"), world.said("stderr")].concat();
    assert!(!told.contains("s3cret"), "{told}");
    world.leave(&[]).await;
}

/// They steer no systemd-nspawn, and are the command's all the same.
pub(crate) async fn names_that_systemd_reads_arrive(world: World) {
    let names = [
        "HOME",
        "LC_ALL",
        "SYSTEMD_LOG_LEVEL",
        "TERM",
        "TZ",
        "XDG_RUNTIME_DIR",
    ];
    let environment = names
        .iter()
        .map(|name| ((*name).to_owned(), format!("/{name}/ of the job")))
        .collect();
    let script = format!("for n in {}; do eval \"echo \\$$n\"; done", names.join(" "));
    let started = world
        .start(ContainerSpec {
            environment,
            ..world.spec(&script)
        })
        .await;
    world.end(&started).await;
    let want: String = names
        .iter()
        .map(|name| format!("/{name}/ of the job\n"))
        .collect();
    assert_eq!(world.said("stdout"), want);
    world.leave(&[&started]).await;
}

pub(crate) async fn a_value_stands_in_no_command_line(world: World) {
    let scratch = world.scratch.path().to_string_lossy().into_owned();
    for mode in [Mode::Plain, Mode::ProcessTwo] {
        let secret = format!("s3cret-{}-{mode:?}", scratch.replace('/', "_"));
        let environment = BTreeMap::from([("DB_PASSWORD".to_owned(), secret.clone())]);
        let task = format!("{mode:?}").to_lowercase();
        let started = world
            .start(ContainerSpec {
                mode,
                environment,
                ..world.named(&task, DEAF)
            })
            .await;
        world.heard("up").await;
        let shown = processes_that_name(&secret);
        assert!(shown.is_empty(), "{shown:?}");
        within(world.backend.remove(&started.id)).await.unwrap();
        fs::write(world.file("stdout"), "").unwrap();
    }
    world.leave(&[]).await;
}

/// Whatever driver and systemd-nspawn use among themselves.
pub(crate) async fn a_command_has_three_descriptors(world: World) {
    for mode in [Mode::Plain, Mode::ProcessTwo] {
        // The shell's own, with which it reads the directory, is closed when it looks again.
        let script = "for d in /proc/$$/fd/*; do test -e $d && echo ${d##*/}; done";
        let task = format!("{mode:?}").to_lowercase();
        let started = world
            .start(ContainerSpec {
                mode,
                ..world.named(&task, script)
            })
            .await;
        world.end(&started).await;
        assert_eq!(world.said("stdout"), "0\n1\n2\n", "{mode:?}");
        within(world.backend.remove(&started.id)).await.unwrap();
        fs::write(world.file("stdout"), "").unwrap();
    }
    world.leave(&[]).await;
}

/// systemd-nspawn must not dump core, for its secrets; the command may.
pub(crate) async fn a_command_keeps_the_limit_of_core_dumps(world: World) {
    let started = world.start(world.spec("ulimit -H -c")).await;
    world.end(&started).await;
    let (_, hard) =
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_CORE).unwrap();
    let want = match hard {
        nix::sys::resource::RLIM_INFINITY => "unlimited\n".to_owned(),
        bytes => format!("{}\n", bytes / 512),
    };
    assert_eq!(world.said("stdout"), want);
    world.leave(&[&started]).await;
}
