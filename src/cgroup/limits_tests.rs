use super::*;
use std::collections::BTreeMap;

use crate::cgroup::CgroupPath;
use crate::container::{Cpu, CpuQuota, Memory};

const GROUP: &str = "/cg/nomad-driver-nspawn/x";

fn place(granted: bool, version_1: &[&str]) -> Place {
    let group = match granted {
        true => "/cg/nomad.slice/a.t.scope/x",
        false => GROUP,
    };
    let controllers = version_1.iter().map(|name| {
        let group = format!("/v1/{name}/nomad-driver-nspawn/x");
        ((*name).to_owned(), group.into())
    });
    Place {
        tracking: CgroupPath {
            group: group.into(),
            mirror: None,
        },
        version_2: true,
        granted,
        controllers: controllers.collect::<BTreeMap<_, _>>(),
    }
}

fn all() -> BTreeSet<String> {
    ["cpu", "cpuset", "memory", "pids"]
        .map(str::to_owned)
        .into()
}

fn resources() -> Resources {
    Resources {
        memory: Memory {
            hard: Some(200),
            reserved: Some(100),
            swap: Swap::Limit(50),
        },
        cpu: Cpu {
            shares: Some(1024),
            quota: Some(CpuQuota {
                quota: 30_000,
                period: 100_000,
            }),
            cores: Some("2,4-5".to_owned()),
        },
        pids: Some(10),
        ..Resources::default()
    }
}

fn lines(settings: &[Setting]) -> Vec<String> {
    let line = |setting: &Setting| format!("{} {}", setting.file.display(), setting.value);
    settings.iter().map(line).collect()
}

#[test]
fn limits_of_version_2_hold_for_the_start_and_are_seen_inside() {
    let settings = settings(&place(false, &[]), &all(), &resources());
    assert_eq!(settings.unenforced, []);
    let before = [
        "memory.max 200",
        "memory.low 100",
        "memory.swap.max 50",
        "cpu.weight 100",
        "cpu.max 30000 100000",
        "cpuset.cpus 2,4-5",
        "pids.max 12",
        "cgroup.max.descendants 4096",
        "cgroup.max.depth 32",
    ];
    assert_eq!(
        lines(&settings.before),
        before.map(|line| format!("{GROUP}/{line}"))
    );
    let up = [
        "memory.max 200",
        "memory.swap.max 50",
        "cpu.weight 100",
        "cpu.max 30000 100000",
        "cpuset.cpus 2,4-5",
        "pids.max 10",
    ];
    assert_eq!(
        lines(&settings.up),
        up.map(|line| format!("{GROUP}/payload/{line}"))
    );
}

/// A weight and a reservation count among the children of one cgroup, and the cgroup of a start is the only child of Nomad's scope.
#[test]
fn weight_and_reservation_are_written_to_nomads_scope_too() {
    let settings = settings(&place(true, &[]), &all(), &resources());
    let lines = lines(&settings.before);
    for file in ["cpu.weight 100", "memory.low 100"] {
        for group in ["/cg/nomad.slice/a.t.scope", "/cg/nomad.slice/a.t.scope/x"] {
            let line = format!("{group}/{file}");
            assert!(lines.contains(&line), "{line} is missing in {lines:?}");
        }
    }
    let scope_only = lines
        .iter()
        .filter(|line| !line.starts_with("/cg/nomad.slice/a.t.scope/x/"));
    assert_eq!(scope_only.count(), 2, "{lines:?}");
}

#[test]
fn limits_of_version_1_are_in_the_hierarchy_of_their_controller() {
    let version_1 = ["cpu", "cpuset", "memory", "pids"];
    let settings = settings(&place(false, &version_1), &BTreeSet::new(), &resources());
    assert_eq!(settings.unenforced, []);
    let before = [
        "/v1/memory/nomad-driver-nspawn/x/memory.limit_in_bytes 200",
        "/v1/memory/nomad-driver-nspawn/x/memory.soft_limit_in_bytes 100",
        "/v1/memory/nomad-driver-nspawn/x/memory.memsw.limit_in_bytes 250",
        "/v1/cpu/nomad-driver-nspawn/x/cpu.shares 1024",
        "/v1/cpu/nomad-driver-nspawn/x/cpu.cfs_period_us 100000",
        "/v1/cpu/nomad-driver-nspawn/x/cpu.cfs_quota_us 30000",
        "/v1/cpuset/nomad-driver-nspawn/x/cpuset.cpus 2,4-5",
        "/v1/pids/nomad-driver-nspawn/x/pids.max 12",
        "/cg/nomad-driver-nspawn/x/cgroup.max.descendants 4096",
        "/cg/nomad-driver-nspawn/x/cgroup.max.depth 32",
    ];
    assert_eq!(lines(&settings.before), before);
    // systemd-nspawn is moved out of it, so that the container's own limit is what it sees.
    let up = ["/v1/pids/nomad-driver-nspawn/x/pids.max 10"];
    assert_eq!(lines(&settings.up), up);
}

#[test]
fn without_limits_nothing_of_a_controller_is_written() {
    let settings = settings(&place(false, &[]), &BTreeSet::new(), &Resources::default());
    assert_eq!(settings.unenforced, []);
    assert_eq!(settings.before.len(), 2, "{:?}", settings.before);
    assert_eq!(settings.up, []);
}

#[test]
fn a_limit_without_a_controller_is_named() {
    let some = ["cpu".to_owned()].into();
    let settings = settings(&place(false, &[]), &some, &resources());
    let limits: Vec<Limit> = settings.unenforced.iter().map(|one| one.limit).collect();
    let wanted = [
        Limit::Memory,
        Limit::MemoryReservation,
        Limit::Swap,
        Limit::Cores,
        Limit::Pids,
    ];
    assert_eq!(limits, wanted);
    assert_eq!(
        settings.unenforced[0].reason,
        "this host has no memory controller"
    );
}

/// The values that Nomad's own drivers write.
#[test]
fn shares_become_weights() {
    let values = [0, 2, 3, 100, 500, 1024, 3000, 100_000, 262_144, u64::MAX];
    assert_eq!(
        values.map(weight),
        [1, 1, 2, 17, 58, 100, 236, 4340, 10_000, 10_000]
    );
}

/// The table of `docs/resources.md`. `tests/contract/limits.rs` compares its values with the files of a running container.
#[test]
fn the_documentation_has_every_file_and_value() {
    const DOCS: &str = include_str!("../../docs/resources.md");
    let version_1 = ["cpu", "cpuset", "memory", "pids"];
    let none = BTreeSet::new();
    let columns = [
        (place(true, &[]), all(), true),
        (place(false, &[]), all(), true),
        (place(false, &version_1), none.clone(), true),
        (place(false, &version_1), none, false),
    ];
    let columns = columns.map(|(place, version_2, tracked)| {
        let place = Place {
            version_2: tracked,
            ..place
        };
        settings(&place, &version_2, &documented())
    });
    let rows = [
        (
            "`memory = 256` beside `memory_max`",
            Limit::MemoryReservation,
        ),
        ("`memory_max = 512`, or `memory` alone", Limit::Memory),
        ("`memory_swap = \"640m\"`", Limit::Swap),
        ("`cpu = 500`", Limit::Cpu),
        ("`cpu_hard_limit = true`", Limit::CpuHardLimit),
        ("`cores = 1`", Limit::Cores),
        ("`pids_limit = 100`", Limit::Pids),
        ("always", Limit::Cgroups),
    ];
    let rows = rows.map(|(field, limit)| {
        let cells = columns.each_ref().map(|settings| cell(settings, limit));
        format!("| {field} | {} |", cells.join(" | "))
    });
    let table = rows.join("\n");
    assert!(DOCS.contains(&table), "the table is\n{table}");
}

/// What the table is about.
fn documented() -> Resources {
    Resources {
        memory: Memory {
            hard: Some(512 << 20),
            reserved: Some(256 << 20),
            swap: Swap::Limit(128 << 20),
        },
        cpu: Cpu {
            shares: Some(500),
            quota: Some(CpuQuota {
                quota: 25_000,
                period: 100_000,
            }),
            cores: Some("0".to_owned()),
        },
        pids: Some(100),
        ..Resources::default()
    }
}

/// The files of a limit, relative to the cgroup of the start in the hierarchy of their controller. A file that gets another value once
/// the container is up is listed with that.
fn cell(settings: &Settings, limit: Limit) -> String {
    let mut files: Vec<(String, String)> = Vec::new();
    for setting in settings.before.iter().chain(&settings.up) {
        if setting.limit != limit {
            continue;
        }
        let path = setting.file.to_string_lossy();
        let file = match path.split_once("/x/") {
            Some((_, below)) => below.to_owned(),
            None => format!("../{}", path.rsplit('/').next().unwrap()),
        };
        files.retain(|(known, _)| *known != file);
        files.push((file, setting.value.clone()));
    }
    let files = files
        .iter()
        .map(|(file, value)| format!("`{file}` {value}"));
    let files: Vec<String> = files.collect();
    match files.is_empty() {
        true => "–".to_owned(),
        false => files.join("<br>"),
    }
}
