//! Records: which users may read them, their frozen format, and what hostile ones can't do.

use super::directory::MAX_RECORD_BYTES;
use super::*;
use crate::lease::{
    Cgroup, CgroupMirror, EphemeralCopy, NspawnMounts, Skeleton, TreeLock, UidRange,
};
use crate::seccomp::{Kind, Source};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;

#[path = "task_dir_strategies.rs"]
mod strategies;

pub(crate) use strategies::{exit, started};
use strategies::{launch_spec, path, process};

fn an_exit() -> Exit {
    Exit {
        code: 7,
        signal: 0,
        oom_killed: false,
        error: None,
        ended_at: SystemTime::UNIX_EPOCH,
    }
}

/// A launch spec of the boot `b` with nothing special in it.
pub(crate) fn an_order(id: &str) -> LaunchSpec {
    LaunchSpec {
        id: id.to_owned(),
        alloc_dir: None,
        machine: "t-a".to_owned(),
        mode: Mode::Plain,
        boot: "b".to_owned(),
        program: "/n".into(),
        arguments: Vec::new(),
        first: Pid1::Image,
        stdout: None,
        stderr: None,
        network_namespace: None,
        network_of: None,
        mounts: MountPlan::default(),
        output: SystemOutput::default(),
        ready_within: None,
        credentials: Vec::new(),
        cgroups: None,
        oom_score_adj: 0,
        resources: Vec::new(),
        inside: InsideSettings::default(),
        seccomp: Source::default(),
        notes: Vec::new(),
    }
}

/// A running record whose processes do not exist.
pub(crate) fn a_running(id: &str, boot: &str) -> Running {
    let nobody = Process { pid: 0, start: 0 };
    Running {
        started: Started::for_test(id, boot),
        nspawn: nobody,
        copy: None,
        uids: None,
        alloc_dir: None,
    }
}

/// A task directory in a temporary directory of its own.
fn some() -> (tempfile::TempDir, TaskDir) {
    let temp = tempfile::tempdir().unwrap();
    let task_dir = TaskDir::new(temp.path().join("x"));
    task_dir.create().unwrap();
    (temp, task_dir)
}

#[test]
fn files_are_read_back_and_accessible_to_root_only() {
    let temp = tempfile::tempdir().unwrap();
    let task_dir = TaskDir::for_task(&temp.path().join("state"), "alloc/web/0a1b2c3d");
    task_dir.create().unwrap();
    assert_eq!(task_dir.exit().unwrap(), None);
    task_dir.write_exit(&an_exit()).unwrap();
    assert_eq!(task_dir.exit().unwrap(), Some(an_exit()));
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(task_dir.path()), 0o700);
    assert_eq!(mode(&task_dir.path().join("exit")), 0o600);
    task_dir.create().unwrap_err();
    task_dir.remove().unwrap();
    task_dir.remove().unwrap();
}

#[test]
fn starts_of_a_task_find_only_each_other() {
    let temp = tempfile::tempdir().unwrap();
    let of = |id| TaskDir::for_task(temp.path(), id);
    for id in ["a/web/1", "a/web/2", "a/web/3", "a/other/1", "b/web/1"] {
        of(id).create().unwrap();
    }
    let mut earlier = TaskDir::previous_starts(temp.path(), "a/web/3").unwrap();
    earlier.sort_by(|one, two| one.0.cmp(&two.0));
    let mut wanted = [of("a/web/1"), of("a/web/2")];
    wanted.sort_by(|one, two| one.0.cmp(&two.0));
    assert_eq!(earlier, wanted);
    assert_eq!(
        TaskDir::previous_starts(&temp.path().join("absent"), "a/web/3").unwrap(),
        []
    );
}

#[test]
fn a_lock_on_the_log_shows_a_supervisor() {
    let temp = tempfile::tempdir().unwrap();
    let task_dir = TaskDir::new(temp.path());
    assert!(!task_dir.has_supervisor());
    let log = File::create(task_dir.log()).unwrap();
    assert!(!task_dir.has_supervisor());
    log.try_lock().unwrap();
    assert!(task_dir.has_supervisor());
    drop(log);
    assert!(!task_dir.has_supervisor());
}

#[test]
fn a_log_that_is_a_link_shows_no_supervisor() {
    let (temp, task_dir) = some();
    let elsewhere = File::create(temp.path().join("elsewhere")).unwrap();
    elsewhere.try_lock().unwrap();
    std::os::unix::fs::symlink(temp.path().join("elsewhere"), task_dir.log()).unwrap();
    assert!(!task_dir.has_supervisor());
}

/// A plugin that has lost its supervisor writes the exit record while the supervisor may be writing it too.
#[test]
fn concurrent_writes_of_a_record_do_not_collide() {
    let (_temp, task_dir) = some();
    // Temporary files that another process, or an earlier one with this pid, has begun.
    let begun = task_dir
        .path()
        .join(format!("exit.{}-0.new", std::process::id()));
    for place in [
        &begun,
        &task_dir.path().join("exit.1-1.new"),
        &task_dir.path().join("exit.new"),
    ] {
        fs::write(place, "{").unwrap();
    }
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..50).for_each(|_| task_dir.write_exit(&an_exit()).unwrap()));
        }
    });
    assert_eq!(task_dir.exit().unwrap(), Some(an_exit()));
    assert_eq!(fs::read_to_string(begun).unwrap(), "{");
    assert_eq!(task_dir.unexpected_entry().unwrap(), None);
    for strange in ["exit.x.new", "else.1-1.new", "exit.1-1.new.old"] {
        let place = task_dir.path().join(strange);
        fs::write(&place, "").unwrap();
        assert_eq!(task_dir.unexpected_entry().unwrap(), Some(strange.into()));
        fs::remove_file(place).unwrap();
    }
}

/// A process that is being forked inherits its parent's descriptors, and so the shared lock of a probe.
#[test]
fn looking_for_a_supervisor_is_not_taken_for_one() {
    let temp = tempfile::tempdir().unwrap();
    let task_dir = TaskDir::new(temp.path());
    let looking = File::create(task_dir.log()).unwrap();
    looking.try_lock_shared().unwrap();
    assert!(!task_dir.has_supervisor());
}

#[test]
fn a_link_is_not_followed() {
    let (temp, task_dir) = some();
    let elsewhere = temp.path().join("elsewhere");
    fs::write(&elsewhere, encode(&an_exit()).unwrap()).unwrap();
    std::os::unix::fs::symlink(elsewhere, task_dir.path().join("exit")).unwrap();
    task_dir.exit().unwrap_err();
}

#[test]
fn secrets_can_be_read_once() {
    let temp = tempfile::tempdir().unwrap();
    let task_dir = TaskDir::new(temp.path());
    task_dir.write("environment", br#"{"A":"b"}"#).unwrap();
    fs::write(temp.path().join("init"), "spec").unwrap();
    let environment = task_dir.take_environment().unwrap();
    assert_eq!(environment.get("A").map(String::as_str), Some("b"));
    task_dir.take_environment().unwrap_err();
    let init_spec = io::read_to_string(task_dir.take_init_spec().unwrap()).unwrap();
    assert_eq!(init_spec, "spec");
    task_dir.take_init_spec().unwrap_err();
    let defaults = ExecDefaults {
        directory: Some("/srv".to_owned()),
        ..ExecDefaults::default()
    };
    task_dir.write_exec_defaults(&defaults).unwrap();
    let file = task_dir.take_exec_defaults().unwrap();
    assert_eq!(read_exec_defaults(file).unwrap(), defaults);
    task_dir.take_exec_defaults().unwrap_err();
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
    task_dir.write_exec_defaults(&defaults).unwrap();
    task_dir.discard_secrets();
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
}

#[test]
fn only_the_end_of_long_output_is_kept() {
    let temp = tempfile::tempdir().unwrap();
    let task_dir = TaskDir::new(temp.path());
    assert_eq!(task_dir.nspawn_stderr_tail(), "");
    for word in ["first", &"x".repeat(3000), "last"] {
        task_dir
            .open_nspawn_stderr()
            .unwrap()
            .write_all(word.as_bytes())
            .unwrap();
    }
    let words = task_dir.nspawn_stderr_tail();
    assert!(words.ends_with("xlast") && words.len() == 2048, "{words}");
}

#[test]
fn an_error_does_not_show_the_content() {
    let (_temp, task_dir) = some();
    task_dir
        .write("environment", br#"{"A":{"marker\n":"marker"}}"#)
        .unwrap();
    let error = task_dir.take_environment().unwrap_err().to_string();
    assert!(
        !error.contains("marker") && error.contains("line 1 column"),
        "{error}"
    );
    let error = decode::<LaunchSpec>(br#"{"id":"i","machine":"m","mode":"marker\n"}"#).unwrap_err();
    assert!(!error.to_string().contains("marker"), "{error}");
}

#[test]
fn an_oversized_record_is_refused_and_not_truncated() {
    let (_temp, task_dir) = some();
    task_dir.write_exit(&an_exit()).unwrap();
    let place = task_dir.path().join("exit");
    let file = OpenOptions::new().write(true).open(&place).unwrap();
    // A sparse file, which takes no space on disk.
    file.set_len(MAX_RECORD_BYTES + 1).unwrap();
    let error = task_dir.exit().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    assert!(error.to_string().contains("larger than"), "{error}");
}

#[test]
fn a_log_that_is_a_link_is_not_opened() {
    let (temp, task_dir) = some();
    let elsewhere = temp.path().join("elsewhere");
    std::os::unix::fs::symlink(&elsewhere, task_dir.log()).unwrap();
    task_dir.open_log().unwrap_err();
    assert!(!elsewhere.exists());
}

#[test]
fn damaged_content_is_not_shown_in_errors() {
    let (_temp, task_dir) = some();
    fs::write(task_dir.path().join("environment"), "\"s3cret\"").unwrap();
    let error = task_dir.take_environment().unwrap_err().to_string();
    assert!(!error.contains("s3cret"), "{error}");
}

/// What released drivers wrote, one record per line. Never change a line; add one when there is a new field.
const ORDERS: &str = include_str!("frozen/order.jsonl");
const RUNNING: &str = include_str!("frozen/running.jsonl");
const EXITS: &str = include_str!("frozen/exit.jsonl");
const EXECS: &str = include_str!("frozen/exec.jsonl");

/// All lines can be read, and the last is what is written today.
fn is_frozen<T: Serialize + DeserializeOwned>(lines: &str) {
    for line in lines.lines() {
        let record: T = decode(line.as_bytes()).unwrap_or_else(|error| panic!("{line}: {error}"));
        let written = String::from_utf8(encode(&record).unwrap()).unwrap();
        if Some(line) == lines.lines().last() {
            assert_eq!(written, line);
        }
    }
}

#[test]
fn every_released_format_is_read_and_the_latest_is_written() {
    is_frozen::<LaunchSpec>(ORDERS);
    is_frozen::<Running>(RUNNING);
    is_frozen::<Exit>(EXITS);
    is_frozen::<ExecDefaults>(EXECS);
}

/// Drivers from before the list of resources release what they find in separate fields.
#[test]
fn fields_of_older_launch_specs_become_resources_and_are_kept() {
    const OLDER: [&str; 5] = ["place", "locks", "shares", "copies", "picks"];
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    for line in ORDERS.lines() {
        let launch_spec: LaunchSpec = decode(line.as_bytes()).unwrap();
        let written = String::from_utf8(encode(&launch_spec).unwrap()).unwrap();
        for name in OLDER {
            let before = json(line)[name].clone();
            let before = match name {
                "picks" | "shares" if before.is_null() => false.into(),
                _ => before,
            };
            assert_eq!(json(&written)[name], before, "{name} of {line}");
        }
        assert_eq!(
            decode::<LaunchSpec>(written.as_bytes()).unwrap(),
            launch_spec
        );
    }
    let of = |number: usize| {
        let line = ORDERS.lines().nth(number).unwrap();
        decode::<LaunchSpec>(line.as_bytes()).unwrap().resources
    };
    let group =
        |hierarchy: &str| format!("/sys/fs/cgroup/{hierarchy}/nomad-driver-nspawn/x").into();
    let want = [
        Resource::Cgroup(Cgroup {
            group: group("unified"),
        }),
        Resource::CgroupMirror(CgroupMirror {
            group: group("systemd"),
        }),
        Resource::Skeleton(Skeleton {}),
        Resource::EphemeralCopy(EphemeralCopy {
            directory: "/srv".into(),
            tree: None,
        }),
        Resource::NspawnMounts(NspawnMounts {}),
    ];
    assert_eq!(of(0), want);
    let want = [
        Resource::UidRange(UidRange::default()),
        Resource::Skeleton(Skeleton {}),
        Resource::TreeLock(TreeLock {
            tree: "/srv/web".into(),
            shared: false,
        }),
        Resource::NspawnMounts(NspawnMounts {}),
    ];
    assert_eq!(of(4), want);
}

#[test]
fn records_of_other_versions_are_read_or_refused() {
    let last = EXITS.lines().last().unwrap();
    let exit: Exit = decode(last.as_bytes()).unwrap();
    let changed = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut value = serde_json::from_str(last).unwrap();
        change(&mut value);
        decode::<Exit>(value.to_string().as_bytes())
    };
    let without = changed(&|value| drop(value.as_object_mut().unwrap().remove("form")));
    assert_eq!(without.unwrap(), exit);
    assert_eq!(changed(&|value| value["later"] = 1.into()).unwrap(), exit);
    let newer = changed(&|value| value["form"] = (FORMAT_VERSION + 1).into()).unwrap_err();
    assert_eq!(newer.kind(), io::ErrorKind::Unsupported);
    assert!(
        newer.to_string().contains("format 2, which is newer"),
        "{newer}"
    );
    for nonsense in ["x".into(), (-1).into(), serde_json::Value::Null] {
        changed(&|value| value["form"] = nonsense.clone()).unwrap_err();
    }
}

proptest! {
    #[test]
    fn no_id_leaves_the_state_directory(id in "\\PC{0,200}") {
        let task_dir = TaskDir::for_task(Path::new("/state"), &id);
        prop_assert_eq!(task_dir.path().parent(), Some(Path::new("/state")));
        prop_assert!(TaskDir::is_name(task_dir.path().file_name().unwrap().to_str().unwrap()));
        // Socket paths are short: the configuration keeps 43 bytes free below the state directory.
        for socket in [task_dir.control_socket(), task_dir.control_stream()] {
            prop_assert!(socket.as_os_str().len() <= "/state".len() + 43);
        }
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let (_temp, task_dir) = some();
        for name in ["order", "running", "exit", "environment", "failure"] {
            fs::write(task_dir.path().join(name), &bytes).unwrap();
        }
        prop_assert!(task_dir.launch_spec().is_err());
        prop_assert!(task_dir.running().is_err());
        prop_assert!(task_dir.exit().is_err());
        let _ = (task_dir.take_environment(), task_dir.failure());
    }

    #[test]
    fn every_record_is_read_back(
        launch_spec in launch_spec(),
        environment in proptest::collection::btree_map(any::<String>(), any::<String>(), 0..4),
        exit in exit(),
        started in started(),
        nspawn in process(),
        copy in proptest::option::of(path()),
        uids: Option<u32>,
        alloc_dir in proptest::option::of(path()),
    ) {
        let (_temp, task_dir) = some();
        task_dir.write_launch_spec(&launch_spec, &environment, None).unwrap();
        prop_assert_eq!(task_dir.launch_spec().unwrap(), launch_spec);
        prop_assert_eq!(task_dir.take_environment().unwrap(), environment);
        task_dir.write_exit(&exit).unwrap();
        prop_assert_eq!(task_dir.exit().unwrap(), Some(exit));
        let running = Running { started, nspawn, copy, uids, alloc_dir };
        task_dir.write_running(&running).unwrap();
        prop_assert_eq!(task_dir.running().unwrap(), running);
    }

    #[test]
    fn a_truncated_record_is_refused(cut: prop::sample::Index) {
        for lines in [ORDERS, RUNNING, EXITS] {
            let whole = lines.lines().last().unwrap().as_bytes();
            let half = &whole[..cut.index(whole.len())];
            prop_assert!(decode::<serde_json::Value>(half).is_err());
        }
    }

    #[test]
    fn a_changed_byte_is_no_panic(at: prop::sample::Index, byte: u8) {
        for lines in [ORDERS, RUNNING, EXITS] {
            let mut text = lines.lines().last().unwrap().as_bytes().to_vec();
            let at = at.index(text.len());
            text[at] = byte;
            let _ = (decode::<LaunchSpec>(&text), decode::<Running>(&text), decode::<Exit>(&text));
        }
    }
}
