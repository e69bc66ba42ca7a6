use super::*;
use crate::cgroup::limits::Limit;

fn setting(limit: Limit, file: PathBuf) -> Setting {
    let value = "7".to_owned();
    Setting { limit, file, value }
}

/// A directory with the files that the kernel would make.
fn group(path: &Path, files: &[&str]) {
    fs::create_dir_all(path).unwrap();
    for file in files {
        fs::write(path.join(file), "").unwrap();
    }
}

#[test]
fn what_the_kernel_refuses_is_named_once_for_each_limit() {
    let temp = tempfile::tempdir().unwrap();
    group(temp.path(), &["pids.max"]);
    let settings = [
        setting(Limit::Pids, temp.path().join("pids.max")),
        setting(Limit::Memory, temp.path().join("memory.max")),
        setting(Limit::Memory, temp.path().join("memory.min")),
        setting(Limit::Cpu, temp.path().join("cpu.weight")),
    ];
    let disabled = [("cpu".to_owned(), "cpu is busy".to_owned())];
    let refused = written(&settings, &disabled);
    let limits: Vec<Limit> = refused.iter().map(|one| one.limit).collect();
    assert_eq!(limits, [Limit::Memory, Limit::Cpu]);
    assert!(
        refused[0]
            .reason
            .contains("memory.max can't be set to 7: No such file")
    );
    assert_eq!(refused[1].reason, "cpu is busy");
    assert_eq!(
        fs::read_to_string(temp.path().join("pids.max")).unwrap(),
        "7"
    );
    // No file is made where the kernel has none.
    assert!(!temp.path().join("memory.max").exists());
    let note = unenforced_note(&refused).unwrap();
    assert!(
        note.starts_with("these limits are not enforced on this node: memory ("),
        "{note}"
    );
    assert!(note.ends_with("; cpu (cpu is busy)"), "{note}");
    assert_eq!(unenforced_note(&[]), None);
}

#[test]
fn controllers_are_enabled_from_the_top_on_and_once() {
    let temp = tempfile::tempdir().unwrap();
    let parent = temp.path().join("nomad-driver-nspawn");
    group(temp.path(), &["cgroup.subtree_control"]);
    group(&parent, &["cgroup.subtree_control"]);
    fs::write(temp.path().join("cgroup.subtree_control"), "cpu memory").unwrap();
    let plan = CgroupPlan {
        above: vec![temp.path().to_owned(), parent.clone()],
        enable: vec!["memory".to_owned()],
        ..CgroupPlan::default()
    };
    plan.create(&parent.join("x")).unwrap();
    let enabled = |group: &Path| fs::read_to_string(group.join("cgroup.subtree_control")).unwrap();
    assert_eq!(enabled(temp.path()), "cpu memory");
    assert_eq!(enabled(&parent), "+memory");
    assert!(parent.join("x").is_dir());
}

#[test]
fn a_controller_that_cannot_be_enabled_is_the_reason() {
    let temp = tempfile::tempdir().unwrap();
    let group = temp.path().join("x");
    let plan = CgroupPlan {
        above: vec![temp.path().to_owned()],
        enable: vec!["memory".to_owned()],
        before: vec![setting(Limit::Memory, group.join("memory.max"))],
        ..CgroupPlan::default()
    };
    let refused = plan.create(&group).unwrap();
    assert_eq!(refused.len(), 1);
    let reason = &refused[0].reason;
    assert!(
        reason.starts_with("memory can't be enabled in "),
        "{reason}"
    );
}

#[test]
fn a_cpuset_gets_the_cores_of_the_one_above() {
    let temp = tempfile::tempdir().unwrap();
    let files = ["cpuset.cpus", "cpuset.mems"];
    let top = temp.path().join("cpuset");
    let own = top.join("nomad-driver-nspawn/x");
    for path in [&top, &top.join("nomad-driver-nspawn"), &own] {
        group(path, &files);
    }
    fs::write(top.join("cpuset.cpus"), "0-3\n").unwrap();
    fs::write(top.join("cpuset.mems"), "0\n").unwrap();
    inherit_cores(&own).unwrap();
    assert_eq!(fs::read_to_string(own.join("cpuset.cpus")).unwrap(), "0-3");
    assert_eq!(fs::read_to_string(own.join("cpuset.mems")).unwrap(), "0");
}

/// The launch spec of a later driver may name a limit that this one does not know.
#[test]
fn a_plan_is_read_back_and_an_unknown_limit_is_kept_harmless() {
    let plan = CgroupPlan {
        before: vec![setting(Limit::Memory, "/x".into())],
        ..CgroupPlan::default()
    };
    let text = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<CgroupPlan>(&text).unwrap(), plan);
    let later = text.replace("\"memory\"", "\"io\"");
    let plan: CgroupPlan = serde_json::from_str(&later).unwrap();
    assert_eq!(plan.before[0].limit, Limit::Unknown);
}

/// The umask of a supervisor is 077.
#[test]
fn every_directory_that_the_driver_makes_is_visible_to_the_container() {
    let temp = tempfile::tempdir().unwrap();
    let subtree = temp.path().join(SUBTREE);
    let (tracking, controller) = (
        subtree.join("x"),
        temp.path().join("v1").join(SUBTREE).join("x"),
    );
    fs::create_dir(&subtree).unwrap();
    fs::set_permissions(&subtree, fs::Permissions::from_mode(0o700)).unwrap();
    let plan = CgroupPlan {
        controllers: [("memory".to_owned(), controller.clone())].into(),
        ..CgroupPlan::default()
    };
    plan.create(&tracking).unwrap();
    for directory in [
        &subtree,
        &tracking,
        &controller,
        &controller.parent().unwrap().to_owned(),
    ] {
        let mode = fs::metadata(directory).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o755, "{}", directory.display());
    }
}

/// As any other limit: a note, or with `require_limits` a refusal.
#[test]
fn a_device_policy_that_cannot_be_enforced_is_a_limit() {
    let temp = tempfile::tempdir().unwrap();
    let group = temp.path().join("x");
    let place = Place {
        tracking: crate::cgroup::CgroupPath {
            group: group.clone(),
            mirror: None,
        },
        version_2: false,
        granted: false,
        controllers: [("devices".to_owned(), group.clone())].into(),
    };
    let layout = Layout::of(&[]);
    let (plan, unenforced) = CgroupPlan::new(
        &layout,
        &place,
        &Resources::default(),
        &DeviceRules::default(),
    );
    assert_eq!(unenforced, []);
    // No kernel makes the files here.
    let refused = plan.create(&group).unwrap();
    let note = unenforced_note(&refused).unwrap();
    let start = "these limits are not enforced on this node: devices (";
    assert!(note.starts_with(start), "{note}");
    assert!(note.contains("devices.deny can't be written"), "{note}");
    let nowhere = Place {
        controllers: BTreeMap::new(),
        ..place
    };
    let resources = Resources::default();
    let (_, unenforced) = CgroupPlan::new(&layout, &nowhere, &resources, &DeviceRules::default());
    let limits: Vec<Limit> = unenforced.iter().map(|one| one.limit).collect();
    assert_eq!(limits, [Limit::Devices]);
}
