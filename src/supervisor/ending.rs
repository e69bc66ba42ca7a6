//! How a container ended, from what systemd-nspawn's own status tells. Pure; what the status can't tell is not guessed.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::SystemTime;

use crate::container::{Exit, Mode};
use crate::signal::Signal;

/// What systemd-nspawn's status means for Nomad. It passes a payload's code on, but has only one number for every signal.
pub(super) fn exit_of(status: ExitStatus, mode: Mode, forced: bool, oom: bool) -> Exit {
    let kill = Signal::KILL.number();
    let (code, signal, error) = match (status.code(), status.signal()) {
        _ if forced => (128 + kill, kill, None),
        (Some(1 | 255), _) if oom && mode != Mode::Boot => (128 + kill, kill, None),
        (Some(code), _) => (code, 0, None),
        (None, signal) => {
            let signal = signal.unwrap_or(kill);
            let text = format!("{} from outside, and the container with it", told(status));
            (128 + signal, signal, Some(text))
        }
    };
    Exit {
        code,
        signal,
        oom_killed: oom,
        error,
        ended_at: SystemTime::now(),
    }
}

/// How systemd-nspawn ended, in words.
pub(super) fn told(status: ExitStatus) -> String {
    match (status.code(), status.signal().and_then(Signal::from_number)) {
        (Some(code), _) => format!("systemd-nspawn exited with status {code}"),
        (None, Some(signal)) => format!("systemd-nspawn was ended by {signal}"),
        (None, None) => format!("systemd-nspawn ended: {status}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn exited(code: i32) -> ExitStatus {
        ExitStatus::from_raw(code << 8)
    }

    #[rstest]
    #[case::a_code(exited(7), false, false, (7, 0, false))]
    #[case::by_force(exited(1), true, false, (137, 9, false))]
    #[case::out_of_memory(exited(1), false, true, (137, 9, true))]
    #[case::one_of_many_out_of_memory(exited(3), false, true, (3, 0, true))]
    fn a_status_becomes_an_exit(
        #[case] status: ExitStatus,
        #[case] forced: bool,
        #[case] oom: bool,
        #[case] want: (i32, i32, bool),
    ) {
        let exit = exit_of(status, Mode::Plain, forced, oom);
        assert_eq!((exit.code, exit.signal, exit.oom_killed), want);
        assert_eq!(exit.error, None);
    }

    #[rstest]
    #[case(1, "SIGHUP")]
    #[case(52, "SIGRTMIN+18")]
    fn a_killed_systemd_nspawn_is_no_success(#[case] signal: i32, #[case] name: &str) {
        let exit = exit_of(ExitStatus::from_raw(signal), Mode::Plain, false, false);
        assert_eq!((exit.code, exit.signal), (128 + signal, signal));
        assert!(exit.error.unwrap().contains(name));
    }
}
