//! Mounts: volumes, binds, `mount` blocks and temporary file systems.

use crate::container::{MountIds, Propagation, Restrictions, Tmpfs};

use super::*;

#[test]
fn mounts_have_nomads_first_and_binds_last() {
    let mut host = TestHost::new();
    host.make(format!("alloc/{ALLOC}/web/local/conf/."));
    host.make("volume/.");
    host.context.mounts = vec![VolumeMount {
        source: host.path("volume"),
        target: "/v".into(),
        read_only: true,
        propagation: String::new(),
    }];
    let spec = plain(
        &host,
        r#"
        bind = { "local/conf" = "/etc/conf", "TOP/data" = "/da:ta" }
        bind_read_only = { "/local/conf" = "/etc/other" }
        "#,
    );
    let conf = host.path(format!("alloc/{ALLOC}/web/local/conf"));
    let expected: Vec<(PathBuf, &str, bool)> = vec![
        (host.path("volume"), "/v", true),
        (host.path("data"), "/da:ta", false),
        (conf.clone(), "/etc/conf", false),
        (conf, "/etc/other", true),
    ];
    let found: Vec<_> = spec.mounts[3..]
        .iter()
        .map(|m| (m.source.clone(), m.target.to_str().unwrap(), m.read_only))
        .collect();
    assert_eq!(found, expected);
}

#[test]
fn without_volumes_only_the_allocation_can_be_mounted() {
    let mut host = TestHost::new();
    host.plugin_config.volumes = false;
    let body = "image = \"tree\"\nboot = false\n";
    assert_eq!(plain(&host, r#"bind = { "local" = "/x" }"#).mounts.len(), 4);
    assert_eq!(
        host.refusal(&format!("{body}bind = {{ \"TOP/data\" = \"/x\" }}")),
        r#"config.bind["TOP/data"]: "TOP/data" is outside the allocation, and volumes are disabled on this node (plugin.volumes = false)"#
    );
    host.context.mounts = vec![VolumeMount {
        source: host.path("data"),
        target: "/v".into(),
        read_only: false,
        propagation: String::new(),
    }];
    assert_eq!(
        host.refusal(body),
        r#"task.volume_mount["/v"]: volumes are disabled on this node (plugin.volumes = false)"#
    );
}

fn volume(target: &str, propagation: &str) -> VolumeMount {
    VolumeMount {
        source: "/".into(),
        target: target.into(),
        read_only: false,
        propagation: propagation.into(),
    }
}

#[test]
fn a_volume_has_the_propagation_of_its_block_and_a_bind_that_of_systemd_nspawn() {
    let mut host = TestHost::new();
    host.context.mounts = vec![
        volume("/unset", ""),
        volume("/private", "private"),
        volume("/slave", "host-to-task"),
    ];
    let spec = plain(&host, r#"bind = { "TOP/data" = "/bind" }"#);
    let modes = spec.mounts.iter().map(|mount| mount.propagation);
    use Propagation::{HostToTask, Private};
    assert_eq!(
        modes.collect::<Vec<_>>(),
        [
            HostToTask, HostToTask, HostToTask, Private, Private, HostToTask, HostToTask
        ]
    );
}

#[rstest]
#[case(
    "bidirectional",
    r#"task.volume_mount["/v"].propagation_mode: "bidirectional" is not supported, because mounts that a task makes can't reach the host: use one of private, host-to-task"#
)]
#[case(
    "slave",
    r#"task.volume_mount["/v"].propagation_mode: "slave" is not one of private, host-to-task"#
)]
fn a_propagation_that_is_not_supported_is_refused(#[case] word: &str, #[case] message: &str) {
    let mut host = TestHost::new();
    host.context.mounts = vec![volume("/v", word)];
    assert_eq!(host.refusal("image = \"tree\"\nboot = false"), message);
}

/// The last mount of a task with these options.
fn last(host: &TestHost, extra: &str) -> Mount {
    plain(host, extra).mounts.pop().unwrap()
}

#[rstest]
#[case("", [MountIds::Mapped; 3])]
#[case("idmap = false", [MountIds::Unmapped; 3])]
fn idmap_is_that_of_volumes_and_binds(#[case] extra: &str, #[case] wanted: [MountIds; 3]) {
    let mut host = TestHost::new();
    host.context.mounts = vec![volume("/v", "")];
    let extra = format!(
        "{extra}\nbind = {{ \"TOP/data\" = \"/a\" }}\nmount {{\nsource = \"TOP/data\"\ntarget = \"/b\"\n}}"
    );
    let mounts = plain(&host, &extra).mounts;
    let ids: Vec<_> = mounts.iter().map(|mount| mount.ids).collect();
    assert_eq!(ids[..3], [MountIds::MappedIfPossible; 3], "Nomad's own");
    assert_eq!(ids[3..], wanted);
}

#[rstest]
#[case("", Mount::new("TOP/data", "/b"))]
#[case("readonly = true", Mount::new("TOP/data", "/b").with_read_only(true))]
#[case("nosuid = true\nnodev = true\nnoexec = true", Mount {
    restrictions: Restrictions { nosuid: true, nodev: true, noexec: true },
    ..Mount::new("TOP/data", "/b")
})]
#[case("idmap = false", Mount { ids: MountIds::Unmapped, ..Mount::new("TOP/data", "/b") })]
#[case("bind_options { propagation = \"rslave\" }", Mount {
    propagation: Propagation::HostToTask,
    ..Mount::new("TOP/data", "/b")
})]
#[case("bind_options {}", Mount::new("TOP/data", "/b"))]
#[case("create = true", Mount::new("TOP/data", "/b"))]
fn a_mount_block_binds_in_dockers_words(#[case] extra: &str, #[case] wanted: Mount) {
    let host = TestHost::new();
    let block = format!("mount {{\nsource = \"TOP/data\"\ntarget = \"/b\"\n{extra}\n}}");
    // The default of `Mount` is that of `bind`.
    let of_bind = extra.contains("rslave");
    let wanted = Mount {
        source: host.path("data"),
        propagation: match of_bind {
            true => Propagation::HostToTask,
            false => Propagation::Private,
        },
        ids: match wanted.ids {
            MountIds::Unmapped => MountIds::Unmapped,
            _ => MountIds::Mapped,
        },
        option: Some("config.mount[0]".to_owned()),
        ..wanted
    };
    assert_eq!(last(&host, &block), wanted);
}

#[test]
fn a_mount_block_overrides_the_tasks_idmap() {
    let host = TestHost::new();
    let body = "idmap = false\nmount {\nsource = \"local\"\ntarget = \"/b\"\nidmap = true\n}";
    assert_eq!(last(&host, body).ids, MountIds::Mapped);
}

#[rstest]
#[case("new", "alloc/ALLOC/web/new")]
#[case("local/a/b", "alloc/ALLOC/web/local/a/b")]
#[case("/local/a", "alloc/ALLOC/web/local/a")]
#[case("/alloc/a", "alloc/ALLOC/alloc/a")]
#[case("TOP/alloc/ALLOC/alloc/a", "alloc/ALLOC/alloc/a")]
#[case("local/../local/a", "alloc/ALLOC/web/local/a")]
#[case("TOP/data/a/b", "data/a/b")]
#[case("TOP/linked/a", "data/a")]
fn a_missing_directory_can_be_created(#[case] source: &str, #[case] wanted: &str) {
    let host = TestHost::new();
    host.link("linked", "data");
    let source = source.replace("ALLOC", ALLOC);
    let block = format!("mount {{\nsource = \"{source}\"\ntarget = \"/b\"\ncreate = true\n}}");
    let mount = last(&host, &block);
    let wanted = host.path(wanted.replace("ALLOC", ALLOC));
    assert_eq!((&mount.source, mount.create), (&wanted, true));
    assert!(!wanted.exists(), "validation creates nothing");
}

#[rstest]
#[case("local/out/a", r#""local/out/a" leads outside "TOP/alloc/ALLOC/web""#)]
#[case("../a", r#""../a" leads outside "TOP/alloc/ALLOC/web""#)]
#[case(
    "local/nowhere",
    r#""local/nowhere" does not exist; looked at "TOP/alloc/ALLOC/web/local/nowhere""#
)]
#[case(
    "local/nowhere/a",
    r#""local/nowhere/a" does not exist; looked at "TOP/alloc/ALLOC/web/local/nowhere""#
)]
#[case(
    "local/a/../b",
    r#""local/a/../b" does not exist; looked at "TOP/alloc/ALLOC/web/local/a""#
)]
#[case(
    "local/file/a",
    r#""local/file/a" does not exist; looked at "TOP/alloc/ALLOC/web/local/file/a""#
)]
#[case(
    "private/a",
    r#""private/a" is or contains a directory that Nomad hides from tasks"#
)]
#[case("TOP/alloc/ALLOC/db/local/a", r#""TOP/alloc/ALLOC/db/local/a" does not exist, and is not created outside the shared directory of the allocation and that of this task"#)]
#[case(
    "TOP/alloc/ALLOC/later",
    r#""TOP/alloc/ALLOC/later" does not exist; looked at "TOP/alloc/ALLOC/later""#
)]
fn a_directory_is_created_only_where_the_task_may(#[case] source: &str, #[case] reason: &str) {
    let host = TestHost::new();
    let local = format!("alloc/{ALLOC}/web/local");
    host.link(&format!("{local}/out"), "/etc");
    host.link(&format!("{local}/nowhere"), "/nowhere/at/all");
    host.make(format!("{local}/file"));
    let source = source.replace("ALLOC", ALLOC);
    let body = format!(
        "image = \"tree\"\nboot = false\nmount {{\nsource = \"{source}\"\ntarget = \"/b\"\ncreate = true\n}}"
    );
    let wanted = format!("config.mount[0].source: {reason}");
    assert_eq!(host.refusal(&body), wanted);
}

#[test]
fn without_volumes_nothing_is_created_outside_the_allocation() {
    let mut host = TestHost::new();
    host.plugin_config.volumes = false;
    let block = "mount {\nsource = \"local/a\"\ntarget = \"/b\"\ncreate = true\n}";
    assert!(last(&host, block).create);
    let body = format!("image = \"tree\"\nboot = false\n{block}").replace("local", "TOP/data");
    assert_eq!(
        host.refusal(&body),
        r#"config.mount[0].source: "TOP/data/a" is outside the allocation, and volumes are disabled on this node (plugin.volumes = false)"#
    );
}

#[rstest]
#[case("type = \"volume\"", r#"type: "volume" is a volume that docker manages: use a volume block of the group and a volume_mount block of the task, or one of bind, tmpfs"#)]
#[case("type = \"nfs\"", r#"type: "nfs" is not one of bind, tmpfs"#)]
#[case("", r#"source: is required for the type "bind""#)]
#[case(
    "source = \"none\"",
    r#"source: "none" does not exist; looked at "TOP/alloc/ALLOC/web/none""#
)]
#[case(
    "source = \"private\"",
    r#"source: "private" is or contains a directory that Nomad hides from tasks"#
)]
#[case("source = \"local\"\nbind_options { propagation = \"rshared\" }", r#"bind_options.propagation: "rshared" is not supported, because mounts that a task makes can't reach the host: use one of private, rprivate, slave, rslave, host-to-task"#)]
#[case("source = \"local\"\nbind_options { propagation = \"up\" }", r#"bind_options.propagation: "up" is not one of private, rprivate, slave, rslave, host-to-task"#)]
#[case(
    "source = \"local\"\ntmpfs_options {}",
    r#"tmpfs_options: can't be combined with the type "bind""#
)]
#[case(
    "type = \"tmpfs\"\nsource = \"local\"",
    r#"source: can't be combined with the type "tmpfs""#
)]
#[case(
    "type = \"tmpfs\"\nidmap = true",
    r#"idmap: can't be combined with the type "tmpfs""#
)]
#[case(
    "type = \"tmpfs\"\ncreate = true",
    r#"create: can't be combined with the type "tmpfs""#
)]
#[case(
    "type = \"tmpfs\"\nbind_options {}",
    r#"bind_options: can't be combined with the type "tmpfs""#
)]
#[case(
    "type = \"tmpfs\"\ntmpfs_options { size = 0 }",
    r#"tmpfs_options.size: 0 is not a whole number from 1 to 9223372036854775807"#
)]
#[case("type = \"tmpfs\"\ntmpfs_options { mode = 1777 }", r#"tmpfs_options.mode: 1777 is 3361 in octal, which takes permissions from the owner: use a decimal number as with docker, such as 1023 for 1777, 511 for 0777 or 448 for 0700"#)]
#[case("type = \"tmpfs\"\ntmpfs_options { mode = 755 }", r#"tmpfs_options.mode: 755 is 1363 in octal, which takes permissions from the owner: use a decimal number as with docker, such as 1023 for 1777, 511 for 0777 or 448 for 0700"#)]
#[case(
    "type = \"tmpfs\"\ntmpfs_options { mode = 4096 }",
    r#"tmpfs_options.mode: 4096 is not a whole number from 0 to 4095"#
)]
fn a_bad_mount_block_is_refused_with_a_reason(#[case] extra: &str, #[case] reason: &str) {
    let message = refusal(&format!("mount {{\ntarget = \"/b\"\n{extra}\n}}"));
    assert_eq!(message, format!("config.mount[0].{reason}"));
}

#[rstest]
#[case("/", r#"config.mount[0].target: the target "/" would hide the image"#)]
#[case("b", r#"config.mount[0].target: "b" is not an absolute path"#)]
#[case("/a/../b", r#"config.mount[0].target: "/a/../b" contains .."#)]
#[case("", "config.mount[0].target: is required")]
fn a_mount_block_needs_a_target(#[case] target: &str, #[case] message: &str) {
    let block = format!("mount {{\nsource = \"local\"\ntarget = \"{target}\"\n}}");
    assert_eq!(refusal(&block), message);
}

fn temporary(target: &str, option: &str) -> Tmpfs {
    Tmpfs {
        target: target.into(),
        size: None,
        mode: 0o1777,
        read_only: false,
        restrictions: Restrictions::default(),
        option: option.to_owned(),
    }
}

#[rstest]
#[case("tmpfs = [\"/c\"]", temporary("/c", "config.tmpfs[0]"))]
#[case("tmpfs = [\"/c//d/\"]", temporary("/c/d", "config.tmpfs[0]"))]
#[case("tmpfs = [\"/c:rw,suid,exec\"]", temporary("/c", "config.tmpfs[0]"))]
#[case("tmpfs = [\"/c:size=64k,mode=0750,ro,nosuid,nodev,noexec\"]", Tmpfs {
    size: Some(64 << 10),
    mode: 0o750,
    read_only: true,
    restrictions: Restrictions { nosuid: true, nodev: true, noexec: true },
    ..temporary("/c", "config.tmpfs[0]")
})]
#[case(
    "mount {\ntype = \"tmpfs\"\ntarget = \"/a:b\"\n}",
    temporary("/a:b", "config.mount[0]")
)]
#[case("mount {\ntype = \"tmpfs\"\ntarget = \"/c\"\nreadonly = true\nnoexec = true\ntmpfs_options {\nsize = 65536\nmode = 448\n}\n}", Tmpfs {
    size: Some(65536),
    mode: 0o700,
    read_only: true,
    restrictions: Restrictions { noexec: true, ..Restrictions::default() },
    ..temporary("/c", "config.mount[0]")
})]
fn temporary_file_systems(#[case] extra: &str, #[case] wanted: Tmpfs) {
    assert_eq!(plain(&TestHost::new(), extra).tmpfs, [wanted]);
}

#[test]
fn a_temporary_file_system_holds_half_of_the_memory_limit() {
    let mut host = TestHost::new();
    host.context.resources.memory_mb = 64;
    let sizes = |extra: &str| {
        let tmpfs = plain(&host, extra).tmpfs;
        tmpfs.iter().map(|one| one.size).collect::<Vec<_>>()
    };
    let extra = "tmpfs = [\"/c\", \"/d:size=64m\"]\nmount {\ntype = \"tmpfs\"\ntarget = \"/e\"\n}";
    assert_eq!(sizes(extra), [32 << 20, 32 << 20, 64 << 20].map(Some));
    let body = "image = \"tree\"\nboot = false\n";
    assert_eq!(
        host.refusal(&format!("{body}tmpfs = [\"/c:size=65m\"]")),
        r#"config.tmpfs[0]: "65m" is more than the memory limit of the task, 67108864 bytes"#
    );
    assert_eq!(
        host.refusal(&format!("{body}mount {{\ntype = \"tmpfs\"\ntarget = \"/e\"\ntmpfs_options {{ size = 67108865 }}\n}}")),
        r#"config.mount[0].tmpfs_options.size: "67108865" is more than the memory limit of the task, 67108864 bytes"#
    );
}

#[rstest]
#[case("c", r#""c" is not an absolute path"#)]
#[case("", r#""" is empty"#)]
#[case("/", r#"the target "/" would hide the image"#)]
#[case(
    "/c:size=x",
    r#""x" is not a size: use a whole number with one of the units b, k, m and g, such as 512m"#
)]
#[case("/c:size=0", r#""0" is no size: use at least 1 byte, or leave it out"#)]
#[case(
    "/c:mode=8",
    r#""8" is not a mode: use one in octal such as 1777 or 0700"#
)]
#[case(
    "/c:mode=+7",
    r#""+7" is not a mode: use one in octal such as 1777 or 0700"#
)]
#[case(
    "/c:mode=10000",
    r#""10000" is not a mode: use one in octal such as 1777 or 0700"#
)]
#[case(
    "/c:mode=",
    r#""" is not a mode: use one in octal such as 1777 or 0700"#
)]
#[case(
    "/c:uid=5",
    r#""uid=5" is not one of size=SIZE, mode=MODE, ro, rw, nosuid, suid, nodev, noexec, exec"#
)]
#[case(
    "/c:dev",
    r#""dev" is not one of size=SIZE, mode=MODE, ro, rw, nosuid, suid, nodev, noexec, exec"#
)]
#[case("/tmp", r#""/tmp" is a temporary file system in every container: leave it out, and set its size by config.tmp_size"#)]
#[case("/dev/shm/:ro", r#""/dev/shm" is a temporary file system in every container: leave it out, and set its size by config.shm_size"#)]
#[case(
    "/run",
    r#""/run" is a temporary file system in every container: leave it out"#
)]
fn a_bad_tmpfs_is_refused_with_a_reason(#[case] text: &str, #[case] reason: &str) {
    let message = refusal(&format!("tmpfs = [\"{text}\"]"));
    assert_eq!(message, format!("config.tmpfs[0]: {reason}"));
}

#[rstest]
#[case(
    "tmpfs = [\"/v\"]",
    r#"config.tmpfs[0]: the target "/v" is also that of task.volume_mount["/v"]"#
)]
#[case(
    "tmpfs = [\"/c\", \"/c/:ro\"]",
    r#"config.tmpfs[1]: the target "/c" is also that of config.tmpfs[0]"#
)]
#[case(
    "tmpfs = [\"/secrets\"]",
    r#"config.tmpfs[0]: the target "/secrets" is also that of Nomad's own directory /secrets"#
)]
#[case(
    "bind = { local = \"/c\" }\nmount {\nsource = \"local\"\ntarget = \"/c\"\n}",
    r#"config.mount[0]: the target "/c" is also that of config.bind["local"]"#
)]
#[case(
    "bind = { local = \"/dev/null0\" }\ndevices { \n host_path = \"/dev/null\"\ncontainer_path = \"/dev/null0\"\n}",
    r#"config.bind["local"]: the target "/dev/null0" is also that of config.devices[0].host_path"#
)]
fn two_mounts_with_the_same_target_are_refused(#[case] extra: &str, #[case] message: &str) {
    let mut host = TestHost::new();
    host.context.mounts = vec![volume("/v", "")];
    let body = format!("image = \"tree\"\nboot = false\n{extra}");
    assert_eq!(host.refusal(&body), message);
}

#[rstest]
#[case("bind = { \"TOP/data\" = \"/c\", local = \"/c/new\" }", None)]
#[case(
    "bind_read_only = { \"TOP/data\" = \"/c\", local = \"/c/there\" }",
    None
)]
#[case(
    "bind_read_only = { \"TOP/data\" = \"/c\", local = \"/c/link/new\" }",
    None
)]
#[case("bind_read_only = { \"TOP/data\" = \"/c\", local = \"/c/there\", secrets = \"/c/there/new\" }", Some(r#"config.bind_read_only["secrets"]: the target "/c/there/new" can't be created in config.bind_read_only["local"], which is read-only: create "TOP/alloc/ALLOC/web/local/new" on the host"#))]
#[case("bind_read_only = { \"TOP/data\" = \"/c\" }\ntmpfs = [\"/c/new\"]", Some(r#"config.tmpfs[0]: the target "/c/new" can't be created in config.bind_read_only["TOP/data"], which is read-only: create "TOP/data/new" on the host"#))]
#[case("tmpfs = [\"/c\", \"/c/new\"]", None)]
#[case("tmpfs = [\"/c:ro\", \"/c/new\"]", Some(r#"config.tmpfs[1]: the target "/c/new" can't be created in config.tmpfs[0], which is empty and read-only"#))]
#[case("bind = { \"TOP/data/file\" = \"/c\" }\ntmpfs = [\"/c/new\"]", Some(r#"config.tmpfs[0]: the target "/c/new" lies in config.bind["TOP/data/file"], which is a file"#))]
#[case("tmpfs = [\"/local/new\", \"/cc\", \"/c\"]", None)]
fn a_mount_point_in_another_mount_has_to_be_there_or_possible(
    #[case] extra: &str,
    #[case] message: Option<&str>,
) {
    let host = TestHost::new();
    host.make("data/there/.");
    host.make("data/file");
    host.link("data/link", "/somewhere");
    match message {
        None => drop(plain(&host, extra)),
        Some(message) => {
            let body = format!("image = \"tree\"\nboot = false\n{extra}");
            assert_eq!(host.refusal(&body), message);
        }
    }
}

#[test]
fn only_paths_that_the_operator_lists_are_mounted() {
    let mut host = TestHost::new();
    host.link("data/out", "../plugins");
    host.link("shortcut", "data");
    let pattern = format!("{}/da*", host.path("").display());
    host.plugin_config.volumes_allow =
        AllowedPaths::of("plugin.volumes_allow", &[pattern, "/none".to_owned()]).unwrap();
    for allowed in [
        "bind = { \"TOP/data\" = \"/x\", \"TOP/shortcut\" = \"/y\", local = \"/z\" }",
        "mount {\nsource = \"TOP/data/new\"\ntarget = \"/x\"\ncreate = true\n}",
    ] {
        plain(&host, allowed);
    }
    let refused = |option: &str, path: &str| {
        format!(
            r#"{option}: the source is "TOP/{path}" on this node, which matches none of plugin.volumes_allow: "TOP/da*", "/none""#
        )
    };
    for (extra, message) in [
        (
            "bind = { \"TOP/plugins\" = \"/x\" }",
            refused(r#"config.bind["TOP/plugins"]"#, "plugins"),
        ),
        (
            "bind_read_only = { \"TOP/data/out\" = \"/x\" }",
            refused(r#"config.bind_read_only["TOP/data/out"]"#, "plugins"),
        ),
        (
            "mount {\nsource = \"TOP/new/a\"\ntarget = \"/x\"\ncreate = true\n}",
            refused("config.mount[0].source", "new/a"),
        ),
    ] {
        let body = format!("image = \"tree\"\nboot = false\n{extra}");
        assert_eq!(host.refusal(&body), message);
    }
    host.context.mounts = vec![VolumeMount {
        source: host.path("machines"),
        ..volume("/v", "")
    }];
    assert_eq!(
        host.refusal("image = \"tree\"\nboot = false"),
        refused(r#"task.volume_mount["/v"]"#, "machines")
    );
    host.context.mounts[0].source = host.path("shortcut");
    assert_eq!(plain(&host, "").mounts[3].source, host.path("data"));
}
