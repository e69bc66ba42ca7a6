//! The driver's table and what becomes of its elements, in namespaces of the tests' own and without traffic.

use rstest::rstest;

use super::*;
use crate::network::Mapping;
use crate::network::pool;
use crate::network::testing::{Namespace, plan, port};

const HOST: &str = "192.0.2.1";
const HOST6: &str = "2001:db8::1";

fn host_only() -> Option<Namespace> {
    Namespace::new(&["nft"])
}

fn listed(host: &Namespace) -> String {
    host.call("nft list ruleset")
}

fn run_open(host: &Namespace, plan: &NetworkPlan) -> Result<(), NetworkError> {
    let plan = plan.clone();
    host.run(move || open(&plan))
}

fn run_close(host: &Namespace, plan: &NetworkPlan) {
    let plan = plan.clone();
    host.run(move || close(&plan)).unwrap();
}

/// Removes the elements of all owners but those whose addresses are reserved, here or in another state directory.
fn run_retain(host: &Namespace, here: &[u8], elsewhere: &[u8]) -> Vec<String> {
    let state_dirs = [here, elsewhere].map(|numbers| {
        let state_dir = tempfile::tempdir().unwrap();
        let directory = state_dir.path().join(pool::DIRECTORY);
        std::fs::create_dir(&directory).unwrap();
        for number in numbers {
            let address = plan(*number, &[]).address.to_string();
            std::os::unix::fs::symlink("start", directory.join(address)).unwrap();
        }
        state_dir
    });
    host.run(move || {
        let [here, elsewhere] = state_dirs.each_ref().map(|state_dir| state_dir.path());
        let in_use = || pool::in_use(here, &BTreeSet::from([elsewhere.to_owned()]));
        retain(in_use).unwrap().into_iter().collect()
    })
}

/// The elements in the table that have this owner.
fn owned(host: &Namespace, plan: &NetworkPlan) -> usize {
    listed(host).matches(&format!("\"{}\"", plan.owner)).count()
}

#[test]
fn opening_and_closing_are_repeatable_and_leave_nothing_of_the_plan() {
    let Some(host) = host_only() else { return };
    let ports = [
        port("http", None, 8080, 80),
        port("dns", Some(HOST), 53, 5353),
        port("dns6", Some(HOST6), 53, 5353),
    ];
    let (plan, other) = (plan(1, &ports), plan(2, &[port("other", None, 9090, 80)]));
    assert!(!host.run(table_exists).unwrap());
    run_close(&host, &plan);
    assert_eq!(listed(&host), "");
    run_open(&host, &other).unwrap();
    let before = listed(&host);
    run_open(&host, &plan).unwrap();
    let opened = listed(&host);
    assert_eq!(owned(&host, &plan), 8, "{opened}");
    run_open(&host, &plan).unwrap();
    assert_eq!(listed(&host), opened);
    // As after an interrupted start.
    host.call("nft delete element inet nomad_driver_nspawn ports4 { 8080 }");
    run_open(&host, &plan).unwrap();
    assert_eq!(owned(&host, &plan), 8);
    run_close(&host, &plan);
    run_close(&host, &plan);
    assert_eq!(listed(&host), before);
    assert!(host.run(table_exists).unwrap());
}

#[rstest]
#[case::port(
    port("mine", None, 9090, 80),
    "port \"mine\" (9090) is held by the task alloc2/task, for 10.77.0.2 port 80"
)]
#[case::port_of_one_address(
    port("mine", Some(HOST), 53, 80),
    "port \"mine\" (53) on 192.0.2.1 is held by the task alloc2/task"
)]
fn a_port_of_another_task_is_refused_for_now_and_stays(
    #[case] wanted: Mapping,
    #[case] reason: &str,
) {
    let Some(host) = host_only() else { return };
    let other = plan(
        2,
        &[port("a", None, 9090, 80), port("b", Some(HOST), 53, 80)],
    );
    run_open(&host, &other).unwrap();
    let before = listed(&host);
    let refused = plan(1, &[port("free", None, 8080, 80), wanted]);
    let error = run_open(&host, &refused).unwrap_err();
    assert_eq!(error.cause, Cause::Busy);
    assert!(error.reason.contains(reason), "{error}");
    // Nor does its release take the other's.
    run_close(&host, &refused);
    assert_eq!(listed(&host), before);
}

#[test]
fn an_earlier_start_of_the_same_task_keeps_its_port_until_it_is_released() {
    let Some(host) = host_only() else { return };
    let earlier = plan(1, &[port("http", None, 8080, 80)]);
    let mut later = plan(2, &earlier.ports);
    later.owner.clone_from(&earlier.owner);
    run_open(&host, &earlier).unwrap();
    let error = run_open(&host, &later).unwrap_err();
    assert_eq!(error.cause, Cause::Busy);
    assert!(
        error.reason.contains("an earlier start of this task"),
        "{error}"
    );
    run_close(&host, &earlier);
    run_open(&host, &later).unwrap();
    run_close(&host, &earlier);
    assert_eq!(owned(&host, &later), 6);
}

#[test]
fn elements_of_owners_that_are_gone_are_removed_and_rules_renewed() {
    let Some(host) = Namespace::new(&["nft", "ip"]) else {
        return;
    };
    assert!(run_retain(&host, &[], &[]).is_empty());
    assert_eq!(listed(&host), "");
    let plans =
        [1, 2, 3, 4, 5].map(|number| plan(number, &[port("http", None, number.into(), 80)]));
    for plan in &plans {
        run_open(&host, plan).unwrap();
    }
    let complete = listed(&host);
    host.call("nft flush chain inet nomad_driver_nspawn forwarded");
    assert!(run_retain(&host, &[1, 2, 3], &[4, 5]).is_empty());
    assert_eq!(listed(&host), complete);
    // Those that nobody owns are not the driver's.
    host.call("nft add element inet nomad_driver_nspawn addresses4 { 10.77.0.9 }");
    // A connected container of an agent that this one does not see.
    host.call("ip link add nd-4 type veth peer name host0");
    host.call("ip link set nd-4 up");
    host.call("ip route add 10.77.0.4 dev nd-4");
    let removed = run_retain(&host, &[2], &[3]);
    assert_eq!(removed, ["alloc1/task", "alloc5/task"]);
    let left = plans.each_ref().map(|plan| owned(&host, plan));
    assert_eq!(left, [0, 6, 6, 6, 0]);
    assert!(listed(&host).contains("10.77.0.9"));
}

/// A table of this name can't be written in nft's language, so nothing of it could be put back.
#[test]
fn tables_of_others_are_left_alone() {
    let Some(host) = host_only() else { return };
    host.feed(
        "nft -j -f -",
        r#"{"nftables": [{"add": {"table": {"family": "inet", "name": "log"}}}, {"add": {"chain": {"family": "inet", "table": "log", "name": "drop", "type": "nat", "hook": "prerouting", "prio": -101, "policy": "accept"}}}]}"#,
    );
    let before = listed(&host);
    assert!(before.contains("table inet log"), "{before}");
    let plan = plan(1, &[port("http", None, 8080, 80)]);
    run_open(&host, &plan).unwrap();
    run_retain(&host, &[1], &[]);
    run_close(&host, &plan);
    assert_eq!(listed(&host), before);
}

/// They begin at the same moment, without a table.
#[test]
fn starts_at_the_same_time_do_not_disturb_each_other() {
    const STARTS: u8 = 8;
    let Some(host) = host_only() else { return };
    let at_once = |close_odd: bool| {
        host.run(move || {
            let start = std::sync::Barrier::new(STARTS.into());
            std::thread::scope(|scope| {
                for number in 0..STARTS {
                    let start = &start;
                    scope.spawn(move || {
                        let plan =
                            plan(number, &[port("http", None, 8000 + u16::from(number), 80)]);
                        start.wait();
                        if close_odd && number % 2 == 1 {
                            close(&plan).unwrap();
                        } else {
                            open(&plan).unwrap();
                        }
                    });
                }
            });
        });
    };
    at_once(false);
    let first = plan(0, &[]);
    assert_eq!(owned(&host, &first), 6);
    let listing = listed(&host);
    assert_eq!(listing.matches("comment").count(), 6 * usize::from(STARTS));
    assert_eq!(listing.matches("masquerade").count(), 5, "{listing}");
    at_once(true);
    assert_eq!(
        listed(&host).matches("comment").count(),
        3 * usize::from(STARTS)
    );
}

/// One of two tasks gets a port that both want, and the other an error that names it.
#[test]
fn two_starts_with_one_port_never_both_succeed() {
    let Some(host) = host_only() else { return };
    let outcomes = host.run(|| {
        let start = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            let starts = [1, 2].map(|number| {
                let start = &start;
                scope.spawn(move || {
                    start.wait();
                    open(&plan(number, &[port("http", None, 8080, 80)]))
                })
            });
            starts.map(|start| start.join().unwrap())
        })
    });
    let refused: Vec<_> = outcomes.into_iter().filter_map(Result::err).collect();
    let [error] = refused.as_slice() else {
        panic!("{refused:?}")
    };
    assert_eq!(error.cause, Cause::Busy, "{error}");
}

#[test]
fn chains_of_others_that_drop_what_is_forwarded_are_named() {
    let Some(host) = Namespace::new(&["nft", "iptables"]) else {
        return;
    };
    assert_eq!(host.run(dropped_by), Vec::<String>::new());
    host.run(|| open(&plan(1, &[])).unwrap());
    host.call("iptables -P FORWARD ACCEPT");
    assert_eq!(host.run(dropped_by), Vec::<String>::new());
    host.call("iptables -P FORWARD DROP");
    let want = ["the chain FORWARD of the table ip filter"];
    assert_eq!(host.run(dropped_by), want);
}
