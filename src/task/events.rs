//! What the users of tasks should know, told to every listener. Refuses to wait for anybody: a slow listener loses events, a
//! task is never held up.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use tokio::sync::mpsc;

use super::Identity;

/// Events kept for the first listener while there is none.
const BACKLOG: usize = 64;
/// Events kept for one slow listener.
const PATIENCE: usize = 256;

/// A sentence about a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskEvent {
    /// Which task.
    pub task: Identity,
    /// When it was said.
    pub at: SystemTime,
    /// The sentence.
    pub message: String,
}

/// The place where events are told. Clones are the same place.
#[derive(Debug, Clone, Default)]
pub struct Events {
    board: Arc<Mutex<Board>>,
}

#[derive(Debug, Default)]
struct Board {
    backlog: VecDeque<TaskEvent>,
    listeners: Vec<mpsc::Sender<TaskEvent>>,
}

impl Events {
    /// Tells every listener, or keeps the event for the next one if there is none.
    pub fn tell(&self, task: &Identity, message: impl Into<String>) {
        let event = TaskEvent {
            task: task.clone(),
            at: SystemTime::now(),
            message: message.into(),
        };
        let mut board = self.board();
        board.listeners.retain(|listener| !listener.is_closed());
        if board.listeners.is_empty() {
            if board.backlog.len() == BACKLOG {
                board.backlog.pop_front();
            }
            board.backlog.push_back(event);
            return;
        }
        for listener in &board.listeners {
            if listener.try_send(event.clone()).is_err() {
                tracing::warn!(
                    task = event.task.id,
                    "a listener is too slow for the task's event"
                );
            }
        }
    }

    /// A new listener; it first hears what nobody heard yet.
    pub fn listen(&self) -> mpsc::Receiver<TaskEvent> {
        let (listener, events) = mpsc::channel(PATIENCE);
        let mut board = self.board();
        for event in board.backlog.drain(..) {
            // There is room: the backlog is shorter than the channel.
            let _ = listener.try_send(event);
        }
        board.listeners.push(listener);
        events
    }

    fn board(&self) -> std::sync::MutexGuard<'_, Board> {
        // Every change of the board is a single step; a panic of another holder left it whole.
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task() -> Identity {
        Identity {
            id: "a/t/1".to_owned(),
            name: "t".to_owned(),
            alloc_id: "a".to_owned(),
        }
    }

    fn heard(events: &mut mpsc::Receiver<TaskEvent>) -> Vec<String> {
        std::iter::from_fn(|| events.try_recv().ok())
            .map(|event| event.message)
            .collect()
    }

    #[test]
    fn everybody_hears_and_the_first_hears_what_was_said_before() {
        let events = Events::default();
        events.tell(&task(), "early");
        let mut first = events.listen();
        let mut second = events.listen();
        events.tell(&task(), "late");
        assert_eq!(heard(&mut first), ["early", "late"]);
        assert_eq!(heard(&mut second), ["late"]);
    }

    #[test]
    fn with_all_listeners_gone_events_are_kept_again() {
        let events = Events::default();
        drop(events.listen());
        events.tell(&task(), "kept");
        assert_eq!(heard(&mut events.listen()), ["kept"]);
    }

    #[test]
    fn neither_the_backlog_nor_a_slow_listener_grows() {
        let events = Events::default();
        for number in 0..BACKLOG * 2 {
            events.tell(&task(), number.to_string());
        }
        let mut slow = events.listen();
        for number in 0..PATIENCE * 2 {
            events.tell(&task(), number.to_string());
        }
        let heard = heard(&mut slow);
        assert_eq!(heard.len(), PATIENCE);
        assert_eq!(heard[0], BACKLOG.to_string(), "the oldest were dropped");
    }
}
