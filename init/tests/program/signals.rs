//! An init forwards signals and reaps children.

use nix::libc;
use nspawn_init::{InitEvent, InitMode};

use crate::harness::{Launch, UNTIL_END, eventually, shell};

/// Signals that can't be caught, the one that an init does not forward, and the two that the C library reserves.
const KEPT: [i32; 5] = [libc::SIGKILL, libc::SIGSTOP, libc::SIGCHLD, 32, 33];

#[test]
fn every_signal_is_forwarded() {
    let numbers: Vec<i32> = (1..=64).filter(|number| !KEPT.contains(number)).collect();
    let mut script = String::new();
    for number in &numbers {
        script += &format!("trap 'echo {number}' {number}\n");
    }
    // A shell runs a trap before it reads the next line, or while it waits for one.
    script += "echo ready\n";
    script += UNTIL_END;
    let mut program = Launch::new(&shell(InitMode::Init, &script)).start();
    program.expect_running();
    assert_eq!(program.line(), "ready");
    for number in numbers {
        program.signal(number);
        eventually("the trap", || {
            program.tell("");
            program.writes_within(5)
        });
        assert_eq!(program.line(), number.to_string());
    }
    program.tell("end");
    let left = program.end();
    assert_eq!(left.words, [InitEvent::Ended { status: 0 }]);
    assert_eq!(left.stdout, "", "each came once");
}

#[test]
fn the_supervisor_learns_which_process_the_command_is() {
    let program = Launch::new(&shell(InitMode::Init, "read line")).start();
    assert_eq!(program.event(), Some(InitEvent::Ready));
    let running = program.event();
    let pid = program.command();
    assert_eq!(running, Some(InitEvent::Running { pid }));
}

#[test]
fn an_unhandled_signal_ends_the_command() {
    for number in [libc::SIGTERM, libc::SIGINT, libc::SIGPIPE, 34, 64] {
        let program = Launch::new(&shell(InitMode::Init, "read line")).start();
        program.expect_running();
        program.signal(number);
        assert_eq!(program.event(), Some(InitEvent::Ended { status: number }));
        assert_eq!(program.end().code(), 128 + number);
    }
}

#[test]
fn an_early_signal_is_not_lost() {
    for _ in 0..20 {
        let program = Launch::new(&shell(InitMode::Init, "read line")).start();
        let pid = program.pid();
        // Once the signals are blocked none may be lost.
        eventually("the mask", || {
            let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            let line = text.lines().find_map(|line| line.strip_prefix("SigBlk:"));
            let mask = u64::from_str_radix(line.unwrap().trim(), 16).unwrap();
            mask & (1 << (libc::SIGTERM - 1)) != 0
        });
        program.signal(libc::SIGTERM);
        program.expect_running();
        let status = libc::SIGTERM;
        assert_eq!(program.event(), Some(InitEvent::Ended { status }));
    }
}

#[test]
fn a_stopped_command_is_not_reported_as_exited() {
    let mut program =
        Launch::new(&shell(InitMode::Init, "kill -STOP $$; echo on; read line")).start();
    program.expect_running();
    let command = program.command();
    eventually("the stop", || {
        let text = std::fs::read_to_string(format!("/proc/{command}/stat")).unwrap();
        text.rsplit(')').next().unwrap().starts_with(" T")
    });
    program.signal(libc::SIGCONT);
    assert_eq!(program.line(), "on");
    assert_eq!(program.end().code(), 1, "read at the end of its input");
}

#[test]
fn orphans_are_reaped() {
    let script = "for n in 1 2 3 4 5; do (sh -c 'exit 3' & echo $!) | cat; done; read line; exit 6";
    let mut program = Launch::new(&shell(InitMode::Init, script)).start();
    program.expect_running();
    let orphans: Vec<String> = (0..5).map(|_| program.line()).collect();
    eventually("the orphans' end", || {
        orphans
            .iter()
            .all(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists())
    });
    assert_eq!(program.children().len(), 1, "the command is still there");
    program.tell("");
    assert_eq!(program.end().words, [InitEvent::Ended { status: 6 << 8 }]);
}

#[test]
fn the_init_survives_the_death_of_its_supervisor() {
    let script = format!("trap 'echo term; exit 8' TERM; echo ready; {UNTIL_END}");
    let mut program = Launch::new(&shell(InitMode::Init, &script)).start();
    program.expect_running();
    assert_eq!(program.line(), "ready");
    program.close_channel();
    program.signal(libc::SIGTERM);
    eventually("the trap", || {
        program.tell("");
        program.writes_within(5)
    });
    assert_eq!(program.line(), "term");
    assert_eq!(program.end().code(), 8);
}
