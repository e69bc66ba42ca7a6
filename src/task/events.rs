//! The event bus: messages for the users of tasks, sent to every subscriber. Refuses to wait for anybody: a slow listener loses
//! events, a task is never held up.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use tokio::sync::mpsc;

use super::TaskInfo;

/// Events kept for the first listener while there is none.
const BACKLOG_EVENTS: usize = 64;
/// Events kept for one slow listener.
const SUBSCRIBER_BUFFER: usize = 256;

/// A sentence about a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskEvent {
    /// Which task.
    pub task: TaskInfo,
    /// When it was said.
    pub at: SystemTime,
    /// The sentence.
    pub message: String,
}

/// The place where events are told. Clones are the same place.
#[derive(Debug, Clone, Default)]
pub struct EventBus {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    backlog: VecDeque<TaskEvent>,
    subscribers: Vec<mpsc::Sender<TaskEvent>>,
}

impl EventBus {
    /// Tells every listener, or keeps the event for the next one if there is none.
    pub fn publish(&self, task: &TaskInfo, message: impl Into<String>) {
        let event = TaskEvent {
            task: task.clone(),
            at: SystemTime::now(),
            message: message.into(),
        };
        let mut inner = self.inner();
        inner
            .subscribers
            .retain(|subscriber| !subscriber.is_closed());
        if inner.subscribers.is_empty() {
            if inner.backlog.len() == BACKLOG_EVENTS {
                inner.backlog.pop_front();
            }
            inner.backlog.push_back(event);
            return;
        }
        for subscriber in &inner.subscribers {
            if subscriber.try_send(event.clone()).is_err() {
                tracing::warn!(
                    task = event.task.id,
                    "a listener is too slow for the task's event"
                );
            }
        }
    }

    /// A new listener; it first hears what nobody heard yet.
    pub fn subscribe(&self) -> mpsc::Receiver<TaskEvent> {
        let (subscriber, events) = mpsc::channel(SUBSCRIBER_BUFFER);
        let mut inner = self.inner();
        for event in inner.backlog.drain(..) {
            // There is room: the backlog is shorter than the channel.
            let _ = subscriber.try_send(event);
        }
        inner.subscribers.push(subscriber);
        events
    }

    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        // Every change of the board is a single step; a panic of another holder left it whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task() -> TaskInfo {
        TaskInfo {
            id: "a/t/1".to_owned(),
            name: "t".to_owned(),
            alloc_id: "a".to_owned(),
        }
    }

    fn received(events: &mut mpsc::Receiver<TaskEvent>) -> Vec<String> {
        std::iter::from_fn(|| events.try_recv().ok())
            .map(|event| event.message)
            .collect()
    }

    #[test]
    fn everyone_receives_and_the_first_receives_what_was_said_before() {
        let events = EventBus::default();
        events.publish(&task(), "early");
        let mut first = events.subscribe();
        let mut second = events.subscribe();
        events.publish(&task(), "late");
        assert_eq!(received(&mut first), ["early", "late"]);
        assert_eq!(received(&mut second), ["late"]);
    }

    #[test]
    fn with_all_listeners_gone_events_are_kept_again() {
        let events = EventBus::default();
        drop(events.subscribe());
        events.publish(&task(), "kept");
        assert_eq!(received(&mut events.subscribe()), ["kept"]);
    }

    #[test]
    fn neither_the_backlog_nor_a_slow_listener_grows() {
        let events = EventBus::default();
        for number in 0..BACKLOG_EVENTS * 2 {
            events.publish(&task(), number.to_string());
        }
        let mut slow = events.subscribe();
        for number in 0..SUBSCRIBER_BUFFER * 2 {
            events.publish(&task(), number.to_string());
        }
        let received = received(&mut slow);
        assert_eq!(received.len(), SUBSCRIBER_BUFFER);
        assert_eq!(
            received[0],
            BACKLOG_EVENTS.to_string(),
            "the oldest were dropped"
        );
    }
}
