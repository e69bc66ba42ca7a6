use super::*;
use proptest::prelude::*;
use std::os::unix::fs::symlink;

/// What the kernel asks a program about.
#[derive(Debug, Clone, Copy)]
struct Request {
    kind: u32,
    access: u32,
    major: u32,
    minor: u32,
}

/// Runs a program as the kernel would.
fn runs(program: &[u64], request: Request) -> bool {
    let bytes: Vec<u8> = program.iter().flat_map(|it| it.to_le_bytes()).collect();
    let kind = request.access << 16 | request.kind;
    let input = [kind, request.major, request.minor];
    let mut input: Vec<u8> = input.iter().flat_map(|it| it.to_le_bytes()).collect();
    let machine = rbpf::EbpfVmRaw::new(Some(&bytes)).unwrap();
    match machine.execute_program(&mut input).unwrap() {
        0 => false,
        1 => true,
        other => panic!("{other}"),
    }
}

fn is_of(devices: &Devices, request: Request) -> bool {
    let kind = match devices.kind {
        Kind::Block => 1,
        Kind::Character => 2,
    };
    kind == request.kind
        && devices.major == request.major
        && devices.minor.is_none_or(|minor| minor == request.minor)
}

/// Whether rules allow a request together.
fn model(rules: &[Rule], request: Request) -> bool {
    let matching = rules.iter().filter(|rule| is_of(&rule.devices, request));
    let allowed = matching.fold(0, |all, rule| all | rule.access.0);
    request.access & !u32::from(allowed) == 0
}

/// Whether the devices controller of cgroup v1 allows a request: one rule has to allow all of it.
fn version_1(rules: &[Rule], request: Request) -> bool {
    let mut matching = rules.iter().filter(|rule| is_of(&rule.devices, request));
    matching.any(|rule| request.access & !u32::from(rule.access.0) == 0)
}

/// Few numbers, so that many requests meet a rule, among them the largest that the kernel has.
fn major_number() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), Just(1), Just(10), Just(0xfff)]
}

fn minor_number() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), Just(3), Just(0xf_ffff)]
}

fn any_rule() -> impl Strategy<Value = Rule> {
    let kind = prop_oneof![Just(Kind::Block), Just(Kind::Character)];
    let minor = proptest::option::of(minor_number());
    (kind, major_number(), minor, 1..8_u8).prop_map(|(kind, major, minor, access)| {
        rule(Devices { kind, major, minor }, Access(access))
    })
}

/// Also kinds and accesses that no kernel has.
fn any_request() -> impl Strategy<Value = Request> {
    let access = prop_oneof![4 => 1..8_u32, 1 => 8..0x1_0000_u32];
    (0..4_u32, access, major_number(), minor_number()).prop_map(|(kind, access, major, minor)| {
        Request {
            kind,
            access,
            major,
            minor,
        }
    })
}

proptest! {
    #[test]
    fn a_program_allows_what_the_rules_allow(
        rules in proptest::collection::vec(any_rule(), 0..12),
        requests in proptest::collection::vec(any_request(), 1..40),
    ) {
        for program in [program(&rules), program(&merged(rules.iter().copied()))] {
            for request in &requests {
                prop_assert_eq!(runs(&program, *request), model(&rules, *request), "{:?}", request);
            }
        }
    }

    #[test]
    fn version_1_allows_the_same(
        rules in proptest::collection::vec(any_rule(), 0..12),
        requests in proptest::collection::vec(any_request(), 1..40),
    ) {
        let merged = merged(rules.iter().copied());
        for request in requests {
            prop_assert_eq!(version_1(&merged, request), model(&rules, request), "{:?}", request);
        }
    }
}

/// A number that the kernel can't have is not taken for another.
#[test]
fn an_impossible_device_is_in_no_program() {
    for (major, minor) in [(0x1000, Some(3)), (1, Some(0x10_0003)), (0x1001, None)] {
        let devices = Devices {
            kind: Kind::Character,
            major,
            minor,
        };
        assert_eq!(program(&[rule(devices, Access::ALL)]), program(&[]));
    }
}

fn request(kind: u32, major: u32, minor: u32, access: Access) -> Request {
    let access = access.0.into();
    Request {
        kind,
        access,
        major,
        minor,
    }
}

#[test]
fn a_container_has_the_usual_devices_and_no_disk() {
    let program = program(&DeviceRules::default().container());
    let allowed = [
        (2, 1, 3, Access::ALL),
        (2, 136, 12_345, Access::READ_WRITE),
        (2, 10, 200, Access::ALL),
        (1, 0, 0, Access::MKNOD),
    ];
    for (kind, major, minor, access) in allowed {
        assert!(runs(&program, request(kind, major, minor, access)));
    }
    let denied = [
        // The same number, but a RAM disk.
        (1, 1, 3, Access::READ),
        (2, 136, 1, Access::MKNOD),
        // Memory, the console, disks.
        (2, 1, 1, Access::READ),
        (2, 5, 1, Access::WRITE),
        (1, 8, 0, Access::READ),
        (1, 7, 0, Access::READ),
        (1, 254, 0, Access::MKNOD),
    ];
    for (kind, major, minor, access) in denied {
        let request = request(kind, major, minor, access);
        assert!(!runs(&program, request), "{request:?}");
    }
}

#[test]
fn rules_are_lines_of_version_1() {
    let lines: Vec<String> = EVERY_CONTAINER
        .iter()
        .map(|(_, rule)| rule.to_string())
        .collect();
    assert_eq!(lines[0], "c 1:3 rwm");
    assert_eq!(lines[7], "c 136:* rw");
    assert_eq!(lines[11], "b 0:0 rwm");
    let read = rule(Devices::block(7), Access::READ);
    assert_eq!(read.to_string(), "b 7:* r");
}

/// The table of `docs/resources.md`.
#[test]
fn the_documentation_has_every_device() {
    const DOCS: &str = include_str!("../../docs/resources.md");
    let rows = EVERY_CONTAINER.map(|(name, rule)| format!("| {name} | `{rule}` |"));
    let table = rows.join("\n");
    assert!(DOCS.contains(&table), "the table is\n{table}");
}

fn device(host: &Path, read: bool, write: bool, mknod: bool) -> Device {
    Device {
        host: host.to_owned(),
        container: "/dev/mine".into(),
        read,
        write,
        mknod,
    }
}

fn mount(source: &Path, read_only: bool) -> Mount {
    Mount::new(source, "/mnt").with_read_only(read_only)
}

/// Nodes of the host whose numbers every kernel has.
#[test]
fn devices_of_the_job_and_bound_nodes_are_allowed() {
    let temp = tempfile::tempdir().unwrap();
    let link = temp.path().join("link");
    symlink("/dev/zero", &link).unwrap();
    let devices = [
        device(&link, true, false, false),
        device(&temp.path().join("none"), true, true, true),
        device(temp.path(), true, true, true),
        device(Path::new("/dev/full"), false, true, true),
    ];
    let mounts = [
        mount(Path::new("/dev/random"), true),
        mount(Path::new("/dev/tty"), false),
        mount(temp.path(), false),
    ];
    let rules = DeviceRules::new(&devices, &mounts, &Root::Directory(temp.path().to_owned()));
    let lines: Vec<String> = rules.container.iter().map(Rule::to_string).collect();
    assert_eq!(lines, ["c 1:5 r", "c 1:7 wm", "c 1:8 r", "c 5:0 rw"]);
    assert_eq!(rules.only_nspawn(), []);
}

#[test]
fn a_directory_below_dev_brings_the_nodes_in_it() {
    let node = |path: &str| Devices::of_node(Path::new(path)).unwrap();
    let all = bound_devices(Path::new("/dev"));
    for path in ["/dev/null", "/dev/zero", "/dev/tty"] {
        assert!(all.contains(&node(path)), "{path}");
    }
    assert_eq!(bound_devices(Path::new("/dev/null")), [node("/dev/null")]);
    let temp = tempfile::tempdir().unwrap();
    symlink("/dev/zero", temp.path().join("link")).unwrap();
    assert_eq!(bound_devices(temp.path()), []);
}

/// What the job may use too is not taken from it once the container is up.
#[test]
fn only_a_disk_image_needs_more_and_only_until_the_container_is_up() {
    let temp = tempfile::tempdir().unwrap();
    let mut rules = DeviceRules::new(&[], &[], &Root::Image(temp.path().join("disk.raw")));
    let lines = |rules: &[Rule]| rules.iter().map(Rule::to_string).collect::<Vec<_>>();
    let needed = lines(&rules.only_nspawn());
    for line in ["b 7:* rw", "b 259:* rw", "c 10:236 rw", "c 10:237 rw"] {
        assert!(needed.iter().any(|it| it == line), "{line}: {needed:?}");
    }
    assert!(!lines(&rules.container()).contains(&"b 7:* rw".to_owned()));
    rules.container = vec![rule(LOOP_CONTROL, Access::READ), rule(LOOP, Access::ALL)];
    let needed = lines(&rules.only_nspawn());
    assert!(needed.contains(&"c 10:237 w".to_owned()), "{needed:?}");
    assert!(
        !needed.iter().any(|it| it.starts_with("b 7:")),
        "{needed:?}"
    );
}

#[test]
fn the_number_of_a_driver_is_that_of_block_devices() {
    let text = "Character devices:\n  1 mem\n253 device-mapper\n\nBlock devices:\n  7 loop\n254 device-mapper\n";
    assert_eq!(block_major(text, "device-mapper"), Some(254));
    assert_eq!(block_major(text, "loop"), Some(7));
    assert_eq!(block_major(text, "mem"), None);
    assert_eq!(block_major("", "loop"), None);
}
