//! Records: who may read them, what they look like for ever, and what hostile ones can't do.

use super::super::resource::{
    Cgroup, CgroupMirror, EphemeralCopy, NspawnMounts, Skeleton, TreeLock, UidRange, ZoneBridge,
};
use super::*;
use proptest::prelude::*;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, SystemTime};

fn an_exit() -> Exit {
    Exit {
        code: 7,
        signal: 0,
        oom_killed: false,
        error: None,
        ended_at: SystemTime::UNIX_EPOCH,
    }
}

/// An order of the boot `b` with nothing special in it.
pub(in crate::supervisor) fn an_order(id: &str) -> Order {
    Order {
        id: id.to_owned(),
        alloc_dir: None,
        machine: "t-a".to_owned(),
        mode: Mode::Plain,
        boot: "b".to_owned(),
        program: "/n".into(),
        arguments: Vec::new(),
        first: First::Image,
        stdout: None,
        stderr: None,
        network_namespace: None,
        resources: Vec::new(),
        notes: Vec::new(),
    }
}

/// The fact of a start whose processes are nobody.
pub(in crate::supervisor) fn a_running(id: &str, boot: &str) -> Running {
    let nobody = Process { pid: 0, start: 0 };
    Running {
        started: Started {
            id: id.to_owned(),
            machine: "t-a".to_owned(),
            state: "/none".into(),
            boot: boot.to_owned(),
            supervisor: nobody,
            leader: nobody,
            mode: Mode::Plain,
            cgroup: None,
            started_at: SystemTime::UNIX_EPOCH,
            notes: Vec::new(),
        },
        nspawn: nobody,
        copy: None,
        uids: None,
        alloc_dir: None,
    }
}

/// Records in a directory of their own.
fn some() -> (tempfile::TempDir, Records) {
    let temp = tempfile::tempdir().unwrap();
    let records = Records::at(temp.path().join("x"));
    records.create().unwrap();
    (temp, records)
}

#[test]
fn what_is_written_is_read_and_is_root_s_alone() {
    let temp = tempfile::tempdir().unwrap();
    let records = Records::of(&temp.path().join("state"), "alloc/web/0a1b2c3d");
    records.create().unwrap();
    assert_eq!(records.exit().unwrap(), None);
    records.write_exit(&an_exit()).unwrap();
    assert_eq!(records.exit().unwrap(), Some(an_exit()));
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(records.path()), 0o700);
    assert_eq!(mode(&records.path().join("exit")), 0o600);
    records.create().unwrap_err();
    records.remove().unwrap();
    records.remove().unwrap();
}

#[test]
fn starts_of_one_task_are_found_by_each_other_alone() {
    let temp = tempfile::tempdir().unwrap();
    let of = |id| Records::of(temp.path(), id);
    for id in ["a/web/1", "a/web/2", "a/web/3", "a/other/1", "b/web/1"] {
        of(id).create().unwrap();
    }
    let mut earlier = Records::earlier(temp.path(), "a/web/3").unwrap();
    earlier.sort_by(|one, two| one.0.cmp(&two.0));
    let mut wanted = [of("a/web/1"), of("a/web/2")];
    wanted.sort_by(|one, two| one.0.cmp(&two.0));
    assert_eq!(earlier, wanted);
    assert_eq!(
        Records::earlier(&temp.path().join("absent"), "a/web/3").unwrap(),
        []
    );
}

#[test]
fn a_lock_on_the_log_is_a_watch() {
    let temp = tempfile::tempdir().unwrap();
    let records = Records::at(temp.path());
    assert!(!records.is_watched());
    let log = File::create(records.log()).unwrap();
    assert!(!records.is_watched());
    log.try_lock().unwrap();
    assert!(records.is_watched());
    drop(log);
    assert!(!records.is_watched());
}

#[test]
fn a_log_that_is_a_link_is_no_watch() {
    let (temp, records) = some();
    let elsewhere = File::create(temp.path().join("elsewhere")).unwrap();
    elsewhere.try_lock().unwrap();
    std::os::unix::fs::symlink(temp.path().join("elsewhere"), records.log()).unwrap();
    assert!(!records.is_watched());
}

/// A plugin that has lost its supervisor writes the end, while the supervisor may be writing it.
#[test]
fn two_who_write_the_same_record_do_not_meet() {
    let (_temp, records) = some();
    // What another process, or this pid in another life, has begun.
    let begun = records
        .path()
        .join(format!("exit.{}-0.new", std::process::id()));
    for place in [
        &begun,
        &records.path().join("exit.1-1.new"),
        &records.path().join("exit.new"),
    ] {
        fs::write(place, "{").unwrap();
    }
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..50).for_each(|_| records.write_exit(&an_exit()).unwrap()));
        }
    });
    assert_eq!(records.exit().unwrap(), Some(an_exit()));
    assert_eq!(fs::read_to_string(begun).unwrap(), "{");
    assert_eq!(records.stranger().unwrap(), None);
    for strange in ["exit.x.new", "else.1-1.new", "exit.1-1.new.old"] {
        let place = records.path().join(strange);
        fs::write(&place, "").unwrap();
        assert_eq!(records.stranger().unwrap(), Some(strange.into()));
        fs::remove_file(place).unwrap();
    }
}

/// A process that is just being started holds what its starter has open, and so the lock of somebody who looks.
#[test]
fn who_looks_for_a_watch_is_not_taken_for_one() {
    let temp = tempfile::tempdir().unwrap();
    let records = Records::at(temp.path());
    let looking = File::create(records.log()).unwrap();
    looking.try_lock_shared().unwrap();
    assert!(!records.is_watched());
}

#[test]
fn a_link_is_not_followed() {
    let (temp, records) = some();
    let elsewhere = temp.path().join("elsewhere");
    fs::write(&elsewhere, encode(&an_exit()).unwrap()).unwrap();
    std::os::unix::fs::symlink(elsewhere, records.path().join("exit")).unwrap();
    records.exit().unwrap_err();
}

#[test]
fn secrets_can_be_taken_once() {
    let temp = tempfile::tempdir().unwrap();
    let records = Records::at(temp.path());
    records.write("environment", br#"{"A":"b"}"#).unwrap();
    fs::write(temp.path().join("init"), "told").unwrap();
    let environment = records.take_environment().unwrap();
    assert_eq!(environment.get("A").map(String::as_str), Some("b"));
    records.take_environment().unwrap_err();
    let told = io::read_to_string(records.take_init().unwrap()).unwrap();
    assert_eq!(told, "told");
    records.take_init().unwrap_err();
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
}

#[test]
fn of_many_words_the_last_are_kept() {
    let temp = tempfile::tempdir().unwrap();
    let records = Records::at(temp.path());
    assert_eq!(records.words(), "");
    for word in ["first", &"x".repeat(3000), "last"] {
        records
            .open_words()
            .unwrap()
            .write_all(word.as_bytes())
            .unwrap();
    }
    let words = records.words();
    assert!(words.ends_with("xlast") && words.len() == 2048, "{words}");
}

#[test]
fn an_error_says_nothing_of_what_was_read() {
    let (_temp, records) = some();
    records
        .write("environment", br#"{"A":{"marker\n":"marker"}}"#)
        .unwrap();
    let error = records.take_environment().unwrap_err().to_string();
    assert!(
        !error.contains("marker") && error.contains("line 1 column"),
        "{error}"
    );
    let error = decode::<Order>(br#"{"id":"i","machine":"m","mode":"marker\n"}"#).unwrap_err();
    assert!(!error.to_string().contains("marker"), "{error}");
}

#[test]
fn what_is_too_large_is_refused_and_not_cut() {
    let (_temp, records) = some();
    records.write_exit(&an_exit()).unwrap();
    let place = records.path().join("exit");
    let file = OpenOptions::new().write(true).open(&place).unwrap();
    // A hole, which takes no room.
    file.set_len(LARGEST + 1).unwrap();
    let error = records.exit().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    assert!(error.to_string().contains("larger than"), "{error}");
}

#[test]
fn a_log_that_is_a_link_is_not_opened() {
    let (temp, records) = some();
    let elsewhere = temp.path().join("elsewhere");
    std::os::unix::fs::symlink(&elsewhere, records.log()).unwrap();
    records.open_log().unwrap_err();
    assert!(!elsewhere.exists());
}

#[test]
fn what_is_damaged_is_not_repeated() {
    let (_temp, records) = some();
    fs::write(records.path().join("environment"), "\"s3cret\"").unwrap();
    let error = records.take_environment().unwrap_err().to_string();
    assert!(!error.contains("s3cret"), "{error}");
}

/// What released drivers wrote, a line each. Never change a line; add one when a field is new.
const ORDERS: &str = include_str!("frozen/order.jsonl");
const RUNNING: &str = include_str!("frozen/running.jsonl");
const EXITS: &str = include_str!("frozen/exit.jsonl");

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
fn what_was_ever_released_is_read_and_the_last_is_written() {
    is_frozen::<Order>(ORDERS);
    is_frozen::<Running>(RUNNING);
    is_frozen::<Exit>(EXITS);
}

/// A driver before the list of resources frees what it finds in fields of its own.
#[test]
fn what_older_orders_name_is_a_resource_and_still_named_as_before() {
    const OLDER: [&str; 6] = ["place", "locks", "shares", "copies", "picks", "zone"];
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    for line in ORDERS.lines() {
        let order: Order = decode(line.as_bytes()).unwrap();
        let written = String::from_utf8(encode(&order).unwrap()).unwrap();
        for name in OLDER {
            let before = json(line)[name].clone();
            let before = match name {
                "picks" | "shares" if before.is_null() => false.into(),
                _ => before,
            };
            assert_eq!(json(&written)[name], before, "{name} of {line}");
        }
        assert_eq!(decode::<Order>(written.as_bytes()).unwrap(), order);
    }
    let of = |number: usize| {
        let line = ORDERS.lines().nth(number).unwrap();
        decode::<Order>(line.as_bytes()).unwrap().resources
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
        }),
        Resource::NspawnMounts(NspawnMounts {}),
    ];
    assert_eq!(of(0), want);
    let want = [
        Resource::ZoneBridge(ZoneBridge { zone: "web".into() }),
        Resource::UidRange(UidRange {}),
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
fn records_of_another_age() {
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
    let newer = changed(&|value| value["form"] = (FORM + 1).into()).unwrap_err();
    assert_eq!(newer.kind(), io::ErrorKind::Unsupported);
    assert!(
        newer.to_string().contains("form 2, which is newer"),
        "{newer}"
    );
    for nonsense in ["x".into(), (-1).into(), serde_json::Value::Null] {
        changed(&|value| value["form"] = nonsense.clone()).unwrap_err();
    }
}

/// A moment that a record can hold.
fn moment() -> impl Strategy<Value = SystemTime> {
    let span = (0..1u64 << 40, 0..1_000_000_000u32);
    span.prop_map(|(seconds, nanos)| SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos))
}

fn process() -> impl Strategy<Value = Process> {
    (any::<i32>(), any::<u64>()).prop_map(|(pid, start)| Process { pid, start })
}

fn path() -> impl Strategy<Value = PathBuf> {
    any::<String>().prop_map(PathBuf::from)
}

pub(in crate::supervisor) fn exit() -> impl Strategy<Value = Exit> {
    let numbers = (any::<i32>(), any::<i32>(), any::<bool>());
    (numbers, any::<Option<String>>(), moment()).prop_map(
        |((code, signal, oom_killed), error, ended_at)| Exit {
            code,
            signal,
            oom_killed,
            error,
            ended_at,
        },
    )
}

fn resource() -> impl Strategy<Value = Resource> {
    prop_oneof![
        path().prop_map(|group| Resource::Cgroup(Cgroup { group })),
        path().prop_map(|group| Resource::CgroupMirror(CgroupMirror { group })),
        any::<String>().prop_map(|zone| Resource::ZoneBridge(ZoneBridge { zone })),
        Just(Resource::UidRange(UidRange {})),
        (path(), any::<bool>())
            .prop_map(|(tree, shared)| Resource::TreeLock(TreeLock { tree, shared })),
        Just(Resource::Skeleton(Skeleton {})),
        path().prop_map(|directory| Resource::EphemeralCopy(EphemeralCopy { directory })),
        Just(Resource::NspawnMounts(NspawnMounts {})),
        any::<String>()
            .prop_map(|x| Resource::Unknown(serde_json::json!({"kind": "later", "x": x}))),
    ]
}

fn order() -> impl Strategy<Value = Order> {
    let first = prop_oneof![
        Just(First::Image),
        any::<bool>().prop_map(|streams| First::Ours { streams }),
    ];
    let maybe = || proptest::option::of(path());
    let names = (any::<String>(), any::<String>(), any::<String>(), mode());
    let call = (path(), any::<Vec<String>>(), first);
    let paths = (maybe(), maybe(), maybe(), maybe());
    let resources = proptest::collection::vec(resource(), 0..9);
    let rest = (resources, any::<Vec<String>>());
    (names, call, paths, rest).prop_map(
        |((id, machine, boot, mode), (program, arguments, first), paths, (resources, notes))| {
            let (stdout, stderr, network_namespace, alloc_dir) = paths;
            Order {
                id,
                alloc_dir,
                machine,
                mode,
                boot,
                program,
                arguments,
                first,
                stdout,
                stderr,
                network_namespace,
                resources,
                notes,
            }
        },
    )
}

fn mode() -> impl Strategy<Value = Mode> {
    proptest::sample::select(vec![Mode::Plain, Mode::ProcessTwo, Mode::Boot])
}

pub(in crate::supervisor) fn started() -> impl Strategy<Value = Started> {
    let names = (any::<String>(), any::<String>(), any::<String>(), path());
    let cgroup = proptest::option::of(path());
    let rest = (mode(), cgroup, moment(), any::<Vec<String>>());
    (names, process(), process(), rest).prop_map(
        |((id, machine, boot, state), supervisor, leader, (mode, cgroup, started_at, notes))| {
            Started {
                id,
                machine,
                state,
                boot,
                supervisor,
                leader,
                mode,
                cgroup,
                started_at,
                notes,
            }
        },
    )
}

proptest! {
    #[test]
    fn no_id_leads_out_of_the_state_directory(id in "\\PC{0,200}") {
        let records = Records::of(Path::new("/state"), &id);
        prop_assert_eq!(records.path().parent(), Some(Path::new("/state")));
        prop_assert!(Records::is_name(records.path().file_name().unwrap().to_str().unwrap()));
        // Sockets have short paths: the configuration keeps 43 bytes free below the state directory.
        prop_assert!(records.lifeline().as_os_str().len() <= "/state".len() + 43);
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let (_temp, records) = some();
        for name in ["order", "running", "exit", "environment", "failure"] {
            fs::write(records.path().join(name), &bytes).unwrap();
        }
        prop_assert!(records.order().is_err());
        prop_assert!(records.running().is_err());
        prop_assert!(records.exit().is_err());
        let _ = (records.take_environment(), records.failure());
    }

    #[test]
    fn every_record_is_read_as_it_was_written(
        order in order(),
        environment in proptest::collection::btree_map(any::<String>(), any::<String>(), 0..4),
        exit in exit(),
        started in started(),
        nspawn in process(),
        copy in proptest::option::of(path()),
        uids: Option<u32>,
        alloc_dir in proptest::option::of(path()),
    ) {
        let (_temp, records) = some();
        records.write_order(&order, &environment, None).unwrap();
        prop_assert_eq!(records.order().unwrap(), order);
        prop_assert_eq!(records.take_environment().unwrap(), environment);
        records.write_exit(&exit).unwrap();
        prop_assert_eq!(records.exit().unwrap(), Some(exit));
        let running = Running { started, nspawn, copy, uids, alloc_dir };
        records.write_running(&running).unwrap();
        prop_assert_eq!(records.running().unwrap(), running);
    }

    #[test]
    fn half_a_record_is_none(cut: prop::sample::Index) {
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
            let _ = (decode::<Order>(&text), decode::<Running>(&text), decode::<Exit>(&text));
        }
    }
}
