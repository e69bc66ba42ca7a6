//! What happens to a task, chosen by a reproducible random sequence: it is done by `strike`, and its exit is checked by `judge`.

use super::*;

/// Reproducible pseudo-random numbers (splitmix64).
#[derive(Debug)]
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % sides
    }

    pub(super) fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        let count = u64::try_from(choices.len()).unwrap();
        choices[usize::try_from(self.roll(count)).unwrap()]
    }
}

/// What happens to a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It exits by itself with this code.
    Ends(i32),
    /// The agent stops it, with this grace period in milliseconds.
    Stopped(u64),
    /// The agent destroys it while it runs.
    Destroyed,
    /// One of its processes is killed while it runs.
    Struck(Role),
    /// One of its processes is killed during the start.
    StruckEarly(Role),
    /// The plugin is killed while the task runs.
    PluginDies,
    /// The plugin is killed during the start.
    PluginDiesEarly,
    /// The plugin and the task's supervisor are killed.
    BothDie,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Supervisor,
    Nspawn,
    Leader,
    Payload,
}

impl Fate {
    pub(super) fn choose(dice: &mut Dice, plugin_may_die: bool) -> Self {
        let early = [Role::Supervisor, Role::Nspawn, Role::Leader];
        match dice.roll(100) {
            0..25 => Self::Ends(dice.one_of(&[0, 1, 7, 42, 255])),
            25..40 => Self::Stopped(dice.one_of(&[0, 50, 20_000])),
            40..48 => Self::Destroyed,
            48..72 => Self::Struck(dice.one_of(&[
                Role::Supervisor,
                Role::Nspawn,
                Role::Leader,
                Role::Payload,
            ])),
            72..92 => Self::StruckEarly(dice.one_of(&early)),
            _ if !plugin_may_die => Self::Ends(3),
            92..96 => Self::PluginDies,
            96..98 => Self::PluginDiesEarly,
            _ => Self::BothDie,
        }
    }

    /// Whether its exit may be unknown, because every process that could report it was killed.
    pub(super) fn may_be_lost(self) -> bool {
        matches!(
            self,
            Self::BothDie | Self::Struck(Role::Supervisor) | Self::StruckEarly(Role::Supervisor)
        )
    }

    pub(super) fn script(self) -> String {
        match self {
            Self::Ends(code) => format!("echo up; exit {code}"),
            Self::Stopped(20_000) => {
                "trap 'exit 9' TERM 38; echo up; while :; do sleep 0.02; done".to_owned()
            }
            _ => "trap '' TERM INT; echo up; while :; do sleep 0.05; done".to_owned(),
        }
    }
}

/// Kills one of a task's processes, if it exists.
pub(super) fn strike(stage: &Stage, id: &str, role: Role, two: bool) {
    let state_dir = stage.join("state");
    let task_dir = TaskDir::for_task(&state_dir, id);
    let found = supervisors(&state_dir)
        .into_iter()
        .find(|supervisor| supervisor.directory == task_dir.path());
    let Some(supervisor) = found.map(|found| found.handle) else {
        return;
    };
    let nspawn = || first_child(supervisor.process().pid);
    let leader = || first_child(nspawn()?);
    let target = match role {
        Role::Supervisor => Some(supervisor.process().pid),
        Role::Nspawn => nspawn(),
        Role::Leader => leader(),
        // The command is the leader itself, except with `process_two`.
        Role::Payload if two => leader().and_then(first_child),
        Role::Payload => leader(),
    };
    if let Some(held) = target.and_then(|pid| ProcessHandle::open(pid).ok()) {
        held.signal(Signal::KILL).unwrap();
    }
}

/// Checks that this exit is correct for this fate.
pub(super) fn judge(fate: Fate, exit: &TaskExit, config: &Value) {
    let fine = match fate {
        Fate::Ends(code) => exit.code == code && exit.error.is_none(),
        Fate::Stopped(20_000) => exit.code == 9 || exit.code == 137,
        Fate::Struck(Role::Supervisor | Role::Nspawn) => exit.code != 0 && exit.error.is_some(),
        _ => exit.code != 0,
    };
    assert!(fine, "{fate:?}: {exit:?} of {config}");
}
