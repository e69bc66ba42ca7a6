//! The cells: what can be killed when, and what is owed then. Data only.

use std::fmt;

use nomad_driver_nspawn::supervisor::failpoint::Failpoint;

use super::Moment;

/// Whom a cell kills.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Victim {
    Plugin,
    Supervisor,
    Nspawn,
    /// The command itself, which is the container's first process.
    Leader,
    /// The driver's own program, as the first process of a container whose command is the second.
    Init,
    /// Nomad's agent: its connection is gone, the plugin lives.
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

/// When.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    BeforeOrder,
    OrderWritten,
    CgroupMade,
    NspawnSpawned,
    BeforeNotification,
    Notified,
    StartRecorded,
    Running,
    Signalled,
    Stopping,
    Exited,
    EndRecorded,
    EndTold,
    Destroying,
    Removing,
    Recovering,
}

impl Step {
    pub(crate) const ALL: [Self; 16] = [
        Self::BeforeOrder,
        Self::OrderWritten,
        Self::CgroupMade,
        Self::NspawnSpawned,
        Self::BeforeNotification,
        Self::Notified,
        Self::StartRecorded,
        Self::Running,
        Self::Signalled,
        Self::Stopping,
        Self::Exited,
        Self::EndRecorded,
        Self::EndTold,
        Self::Destroying,
        Self::Removing,
        Self::Recovering,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::BeforeOrder => "before the order is written",
            Self::OrderWritten => "order written",
            Self::CgroupMade => "cgroup made",
            Self::NspawnSpawned => "nspawn spawned",
            Self::BeforeNotification => "before the notification",
            Self::Notified => "notified, not recorded",
            Self::StartRecorded => "start recorded, not told",
            Self::Running => "running",
            Self::Signalled => "signalled",
            Self::Stopping => "stopping",
            Self::Exited => "exited, not waited for",
            Self::EndRecorded => "end recorded, not told",
            Self::EndTold => "end told, nothing freed",
            Self::Destroying => "destroying, still alive",
            Self::Removing => "destroying, already dead",
            Self::Recovering => "recovering",
        }
    }

    /// Whether StartTask has not answered yet, so that Nomad has no handle.
    pub(crate) fn is_start(self) -> bool {
        matches!(
            self,
            Self::BeforeOrder
                | Self::OrderWritten
                | Self::CgroupMade
                | Self::NspawnSpawned
                | Self::BeforeNotification
                | Self::Notified
                | Self::StartRecorded
        )
    }
}

/// Where somebody is held so that a step stands still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hold {
    Driver(Failpoint),
    Nspawn(Moment),
    /// Nobody: the step lasts.
    Nobody,
}

/// What Nomad asks for after a start that gave no handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Again {
    /// What it does.
    NewId,
    /// What no promise forbids it.
    SameId,
}

/// What is owed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owed {
    /// The start fails with these words in its reason, or was cut off; nothing of it stays.
    Undone(&'static str),
    /// It is the same container, and watched: its end is told later.
    Same,
    /// It has ended by itself, and its own code is told.
    ItsOwnEnd,
    /// It is told dead, by SIGKILL, with these words for a reason; none if the driver was asked to kill it.
    Killed(&'static str),
    /// It is told dead, with no success: its first process was killed. By SIGKILL, where the kernel tells how it ended (6.15).
    NoSuccess,
    /// RecoverTask refuses it with these words.
    Lost(&'static str),
    /// It was told dead before; it is removed.
    Removed,
}

/// Who is killed at which step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) step: Step,
    pub(crate) victim: Victim,
    pub(crate) again: Again,
}

/// A process of a cell or the reason why there is none.
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

/// All cells that can be, in the order of the table.
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
                // The plugin that lives through its agent's death still has the first start on its desk.
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
const SUPERVISOR: &str = "supervisor was killed";
const NSPAWN: &str = "systemd-nspawn was ended by SIGKILL";

impl Cell {
    /// Whether it is one of those that are played on the real systemd-nspawn too, which nobody can hold.
    pub(crate) fn is_for_real(self) -> bool {
        let step = matches!(
            self.step,
            Step::NspawnSpawned
                | Step::Notified
                | Step::Running
                | Step::Signalled
                | Step::Stopping
                | Step::Exited
                | Step::EndRecorded
                | Step::Destroying
                | Step::Recovering
        );
        step && self
            .plan()
            .is_ok_and(|(hold, _)| !matches!(hold, Hold::Nspawn(_)))
    }

    /// Where it is held, and what is owed; or why there is no such cell.
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
                // The supervisor is launched for the order.
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
            Step::NspawnSpawned => (
                Hold::Driver(Failpoint::Entered),
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
            Step::Notified => (
                Hold::Driver(Failpoint::Heard),
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
            Step::Running => (Hold::Nobody, ALIVE),
            Step::Signalled | Step::Stopping => (Hold::Driver(Failpoint::Signalled), ALIVE),
            Step::Exited => (
                match self.victim {
                    Victim::Nspawn => Hold::Nspawn(Moment::BeforeExit),
                    _ => Hold::Driver(Failpoint::Exited),
                },
                [
                    Ok(Owed::ItsOwnEnd),
                    Ok(Owed::Killed(SUPERVISOR)),
                    Ok(Owed::Killed(NSPAWN)),
                    Err(OVER),
                ],
            ),
            Step::EndRecorded => (Hold::Driver(Failpoint::EndRecorded), DEAD),
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
            // What a plugin owes after its own death it owes after its agent's; what was being destroyed goes on to be destroyed.
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
