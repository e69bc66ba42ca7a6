//! Which devices the processes of a container may use. The nodes are in its tree, as root of a container without a user namespace could make
//! them. A disk of the host is only ever opened for reading.

use std::os::unix::fs::PermissionsExt as _;

use nix::sys::stat::{Mode as Bits, SFlag, makedev, mknod};
use nomad_driver_nspawn::cgroup::Layout;
use nomad_driver_nspawn::container::{CgroupLayout, Mount};

use super::*;

/// `try NODE '<'` and `try NODE '>'` print whether the node can be opened, and `make NAME …` whether it can be made. Anything but success
/// and EPERM is printed as it is.
const FUNCTIONS: &str = r#"
say() { case $1 in '') echo yes ;; *'not permitted'*) echo no ;; *) echo "$1" ;; esac; }
try() { say "$( (eval ": $2 $1") 2>&1)"; }
make() { say "$(mknod "$@" 2>&1)"; }
"#;

/// Whether the host can restrict devices at all. Reports the test as not applicable otherwise.
fn can_restrict() -> bool {
    let layout = Layout::of_this_host();
    let has = layout.controllers.contains_key("devices")
        || matches!(layout.kind, CgroupLayout::V2 | CgroupLayout::Hybrid);
    let can = nix::unistd::geteuid().is_root() && has;
    if !can {
        not_applicable("needs root, and cgroup v2 or the devices controller");
    }
    can
}

/// A node that every user may use.
fn node(path: PathBuf, kind: SFlag, (major, minor): (u64, u64)) -> PathBuf {
    mknod(&path, kind, Bits::empty(), makedev(major, minor)).unwrap();
    // Not by the umask, which other tests of this process share: their directories would be writable by everyone for a moment.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    path
}

/// The numbers of a disk of this host; those of a loop device if it has none.
fn disk() -> (u64, u64) {
    let text = fs::read_to_string("/proc/partitions").unwrap();
    let numbers = |line: &str| {
        let mut words = line.split_whitespace().map(|word| word.parse().ok());
        Some((words.next()??, words.next()??))
    };
    text.lines().find_map(numbers).unwrap_or((7, 0))
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_uses_no_device_but_those_of_its_policy(world: World) {
    if !can_restrict() {
        return;
    }
    let (major, minor) = disk();
    const LOOP_CONTROL: (u64, u64) = (10, 237);
    node(world.tree.join("null"), SFlag::S_IFCHR, (1, 3));
    node(world.tree.join("disk"), SFlag::S_IFBLK, (major, minor));
    node(world.tree.join("control"), SFlag::S_IFCHR, LOOP_CONTROL);
    let bound = world.scratch.path().join("bound");
    let bound = node(bound, SFlag::S_IFCHR, LOOP_CONTROL);
    // The fake does not change the root.
    let top = match world.is_fake() {
        true => world.tree.display().to_string(),
        false => String::new(),
    };
    let script = format!(
        "{FUNCTIONS}
        try {top}/null '<'; try {top}/null '>'; make {top}/made c 1 3
        try {top}/disk '<'; make {top}/copy b {major} {minor}
        try {top}/control '<'; try {top}/control '>'"
    );
    let run = async |mounts| {
        fs::write(world.file("stdout"), "").unwrap();
        let spec = world.spec(&script).with(|spec| spec.mounts = mounts);
        let started = world.start(spec).await;
        assert_eq!(started.notes, Vec::<String>::new());
        assert_eq!(ended(&world.end(&started).await), (0, 0));
        within(world.backend.remove(&started.id)).await.unwrap();
        let _ = fs::remove_file(world.tree.join("made"));
        world.said("stdout")
    };
    let every = "yes\nyes\nyes\nno\nno\n";
    assert_eq!(run(Vec::new()).await, format!("{every}no\nno\n"));
    // A node that is bound is allowed as it is bound.
    let bound = |read_only| vec![Mount::new(bound.clone(), "/srv/bound").with_read_only(read_only)];
    fs::create_dir_all(world.tree.join("srv")).unwrap();
    assert_eq!(run(bound(true)).await, format!("{every}yes\nno\n"));
    assert_eq!(run(bound(false)).await, format!("{every}yes\nyes\n"));
    world.leave(&[]).await;
}

/// In cgroup v1 the kernel shows the policy.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_devices_of_a_container_are_those_of_the_documentation(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    let Some(group) = started.controllers.get("devices") else {
        not_applicable("needs root and the devices controller of cgroup v1");
        return world.leave(&[&started]).await;
    };
    let list = fs::read_to_string(group.join("devices.list")).unwrap();
    let text = include_str!("../../docs/resources.md");
    let table = text
        .split("|---|---|\n")
        .find(|part| part.starts_with("| `/dev/null` |"));
    let rows = table
        .unwrap()
        .lines()
        .take_while(|line| line.starts_with('|'));
    let documented = rows.map(|row| row.split('|').nth(2).unwrap().trim().trim_matches('`'));
    let documented: BTreeSet<&str> = documented.collect();
    assert_eq!(list.lines().collect::<BTreeSet<_>>(), documented);
    world.leave(&[&started]).await;
}
