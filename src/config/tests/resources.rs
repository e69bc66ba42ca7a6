//! What a container may use: Nomad's `resources` block and the options of the job.

use super::*;
use crate::config::testing::bytes;
use crate::container::{Device, Memory, Resources, Rlimit, Swap, TmpfsSizes};

const MIB: u64 = 1 << 20;

/// A host on which Nomad allocated this memory to the task, in MiB.
fn with_memory(memory_mb: i64, memory_max_mb: i64) -> TestHost {
    let mut host = TestHost::new();
    host.context.resources.memory_mb = memory_mb;
    host.context.resources.memory_max_mb = memory_max_mb;
    host
}

fn resources(host: &TestHost, extra: &str) -> Resources {
    plain(host, extra).resources
}

fn refused(host: &TestHost, extra: &str) -> String {
    host.refusal(&format!("image = \"tree\"\nboot = false\n{extra}"))
}

#[test]
fn without_resources_there_is_no_limit() {
    assert_eq!(resources(&TestHost::new(), ""), Resources::default());
}

#[rstest]
#[case(64, 0, "", Some(64 * MIB), None, Swap::Limit(0))]
#[case(64, 128, "", Some(128 * MIB), Some(64 * MIB), Swap::Limit(0))]
#[case(64, 64, "", Some(64 * MIB), Some(64 * MIB), Swap::Limit(0))]
#[case(64, -1, "", None, Some(64 * MIB), Swap::Unlimited)]
#[case(0, -1, "", None, None, Swap::Unlimited)]
#[case(0, 128, "", Some(128 * MIB), None, Swap::Limit(0))]
// More than this host has: one job may run on hosts of different size.
#[case(64, 1 << 40, "", Some(1 << 60), Some(64 * MIB), Swap::Limit(0))]
#[case(64, 0, "memory_swap = \"64m\"", Some(64 * MIB), None, Swap::Limit(0))]
#[case(64, 0, "memory_swap = \"96m\"", Some(64 * MIB), None, Swap::Limit(32 * MIB))]
#[case(64, 0, "memory_swap = 67108865", Some(64 * MIB), None, Swap::Limit(1))]
#[case(64, 0, "memory_swap = \"-1\"", Some(64 * MIB), None, Swap::Unlimited)]
#[case(64, -1, "memory_swap = \"-1\"", None, Some(64 * MIB), Swap::Unlimited)]
#[case(64, 0, "memory_swap = \"\"", Some(64 * MIB), None, Swap::Limit(0))]
fn memory(
    #[case] memory_mb: i64,
    #[case] memory_max_mb: i64,
    #[case] extra: &str,
    #[case] hard: Option<u64>,
    #[case] reserved: Option<u64>,
    #[case] swap: Swap,
) {
    let wanted = Memory {
        hard,
        reserved,
        swap,
    };
    let host = with_memory(memory_mb, memory_max_mb);
    assert_eq!(resources(&host, extra).memory, wanted);
}

#[rstest]
#[case(-1, 0, "task.resources.memory: -1 MiB is negative: use at least 1")]
#[case(
    i64::MIN,
    0,
    "task.resources.memory: -9223372036854775808 MiB is negative: use at least 1"
)]
#[case(
    64,
    -2,
    "task.resources.memory_max: -2 MiB is negative: use -1 for no limit, or at least 1"
)]
#[case(
    i64::MAX,
    0,
    "task.resources.memory: 9223372036854775807 MiB is more than 8796093022207 MiB"
)]
#[case(
    64,
    8_796_093_022_208,
    "task.resources.memory_max: 8796093022208 MiB is more than 8796093022207 MiB"
)]
#[case(
    64,
    63,
    "task.resources.memory_max: 63 MiB is less than memory, 64 MiB"
)]
fn impossible_memory_is_refused(
    #[case] memory_mb: i64,
    #[case] memory_max_mb: i64,
    #[case] message: &str,
) {
    assert_eq!(refused(&with_memory(memory_mb, memory_max_mb), ""), message);
}

#[test]
fn more_memory_than_the_host_has_is_refused() {
    let message = refused(&with_memory(1 << 40, 0), "");
    let start = "task.resources.memory: 1099511627776 MiB is more than this host has, ";
    assert!(message.starts_with(start), "{message}");
}

#[rstest]
#[case(
    0,
    r#"memory_swap = "63m""#,
    r#"config.memory_swap: "63m" is less than the memory limit of the task, 67108864 bytes: it is the limit of memory and swap together"#
)]
#[case(
    0,
    r#"memory_swap = "-2""#,
    r#"config.memory_swap: "-2" is not a size: use a whole number with one of the units b, k, m and g, such as 512m"#
)]
#[case(
    -1,
    r#"memory_swap = "1g""#,
    r#"config.memory_swap: "1g" is a limit of memory and swap together, but the memory of this task is not limited: use -1, or set memory_max"#
)]
#[case(
    0,
    "shm_size = \"0\"",
    r#"config.shm_size: "0" is no size: use at least 1 byte, or leave it out"#
)]
#[case(-1, "tmp_size = \"0k\"", r#"config.tmp_size: "0k" is no size: use at least 1 byte, or leave it out"#)]
#[case(
    0,
    "tmp_size = \"65m\"",
    r#"config.tmp_size: "65m" is more than the memory limit of the task, 67108864 bytes"#
)]
#[case(0, "shm_size = \"-1\"", r#"config.shm_size: "-1" is not a size: use a whole number with one of the units b, k, m and g, such as 512m"#)]
fn bad_sizes_are_refused(#[case] memory_max: i64, #[case] extra: &str, #[case] message: &str) {
    assert_eq!(refused(&with_memory(64, memory_max), extra), message);
}

#[rstest]
#[case(60, 0, "", (Some(30 * MIB), Some(12 * MIB), Some(30 * MIB)))]
#[case(60, 120, "", (Some(60 * MIB), Some(24 * MIB), Some(60 * MIB)))]
#[case(60, -1, "", (None, None, None))]
#[case(60, 0, "shm_size = \"60m\"", (Some(30 * MIB), Some(12 * MIB), Some(60 * MIB)))]
#[case(60, 0, "tmp_size = \"4k\"", (Some(4096), Some(12 * MIB), Some(30 * MIB)))]
#[case(60, 0, "shm_size = 4096", (Some(30 * MIB), Some(12 * MIB), Some(4096)))]
#[case(60, -1, "shm_size = \"1g\"", (None, None, Some(1024 * MIB)))]
fn temporary_file_systems_are_parts_of_the_memory(
    #[case] memory_mb: i64,
    #[case] memory_max_mb: i64,
    #[case] extra: &str,
    #[case] (tmp, run, shm): (Option<u64>, Option<u64>, Option<u64>),
) {
    let host = with_memory(memory_mb, memory_max_mb);
    let wanted = TmpfsSizes { tmp, run, shm };
    assert_eq!(resources(&host, extra).tmpfs, wanted);
}

#[rstest]
#[case(0, None)]
#[case(1, Some(2))]
#[case(500, Some(500))]
#[case(262_144, Some(262_144))]
#[case(i64::MAX, Some(262_144))]
fn shares_are_the_mhz_within_the_kernels_bounds(#[case] mhz: i64, #[case] shares: Option<u64>) {
    let mut host = TestHost::new();
    host.context.resources.cpu_mhz = mhz;
    assert_eq!(resources(&host, "").cpu.shares, shares);
}

#[test]
fn a_hard_limit_uses_the_share_of_the_node_and_the_period() {
    let mut host = TestHost::new();
    host.context.resources.cpu_fraction = f64::INFINITY;
    assert_eq!(resources(&host, "").cpu.quota, None, "not used");
    host.context.resources.cpu_fraction = 1.0;
    let quota = |extra| resources(&host, extra).cpu.quota.unwrap();
    let whole = quota("cpu_hard_limit = true");
    assert_eq!(whole.period, 100_000);
    assert_eq!(whole.quota % 100_000, 0, "a number of processors");
    let longer = quota("cpu_hard_limit = true\ncpu_cfs_period = 1000000");
    assert_eq!((longer.quota, longer.period), (10 * whole.quota, 1_000_000));
}

#[rstest]
#[case(-1, 0.0, "", "task.resources.cpu: -1 MHz is negative: use at least 1")]
#[case(
    0,
    f64::NAN,
    "cpu_hard_limit = true",
    "task.resources.cpu: NaN is not a fraction of the node's processors, which config.cpu_hard_limit needs"
)]
#[case(
    0,
    f64::INFINITY,
    "cpu_hard_limit = true",
    "task.resources.cpu: inf is not a fraction of the node's processors, which config.cpu_hard_limit needs"
)]
#[case(
    0,
    -0.5,
    "cpu_hard_limit = true",
    "task.resources.cpu: -0.5 is not a fraction of the node's processors, which config.cpu_hard_limit needs"
)]
#[case(
    0,
    0.0,
    "cpu_hard_limit = true",
    "config.cpu_hard_limit: true needs a share of the node's processors, and Nomad gave the task none: set cpu or cores in its resources block"
)]
#[case(
    0,
    0.5,
    "cpu_cfs_period = 999",
    "config.cpu_cfs_period: 999 is not a whole number from 1000 to 1000000"
)]
#[case(
    0,
    0.5,
    "cpu_cfs_period = 1000001",
    "config.cpu_cfs_period: 1000001 is not a whole number from 1000 to 1000000"
)]
#[case(
    0,
    0.5,
    "cpu_cfs_period = 2000.5",
    "config.cpu_cfs_period: 2000.5 is not a whole number from 1000 to 1000000"
)]
fn impossible_processor_time_is_refused(
    #[case] cpu_mhz: i64,
    #[case] cpu_fraction: f64,
    #[case] extra: &str,
    #[case] message: &str,
) {
    let mut host = TestHost::new();
    host.context.resources.cpu_mhz = cpu_mhz;
    host.context.resources.cpu_fraction = cpu_fraction;
    assert_eq!(refused(&host, extra), message);
}

#[test]
fn reserved_cores_are_those_of_the_host() {
    let mut host = TestHost::new();
    host.context.resources.cores = "0".into();
    assert_eq!(resources(&host, "").cpu.cores.as_deref(), Some("0"));
    host.context.resources.cores = "0-70000".into();
    let message = refused(&host, "");
    let start = r#"task.resources.cores: "0-70000" is not a part of this host's processors, 0"#;
    assert!(message.starts_with(start), "{message}");
    host.context.resources.cores = "1-0".into();
    assert_eq!(
        refused(&host, ""),
        r#"task.resources.cores: "1-0" is not a list of processors such as 0-3,7"#
    );
}

#[rstest]
#[case("", None, 0)]
#[case("pids_limit = 0", None, 0)]
#[case("pids_limit = -1", None, 0)]
#[case("pids_limit = 1", Some(1), 0)]
#[case("pids_limit = 4194304", Some(4_194_304), 0)]
#[case("oom_score_adj = 1000", None, 1000)]
fn processes(#[case] extra: &str, #[case] pids: Option<u64>, #[case] oom_score_adj: i32) {
    let resources = resources(&TestHost::new(), extra);
    assert_eq!(
        (resources.pids, resources.oom_score_adj),
        (pids, oom_score_adj)
    );
}

#[rstest]
#[case(
    "pids_limit = -2",
    "config.pids_limit: -2 is not a whole number from 1 to 4194304, or 0 or -1 for no limit"
)]
#[case(
    "pids_limit = 4194305",
    "config.pids_limit: 4194305 is not a whole number from 1 to 4194304, or 0 or -1 for no limit"
)]
#[case(
    "pids_limit = 1.5",
    "config.pids_limit: 1.5 is not a whole number from 1 to 4194304, or 0 or -1 for no limit"
)]
#[case(
    "oom_score_adj = -1",
    "config.oom_score_adj: -1 would let the kernel kill processes of the host before those of the task: use 0 to 1000"
)]
#[case(
    "oom_score_adj = 1001",
    "config.oom_score_adj: 1001 is not a whole number from 0 to 1000"
)]
#[case(
    "oom_score_adj = -1001",
    "config.oom_score_adj: -1001 is not a whole number from 0 to 1000"
)]
#[case(
    r#"ulimit { nofile = "5:4" }"#,
    r#"config.ulimit["nofile"]: "5:4": the soft limit is above the hard limit"#
)]
#[case(
    r#"sysctl = { "net.core.somaxconn" = "16" }"#,
    r#"config.sysctl["net.core.somaxconn"]: belongs to the network of the host, which this task uses: set config.network_veth = true, network_zone or network_bridge, or mode = "bridge" in the network block of the group"#
)]
#[case(
    r#"devices = [{ host_path = "dev/null" }]"#,
    r#"config.devices[0].host_path: "dev/null" is not an absolute path"#
)]
#[case(
    r#"devices = [{ host_path = "/dev/fuse" }, { host_path = "/dev/x", container_path = "/srv/x" }]"#,
    r#"config.devices[1].container_path: "/srv/x" is not below /dev"#
)]
#[case(
    r#"devices = [{ host_path = "/srv/x" }]"#,
    r#"config.devices[0].container_path: "/srv/x" is not below /dev"#
)]
#[case(
    r#"devices = [{ host_path = "/dev" }]"#,
    r#"config.devices[0].container_path: "/dev" is not below /dev"#
)]
#[case(
    r#"devices = [{ host_path = "/dev/x", container_path = "/dev/../etc/x" }]"#,
    r#"config.devices[0].container_path: "/dev/../etc/x" contains .."#
)]
#[case(
    r#"devices = [{ host_path = "/dev/x", container_path = "/dev/pts/7" }]"#,
    r#"config.devices[0].container_path: "/dev/pts/7" is a path that every container has: use another one"#
)]
#[case(
    r#"devices = [{ host_path = "/dev/x", container_path = "/dev/null" }]"#,
    r#"config.devices[0].container_path: "/dev/null" is a path that every container has: use another one"#
)]
#[case(
    r#"devices = [{ host_path = "/dev/x\n" }]"#,
    r#"config.devices[0].host_path: "/dev/x\n" contains a control character"#
)]
#[case(
    r#"devices = [{ host_path = "/dev/x", cgroup_permissions = "rx" }]"#,
    r#"config.devices[0].cgroup_permissions: "rx" is not one or more of the letters r, w and m, each at most once"#
)]
#[case(
    r#"devices = [{ host_path = "/dev/x", cgroup_permissions = "rr" }]"#,
    r#"config.devices[0].cgroup_permissions: "rr" is not one or more of the letters r, w and m, each at most once"#
)]
#[case(
    r#"devices = [{ host_path = "/dev/x" }, { host_path = "/dev/y", container_path = "/dev//x" }]"#,
    r#"config.devices[1].host_path: "/dev/x" is already the path of another device of this task"#
)]
#[case(
    r#"devices = [{ host_path = "/dev/nothing/here" }]"#,
    r#"config.devices[0].host_path: "/dev/nothing/here" does not exist"#
)]
#[case(
    r#"devices = [{ host_path = "TOP/data", container_path = "/dev/x" }]"#,
    r#"config.devices[0].host_path: "TOP/data" is a directory: name each device in it"#
)]
#[case(
    r#"devices = [{ host_path = "TOP/file", container_path = "/dev/x" }]"#,
    r#"config.devices[0].host_path: "TOP/file" is neither a character device nor a block device"#
)]
fn bad_options_are_refused(#[case] extra: &str, #[case] message: &str) {
    let host = TestHost::new();
    host.make("file");
    assert_eq!(refused(&host, extra), message);
}

#[test]
fn the_host_path_of_a_device_is_required() {
    let block = Value::Map(vec![("container_path".into(), "/dev/x".into())]);
    let bytes = encode(&Value::Map(vec![
        ("image".into(), "tree".into()),
        ("devices".into(), Value::Array(vec![Value::Nil, block])),
    ]));
    let message = TestHost::new().raw(&bytes).unwrap_err().to_string();
    assert_eq!(message, "config.devices[1].host_path: is required");
}

#[rstest]
#[case::list(r#"devices = [{ host_path = "TOP/link", container_path = "/dev/zero2", cgroup_permissions = "rw" }]"#)]
#[case::block(
    "devices {\n host_path = \"TOP/link\"\n container_path = \"/dev/zero2\"\n cgroup_permissions = \"wr\"\n}"
)]
fn devices_are_found_through_links(#[case] extra: &str) {
    let host = TestHost::new();
    host.link("link", "/dev/zero");
    let wanted = Device {
        host: "/dev/zero".into(),
        container: "/dev/zero2".into(),
        read: true,
        write: true,
        mknod: false,
    };
    assert_eq!(resources(&host, extra).devices, [wanted]);
}

#[test]
fn several_device_blocks_are_a_list() {
    let block = |number| {
        format!(
            "devices {{\n host_path = \"/dev/null\"\n container_path = \"/dev/n{number}\"\n}}\n"
        )
    };
    let devices = resources(&TestHost::new(), &(block(1) + &block(2))).devices;
    let paths: Vec<_> = devices
        .iter()
        .map(|device| device.container.to_str().unwrap())
        .collect();
    assert_eq!(paths, ["/dev/n1", "/dev/n2"]);
    assert!(
        devices
            .iter()
            .all(|device| device.read && device.write && device.mknod)
    );
}

fn reserved(source: &str, target: &str, permissions: &str) -> AllocatedDevice {
    AllocatedDevice {
        source: source.into(),
        target: target.into(),
        permissions: permissions.into(),
    }
}

/// The operator's option is about jobs: a device plugin is the operator's own.
#[test]
fn devices_of_device_plugins_are_always_allowed() {
    let mut host = TestHost::new();
    host.plugin_config.devices = false;
    host.context.devices = vec![
        reserved("/dev/null", "/dev/accelerator", "r"),
        reserved("/dev/full", "/dev/other", ""),
    ];
    let devices = resources(&host, "").devices;
    assert_eq!(devices.len(), 2);
    assert_eq!(devices[0].host, PathBuf::from("/dev/null"));
    assert_eq!(devices[0].container, PathBuf::from("/dev/accelerator"));
    assert!(devices[0].read && !devices[0].write && !devices[0].mknod);
    assert!(devices[1].read && devices[1].write && devices[1].mknod);
    assert_eq!(
        refused(&host, r#"devices = [{ host_path = "/dev/fuse" }]"#),
        "config.devices: devices of the host are disabled on this node (plugin.devices = false)"
    );
}

#[rstest]
#[case(
    "dev/x",
    "/dev/x",
    "rw",
    r#"task.devices["dev/x"]: "dev/x" is not an absolute path"#
)]
#[case(
    "/dev/x",
    "/srv/x",
    "rw",
    r#"task.devices["/dev/x"]: "/srv/x" is not below /dev"#
)]
#[case("/dev/x", "/dev/x", "all", r#"task.devices["/dev/x"]: "all" is not one or more of the letters r, w and m, each at most once"#)]
#[case(
    "/dev/none",
    "/dev/x",
    "rw",
    r#"task.devices["/dev/none"]: "/dev/none" does not exist"#
)]
fn impossible_devices_of_device_plugins_are_refused(
    #[case] source: &str,
    #[case] target: &str,
    #[case] permissions: &str,
    #[case] message: &str,
) {
    let mut host = TestHost::new();
    host.context.devices = vec![reserved(source, target, permissions)];
    assert_eq!(refused(&host, ""), message);
}

#[test]
fn limits_and_kernel_settings_become_a_part_of_the_container() {
    let resources = resources(
        &TestHost::new(),
        r#"
        ulimit {
          nproc  = 100
          nofile = "64:128"
        }
        network_veth = true
        sysctl = { "net/core/somaxconn" = 4096, "kernel.sem" = "250 32000 100 128" }
        "#,
    );
    let limit = |name, soft, hard| Rlimit {
        name,
        soft: Some(soft),
        hard: Some(hard),
    };
    assert_eq!(
        resources.rlimits,
        [limit("NOFILE", 64, 128), limit("NPROC", 100, 100)]
    );
    let sysctls = [
        ("kernel.sem", "250 32000 100 128"),
        ("net.core.somaxconn", "4096"),
    ];
    let sysctls = sysctls.map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!(resources.sysctls, sysctls.into());
}

/// Numbers at the edges of their types as well as any others.
fn numbers() -> impl Strategy<Value = i64> {
    let edges = vec![i64::MIN, -2, -1, 0, 1, 64, 1 << 43, i64::MAX];
    prop_oneof![prop::sample::select(edges), any::<i64>()]
}

#[test]
fn no_numbers_of_nomad_panic() {
    let host = TestHost::new();
    let options = vec![
        "cpu_hard_limit = true",
        "memory_swap = \"1g\"",
        "tmp_size = \"1m\"",
    ];
    proptest!(|(
        memory in (numbers(), numbers()),
        cpu_mhz in numbers(),
        cpu_fraction in any::<f64>(),
        cores in "[0-9,-]{0,12}",
        options in prop::sample::subsequence(options, 0..=3),
    )| {
        let context = TaskContext {
            resources: AllocatedResources {
                memory_mb: memory.0,
                memory_max_mb: memory.1,
                cpu_mhz,
                cpu_fraction,
                cores,
            },
            ..host.context.clone()
        };
        let body = format!("image = \"tree\"\nboot = false\n{}", options.join("\n"));
        let bytes = bytes(&task_schema(), &body);
        match container(&bytes, &context, &host.plugin_config, &host.search_path) {
            Err(error) => prop_assert!(is_named(&error), "{error:?}"),
            Ok(validated) => {
                let Resources { cpu, memory, tmpfs, .. } = validated.spec.resources;
                prop_assert!(cpu.shares.is_none_or(|shares| (2..=262_144).contains(&shares)));
                prop_assert!(cpu.quota.is_none_or(|quota| quota.quota >= 1000));
                prop_assert!(memory.hard.is_none_or(|hard| Some(hard) >= memory.reserved));
                prop_assert_eq!(tmpfs.run, memory.hard.map(|hard| hard / 5));
            }
        }
    });
}
