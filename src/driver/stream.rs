//! The streaming calls: Fingerprint, TaskEvents, TaskStats. Each has one producer that lives exactly as long as somebody
//! listens. Nomad opens a stream that ends again at once, without a pause, so only statistics end by themselves.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;

use super::fingerprint::Fingerprint;
use super::stats::UsageSampler;
use super::{Driver, convert};
use crate::proto::driver as proto;
use crate::task::Task;

/// How often the host is looked at again.
const PROBE_INTERVAL: Duration = Duration::from_secs(5);
/// How long looking may take before the host counts as unknown.
const PROBE_TIMEOUT: Duration = Duration::from_secs(20);
/// How often Nomad hears a fingerprint that has not changed.
const REPEAT_INTERVAL: Duration = Duration::from_secs(30);
/// The statistics interval where none is given.
const STATS_INTERVAL: Duration = Duration::from_secs(1);
/// The shortest one.
const MIN_STATS_INTERVAL: Duration = Duration::from_millis(100);

/// A stream and its producer, which ends with it.
#[derive(Debug)]
pub struct ProducerStream<T> {
    /// Boxed: a channel has room for dozens from the start, and every task has one open for its statistics.
    answers: ReceiverStream<Box<Result<T, Status>>>,
    _producer: AbortOnDropHandle<()>,
}

impl<T: Send + 'static> ProducerStream<T> {
    fn new<F: Future<Output = ()> + Send + 'static>(
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

    /// One look at the host. A look that panics or hangs is a statement about the host as well, not the end of the stream.
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
                "the host could not be examined: internal error, see the client's log",
            ),
            Err(_) => Fingerprint::undetected("the host could not be examined in time"),
        }
    }

    pub(super) fn event_stream(&self) -> EventStream {
        let events = ReceiverStream::new(self.events.subscribe());
        Box::pin(events.map(|event| Ok(convert::event(event))))
    }

    pub(super) fn stats_stream(
        &self,
        task: Option<Task>,
        every: Duration,
    ) -> ProducerStream<proto::TaskStatsResponse> {
        let driver = self.clone();
        let every = if every.is_zero() {
            STATS_INTERVAL
        } else {
            every.max(MIN_STATS_INTERVAL)
        };
        ProducerStream::new(move |listener| async move {
            // Statistics of a task that is not there end without a word: an error would be logged at every attempt.
            let Some(task) = task else { return };
            tokio::select! {
                _ = task.wait() => {}
                () = driver.stream_stats(&task, every, &listener) => {}
            }
        })
    }

    async fn stream_stats(
        &self,
        task: &Task,
        every: Duration,
        listener: &mpsc::Sender<Box<Result<proto::TaskStatsResponse, Status>>>,
    ) {
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut sampler = UsageSampler::default();
        loop {
            ticks.tick().await;
            let usage = match task.usage().await {
                Ok(usage) => usage,
                Err(error) => {
                    let error = crate::backend::chain(&error);
                    tracing::debug!(task = task.id(), error, "no statistics this time");
                    continue;
                }
            };
            let compute = self
                .config
                .borrow()
                .as_ref()
                .and_then(|config| config.compute);
            let stats = proto::TaskStats {
                id: task.id().to_owned(),
                timestamp: Some(convert::timestamp(SystemTime::now())),
                agg_resource_usage: Some(sampler.read(Instant::now().into_std(), usage, compute)),
                resource_usage_by_pid: std::collections::HashMap::new(),
            };
            let response = proto::TaskStatsResponse { stats: Some(stats) };
            if listener.send(Box::new(Ok(response))).await.is_err() {
                return;
            }
        }
    }
}

/// Everybody's task events.
pub type EventStream = Pin<Box<dyn Stream<Item = Result<proto::DriverTaskEvent, Status>> + Send>>;
