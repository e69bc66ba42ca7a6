//! Whether what has become of a task is the expected result of its cell.

use super::*;

impl<W: World> Game<'_, W> {
    /// WaitTask for a failed start returns an error and no exit, because there was no task. Only a task that lost its agent may still be on
    /// its way out, killed by force.
    pub(super) async fn is_undone(&self) {
        match within("WaitTask", self.line.wait(&self.id())).await {
            Err(_) => {}
            Ok(exit) => assert!(
                self.cell.victim == Victim::Agent && (exit.code, exit.signal) == (137, 9),
                "nothing is known of it: {exit:?}"
            ),
        }
    }

    /// It is the container that was started, and it runs with the same limits.
    pub(super) async fn is_the_same(&self) {
        let leader = self.leader();
        assert!(
            is_alive(leader) && is_running(leader.pid),
            "the container is gone"
        );
        let answer = self.inspect().await;
        assert_eq!(answer.task.unwrap().state(), TaskState::Running);
        assert_eq!(
            answer.driver.unwrap().attributes["pid"],
            leader.pid.to_string()
        );
        assert!(supervisor_below(&self.world.state()).is_some(), "unwatched");
        let (before, now) = (self.limits.as_ref(), self.started.as_ref().map(limits_of));
        let (before, now) = before.zip(now.as_ref()).unwrap();
        let known = before.has(&["memory.limit_in_bytes", "memory.max"]);
        assert!(known || !limits_memory(), "{before:?}");
        let changed = before.differences(now);
        assert!(changed.is_empty(), "other limits:\n{changed}");
    }

    /// It is the exit of the task itself.
    pub(super) fn is_its_own(&self, exit: &TaskExit) {
        match self.cell.step.is_out_of_memory() {
            true => out_of_memory(exit),
            false => own_end(exit),
        }
    }

    pub(super) fn check(&self, exit: &TaskExit) {
        match self.owed {
            Owed::ItsOwnEnd => self.is_its_own(exit),
            Owed::ItsOwnEndOrKilled(_) if exit.error.is_none() => self.is_its_own(exit),
            Owed::Killed("") => {
                assert_eq!(
                    (exit.code, exit.signal, &exit.error),
                    (137, 9, &None),
                    "{exit:?}"
                );
            }
            Owed::Killed(words) | Owed::ItsOwnEndOrKilled(words) => {
                assert_eq!((exit.code, exit.signal), (137, 9), "{exit:?}");
                assert!(
                    exit.error.as_ref().is_some_and(|text| text.contains(words)),
                    "{exit:?}"
                );
            }
            Owed::NoSuccess if kernel::version() >= (6, 15) => {
                assert_eq!((exit.code, exit.signal), (137, 9), "{exit:?}");
            }
            Owed::NoSuccess => assert_ne!(exit.code, 0, "{exit:?}"),
            other => panic!("{other:?} has no end"),
        }
    }
}
