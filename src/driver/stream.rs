//! The streaming calls: Fingerprint, TaskEvents, TaskStats. Each has one producer that lives exactly as long as its stream. If a
//! stream ends at once, Nomad reopens it without a delay, so only statistics streams end by themselves.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;

use super::fingerprint::Fingerprint;
use super::sampler::{Sample, Subscription};
use super::{Driver, convert};
use crate::proto::driver as proto;
use crate::task::Task;

/// How often the host is probed.
const PROBE_INTERVAL: Duration = Duration::from_secs(5);
/// How long a probe may take before the node is reported as undetected.
const PROBE_TIMEOUT: Duration = Duration::from_secs(20);
/// How often an unchanged fingerprint is sent again.
const REPEAT_INTERVAL: Duration = Duration::from_secs(30);
/// The statistics interval if Nomad gives none.
const STATS_INTERVAL: Duration = Duration::from_secs(1);
/// The shortest statistics interval.
const MIN_STATS_INTERVAL: Duration = Duration::from_millis(100);

/// A stream and its producer task, which is aborted when the stream is dropped.
#[derive(Debug)]
pub struct ProducerStream<T> {
    /// Boxed: a channel allocates space for dozens of entries up front, and every task has one open for its statistics.
    answers: ReceiverStream<Box<Result<T, Status>>>,
    _producer: AbortOnDropHandle<()>,
}

impl<T: Send + 'static> ProducerStream<T> {
    pub(super) fn new<F: Future<Output = ()> + Send + 'static>(
        produce: impl FnOnce(mpsc::Sender<Box<Result<T, Status>>>) -> F,
    ) -> Self {
        let (sender, receiver) = mpsc::channel(4);
        Self {
            answers: ReceiverStream::new(receiver),
            _producer: AbortOnDropHandle::new(tokio::spawn(produce(sender))),
        }
    }
}

impl<T> Stream for ProducerStream<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let answer = Pin::new(&mut self.answers).poll_next(context);
        answer.map(|answer| answer.map(|boxed| *boxed))
    }
}

impl Driver {
    pub(super) fn fingerprint_stream(&self) -> ProducerStream<proto::FingerprintResponse> {
        let driver = self.clone();
        ProducerStream::new(|listener| async move {
            let mut config = driver.config.subscribe();
            let mut published = BTreeSet::new();
            let mut last: Option<(Fingerprint, Instant)> = None;
            loop {
                config.mark_unchanged();
                let print = driver.probe().await;
                let due = last
                    .as_ref()
                    .is_none_or(|(before, at)| *before != print || at.elapsed() >= REPEAT_INTERVAL);
                if due {
                    if listener
                        .send(Box::new(Ok(print.response(&mut published))))
                        .await
                        .is_err()
                    {
                        return;
                    }
                    last = Some((print, Instant::now()));
                }
                tokio::select! {
                    () = sleep(PROBE_INTERVAL) => {}
                    _ = config.changed() => {}
                }
            }
        })
    }

    /// Probes the host once. A probe that panics or hangs is reported as the state of the host and does not end the stream.
    async fn probe(&self) -> Fingerprint {
        let config = match self.config() {
            Ok(config) => config,
            Err(error) => return Fingerprint::undetected(&error.to_string()),
        };
        let backend = config.backend;
        let probe = AbortOnDropHandle::new(tokio::spawn(async move { backend.probe().await }));
        match timeout(PROBE_TIMEOUT, probe).await {
            Ok(Ok(probe)) => Fingerprint::of(&config.plugin_config, &probe),
            Ok(Err(_)) => Fingerprint::undetected(
                "probing the host failed: internal error, see the agent's log",
            ),
            Err(_) => Fingerprint::undetected(&format!(
                "probing the host did not finish within {} s: look for file systems that hang, and at the load of the host",
                PROBE_TIMEOUT.as_secs()
            )),
        }
    }

    pub(super) fn event_stream(&self) -> EventStream {
        let events = ReceiverStream::new(self.events.subscribe());
        Box::pin(events.map(|event| Ok(convert::event(event))))
    }

    /// For an unknown task the stream ends without an error: Nomad would log an error at every attempt.
    pub(super) fn stats_stream(&self, task: Option<Task>, every: Duration) -> StatsStream {
        let every = if every.is_zero() {
            STATS_INTERVAL
        } else {
            every.max(MIN_STATS_INTERVAL)
        };
        let Some(task) = task else {
            return StatsStream {
                samples: mpsc::channel(1).1,
                task_ended: None,
                _subscription: None,
            };
        };
        let (samples, subscription) = self.sampler.subscribe(task.clone(), every);
        StatsStream {
            samples,
            task_ended: Some(Box::pin(async move { drop(task.wait().await) })),
            _subscription: subscription,
        }
    }
}

/// The stream of a task's statistics. Ends with the task.
pub struct StatsStream {
    samples: mpsc::Receiver<Sample>,
    /// `None` once the stream has ended.
    task_ended: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    _subscription: Option<Subscription>,
}

impl std::fmt::Debug for StatsStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StatsStream")
            .field("samples", &self.samples)
            .finish_non_exhaustive()
    }
}

impl Stream for StatsStream {
    type Item = Result<proto::TaskStatsResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(task_ended) = &mut self.task_ended else {
            return Poll::Ready(None);
        };
        if task_ended.as_mut().poll(context).is_pending() {
            let sample = self.samples.poll_recv(context);
            return sample.map(|sample| sample.map(|boxed| *boxed));
        }
        self.task_ended = None;
        Poll::Ready(None)
    }
}

/// The stream of task events, of all tasks.
pub type EventStream = Pin<Box<dyn Stream<Item = Result<proto::DriverTaskEvent, Status>> + Send>>;
