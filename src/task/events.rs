//! The event bus: messages for the users of tasks, sent to every subscriber. Never waits: a slow subscriber loses events, a task
//! is never delayed.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use tokio::sync::mpsc;

use super::TaskInfo;

/// Events kept for the first subscriber while there is none.
const BACKLOG_EVENTS: usize = 64;
/// Events buffered for one slow subscriber.
const SUBSCRIBER_BUFFER: usize = 256;

/// A message about a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskEvent {
    /// The task.
    pub task: TaskInfo,
    /// When it was published.
    pub at: SystemTime,
    /// The text.
    pub message: String,
}

/// The event bus. Clones share the same subscribers.
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
    /// Sends an event to every subscriber, or keeps it for the next one if there is none.
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
                    "a task event is dropped: the agent does not read events fast enough"
                );
            }
        }
    }

    /// Adds a subscriber. It first receives the events that have reached no subscriber yet.
    pub fn subscribe(&self) -> mpsc::Receiver<TaskEvent> {
        let (subscriber, events) = mpsc::channel(SUBSCRIBER_BUFFER);
        let mut inner = self.inner();
        for event in inner.backlog.drain(..) {
            // This can't fail: the backlog is shorter than the channel.
            let _ = subscriber.try_send(event);
        }
        inner.subscribers.push(subscriber);
        events
    }

    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        // Every change is a single step, so a panic while the lock was held leaves it consistent.
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
            description: None,
        }
    }

    fn received(events: &mut mpsc::Receiver<TaskEvent>) -> Vec<String> {
        std::iter::from_fn(|| events.try_recv().ok())
            .map(|event| event.message)
            .collect()
    }

    #[test]
    fn every_subscriber_receives_and_the_first_gets_the_backlog() {
        let events = EventBus::default();
        events.publish(&task(), "early");
        let mut first = events.subscribe();
        let mut second = events.subscribe();
        events.publish(&task(), "late");
        assert_eq!(received(&mut first), ["early", "late"]);
        assert_eq!(received(&mut second), ["late"]);
    }

    #[test]
    fn without_subscribers_events_are_kept_again() {
        let events = EventBus::default();
        drop(events.subscribe());
        events.publish(&task(), "kept");
        assert_eq!(received(&mut events.subscribe()), ["kept"]);
    }

    #[test]
    fn neither_the_backlog_nor_a_slow_subscriber_grows() {
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
