//! Which request is allowed when. Pure: no clock, no I/O, no lock; the desk asks here and does what it is told.
//!
//! ```text
//!              up                end                destroy
//! Starting ─────────▶ Running ─────────▶ Ended ───────────────▶ Removing ─────▶ Gone
//!    │                 │   ▲              ▲                      ▲  │  ▲         ▲
//!    │            stop │   │ last stop    │         try again or │  │  │         │
//!    │                 ▼   │ failed       │         destroy      │  │ failed     │ given up
//!    │                Stopping ───────────┘ end                  │  ▼  │         │
//!    │                 │                                       Leftover ─────────┘
//!    │                 └── destroy by force (from Running, too) ─────┘
//!    └── failed ──▶ Gone
//! ```
//!
//! Nothing leads back from an end to a running task, and nothing leads out of `Gone`.

/// Where a task stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Being started or found again.
    Starting,
    /// Up, and nobody asked it to end.
    Running,
    /// Up, and this many are waiting for its end.
    Stopping(u32),
    /// Its end is known; its remains are kept.
    Ended,
    /// Being cleared away.
    Removing,
    /// Clearing away failed; it will be tried again.
    Leftover,
    /// Nothing is left.
    Gone,
}

/// What somebody wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    Signal,
    Stop,
    Destroy { force: bool },
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fact {
    Up,
    StartFailed,
    End,
    StopFailed,
    Removed,
    RemoveFailed,
    RetryDue,
    GivenUp,
}

/// What to do with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Carry it out.
    Do,
    /// It is fulfilled already.
    Done,
    /// Ask again after the next fact.
    Later,
    /// No.
    Refuse(Refusal),
}

/// Why not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    Unknown,
    NotRunning,
    StillRunning,
}

impl State {
    /// Judges a request; a [`Verdict::Do`] has already changed the state.
    pub(super) fn request(&mut self, request: Request) -> Verdict {
        use Verdict::{Do, Done, Later, Refuse};
        match (*self, request) {
            (Self::Starting, _) => Later,

            (Self::Running | Self::Stopping(_), Request::Signal) => Do,
            (Self::Ended, Request::Signal) => Refuse(Refusal::NotRunning),
            (Self::Removing | Self::Leftover | Self::Gone, Request::Signal) => {
                Refuse(Refusal::Unknown)
            }

            (Self::Running, Request::Stop) => self.do_and_be(Self::Stopping(1)),
            (Self::Stopping(waiting), Request::Stop) => {
                self.do_and_be(Self::Stopping(waiting.saturating_add(1)))
            }
            (Self::Removing, Request::Stop) => Later,
            (Self::Ended | Self::Leftover | Self::Gone, Request::Stop) => Done,

            (Self::Running | Self::Stopping(_), Request::Destroy { force: false }) => {
                Refuse(Refusal::StillRunning)
            }
            (Self::Running | Self::Stopping(_), Request::Destroy { force: true }) => {
                self.do_and_be(Self::Removing)
            }
            (Self::Ended | Self::Leftover, Request::Destroy { .. }) => {
                self.do_and_be(Self::Removing)
            }
            (Self::Removing, Request::Destroy { .. }) => Later,
            (Self::Gone, Request::Destroy { .. }) => Done,
        }
    }

    /// Takes note of a fact. One that can't be, or that comes too late to matter, changes nothing.
    pub(super) fn learn(&mut self, fact: Fact) {
        *self = match (*self, fact) {
            (Self::Starting, Fact::Up) => Self::Running,
            (Self::Starting, Fact::StartFailed) => Self::Gone,
            (Self::Running | Self::Stopping(_), Fact::End) => Self::Ended,
            (Self::Stopping(0 | 1), Fact::StopFailed) => Self::Running,
            (Self::Stopping(waiting), Fact::StopFailed) => Self::Stopping(waiting - 1),
            (Self::Removing, Fact::Removed) => Self::Gone,
            (Self::Removing, Fact::RemoveFailed) => Self::Leftover,
            (Self::Leftover, Fact::RetryDue) => Self::Removing,
            (Self::Leftover, Fact::GivenUp) => Self::Gone,
            (same, _) => same,
        }
    }

    fn do_and_be(&mut self, next: Self) -> Verdict {
        *self = next;
        Verdict::Do
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone, Copy)]
    enum Step {
        Ask(Request),
        Tell(Fact),
    }

    fn step() -> impl Strategy<Value = Step> {
        use proptest::sample::select;
        prop_oneof![
            select(vec![
                Request::Signal,
                Request::Stop,
                Request::Destroy { force: false },
                Request::Destroy { force: true },
            ])
            .prop_map(Step::Ask),
            select(vec![
                Fact::Up,
                Fact::StartFailed,
                Fact::End,
                Fact::StopFailed,
                Fact::Removed,
                Fact::RemoveFailed,
                Fact::RetryDue,
                Fact::GivenUp,
            ])
            .prop_map(Step::Tell),
        ]
    }

    fn rank(state: State) -> u8 {
        match state {
            State::Starting => 0,
            State::Running | State::Stopping(_) => 1,
            State::Ended => 2,
            State::Removing | State::Leftover => 3,
            State::Gone => 4,
        }
    }

    proptest! {
        #[test]
        fn no_order_of_events_breaks_the_rules(steps in proptest::collection::vec(step(), 0..60)) {
            let mut state = State::Starting;
            for step in steps {
                let before = state;
                match step {
                    Step::Ask(request) => {
                        let verdict = state.request(request);
                        prop_assert!(verdict == Verdict::Do || state == before, "only a deed changes the state");
                        let alive = matches!(before, State::Running | State::Stopping(_));
                        if verdict == Verdict::Do {
                            match request {
                                Request::Signal | Request::Stop => prop_assert!(alive),
                                Request::Destroy { force } => {
                                    prop_assert!(!alive || force, "only force ends a running task");
                                    prop_assert_eq!(state, State::Removing, "one removal at a time");
                                    prop_assert_ne!(before, State::Removing);
                                }
                            }
                        }
                        if before == State::Starting {
                            prop_assert_eq!(verdict, Verdict::Later);
                        }
                        if verdict == Verdict::Later {
                            prop_assert!(matches!(before, State::Starting | State::Removing), "nobody waits for nothing");
                        }
                        if matches!(request, Request::Stop) {
                            prop_assert!(!matches!(verdict, Verdict::Refuse(_)), "a stop is never refused");
                        }
                    }
                    Step::Tell(fact) => state.learn(fact),
                }
                prop_assert!(rank(state) >= rank(before), "{:?} led back to {:?}", before, state);
                if before == State::Gone {
                    prop_assert_eq!(state, State::Gone);
                }
                if let State::Stopping(waiting) = state {
                    prop_assert!(waiting > 0);
                }
            }
        }
    }

    #[test]
    fn the_usual_life() {
        let mut state = State::Starting;
        state.learn(Fact::Up);
        assert_eq!(
            state.request(Request::Destroy { force: false }),
            Verdict::Refuse(Refusal::StillRunning)
        );
        assert_eq!(state.request(Request::Stop), Verdict::Do);
        assert_eq!(state.request(Request::Stop), Verdict::Do);
        state.learn(Fact::StopFailed);
        assert_eq!(state, State::Stopping(1));
        state.learn(Fact::End);
        assert_eq!(state.request(Request::Stop), Verdict::Done);
        assert_eq!(
            state.request(Request::Signal),
            Verdict::Refuse(Refusal::NotRunning)
        );
        assert_eq!(
            state.request(Request::Destroy { force: false }),
            Verdict::Do
        );
        state.learn(Fact::Removed);
        assert_eq!(state, State::Gone);
        assert_eq!(
            state.request(Request::Destroy { force: true }),
            Verdict::Done
        );
    }
}
