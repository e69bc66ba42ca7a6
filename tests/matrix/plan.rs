//! The cells: what can be killed at which step, and the expected result.

use std::fmt;

use nomad_driver_nspawn::failpoint::Failpoint;
use nomad_driver_nspawn::sys::kernel;

use super::Moment;

/// The process that a cell kills.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Victim {
    Plugin,
    Supervisor,
    Nspawn,
    /// The command itself, as the container's PID 1.
    Leader,
    /// The driver's own init, as PID 1 of a container whose command is PID 2.
    Init,
    /// Nomad's agent: its connection is closed, the plugin stays alive.
    Agent,
}

impl Victim {
    pub(crate) const ALL: [Self; 6] = [
        Self::Plugin,
        Self::Supervisor,
        Self::Nspawn,
        Self::Leader,
        Self::Init,
        Self::Agent,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plugin => "plugin",
            Self::Supervisor => "supervisor",
            Self::Nspawn => "nspawn",
            Self::Leader => "leader",
            Self::Init => "init",
            Self::Agent => "agent",
        }
    }
}

/// The step at which it is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    BeforeOrder,
    OrderWritten,
    CgroupMade,
    Mounting,
    NspawnSpawned,
    BeforeNotification,
    Notified,
    NetworkPrepared,
    NetworkConnected,
    StartRecorded,
    Running,
    /// A further command runs in the task.
    Exec,
    Signalled,
    Stopping,
    Exited,
    EndRecorded,
    EndTold,
    OutOfMemoryLater,
    OutOfMemory,
    OutOfMemoryRecorded,
    Destroying,
    Removing,
    Recovering,
}

impl Step {
    pub(crate) const ALL: [Self; 23] = [
        Self::BeforeOrder,
        Self::OrderWritten,
        Self::CgroupMade,
        Self::Mounting,
        Self::NspawnSpawned,
        Self::BeforeNotification,
        Self::Notified,
        Self::NetworkPrepared,
        Self::NetworkConnected,
        Self::StartRecorded,
        Self::Running,
        Self::Exec,
        Self::Signalled,
        Self::Stopping,
        Self::Exited,
        Self::EndRecorded,
        Self::EndTold,
        Self::OutOfMemoryLater,
        Self::OutOfMemory,
        Self::OutOfMemoryRecorded,
        Self::Destroying,
        Self::Removing,
        Self::Recovering,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::BeforeOrder => "before the launch spec",
            Self::OrderWritten => "launch spec written",
            Self::CgroupMade => "cgroup made",
            Self::Mounting => "mounting",
            Self::NspawnSpawned => "nspawn spawned",
            Self::BeforeNotification => "before the notification",
            Self::Notified => "notified, not recorded",
            Self::NetworkPrepared => "network prepared",
            Self::NetworkConnected => "network connected",
            Self::StartRecorded => "start recorded, unreported",
            Self::Running => "running",
            Self::Exec => "running a further command",
            Self::Signalled => "signalled",
            Self::Stopping => "stopping",
            Self::Exited => "exited, not recorded",
            Self::EndRecorded => "end recorded, unreported",
            Self::EndTold => "end reported, nothing freed",
            Self::OutOfMemoryLater => "running, later an OOM kill",
            Self::OutOfMemory => "OOM kill, not recorded",
            Self::OutOfMemoryRecorded => "OOM kill, end recorded",
            Self::Destroying => "destroying, still alive",
            Self::Removing => "destroying, already dead",
            Self::Recovering => "recovering",
        }
    }

    /// Whether the task ends because it has used up its memory.
    pub(crate) fn is_out_of_memory(self) -> bool {
        matches!(
            self,
            Self::OutOfMemoryLater | Self::OutOfMemory | Self::OutOfMemoryRecorded
        )
    }

    /// Whether StartTask has not returned yet, so that Nomad has no handle.
    pub(crate) fn is_start(self) -> bool {
        matches!(
            self,
            Self::BeforeOrder
                | Self::OrderWritten
                | Self::CgroupMade
                | Self::Mounting
                | Self::NspawnSpawned
                | Self::BeforeNotification
                | Self::Notified
                | Self::NetworkPrepared
                | Self::NetworkConnected
                | Self::StartRecorded
        )
    }

    /// Whether the driver makes a network for the task.
    pub(crate) fn has_network(self) -> bool {
        matches!(self, Self::NetworkPrepared | Self::NetworkConnected)
    }
}

/// Where a process is held to freeze the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hold {
    Driver(Failpoint),
    Nspawn(Moment),
    /// No process: the step lasts by itself.
    Nobody,
}

/// The id of the next StartTask after a start that returned no handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Again {
    /// What Nomad does.
    NewId,
    /// Not promised by Nomad, but not ruled out either.
    SameId,
}

/// The expected result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owed {
    /// The start fails with this text in its error, or was interrupted; nothing of it is left.
    Undone(&'static str),
    /// The same container runs and is supervised: its exit is reported later.
    Same,
    /// The task exited by itself, and its own exit code is reported; or the kernel killed it for its memory, and that is reported.
    ItsOwnEnd,
    /// One of the two: how it ended may have been seen.
    ItsOwnEndOrKilled(&'static str),
    /// It is reported dead by SIGKILL, with this text in the error; no error if the driver was asked to kill it.
    Killed(&'static str),
    /// It is reported dead and unsuccessful: its PID 1 was killed. By SIGKILL, if the kernel shows how it ended (6.15).
    NoSuccess,
    /// RecoverTask fails with this text.
    Lost(&'static str),
    /// Its exit was reported before; it is removed.
    Removed,
}

/// Which process is killed at which step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) step: Step,
    pub(crate) victim: Victim,
    pub(crate) again: Again,
}

/// The hold and the expected result, or the reason why the cell is impossible.
pub(crate) type Process = Result<(Hold, Owed), &'static str>;

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} killed at: {}", self.victim.name(), self.step.name())?;
        match self.again {
            Again::NewId => Ok(()),
            Again::SameId => write!(f, " (same id again)"),
        }
    }
}

/// All possible cells, in the order of the table.
pub(crate) fn cells() -> Vec<Cell> {
    let mut all = Vec::new();
    for step in Step::ALL {
        for victim in Victim::ALL {
            let plain = Cell {
                step,
                victim,
                again: Again::NewId,
            };
            match plain.plan() {
                // A plugin that outlives its agent still has the first start's task.
                Ok((_, Owed::Undone(_))) if victim != Victim::Agent => all.extend([
                    plain,
                    Cell {
                        again: Again::SameId,
                        ..plain
                    },
                ]),
                Ok(_) => all.push(plain),
                Err(_) => {}
            }
        }
    }
    all
}

const NOT_STARTED: &str = "is not there yet";
const OVER: &str = "is gone already";
const ENDS_IT: &str = "takes the container with it, so no OOM kill comes later";
const SUPERVISOR: &str = "supervisor was killed";
const NSPAWN: &str = "systemd-nspawn was ended by SIGKILL";

impl Cell {
    /// Whether the cell also runs on the real systemd-nspawn, which can't be held.
    pub(crate) fn is_for_real(self) -> bool {
        let step = matches!(
            self.step,
            Step::Mounting
                | Step::NspawnSpawned
                | Step::Notified
                | Step::NetworkPrepared
                | Step::NetworkConnected
                | Step::Running
                | Step::Exec
                | Step::Signalled
                | Step::Stopping
                | Step::Exited
                | Step::EndRecorded
                | Step::OutOfMemoryLater
                | Step::OutOfMemory
                | Step::OutOfMemoryRecorded
                | Step::Destroying
                | Step::Recovering
        );
        step && self
            .plan()
            .is_ok_and(|(hold, _)| !matches!(hold, Hold::Nspawn(_)))
    }

    /// Where the task is held, and the expected result; or why the cell is impossible.
    pub(crate) fn plan(self) -> Process {
        let (hold, owed) = match self.step {
            Step::BeforeOrder => (
                Hold::Driver(Failpoint::BeforeOrder),
                [
                    Ok(Owed::Undone("")),
                    Err(NOT_STARTED),
                    Err(NOT_STARTED),
                    Err(NOT_STARTED),
                ],
            ),
            Step::OrderWritten => (
                // The supervisor is launched for this launch spec.
                Hold::Driver(match self.victim {
                    Victim::Supervisor => Failpoint::Supervising,
                    _ => Failpoint::OrderWritten,
                }),
                [
                    Ok(Owed::Undone("")),
                    Ok(Owed::Undone(SUPERVISOR)),
                    Err(NOT_STARTED),
                    Err(NOT_STARTED),
                ],
            ),
            Step::CgroupMade => (
                Hold::Driver(Failpoint::CgroupMade),
                [
                    Ok(Owed::Undone("")),
                    Ok(Owed::Undone(SUPERVISOR)),
                    Err(NOT_STARTED),
                    Err(NOT_STARTED),
                ],
            ),
            Step::Mounting | Step::NspawnSpawned => (
                Hold::Driver(match self.step {
                    Step::Mounting => Failpoint::Mounting,
                    _ => Failpoint::Entered,
                }),
                [
                    Ok(Owed::Undone("")),
                    Ok(Owed::Undone(SUPERVISOR)),
                    Ok(Owed::Undone(NSPAWN)),
                    Err(NOT_STARTED),
                ],
            ),
            Step::BeforeNotification => (
                Hold::Nspawn(Moment::BeforeNotify),
                [
                    Ok(Owed::Undone("")),
                    Ok(Owed::Undone(SUPERVISOR)),
                    Ok(Owed::Undone(NSPAWN)),
                    Ok(Owed::NoSuccess),
                ],
            ),
            Step::Notified | Step::NetworkPrepared | Step::NetworkConnected => (
                Hold::Driver(match self.step {
                    Step::NetworkPrepared => Failpoint::NetworkPrepared,
                    Step::NetworkConnected => Failpoint::NetworkConnected,
                    _ => Failpoint::Heard,
                }),
                [
                    Ok(Owed::Undone("")),
                    Ok(Owed::Undone(SUPERVISOR)),
                    Ok(Owed::Killed(NSPAWN)),
                    Ok(Owed::NoSuccess),
                ],
            ),
            Step::StartRecorded => (
                Hold::Driver(Failpoint::Recorded),
                [
                    Ok(Owed::Undone("")),
                    Ok(Owed::Undone(SUPERVISOR)),
                    Ok(Owed::Killed(NSPAWN)),
                    Ok(Owed::NoSuccess),
                ],
            ),
            Step::Running | Step::Exec => (Hold::Nobody, ALIVE),
            Step::Signalled | Step::Stopping => (Hold::Driver(Failpoint::Signalled), ALIVE),
            Step::OutOfMemoryLater => (
                Hold::Nobody,
                [Ok(Owed::Same), Err(ENDS_IT), Err(ENDS_IT), Err(ENDS_IT)],
            ),
            Step::Exited | Step::OutOfMemory => (
                match self.victim {
                    Victim::Nspawn => Hold::Nspawn(Moment::BeforeExit),
                    _ => Hold::Driver(Failpoint::Exited),
                },
                [
                    Ok(Owed::ItsOwnEnd),
                    Ok(Owed::Killed(SUPERVISOR)),
                    // Its own exit is reported before systemd-nspawn exits, where the kernel shows it.
                    match self.step == Step::Exited && kernel::version() >= (6, 15) {
                        true => Ok(Owed::ItsOwnEnd),
                        // Of a kill only until systemd-nspawn has waited for it.
                        false => Ok(Owed::ItsOwnEndOrKilled(NSPAWN)),
                    },
                    Err(OVER),
                ],
            ),
            Step::EndRecorded | Step::OutOfMemoryRecorded => {
                (Hold::Driver(Failpoint::EndRecorded), DEAD)
            }
            Step::EndTold => (Hold::Driver(Failpoint::EndTold), DEAD),
            Step::Destroying => (
                Hold::Driver(Failpoint::Killing),
                [
                    Ok(Owed::Killed("")),
                    Ok(Owed::Killed(SUPERVISOR)),
                    Ok(Owed::Killed("")),
                    Ok(Owed::Killed("")),
                ],
            ),
            Step::Removing => (
                Hold::Driver(Failpoint::Removing),
                [Ok(Owed::Removed), Err(OVER), Err(OVER), Err(OVER)],
            ),
            Step::Recovering => (
                Hold::Driver(Failpoint::Recovering),
                [
                    Ok(Owed::Same),
                    Ok(Owed::Lost("its supervisor is gone")),
                    Ok(Owed::Killed(NSPAWN)),
                    Ok(Owed::NoSuccess),
                ],
            ),
        };
        let owed = match self.victim {
            Victim::Plugin => owed[0],
            // After its agent's death a plugin behaves as after its own, except that a pending DestroyTask is completed.
            Victim::Agent if self.step == Step::Destroying => Ok(Owed::Lost("")),
            Victim::Agent => owed[0],
            Victim::Supervisor => owed[1],
            Victim::Nspawn => owed[2],
            Victim::Leader | Victim::Init => owed[3],
        };
        Ok((hold, owed?))
    }
}

const ALIVE: [Result<Owed, &str>; 4] = [
    Ok(Owed::Same),
    Ok(Owed::Killed(SUPERVISOR)),
    Ok(Owed::Killed(NSPAWN)),
    Ok(Owed::NoSuccess),
];
const DEAD: [Result<Owed, &str>; 4] = [
    Ok(Owed::ItsOwnEnd),
    Ok(Owed::ItsOwnEnd),
    Err(OVER),
    Err(OVER),
];
