//! Records with any content that they can have, for property tests.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::container::{
    Changes, Credential, Device, Journal, Mount, MountIds, Overlay, TmpfsSizes,
};
use crate::mounts::{self, IdRange};

/// A time that a record can hold.
fn moment() -> impl Strategy<Value = SystemTime> {
    let span = (0..1u64 << 40, 0..1_000_000_000u32);
    span.prop_map(|(seconds, nanos)| SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos))
}

pub(super) fn process() -> impl Strategy<Value = Process> {
    (any::<i32>(), any::<u64>()).prop_map(|(pid, start)| Process { pid, start })
}

pub(super) fn path() -> impl Strategy<Value = PathBuf> {
    any::<String>().prop_map(PathBuf::from)
}

pub(crate) fn exit() -> impl Strategy<Value = Exit> {
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
        Just(Resource::UidRange(UidRange::default())),
        any::<u32>().prop_map(|first| Resource::UidRange(UidRange { first: Some(first) })),
        (path(), any::<bool>())
            .prop_map(|(tree, shared)| Resource::TreeLock(TreeLock { tree, shared })),
        Just(Resource::Skeleton(Skeleton {})),
        (path(), proptest::option::of(any::<String>())).prop_map(|(directory, tree)| {
            Resource::EphemeralCopy(EphemeralCopy { directory, tree })
        }),
        Just(Resource::NspawnMounts(NspawnMounts {})),
        any::<String>()
            .prop_map(|x| Resource::Unknown(serde_json::json!({"kind": "later", "x": x}))),
    ]
}

fn cgroup_plan() -> impl Strategy<Value = CgroupPlan> {
    let controllers = proptest::collection::btree_map(any::<String>(), path(), 0..3);
    let oom = proptest::option::of(path());
    (controllers, oom, any::<bool>()).prop_map(|(controllers, oom, required)| {
        let mut plan = CgroupPlan::default();
        plan.controllers = controllers;
        plan.oom = oom;
        plan.required = required;
        plan
    })
}

fn inside() -> impl Strategy<Value = InsideSettings> {
    let device =
        (path(), path(), any::<[bool; 3]>()).prop_map(|(host, container, [read, write, mknod])| {
            Device {
                host,
                container,
                read,
                write,
                mknod,
            }
        });
    let devices = proptest::collection::vec(device, 0..3);
    let sysctls = proptest::collection::btree_map(any::<String>(), any::<String>(), 0..3);
    (any::<[Option<u64>; 3]>(), sysctls, devices).prop_map(|([tmp, run, shm], sysctls, devices)| {
        InsideSettings {
            tmpfs: TmpfsSizes { tmp, run, shm },
            sysctls,
            devices,
        }
    })
}

fn seccomp() -> impl Strategy<Value = Source> {
    let spec = crate::container::ContainerSpec::for_test("task", "/tree");
    let kind = Kind::of(&spec, Path::new("/bin/sh")).unwrap().unwrap();
    prop_oneof![
        Just(Source::Nspawn),
        Just(Source::Capture(Box::new(kind))),
        any::<(u32, u64)>().prop_map(|(count, bounding)| Source::Captured { count, bounding }),
    ]
}

fn changes() -> impl Strategy<Value = Changes> {
    let kept = |create| Changes::Kept {
        directory: "/none/kept".into(),
        create,
    };
    prop_oneof![
        Just(Changes::Refused),
        any::<Option<u64>>().prop_map(|size| Changes::Discarded { size }),
        any::<bool>().prop_map(kept),
    ]
}

fn mount_plan() -> impl Strategy<Value = MountPlan> {
    let ids = any::<(u32, u32)>().prop_map(|(first, count)| IdRange { first, count });
    let ids = proptest::option::of(ids);
    let mount = (path(), any::<bool>(), any::<Option<String>>());
    let mount = mount.prop_map(|(source, read_only, option)| Mount {
        option,
        ..Mount::new(source, "/srv").with_read_only(read_only)
    });
    let overlay = changes().prop_map(|changes| Mount {
        ids: MountIds::Unmapped,
        overlay: Some(Overlay {
            below: vec!["/none/base".into()],
            changes,
        }),
        ..Mount::new("/none/site", "/app")
    });
    let mount = prop_oneof![mount, overlay];
    let mounts = proptest::collection::vec(mount, 0..4);
    (mounts, ids, proptest::option::of(path())).prop_map(|(mounts, ids, root)| {
        let mut plan = mounts::plan(mounts, ids, Path::new("/none")).unwrap().plan;
        plan.keep(vec!["/srv".into()], vec!["/srv/web".into()]);
        plan.add_tmpfs(std::iter::once("/scratch".into()));
        if let Some(root) = root {
            plan.map_root(&root);
        }
        match plan.is_empty() {
            true => MountPlan::default(),
            false => plan,
        }
    })
}

fn output() -> impl Strategy<Value = SystemOutput> {
    let journal = any::<Vec<String>>().prop_map(|units| Journal {
        units,
        ..Journal::default()
    });
    let output = (proptest::option::of(journal), any::<bool>());
    output.prop_map(|(journal, console)| SystemOutput { journal, console })
}

pub(super) fn launch_spec() -> impl Strategy<Value = LaunchSpec> {
    let first = prop_oneof![
        Just(Pid1::Image),
        any::<bool>().prop_map(|streams| Pid1::Driver { streams }),
    ];
    let maybe = || proptest::option::of(path());
    let names = (any::<String>(), any::<String>(), any::<String>(), mode());
    let call = (path(), any::<Vec<String>>(), first);
    let paths = (maybe(), maybe(), maybe(), maybe());
    let network_of = proptest::option::of((any::<i32>(), any::<u64>()));
    let network_of = network_of.prop_map(|of| of.map(|(pid, start)| Process { pid, start }));
    let resources = proptest::collection::vec(resource(), 0..9);
    let limits = (proptest::option::of(cgroup_plan()), any::<i32>());
    let rest = (
        resources,
        inside(),
        any::<Vec<String>>(),
        limits,
        (
            seccomp(),
            (mount_plan(), credentials()),
            (output(), any::<Option<Duration>>()),
        ),
        network_of,
    );
    (names, call, paths, rest).prop_map(
        |((id, machine, boot, mode), (program, arguments, first), paths, rest)| {
            let (
                resources,
                inside,
                notes,
                (cgroups, oom_score_adj),
                (seccomp, (mounts, credentials), (output, ready_within)),
                network_of,
            ) = rest;
            let (stdout, stderr, network_namespace, alloc_dir) = paths;
            LaunchSpec {
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
                network_of,
                cgroups,
                oom_score_adj,
                resources,
                inside,
                seccomp,
                mounts,
                credentials,
                output,
                ready_within,
                notes,
            }
        },
    )
}

fn credentials() -> impl Strategy<Value = Vec<Credential>> {
    let one = (any::<String>(), path(), any::<String>());
    let one = one.prop_map(|(name, source, option)| Credential {
        name,
        source,
        option,
    });
    proptest::collection::vec(one, 0..3)
}

fn mode() -> impl Strategy<Value = Mode> {
    proptest::sample::select(vec![Mode::Plain, Mode::ProcessTwo, Mode::Boot])
}

pub(crate) fn started() -> impl Strategy<Value = Started> {
    let names = (any::<String>(), any::<String>(), any::<String>(), path());
    let cgroup = proptest::option::of(path());
    let rest = (
        mode(),
        cgroup,
        any::<Option<u32>>(),
        moment(),
        any::<Vec<String>>(),
    );
    (names, process(), process(), rest).prop_map(
        |((id, machine, boot, state), supervisor, leader, rest)| {
            let (mode, cgroup, filters, started_at, notes) = rest;
            Started {
                id,
                machine,
                state,
                boot,
                supervisor,
                leader,
                mode,
                cgroup,
                controllers: BTreeMap::new(),
                filters,
                network: None,
                started_at,
                notes,
            }
        },
    )
}
