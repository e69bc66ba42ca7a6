//! Signals for the command of `process_two` reach that command and no other process of its container.

use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{MsgFlags, send};
use nix::unistd::Pid;
use nomad_driver_nspawn::failpoint::Failpoint;
use nomad_driver_nspawn::sys::process::{ProcessHandle, children};
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};
use serde_json::json;

use crate::harness::{Host, eventually, within};
use support::trap::Trap;

/// The driver's own init among the descendants of this process.
fn init_below(leader: i32) -> i32 {
    let mut pending = children(leader);
    while let Some(pid) = pending.pop() {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if name.trim() == "nspawn-init" {
            return pid;
        }
        pending.extend(children(pid));
    }
    panic!("no init below {leader}");
}

/// Fills the socket buffer of the init's channel, so that the init does not exit until it gives up sending its last event.
fn fill_channel(init: i32) {
    let held = ProcessHandle::open(init).unwrap();
    let channel = nspawn_init::Descriptor::Channel as i32;
    let channel = pidfd_getfd(&held, channel, PidfdGetfdFlags::empty()).unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&channel);
    while send(number, b"0", MsgFlags::MSG_DONTWAIT).is_ok() {}
}

fn has_state(pid: i32, states: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).map_or_else(
        |_| states.contains('X'),
        |text| {
            let rest = text.rsplit(") ").next().unwrap_or_default();
            rest.starts_with(|state| states.contains(state))
        },
    )
}

fn strike(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

/// The command has been reaped, and a process that it leaves behind becomes the init's first child.
#[tokio::test]
async fn a_signal_in_flight_does_not_reach_leftover_processes() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let [gate, hit, daemon] = ["gate", "hit", "daemon"].map(|name| host.join(name));
    let script = format!(
        "(trap 'echo > {}' USR1; trap 'exit 0' TERM; echo up; while :; do sleep 0.02; done) & \
         echo $! > {}; while ! test -e {}; do sleep 0.02; done; exit 5",
        hit.display(),
        daemon.display(),
        gate.display(),
    );
    let job = host.shell(&script).with("process_two", json!(true));
    let task = host.up(&plugin, job).await;
    let init = init_below(task.leader());
    let command = children(init)[0];
    eventually("the daemon's pid", || {
        fs::read_to_string(&daemon).is_ok_and(|text| text.ends_with('\n'))
    })
    .await;
    let daemon: i32 = fs::read_to_string(&daemon).unwrap().trim().parse().unwrap();

    let mut sending = Trap::at(&host.state(), Failpoint::Signalling);
    let signal = task.signal(&plugin, "SIGUSR1");
    let end_of_the_command = async {
        within("the supervisor", sending.reached()).await;
        fill_channel(init);
        fs::write(&gate, "").unwrap();
        eventually("the command is reaped", || has_state(command, "X")).await;
        strike(init, Signal::SIGSTOP);
        eventually("the init is stopped", || has_state(init, "T")).await;
        assert_eq!(children(init), [daemon]);
        drop(sending);
    };
    let (signal, ()) = tokio::join!(signal, end_of_the_command);
    signal.unwrap();

    // A shell runs its traps in the order of the signal numbers, so SIGUSR1 would come first.
    strike(daemon, Signal::SIGTERM);
    eventually("the daemon has ended", || has_state(daemon, "ZX")).await;
    assert!(!hit.exists(), "the daemon got the signal");
    strike(init, Signal::SIGCONT);
    let exit = task.wait(&plugin).await;
    assert_eq!((exit.code, exit.signal, exit.error), (5, 0, None));
    task.destroy(&plugin).await;
}
