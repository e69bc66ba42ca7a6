//! What becomes of a task, chosen by chance that can be had again.

/// Numbers that look like chance and can be had again (splitmix64).
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

/// What becomes of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It ends by itself, with this code.
    Ends(i32),
    /// The agent stops it, with so many milliseconds of grace.
    Stopped(u64),
    /// The agent destroys it while it runs.
    Destroyed,
    /// Somebody kills one of its processes while it runs.
    Struck(Role),
    /// Somebody kills one of its processes while it is started.
    StruckEarly(Role),
    /// Somebody kills the plugin while it runs.
    PluginDies,
    /// Somebody kills the plugin while it is started.
    PluginDiesEarly,
    /// Somebody kills the plugin and the task's supervisor.
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

    /// Whether nobody may be left who can tell its end.
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
