//! Networks that the driver makes. Each scenario runs in a network namespace of its own, which stands for the host's.

use nix::sched::{CloneFlags, unshare};
use nomad_driver_nspawn::container::{Cause, HostInterface, InterfaceMode, Link, PortForward};
use nomad_driver_nspawn::network::host_addresses::{self, Addresses};
use nomad_driver_nspawn::sys::process::current_process;

use super::*;

/// Runs a scenario in a network namespace of its own, with loopback. Without root in that of the host, where the driver makes no network.
fn in_own_network<F: Future<Output = ()>>(scenario: impl FnOnce() -> F) {
    if is_root() {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        support::run("ip", &["link", "set", "lo", "up"]);
    }
    // Its threads, and the processes that they start, are in the namespace too.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(scenario());
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

fn http(address: Option<&str>) -> PortForward {
    PortForward {
        label: "http".to_owned(),
        address: address.map(|text| text.parse().unwrap()),
        host: 25_917,
        container: 80,
    }
}

fn routed(world: &World, script: &str, ports: &[PortForward]) -> ContainerSpec {
    world.spec(script).with(|spec| {
        spec.network.namespace = NetworkNamespace::Private {
            link: Link::Routed,
            ports: ports.to_vec(),
            interfaces: Vec::new(),
        };
    })
}

/// The first instruction of the command finds addresses and routes.
#[rstest]
fn a_container_is_connected_before_its_command_runs(world: World) {
    in_own_network(|| async {
        let script = "cat /proc/net/route /proc/net/if_inet6; echo up; exec sleep 1000";
        let started = world.up(routed(&world, script, &[])).await;
        let plan = started.network.clone().unwrap();
        let said = world.said("stdout");
        if is_root() {
            assert!(said.contains("host0\t00000000\t0101FEA9\t"), "{said}");
            let mut addresses6 = said.lines().filter(|line| line.ends_with("host0"));
            assert!(addresses6.any(|line| line.starts_with("fd")), "{said}");
            assert!(started.notes.is_empty(), "{:?}", started.notes);
        } else {
            let mut notes = started.notes.iter();
            let is_noted = notes.any(|note| note.contains("does not run as root"));
            assert!(is_noted, "{:?}", started.notes);
        }
        let reservation = world
            .settings
            .state_dir
            .join(".addresses")
            .join(plan.address.to_string());
        assert!(reservation.symlink_metadata().is_ok());
        world.leave(&[&started]).await;
        assert!(reservation.symlink_metadata().is_err());
        if is_root() {
            let links = support::run("ip", &["-o", "link"]);
            assert!(!links.contains("nd-"), "{links}");
        }
    });
}

/// Nomad's usual case. The test determines this host's default addresses in the same way as the driver.
#[rstest]
fn a_port_of_a_default_address_is_forwarded_and_reported(world: World) {
    in_own_network(|| async {
        if is_root() {
            for address in ["192.0.2.2/24", "198.51.100.2/24"] {
                support::run("ip", &["address", "add", address, "dev", "lo"]);
            }
        }
        let host = Addresses::of_this_host().unwrap();
        let address = host.all.first().map(ToString::to_string);
        let port = http(address.as_deref());
        let (_, wanted) = host_addresses::place(std::slice::from_ref(&port), &host).unwrap();
        let started = world.up(routed(&world, DEAF, &[port])).await;
        let reported = started
            .notes
            .iter()
            .filter(|note| note.starts_with("port "));
        assert_eq!(
            reported.collect::<Vec<_>>(),
            wanted.iter().collect::<Vec<_>>()
        );
        let network = started.network.clone().unwrap();
        assert_eq!(network.ports, BTreeMap::from([("http".to_owned(), 80)]));
        world.leave(&[&started]).await;
    });
}

/// The host of the tests has no such pool, so nothing else has an address of it.
#[rstest]
fn no_two_containers_have_the_same_address(world: World) {
    in_own_network(|| async {
        let small = Pool {
            ipv4: "198.18.7.0/30".parse().unwrap(),
            ipv6: None,
        };
        let backend = NspawnBackend::new(Settings {
            network_pool: small,
            ..world.settings.clone()
        });
        let start = |task: &str| {
            let spec = routed(&world, DEAF, &[]).with(|spec| {
                spec.identity.id = format!("alloc/{task}/00000001");
                spec.identity.machine = format!("m-{task}");
                // Several may use the tree at once.
                spec.rootfs.read_only = true;
            });
            within(backend.start(spec))
        };
        let (first, second) = (start("one").await.unwrap(), start("two").await.unwrap());
        let address = |started: &Started| started.network.as_ref().unwrap().address;
        assert_ne!(address(&first), address(&second));
        let error = start("three").await.unwrap_err();
        assert_eq!(error.cause(), Cause::Resources);
        for part in ["all 2 addresses", "plugin.network_pool.ipv4"] {
            assert!(error.to_string().contains(part), "{error}");
        }
        world.leave(&[&first, &second]).await;
    });
}

/// The driver's table in the firewall of this network namespace.
fn firewall() -> String {
    support::run("nft", &["list", "table", "inet", "nomad_driver_nspawn"])
}

fn has_firewall() -> bool {
    let has = is_root() && std::path::Path::new("/usr/sbin/nft").exists();
    if !has {
        not_applicable("needs root and nft");
    }
    has
}

/// A reload of the firewall while a plugin runs, and one while none runs.
#[rstest]
fn the_rules_of_a_container_are_restored_after_a_reload(world: World) {
    if !has_firewall() {
        return;
    }
    in_own_network(|| async {
        let started = world.up(routed(&world, DEAF, &[http(None)])).await;
        let before = firewall();
        assert!(before.contains("25917 comment"), "{before}");
        support::run("nft", &["flush", "ruleset"]);
        let note = within(world.backend.network_restored(&started)).await;
        assert!(note.unwrap().contains("have been restored"));
        assert_eq!(firewall(), before);
        support::run("nft", &["flush", "ruleset"]);
        let later = NspawnBackend::new(world.settings.clone());
        within(later.attach(&started)).await.unwrap();
        let note = within(later.network_restored(&started)).await;
        assert!(note.unwrap().contains("have been restored"));
        assert_eq!(firewall(), before);
        world.leave(&[&started]).await;
        assert_eq!(support::run("nft", &["list", "tables"]), "");
    });
}

/// What starts without records have left is removed. Another agent, whose state directory is another one, keeps what it has.
#[rstest]
fn networks_without_records_are_removed_by_reconciliation(world: World) {
    if !has_firewall() {
        return;
    }
    in_own_network(|| async {
        let started = world.up(routed(&world, DEAF, &[http(None)])).await;
        let own = firewall();
        let gone = "addresses4 { 10.213.0.0 comment \"gone/task\" }";
        support::run("nft", &["add element inet nomad_driver_nspawn", gone]);
        let with_gone = firewall();
        assert_ne!(with_gone, own);
        let reservation = world.settings.state_dir.join(".addresses/10.213.0.0");
        std::os::unix::fs::symlink("task.0123456789abcdef", &reservation).unwrap();
        let state_dir = world.scratch.path().join("other");
        let other = NspawnBackend::new(Settings {
            state_dir: state_dir.clone(),
            ..world.settings.clone()
        });
        within(other.reconcile(&world.alloc_roots())).await;
        assert_eq!(firewall(), with_gone);
        assert!(reservation.symlink_metadata().is_ok());
        within(world.backend.reconcile(&world.alloc_roots())).await;
        assert!(reservation.symlink_metadata().is_err());
        assert_eq!(firewall(), own);
        world.leave(&[&started]).await;
    });
}

/// The bridge of a zone, whose last container has lost its supervisor and its plugin.
#[rstest]
fn the_bridge_of_a_zone_does_not_outlive_a_killed_supervisor(world: World) {
    in_own_network(|| async {
        let spec = world.spec(DEAF).with(|spec| {
            spec.network.namespace = NetworkNamespace::Private {
                link: Link::Zone("z".to_owned()),
                ports: Vec::new(),
                interfaces: Vec::new(),
            };
        });
        let dead = NspawnBackend::new(world.settings.clone());
        let started = Started::clone(&*within(dead.start(spec)).await.unwrap());
        world.received("up").await;
        drop(dead);
        if is_root() {
            let links = support::run("ip", &["-o", "link"]);
            assert!(links.contains("nz-z"), "{links}");
        }
        let supervisor = ProcessHandle::open_checked(started.supervisor).unwrap();
        supervisor.signal(signal("KILL")).unwrap();
        within(async {
            while started.state.exists() {
                world.backend.reconcile(&world.alloc_roots()).await;
            }
        })
        .await;
        if is_root() {
            let links = support::run("ip", &["-o", "link"]);
            assert!(!links.contains("nd-") && !links.contains("nz-"), "{links}");
            let routes = support::run("ip", &["route"]);
            assert!(!routes.contains("10.213."), "{routes}");
        }
        world.leave(&[&started]).await;
    });
}

/// systemd-nspawn would say so too, but not which option it is, and after it has made others.
#[rstest]
#[case::macvlan(InterfaceMode::Macvlan, "config.network_macvlan")]
#[case::ipvlan(InterfaceMode::Ipvlan, "config.network_ipvlan")]
#[case::moved(InterfaceMode::Moved, "config.network_interface")]
fn an_interface_that_the_host_does_not_have_is_refused(
    world: World,
    #[case] mode: InterfaceMode,
    #[case] option: &str,
    #[values(Link::None, Link::Routed)] link: Link,
) {
    in_own_network(|| async {
        let spec = world.spec(DEAF).with(|spec| {
            spec.network.namespace = NetworkNamespace::Private {
                link,
                ports: Vec::new(),
                interfaces: vec![HostInterface {
                    mode,
                    name: "nolink".to_owned(),
                }],
            };
        });
        let error = world.refused(spec).await;
        let words = format!("{option}: the host has no interface \"nolink\"");
        assert!(error.to_string().contains(&words), "{error}");
        // It may be made later.
        assert!(error.cause().is_recoverable());
        world.leave(&[]).await;
    });
}

/// The image is looked into after the addresses have been reserved.
#[rstest]
fn a_start_that_cannot_be_prepared_keeps_no_address(world: World) {
    in_own_network(|| async {
        let missing = world.scratch.path().join("missing");
        let spec = routed(&world, DEAF, &[]).with(|spec| {
            spec.rootfs.source = Root::Directory(missing.clone());
        });
        let error = world.refused(spec).await;
        assert!(error.to_string().contains("missing"), "{error}");
        world.leave(&[]).await;
    });
}

/// As long as the other one runs.
#[rstest]
fn a_container_joins_the_network_of_another_one(world: World) {
    if !is_root() {
        return support::not_applicable("only root can enter a network namespace");
    }
    in_own_network(|| async {
        let shared = |spec: ContainerSpec| spec.with(|spec| spec.rootfs.read_only = true);
        let first = world.up(shared(routed(&world, DEAF, &[]))).await;
        let joining = |task: &str| {
            shared(world.named(task, "cat /proc/net/route")).with(|spec| {
                spec.network.namespace = NetworkNamespace::OfTask {
                    task: "task".to_owned(),
                    leader: Some(first.leader),
                };
            })
        };
        let second = world.start(joining("second")).await;
        assert_eq!(ended(&world.end(&second).await), (0, 0));
        let said = world.said("stdout");
        assert!(said.contains("host0\t00000000\t0101FEA9\t"), "{said}");
        let stopped = world.backend.stop(&first, None, Duration::ZERO);
        within(stopped).await.unwrap();
        let error = world.refused(joining("third")).await;
        assert!(error.is_transient(), "{error:?}");
        let text = error.to_string();
        let wanted = "the network of the task \"task\": it does not exist";
        assert!(text.contains(wanted), "{text}");
        world.leave(&[&first, &second]).await;
    });
}

/// What another task has from the host is had without it.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_network_of_the_host_is_not_joined_as_that_of_a_task(world: World) {
    let spec = world.spec("echo ran").with(|spec| {
        spec.network.namespace = NetworkNamespace::OfTask {
            task: "other".to_owned(),
            leader: Some(current_process().unwrap()),
        };
    });
    let error = world.refused(spec).await;
    assert!(!error.is_transient(), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("network namespace of the host"), "{text}");
    world.leave(&[]).await;
}
