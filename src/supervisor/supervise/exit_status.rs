//! The exit status of a container, from all evidence: what the driver's init reports, what the kernel reports about the leader,
//! what systemd-nspawn reports. Used in the supervisor process. Pure; an exit status that no source knows is not guessed.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::SystemTime;

use nspawn_init::StartError;

use crate::container::{Exit, UNKNOWN_END};
use crate::signal::Signal;

/// The status with which systemd-nspawn reports that the container requested a restart, and nothing else. After reboot(2) only the
/// parent learns what was requested; to other processes the kernel reports that PID 1 was killed or exited with 0.
const RESTART: i32 = 133;

/// The raw wait status of a process that was killed by SIGKILL.
const KILLED: i32 = 9;

/// The raw wait status of a systemd-nspawn that adds nothing to what the leader's own status says.
pub(super) const NSPAWN_FAILED: i32 = 1 << 8;

/// The raw wait statuses that the parent of PID 1 sees after reboot(2) in a pid namespace: SIGHUP for a restart, SIGINT for
/// everything else. These signals themselves never terminate a PID 1.
const REBOOT: i32 = 1;
const POWER_OFF: i32 = 2;

/// The evidence about one exit.
#[derive(Debug)]
pub(super) struct ExitEvidence<'a> {
    /// Why the command did not run at all.
    pub(super) start_error: Option<&'a StartError>,
    /// The command's raw wait status, if the driver's init was its parent.
    pub(super) command: Option<i32>,
    /// The leader's raw wait status, if the kernel reports it to processes other than the parent.
    pub(super) leader: Option<i32>,
    /// The same as wait(2) gives it to the parent, which alone learns what was requested with reboot(2).
    pub(super) waited: Option<i32>,
    /// What systemd-nspawn has written to stderr.
    pub(super) nspawn_stderr: &'a str,
    /// What the image's own init has said about its failure.
    pub(super) init_failure: Option<&'a str>,
    /// How systemd-nspawn itself exited.
    pub(super) nspawn: ExitStatus,
    /// Whether the container was still alive when it was killed.
    pub(super) killed: bool,
    /// Whether systemd-nspawn did not exit after its container had, and was killed by the supervisor.
    pub(super) nspawn_killed: bool,
    /// Whether the kernel has counted an OOM kill in the task's cgroup, at any time.
    pub(super) oom: bool,
}

/// What the evidence means for Nomad: the source nearest to the command counts.
pub(super) fn exit_of(evidence: &ExitEvidence<'_>) -> Exit {
    let (code, signal, error) = match evidence {
        ExitEvidence {
            start_error: Some(start_error),
            ..
        } => (start_error.status(), 0, Some(start_error.to_string())),
        ExitEvidence {
            command: Some(status),
            ..
        } => of_raw(*status),
        _ if !evidence.killed && !evidence.nspawn_killed && evidence.nspawn.signal().is_some() => {
            let signal = evidence.nspawn.signal().unwrap_or_default();
            let how = describe(evidence.nspawn);
            let text = format!("{how} from outside, and the container with it");
            (128 + signal, signal, Some(text))
        }
        _ if matches!(evidence.nspawn.code(), Some(0 | RESTART)) => {
            of_nspawn(evidence.nspawn.code().unwrap_or_default())
        }
        ExitEvidence {
            waited: Some(REBOOT),
            ..
        } => of_nspawn(RESTART),
        ExitEvidence {
            waited: Some(POWER_OFF),
            ..
        } => (0, 0, None),
        ExitEvidence {
            waited: Some(status),
            ..
        }
        | ExitEvidence {
            leader: Some(status),
            ..
        } => of_raw(*status),
        _ => infer(evidence),
    };
    let oom_killed =
        evidence.oom && !evidence.killed && error.is_none() && is_by_kill(code, signal);
    let failed_by_itself = !evidence.killed && code != 0 && signal == 0;
    let failure = evidence.init_failure.filter(|_| failed_by_itself);
    Exit {
        code,
        signal,
        oom_killed,
        error: error.or_else(|| failure.map(|said| format!("the image's init has failed: {said}"))),
        ended_at: SystemTime::now(),
    }
}

/// Whether an OOM kill can have caused this exit: it was by SIGKILL, or the command passed on the code that shells return when a
/// child was killed by SIGKILL. An OOM kill of a worker long before any other exit did not cause it.
fn is_by_kill(code: i32, signal: i32) -> bool {
    let kill = Signal::KILL.number();
    signal == kill || (code, signal) == (128 + kill, 0)
}

/// The exit codes that systemd-nspawn alone has and that are certain: success, and [`RESTART`].
fn of_nspawn(code: i32) -> (i32, i32, Option<String>) {
    let text = (code == RESTART).then(|| "the container has asked for a restart".to_owned());
    (code, 0, text)
}

fn of_raw(status: i32) -> (i32, i32, Option<String>) {
    let status = ExitStatus::from_raw(status);
    match (status.code(), status.signal()) {
        (Some(code), _) => (code, 0, None),
        (None, Some(signal)) => {
            let dumped = status.core_dumped();
            let text = dumped.then(|| "the command dumped core".to_owned());
            (128 + signal, signal, text)
        }
        (None, None) => of_nspawn(RESTART),
    }
}

/// The status that systemd-nspawn sends when only cleanup is left to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NspawnFinalStatus {
    /// It is going to exit with [`RESTART`].
    Restarting,
    /// It is not.
    Terminating,
}

impl NspawnFinalStatus {
    /// The final status in a line that systemd-nspawn sends to the service manager. A status of the container itself has a
    /// different beginning there.
    pub(super) fn of(line: &str) -> Option<Self> {
        match line {
            "STATUS=Restarting..." => Some(Self::Restarting),
            "STATUS=Terminating..." => Some(Self::Terminating),
            _ => None,
        }
    }
}

/// An exit status of systemd-nspawn with which the leader's raw wait status gives the correct result before systemd-nspawn has
/// exited. `None` if only its real exit status decides: to processes other than the parent, a reboot(2) looks like success or
/// SIGKILL.
pub(super) fn predict_nspawn_status(
    leader: i32,
    nspawn_status: Option<NspawnFinalStatus>,
) -> Option<ExitStatus> {
    let exited = |code: i32| Some(ExitStatus::from_raw(code << 8));
    match (leader, nspawn_status) {
        (0 | KILLED, Some(NspawnFinalStatus::Restarting)) => exited(RESTART),
        (0, Some(NspawnFinalStatus::Terminating)) => exited(0),
        (0 | KILLED, _) => None,
        _ => Some(ExitStatus::from_raw(NSPAWN_FAILED)),
    }
}

/// What can be inferred if neither the driver's init nor the kernel reports a status: systemd-nspawn passes an exit code on, names
/// the signal that terminated its container only on stderr (also with `--quiet`), and exits with 1 both in that case and for its
/// own failures. Where its stderr belongs to the task, an exit by a signal looks like code 1. That is reported as code 1 even if an
/// OOM kill was counted: it may have been that of a worker, long before.
fn infer(evidence: &ExitEvidence<'_>) -> (i32, i32, Option<String>) {
    let kill = Signal::KILL.number();
    if let Some(signal) = signal_in(evidence.nspawn_stderr) {
        return (128 + signal, signal, None);
    }
    match evidence.nspawn.code() {
        _ if evidence.killed => (128 + kill, kill, None),
        None if evidence.nspawn_killed => {
            let text =
                format!("{UNKNOWN_END}: the container ended by itself and systemd-nspawn did not");
            (128 + kill, kill, Some(text))
        }
        Some(code) => (code, 0, None),
        None => (128 + kill, kill, Some(describe(evidence.nspawn))),
    }
}

/// The signal in systemd-nspawn's "Container web-0f1e terminated by signal SEGV."
fn signal_in(nspawn_stderr: &str) -> Option<i32> {
    let (_, rest) = nspawn_stderr.rsplit_once("terminated by signal ")?;
    let name = rest.split(['.', '\n']).next()?;
    name.parse::<Signal>().ok().map(Signal::number)
}

/// Describes how systemd-nspawn exited.
pub(super) fn describe(status: ExitStatus) -> String {
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

    const BY_KILL: i32 = 9;
    const DUMPED_BY_SEGV: i32 = 0x80 | 11;

    fn exited(code: i32) -> i32 {
        code << 8
    }

    /// Evidence with nothing but the raw wait status of systemd-nspawn.
    fn evidence(nspawn: i32) -> ExitEvidence<'static> {
        ExitEvidence {
            start_error: None,
            command: None,
            leader: None,
            waited: None,
            nspawn_stderr: "",
            init_failure: None,
            nspawn: ExitStatus::from_raw(nspawn),
            killed: false,
            nspawn_killed: false,
            oom: false,
        }
    }

    fn end(evidence: &ExitEvidence<'_>) -> (i32, i32, bool) {
        let exit = exit_of(evidence);
        (exit.code, exit.signal, exit.error.is_some())
    }

    /// Known from the driver's init, from the kernel, or from systemd-nspawn alone.
    #[test]
    fn every_code_is_reported_as_it_is() {
        for code in 0..=255 {
            let status = exited(code);
            for (command, leader, nspawn) in [
                (Some(status), None, exited(1)),
                (None, Some(status), exited(1)),
                (None, None, status),
            ] {
                let known = ExitEvidence {
                    command,
                    leader,
                    ..evidence(nspawn)
                };
                // For systemd-nspawn itself that code has one meaning.
                let is_restart = (leader.or(command), code) == (None, RESTART);
                assert_eq!(end(&known), (code, 0, is_restart), "{known:?}");
            }
        }
    }

    #[rstest]
    #[case::a_code(exited(7), false, false, (7, 0))]
    #[case::by_force(exited(1), true, false, (137, 9))]
    #[case::a_failure_after_a_worker_out_of_memory(exited(1), false, true, (1, 0))]
    #[case::one_of_many_out_of_memory(exited(3), false, true, (3, 0))]
    fn with_nothing_else_systemd_nspawn_counts(
        #[case] nspawn: i32,
        #[case] killed: bool,
        #[case] oom: bool,
        #[case] (code, signal): (i32, i32),
    ) {
        let evidence = ExitEvidence {
            killed,
            oom,
            ..evidence(nspawn)
        };
        assert_eq!(end(&evidence), (code, signal, false));
    }

    #[rstest]
    #[case::the_command(Some(KILLED), None, exited(137), true)]
    #[case::the_first_process(None, Some(KILLED), exited(1), true)]
    #[case::a_worker_before_code_1_of_which_nothing_else_is_known(None, None, exited(1), false)]
    #[case::a_child_of_a_shell(Some(exited(137)), None, exited(137), true)]
    #[case::a_child_of_a_shell_that_is_first(None, None, exited(137), true)]
    #[case::a_worker_before_success(Some(0), None, exited(0), false)]
    #[case::a_worker_before_success_of_the_first_process(None, Some(0), exited(0), false)]
    #[case::a_worker_before_a_failure(Some(exited(3)), None, exited(3), false)]
    #[case::a_worker_before_a_fault(Some(11), None, exited(139), false)]
    #[case::systemd_nspawn_was_killed(None, None, KILLED, false)]
    fn an_oom_kill_is_reported_where_it_caused_the_end(
        #[case] command: Option<i32>,
        #[case] leader: Option<i32>,
        #[case] nspawn: i32,
        #[case] expected: bool,
    ) {
        let with = |oom: bool, killed: bool| {
            let exit = exit_of(&ExitEvidence {
                command,
                leader,
                oom,
                killed,
                ..evidence(nspawn)
            });
            exit.oom_killed
        };
        assert_eq!(with(true, false), expected);
        assert!(!with(false, false), "none was counted");
        assert!(!with(true, true), "the driver ended it");
    }

    /// Only before Linux 6.15: later kernels report the status of the leader.
    #[rstest]
    #[case::by_kill("Container a terminated by signal KILL.\n", (137, 9), true)]
    #[case::by_another_signal("Container a terminated by signal SEGV.\n", (139, 11), false)]
    #[case::by_itself("", (1, 0), false)]
    fn systemd_nspawns_message_decides_whether_an_oom_kill_was_the_end(
        #[case] nspawn_stderr: &str,
        #[case] (code, signal): (i32, i32),
        #[case] oom_killed: bool,
    ) {
        let exit = exit_of(&ExitEvidence {
            nspawn_stderr,
            oom: true,
            ..evidence(exited(1))
        });
        assert_eq!(
            (exit.code, exit.signal, exit.oom_killed),
            (code, signal, oom_killed)
        );
    }

    #[rstest]
    #[case("Container a terminated by signal SEGV.\n", 11)]
    #[case(
        "noise\nContainer terminated by signal x terminated by signal RTMIN+4.\n",
        38
    )]
    fn its_words_report_the_signal(#[case] nspawn_stderr: &str, #[case] signal: i32) {
        let evidence = ExitEvidence {
            nspawn_stderr,
            ..evidence(exited(1))
        };
        assert_eq!(end(&evidence), (128 + signal, signal, false));
    }

    #[test]
    fn the_kernel_knows_better_than_systemd_nspawn() {
        let with = |leader: i32, nspawn: i32| ExitEvidence {
            leader: Some(leader),
            ..evidence(nspawn)
        };
        assert_eq!(end(&with(exited(133), exited(1))), (133, 0, false));
        assert_eq!(end(&with(BY_KILL, exited(1))), (137, 9, false));
        assert_eq!(end(&with(DUMPED_BY_SEGV, exited(1))), (139, 11, true));
    }

    #[rstest]
    #[case::by_a_child(BY_KILL)]
    #[case::by_the_first_process(0)]
    fn only_systemd_nspawn_is_reported_of_a_reboot(#[case] leader: i32) {
        let with = |nspawn: i32| ExitEvidence {
            leader: Some(leader),
            ..evidence(nspawn)
        };
        assert_eq!(end(&with(exited(133))), (133, 0, true));
        assert_eq!(end(&with(exited(0))), (0, 0, false), "a power-off");
    }

    #[rstest]
    #[case::a_code(exited(7), None, Some((7, 0)))]
    #[case::a_code_of_a_restart(exited(133), Some(NspawnFinalStatus::Terminating), Some((133, 0)))]
    #[case::a_fault(11, None, Some((139, 11)))]
    #[case::success_or_a_restart(0, None, None)]
    #[case::success(0, Some(NspawnFinalStatus::Terminating), Some((0, 0)))]
    #[case::a_restart(0, Some(NspawnFinalStatus::Restarting), Some((133, 0)))]
    #[case::a_restart_by_a_child(BY_KILL, Some(NspawnFinalStatus::Restarting), Some((133, 0)))]
    #[case::a_kill_or_a_power_off_by_a_child(BY_KILL, Some(NspawnFinalStatus::Terminating), None)]
    fn what_is_foreseen_is_the_truth(
        #[case] leader: i32,
        #[case] nspawn_status: Option<NspawnFinalStatus>,
        #[case] expected: Option<(i32, i32)>,
    ) {
        let ends = predict_nspawn_status(leader, nspawn_status).map(|nspawn| {
            let exit = exit_of(&ExitEvidence {
                leader: Some(leader),
                nspawn,
                ..evidence(0)
            });
            (exit.code, exit.signal)
        });
        assert_eq!(ends, expected);
    }

    #[rstest]
    #[case("STATUS=Restarting...", Some(NspawnFinalStatus::Restarting))]
    #[case("STATUS=Terminating...", Some(NspawnFinalStatus::Terminating))]
    #[case("STATUS=Container running: Restarting...", None)]
    #[case("STOPPING=1", None)]
    fn a_final_status_is_systemd_nspawns_own(
        #[case] line: &str,
        #[case] nspawn_status: Option<NspawnFinalStatus>,
    ) {
        assert_eq!(NspawnFinalStatus::of(line), nspawn_status);
    }

    #[test]
    fn who_had_ended_before_force_came_was_not_ended_by_it() {
        let nspawn_killed = |leader| ExitEvidence {
            leader,
            nspawn_killed: true,
            ..evidence(BY_KILL)
        };
        assert_eq!(end(&nspawn_killed(Some(exited(3)))), (3, 0, false));
        assert_eq!(end(&nspawn_killed(None)), (137, 9, true));
    }

    /// systemd-nspawn had not waited for its container, so the leader became a child of the supervisor.
    #[rstest]
    #[case::a_code(exited(7), (7, 0))]
    #[case::a_fault(DUMPED_BY_SEGV, (139, 11))]
    #[case::a_restart(1, (133, 0))]
    #[case::a_power_off(2, (0, 0))]
    fn a_stuck_systemd_nspawn_leaves_the_status_to_the_supervisor(
        #[case] status: i32,
        #[case] expected: (i32, i32),
    ) {
        let exit = exit_of(&ExitEvidence {
            waited: Some(status),
            nspawn_killed: true,
            ..evidence(KILLED)
        });
        assert_eq!((exit.code, exit.signal), expected);
    }

    #[rstest]
    #[case::its_code(exited(255), 1, Some("the image's init has failed: no"))]
    #[case::success(exited(0), 0, None)]
    #[case::a_restart(exited(0), 133, Some("the container has asked for a restart"))]
    fn what_an_init_said_explains_a_failure(
        #[case] leader: i32,
        #[case] nspawn: i32,
        #[case] expected: Option<&str>,
    ) {
        let exit = |killed| {
            exit_of(&ExitEvidence {
                leader: Some(leader),
                init_failure: Some("no"),
                killed,
                ..evidence(exited(nspawn))
            })
        };
        assert_eq!(exit(false).error.as_deref(), expected);
        assert_eq!(
            exit(true)
                .error
                .as_deref()
                .filter(|text| text.contains("init")),
            None
        );
    }

    #[test]
    fn the_first_program_knows_best() {
        let with = |command: i32| ExitEvidence {
            command: Some(command),
            leader: Some(exited(143)),
            killed: true,
            ..evidence(BY_KILL)
        };
        assert_eq!(end(&with(15)), (143, 15, false));
        assert_eq!(end(&with(1)), (129, 1, false), "no reboot: it is a child");
        assert_eq!(end(&with(exited(255))), (255, 0, false));
        let start_error = StartError {
            step: nspawn_init::Step::Execute,
            file: "/bin/none".into(),
            errno: 2,
        };
        let exit = exit_of(&ExitEvidence {
            start_error: Some(&start_error),
            ..evidence(exited(127))
        });
        assert_eq!((exit.code, exit.signal), (127, 0));
        assert!(exit.error.unwrap().contains("/bin/none"));
    }

    #[rstest]
    #[case(1, "SIGHUP")]
    #[case(52, "SIGRTMIN+18")]
    fn a_killed_systemd_nspawn_is_no_success(#[case] signal: i32, #[case] name: &str) {
        let exit = exit_of(&ExitEvidence {
            leader: Some(BY_KILL),
            ..evidence(signal)
        });
        assert_eq!((exit.code, exit.signal), (128 + signal, signal));
        assert!(exit.error.unwrap().contains(name));
    }
}
