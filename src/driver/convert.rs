//! Conversion between protobuf messages and the types of `container`, both ways. Pure; makes no decisions. Always sets the fields
//! whose absence would crash the agent.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use prost_types::Timestamp;

use super::status::CallError;
use crate::config::{
    AllocatedDevice, AllocatedPort, AllocatedResources, RequestedDns, RequestedHostName,
    TaskContext, VolumeMount,
};
use crate::container::{Description, Exit, Started};
use crate::proto::driver as proto;
use crate::proto::driver::network_isolation_spec::NetworkIsolationMode;
use crate::task::events::TaskEvent;
use crate::task::{Task, TaskInfo};

/// Go's zero time, which Nomad uses for "not yet".
pub(super) const ZERO_TIME: Timestamp = Timestamp {
    seconds: -62_135_596_800,
    nanos: 0,
};

pub(super) fn task_info(task: &proto::TaskConfig) -> TaskInfo {
    TaskInfo {
        id: task.id.clone(),
        name: task.name.clone(),
        alloc_id: task.alloc_id.clone(),
        description: None,
    }
}

/// What Nomad allocated to the task, collected from the request's messages.
pub(super) fn task_context(task: &proto::TaskConfig) -> Result<TaskContext, CallError> {
    let resources = task.resources.clone().unwrap_or_default();
    let path = |text: &String| Some(PathBuf::from(text)).filter(|path| path.is_absolute());
    let mut environment: BTreeMap<_, _> = task.env.clone().into_iter().collect();
    environment.extend(task.device_env.clone());
    let network = task.network_isolation_spec.as_ref();
    let group = network.filter(|network| network.mode == NetworkIsolationMode::Group as i32);
    Ok(TaskContext {
        id: task.id.clone(),
        task: task.name.clone(),
        alloc_id: task.alloc_id.clone(),
        alloc_dir: task.alloc_dir.clone().into(),
        environment,
        user: task.user.clone(),
        stdout: task.stdout_path.clone().into(),
        stderr: task.stderr_path.clone().into(),
        mounts: task.mounts.iter().map(mount).collect(),
        network_namespace: group.and_then(|network| path(&network.path)),
        dns: dns(task.dns.as_ref()),
        host_name: host_name(group.and_then(|network| network.hosts_config.as_ref())),
        ports: ports(&resources)?,
        cgroup: resources
            .linux_resources
            .as_ref()
            .and_then(|linux| path(&linux.cpuset_cgroup)),
        resources: allocated(&resources),
        devices: task.devices.iter().map(device).collect(),
    })
}

/// The numbers as they are: `config` checks them.
fn allocated(resources: &proto::Resources) -> AllocatedResources {
    let memory = resources
        .allocated_resources
        .as_ref()
        .and_then(|allocated| allocated.memory)
        .unwrap_or_default();
    // Not its memory_limit_bytes, which can't express that there is no limit.
    let linux = resources.linux_resources.clone().unwrap_or_default();
    AllocatedResources {
        memory_mb: memory.memory_mb,
        memory_max_mb: memory.memory_max_mb,
        cpu_mhz: linux.cpu_shares,
        cpu_fraction: linux.percent_ticks,
        cores: linux.cpuset_cpus,
    }
}

/// The texts as they are: `config` checks them.
fn dns(given: Option<&proto::DnsConfig>) -> RequestedDns {
    let given = given.cloned().unwrap_or_default();
    RequestedDns {
        servers: given.servers,
        searches: given.searches,
        options: given.options,
    }
}

fn host_name(given: Option<&proto::HostsConfig>) -> RequestedHostName {
    let given = given.cloned().unwrap_or_default();
    RequestedHostName {
        name: given.hostname,
        address: given.address,
    }
}

fn device(device: &proto::Device) -> AllocatedDevice {
    AllocatedDevice {
        source: device.host_path.clone().into(),
        target: device.task_path.clone().into(),
        permissions: device.cgroup_permissions.clone(),
    }
}

fn mount(mount: &proto::Mount) -> VolumeMount {
    VolumeMount {
        source: mount.host_path.clone().into(),
        target: mount.task_path.clone().into(),
        read_only: mount.readonly,
        propagation: mount.propagation_mode.clone(),
    }
}

fn ports(resources: &proto::Resources) -> Result<Vec<AllocatedPort>, CallError> {
    let networks = resources
        .allocated_resources
        .iter()
        .flat_map(|allocated| &allocated.networks);
    let task_level = networks.flat_map(|network| {
        let ports = network.reserved_ports.iter().chain(&network.dynamic_ports);
        ports.map(|given| (given, &network.ip))
    });
    let group = resources.ports.iter();
    group
        .map(|given| port(&given.label, given.value, given.to, &given.host_ip, false))
        .chain(task_level.map(|(given, ip)| port(&given.label, given.value, 0, ip, true)))
        .collect()
}

fn port(
    label: &str,
    number: i32,
    to: i32,
    address: &str,
    task_level: bool,
) -> Result<AllocatedPort, CallError> {
    let wrong = |_| CallError::Request(format!("port {label:?}: {number} is not a port number"));
    Ok(AllocatedPort {
        label: label.to_owned(),
        host: number.try_into().map_err(wrong)?,
        // -1 in the job means "the same number".
        to: to.max(0).try_into().map_err(wrong)?,
        address: host_address(label, address)?,
        task_level,
    })
}

/// The address on which a port is allocated. An empty text and the unspecified addresses mean all addresses.
fn host_address(label: &str, text: &str) -> Result<Option<IpAddr>, CallError> {
    if text.is_empty() {
        return Ok(None);
    }
    let wrong = |_| CallError::Request(format!("port {label:?}: {text:?} is not an IP address"));
    let address = text.parse::<IpAddr>().map_err(wrong)?.to_canonical();
    Ok(Some(address).filter(|address| !address.is_unspecified()))
}

/// Converts a protobuf duration; negative and missing ones are zero.
pub(super) fn duration(given: Option<prost_types::Duration>) -> Duration {
    given
        .and_then(|given| given.try_into().ok())
        .unwrap_or_default()
}

pub(super) fn timestamp(time: SystemTime) -> Timestamp {
    Timestamp::from(time)
}

pub(super) fn exit_result(exit: &Exit) -> proto::ExitResult {
    proto::ExitResult {
        exit_code: exit.code,
        signal: exit.signal,
        oom_killed: exit.oom_killed,
    }
}

pub(super) fn wait_response(exit: &Exit) -> proto::WaitTaskResponse {
    proto::WaitTaskResponse {
        result: Some(exit_result(exit)),
        err: exit.error.clone().unwrap_or_default(),
    }
}

pub(super) fn inspect_response(task: &Task, addresses: &[IpAddr]) -> proto::InspectTaskResponse {
    let status = task.status();
    let state = match (&status.started, &status.exit) {
        (_, Some(_)) => proto::TaskState::Exited,
        (Some(_), None) => proto::TaskState::Running,
        (None, None) => proto::TaskState::Unknown,
    };
    let started_at = status
        .started
        .as_ref()
        .map(|started| timestamp(started.started_at));
    let exit = status.exit.as_ref();
    proto::InspectTaskResponse {
        task: Some(proto::TaskStatus {
            id: task.id().to_owned(),
            name: task.info().name.clone(),
            state: state.into(),
            started_at: Some(started_at.unwrap_or(ZERO_TIME)),
            completed_at: Some(exit.map_or(ZERO_TIME, |exit| timestamp(exit.ended_at))),
            result: Some(exit.map(exit_result).unwrap_or_default()),
        }),
        driver: Some(proto::TaskDriverStatus {
            attributes: status
                .started
                .iter()
                .flat_map(|started| {
                    attributes(started, task.info().description.as_deref(), addresses)
                })
                .collect(),
        }),
        network_override: status
            .started
            .as_ref()
            .and_then(|started| network_override(started)),
    }
}

/// The network that Nomad does not know: services with `address_mode = "driver"` get its address. Others keep that of the host, on which
/// the ports are forwarded.
pub(super) fn network_override(started: &Started) -> Option<proto::NetworkOverride> {
    let network = started.network.as_ref()?;
    let ports = network.ports.iter();
    Some(proto::NetworkOverride {
        addr: network.address.to_string(),
        port_map: ports
            .map(|(label, port)| (label.clone(), i32::from(*port)))
            .collect(),
        auto_advertise: false,
    })
}

fn attributes(
    started: &Started,
    description: Option<&Description>,
    addresses: &[IpAddr],
) -> BTreeMap<String, String> {
    let path = |path: &PathBuf| path.display().to_string();
    let addresses: Vec<_> = addresses.iter().map(IpAddr::to_string).collect();
    let addresses = Some(addresses.join(", ")).filter(|all| !all.is_empty());
    let command = description.filter(|description| !description.command.is_empty());
    let plain = [
        ("machine", Some(started.machine.clone())),
        ("pid", Some(started.leader.pid.to_string())),
        ("supervisor_pid", Some(started.supervisor.pid.to_string())),
        (
            "image",
            description.map(|description| description.image.clone()),
        ),
        (
            "command",
            command.map(|description| description.command.clone()),
        ),
        (
            "network",
            description.map(|description| description.network.clone()),
        ),
        ("addresses", addresses),
        ("cgroup", started.cgroup.as_ref().map(path)),
    ];
    let plain = plain
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?)));
    let controllers = started.controllers.iter();
    let controllers = controllers.map(|(name, group)| (format!("cgroup.{name}"), path(group)));
    plain.chain(controllers).collect()
}

pub(super) fn event(event: TaskEvent) -> proto::DriverTaskEvent {
    proto::DriverTaskEvent {
        task_id: event.task.id,
        alloc_id: event.task.alloc_id,
        task_name: event.task.name,
        timestamp: Some(timestamp(event.at)),
        message: event.message,
        annotations: std::collections::HashMap::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::tests::hex;
    use prost::Message as _;
    use rstest::rstest;

    fn exit(code: i32, signal: i32) -> Exit {
        Exit {
            code,
            signal,
            oom_killed: false,
            error: None,
            ended_at: SystemTime::UNIX_EPOCH,
        }
    }

    #[test]
    fn responses_have_the_golden_bytes() {
        assert_eq!(
            hex(&wait_response(&exit(1, 9)).encode_to_vec()),
            "0a0408011009"
        );
        assert_eq!(hex(&wait_response(&exit(0, 0)).encode_to_vec()), "0a00");
        assert_eq!(hex(&ZERO_TIME.encode_to_vec()), "088092b8c398feffffff01");
    }

    #[test]
    fn attributes_say_what_is_known_of_a_task() {
        let mut started = crate::task::tests::started("a/t/1");
        let names = |started: &Started| Vec::from_iter(attributes(started, None, &[]).into_keys());
        assert_eq!(
            names(&started),
            ["cgroup", "machine", "pid", "supervisor_pid"]
        );
        started.cgroup = None;
        let group = PathBuf::from("/sys/fs/cgroup/memory/x");
        started.controllers = [("memory".to_owned(), group)].into();
        let mut description = Description {
            image: "/srv/web".to_owned(),
            command: "web --token=${TOKEN}".to_owned(),
            network: "host".to_owned(),
        };
        let wanted = [
            ("machine", "t-a"),
            ("pid", "11"),
            ("supervisor_pid", "10"),
            ("image", "/srv/web"),
            ("command", "web --token=${TOKEN}"),
            ("network", "host"),
            ("addresses", "192.0.2.7, fd00::2"),
            ("cgroup.memory", "/sys/fs/cgroup/memory/x"),
        ];
        let wanted = wanted.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let addresses = ["192.0.2.7", "fd00::2"].map(|text| text.parse().unwrap());
        assert_eq!(
            attributes(&started, Some(&description), &addresses),
            BTreeMap::from(wanted)
        );
        description.command.clear();
        assert!(!attributes(&started, Some(&description), &[]).contains_key("command"));
    }

    #[test]
    fn task_context_is_read_from_the_whole_request() {
        let port = |label: &str, value, to| proto::PortMapping {
            label: label.to_owned(),
            value,
            to,
            host_ip: String::new(),
        };
        let task = proto::TaskConfig {
            id: "a/t/1".to_owned(),
            name: "t".to_owned(),
            alloc_id: "a".to_owned(),
            alloc_dir: "/alloc/a".to_owned(),
            env: [("A", "env"), ("B", "env")]
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .into(),
            device_env: [("B".to_owned(), "device".to_owned())].into(),
            user: "nobody".to_owned(),
            stdout_path: "/o".to_owned(),
            resources: Some(proto::Resources {
                allocated_resources: Some(proto::AllocatedTaskResources {
                    networks: vec![proto::NetworkResource {
                        dynamic_ports: vec![proto::NetworkPort {
                            label: "old".to_owned(),
                            value: 9000,
                        }],
                        ip: "192.0.2.2".to_owned(),
                        ..Default::default()
                    }],
                    memory: Some(proto::AllocatedMemoryResources {
                        memory_mb: 64,
                        memory_max_mb: -1,
                    }),
                    ..Default::default()
                }),
                linux_resources: Some(proto::LinuxResources {
                    cpu_shares: 500,
                    memory_limit_bytes: 64 << 20,
                    percent_ticks: 0.125,
                    cpuset_cpus: "2,3".to_owned(),
                    cpuset_cgroup: "/sys/fs/cgroup/nomad.slice/share.slice/a.t.scope".to_owned(),
                    ..Default::default()
                }),
                ports: vec![port("http", 25000, 80), port("same", 25001, -1)],
            }),
            devices: vec![proto::Device {
                task_path: "/dev/accelerator".to_owned(),
                host_path: "/dev/accelerator3".to_owned(),
                cgroup_permissions: "rw".to_owned(),
            }],
            // A device plugin's mounts arrive among the volumes.
            mounts: vec![proto::Mount {
                task_path: "/data".to_owned(),
                host_path: "/srv/data".to_owned(),
                readonly: true,
                propagation_mode: "host-to-task".to_owned(),
                ..Default::default()
            }],
            network_isolation_spec: Some(proto::NetworkIsolationSpec {
                mode: NetworkIsolationMode::Group.into(),
                path: "/var/run/netns/a".to_owned(),
                hosts_config: Some(proto::HostsConfig {
                    hostname: "shop".to_owned(),
                    address: "172.26.64.7".to_owned(),
                }),
                ..Default::default()
            }),
            dns: Some(proto::DnsConfig {
                servers: vec!["192.0.2.1".to_owned()],
                searches: vec!["example".to_owned()],
                options: vec!["ndots:3".to_owned()],
            }),
            ..Default::default()
        };
        insta::assert_debug_snapshot!(task_context(&task).unwrap());
    }

    #[test]
    fn an_empty_request_grants_nothing() {
        assert_eq!(
            task_context(&proto::TaskConfig::default()).unwrap(),
            TaskContext::default()
        );
    }

    #[test]
    fn a_namespace_only_in_group_mode_and_ports_only_in_range() {
        let mut task = proto::TaskConfig {
            network_isolation_spec: Some(proto::NetworkIsolationSpec {
                mode: NetworkIsolationMode::Host.into(),
                path: "/var/run/netns/a".to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert_eq!(task_context(&task).unwrap().network_namespace, None);
        task.resources = Some(proto::Resources {
            ports: vec![proto::PortMapping {
                label: "x".to_owned(),
                value: 70_000,
                ..Default::default()
            }],
            ..Default::default()
        });
        let error = task_context(&task).unwrap_err().to_string();
        assert_eq!(error, "port \"x\": 70000 is not a port number");
    }

    #[rstest]
    #[case("", Ok(None))]
    #[case("0.0.0.0", Ok(None))]
    #[case("::", Ok(None))]
    #[case("::ffff:0.0.0.0", Ok(None))]
    #[case("10.0.0.1", Ok(Some("10.0.0.1")))]
    #[case("::ffff:10.0.0.1", Ok(Some("10.0.0.1")))]
    #[case("fd00::1", Ok(Some("fd00::1")))]
    #[case("10.0.0.0/8", Err("port \"x\": \"10.0.0.0/8\" is not an IP address"))]
    fn a_port_keeps_the_address_on_which_it_is_allocated(
        #[case] host_ip: &str,
        #[case] wanted: Result<Option<&str>, &str>,
    ) {
        let port = proto::PortMapping {
            label: "x".to_owned(),
            value: 25000,
            host_ip: host_ip.to_owned(),
            ..Default::default()
        };
        let task = proto::TaskConfig {
            resources: Some(proto::Resources {
                ports: vec![port],
                ..Default::default()
            }),
            ..Default::default()
        };
        let address = task_context(&task).map(|context| context.ports[0].address);
        let wanted = wanted.map(|address| address.map(|text| text.parse().unwrap()));
        assert_eq!(
            address.map_err(|error| error.to_string()),
            wanted.map_err(str::to_owned)
        );
    }

    #[test]
    fn negative_and_missing_durations_are_zero() {
        let given = |seconds, nanos| Some(prost_types::Duration { seconds, nanos });
        assert_eq!(duration(given(2, 500_000_000)), Duration::from_millis(2500));
        assert_eq!(duration(given(-1, 0)), Duration::ZERO);
        assert_eq!(duration(None), Duration::ZERO);
    }
}
