//! The state machine of a task: which request is allowed in which state. Pure: no clock, no I/O, no lock. Used by the task's actor.
//!
//! ```text
//!              up                end                destroy
//! Starting ─────────▶ Running ─────────▶ Ended ───────────────▶ Removing ─────▶ Removed
//!    │                 │   ▲              ▲                      ▲  │  ▲         ▲
//!    │            stop │   │ last stop    │         try again or │  │  │         │
//!    │                 ▼   │ failed       │         destroy      │  │ failed     │ given up
//!    │                Stopping ───────────┘ end                  │  ▼  │         │
//!    │                 │                                       RemoveFailed ─────┘
//!    │                 └── destroy by force (from Running, too) ─────┘
//!    └── failed ──▶ Removed
//! ```
//!
//! No transition leads from `Ended` back to a running state, and none leads out of `Removed`.

/// The state of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Being started or recovered.
    Starting,
    /// Up, with no stop requested.
    Running,
    /// Up, with this many stop requests pending.
    Stopping(u32),
    /// Its exit is known; it has not been destroyed yet.
    Ended,
    /// Being removed.
    Removing,
    /// Removal failed and will be retried.
    RemoveFailed,
    /// Nothing is left.
    Removed,
}

/// A request about a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    Signal,
    Exec,
    Stop,
    Destroy { force: bool },
}

/// What happened to the task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
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
pub(super) enum Decision {
    /// Execute it.
    Do,
    /// Nothing to do; it is already satisfied.
    Done,
    /// Ask again after the next event.
    Later,
    /// Refuse it.
    Reject(Rejection),
}

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rejection {
    Unknown,
    NotRunning,
    StillRunning,
}

impl State {
    /// Decides on a request; a [`Decision::Do`] has already changed the state.
    pub(super) fn request(&mut self, request: Request) -> Decision {
        use Decision::{Do, Done, Later, Reject};
        match (*self, request) {
            (Self::Running, Request::Exec) => Do,
            // Not while it is being stopped: what a session leaves in a container delays its end.
            (Self::Starting | Self::Stopping(_) | Self::Ended, Request::Exec) => {
                Reject(Rejection::NotRunning)
            }
            (Self::Removing | Self::RemoveFailed | Self::Removed, Request::Exec) => {
                Reject(Rejection::Unknown)
            }

            (Self::Starting, _) => Later,

            (Self::Running | Self::Stopping(_), Request::Signal) => Do,
            (Self::Ended, Request::Signal) => Reject(Rejection::NotRunning),
            (Self::Removing | Self::RemoveFailed | Self::Removed, Request::Signal) => {
                Reject(Rejection::Unknown)
            }

            (Self::Running, Request::Stop) => self.transition(Self::Stopping(1)),
            (Self::Stopping(waiting), Request::Stop) => {
                self.transition(Self::Stopping(waiting.saturating_add(1)))
            }
            (Self::Removing, Request::Stop) => Later,
            (Self::Ended | Self::RemoveFailed | Self::Removed, Request::Stop) => Done,

            (Self::Running | Self::Stopping(_), Request::Destroy { force: false }) => {
                Reject(Rejection::StillRunning)
            }
            (Self::Running | Self::Stopping(_), Request::Destroy { force: true }) => {
                self.transition(Self::Removing)
            }
            (Self::Ended | Self::RemoveFailed, Request::Destroy { .. }) => {
                self.transition(Self::Removing)
            }
            (Self::Removing, Request::Destroy { .. }) => Later,
            (Self::Removed, Request::Destroy { .. }) => Done,
        }
    }

    /// Applies an event. An event that is impossible in this state, or too late to matter, changes nothing.
    pub(super) fn apply(&mut self, event: Event) {
        *self = match (*self, event) {
            (Self::Starting, Event::Up) => Self::Running,
            (Self::Starting, Event::StartFailed) => Self::Removed,
            (Self::Running | Self::Stopping(_), Event::End) => Self::Ended,
            (Self::Stopping(0 | 1), Event::StopFailed) => Self::Running,
            (Self::Stopping(waiting), Event::StopFailed) => Self::Stopping(waiting - 1),
            (Self::Removing, Event::Removed) => Self::Removed,
            (Self::Removing, Event::RemoveFailed) => Self::RemoveFailed,
            (Self::RemoveFailed, Event::RetryDue) => Self::Removing,
            (Self::RemoveFailed, Event::GivenUp) => Self::Removed,
            (same, _) => same,
        }
    }

    fn transition(&mut self, next: Self) -> Decision {
        *self = next;
        Decision::Do
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone, Copy)]
    enum Step {
        Ask(Request),
        Tell(Event),
    }

    fn step() -> impl Strategy<Value = Step> {
        use proptest::sample::select;
        prop_oneof![
            select(vec![
                Request::Signal,
                Request::Exec,
                Request::Stop,
                Request::Destroy { force: false },
                Request::Destroy { force: true },
            ])
            .prop_map(Step::Ask),
            select(vec![
                Event::Up,
                Event::StartFailed,
                Event::End,
                Event::StopFailed,
                Event::Removed,
                Event::RemoveFailed,
                Event::RetryDue,
                Event::GivenUp,
            ])
            .prop_map(Step::Tell),
        ]
    }

    fn rank(state: State) -> u8 {
        match state {
            State::Starting => 0,
            State::Running | State::Stopping(_) => 1,
            State::Ended => 2,
            State::Removing | State::RemoveFailed => 3,
            State::Removed => 4,
        }
    }

    proptest! {
        #[test]
        fn no_sequence_of_events_breaks_the_rules(steps in proptest::collection::vec(step(), 0..60)) {
            let mut state = State::Starting;
            for step in steps {
                let before = state;
                match step {
                    Step::Ask(request) => {
                        let verdict = state.request(request);
                        prop_assert!(verdict == Decision::Do || state == before, "only a permitted request changes the state");
                        let alive = matches!(before, State::Running | State::Stopping(_));
                        if verdict == Decision::Do {
                            match request {
                                Request::Signal | Request::Stop => prop_assert!(alive),
                                Request::Exec => prop_assert_eq!(before, State::Running),
                                Request::Destroy { force } => {
                                    prop_assert!(!alive || force, "only force ends a running task");
                                    prop_assert_eq!(state, State::Removing, "one removal at a time");
                                    prop_assert_ne!(before, State::Removing);
                                }
                            }
                        }
                        if matches!(request, Request::Exec) {
                            prop_assert_eq!(state, before, "a session does not change the state");
                            prop_assert!(matches!(verdict, Decision::Do | Decision::Reject(_)), "a session does not wait");
                        } else if before == State::Starting {
                            prop_assert_eq!(verdict, Decision::Later);
                        }
                        if verdict == Decision::Later {
                            prop_assert!(matches!(before, State::Starting | State::Removing), "a request is deferred only while the task is starting or being removed");
                        }
                        if matches!(request, Request::Stop) {
                            prop_assert!(!matches!(verdict, Decision::Reject(_)), "a stop is never refused");
                        }
                    }
                    Step::Tell(event) => state.apply(event),
                }
                prop_assert!(rank(state) >= rank(before), "{:?} led back to {:?}", before, state);
                if before == State::Removed {
                    prop_assert_eq!(state, State::Removed);
                }
                if let State::Stopping(waiting) = state {
                    prop_assert!(waiting > 0);
                }
            }
        }
    }

    #[test]
    fn the_usual_lifecycle() {
        let mut state = State::Starting;
        state.apply(Event::Up);
        assert_eq!(
            state.request(Request::Destroy { force: false }),
            Decision::Reject(Rejection::StillRunning)
        );
        assert_eq!(state.request(Request::Stop), Decision::Do);
        assert_eq!(state.request(Request::Stop), Decision::Do);
        state.apply(Event::StopFailed);
        assert_eq!(state, State::Stopping(1));
        state.apply(Event::End);
        assert_eq!(state.request(Request::Stop), Decision::Done);
        assert_eq!(
            state.request(Request::Signal),
            Decision::Reject(Rejection::NotRunning)
        );
        assert_eq!(
            state.request(Request::Destroy { force: false }),
            Decision::Do
        );
        state.apply(Event::Removed);
        assert_eq!(state, State::Removed);
        assert_eq!(
            state.request(Request::Destroy { force: true }),
            Decision::Done
        );
    }
}
