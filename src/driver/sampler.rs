//! Reads the statistics of all tasks that have an open stream, on one thread. Streams whose next readings are close to each other are read
//! together and stay together, so a thousand streams wake the process a few times per interval and not a thousand times.

use std::collections::{BTreeSet, HashMap};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};
use tonic::Status;

use super::stats::{Compute, Figures};
use super::{Config, convert};
use crate::proto::driver::{TaskStats, TaskStatsResponse};
use crate::task::{SharedReader, Task};

/// A sample may be taken early by this fraction of the interval if others are due.
const EARLY: u32 = 10;
/// The number of samples that are taken before they are sent: the threads that send them are then woken once for all of them, and the
/// samples take little memory.
const TOGETHER: usize = 32;
/// Enough for reading files and making messages of their content.
const STACK_BYTES: usize = 256 * 1024;

/// A sample, or the error that ends a stream. Boxed: a channel allocates space for dozens of entries up front, and every task has one
/// open for its statistics.
pub(super) type Sample = Box<Result<TaskStatsResponse, Status>>;

/// Where streams subscribe. Clones share the thread, which starts with the first stream.
#[derive(Debug, Clone)]
pub(super) struct Sampler {
    config: watch::Receiver<Option<Config>>,
    thread: Arc<Mutex<Option<Commands>>>,
}

/// The way to the thread, and the number of streams it has had.
#[derive(Debug)]
struct Commands {
    sender: Sender<Command>,
    streams: u64,
}

#[derive(Debug)]
enum Command {
    Add(u64, Box<Stream>),
    Remove(u64),
}

/// A stream's place in the thread. It is given up when this is dropped.
#[derive(Debug)]
pub(super) struct Subscription {
    number: u64,
    sender: Sender<Command>,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        // A thread that is gone has no streams.
        let _ = self.sender.send(Command::Remove(self.number));
    }
}

/// One stream of statistics.
#[derive(Debug)]
struct Stream {
    task: Task,
    reader: Source,
    every: Duration,
    due: Instant,
    figures: Figures,
    samples: mpsc::Sender<Sample>,
}

/// Where a stream's figures come from.
#[derive(Debug)]
enum Source {
    /// The container was not up yet.
    Unknown,
    Reader(SharedReader),
    /// The container is gone; its files are closed. The stream stays silent until the exit is known.
    Gone,
}

impl Sampler {
    /// Starts nothing yet. What a percentage is in MHz comes from the latest configuration.
    pub(super) fn new(config: watch::Receiver<Option<Config>>) -> Self {
        Self {
            config,
            thread: Arc::default(),
        }
    }

    /// Sends samples of this task: one now, then one per interval, none while the previous ones have not been received. The channel is
    /// closed without a sample if no thread can be started.
    pub(super) fn subscribe(
        &self,
        task: Task,
        every: Duration,
    ) -> (mpsc::Receiver<Sample>, Option<Subscription>) {
        let (samples, receiver) = mpsc::channel(2);
        let stream = Stream {
            task,
            reader: Source::Unknown,
            every,
            due: Instant::now(),
            figures: Figures::default(),
            samples,
        };
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        let mut stream = Box::new(stream);
        // The second attempt is for a thread that has panicked.
        for _ in 0..2 {
            let Some(commands) = self.commands(&mut thread) else {
                break;
            };
            commands.streams += 1;
            let number = commands.streams;
            match commands.sender.send(Command::Add(number, stream)) {
                Ok(()) => {
                    let sender = commands.sender.clone();
                    return (receiver, Some(Subscription { number, sender }));
                }
                Err(error) => {
                    let Command::Add(_, unsent) = error.0 else {
                        break;
                    };
                    stream = unsent;
                    *thread = None;
                }
            }
        }
        (receiver, None)
    }

    fn commands<'a>(&self, thread: &'a mut Option<Commands>) -> Option<&'a mut Commands> {
        if thread.is_none() {
            let (sender, commands) = channel();
            let config = self.config.clone();
            let started = std::thread::Builder::new()
                .name("statistics".to_owned())
                .stack_size(STACK_BYTES)
                .spawn(move || {
                    // Once a stream has ended by a panic, no command is accepted any more.
                    let mut streams = Streams::default();
                    run(commands, &config, &mut streams);
                });
            match started {
                Ok(_) => *thread = Some(Commands { sender, streams: 0 }),
                Err(error) => {
                    tracing::debug!(%error, "no thread can be started to read statistics");
                }
            }
        }
        thread.as_mut()
    }
}

/// Runs until the driver and all streams are gone. Owns the receiver, which so ends before the streams.
fn run(
    commands: Receiver<Command>,
    config: &watch::Receiver<Option<Config>>,
    streams: &mut Streams,
) {
    loop {
        let command = match streams.next_due() {
            None => commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(due) => commands.recv_timeout(due.saturating_duration_since(Instant::now())),
        };
        match command {
            Ok(Command::Add(number, stream)) => streams.add(number, *stream),
            Ok(Command::Remove(number)) => streams.remove(number),
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {
                let compute = config.borrow().as_ref().and_then(|config| config.compute);
                let now = Instant::now();
                for some in streams.take_due(now).chunks(TOGETHER) {
                    let taken = some
                        .iter()
                        .map(|number| (*number, streams.sample(*number, now, compute)));
                    let taken: Vec<_> = taken.collect();
                    for (number, sample) in taken {
                        streams.send(number, sample);
                    }
                }
            }
        }
    }
}

/// All streams, and the order in which they are due.
#[derive(Debug, Default)]
struct Streams {
    by_number: HashMap<u64, Stream>,
    queue: BTreeSet<(Instant, u64)>,
}

impl Streams {
    fn add(&mut self, number: u64, stream: Stream) {
        self.queue.insert((stream.due, number));
        self.by_number.insert(number, stream);
    }

    fn remove(&mut self, number: u64) {
        if let Some(stream) = self.by_number.remove(&number) {
            self.queue.remove(&(stream.due, number));
        }
    }

    fn next_due(&self) -> Option<Instant> {
        self.queue.first().map(|(due, _)| *due)
    }

    /// Removes those from the queue that are due, or soon enough, and returns them.
    fn take_due(&mut self, now: Instant) -> Vec<u64> {
        let mut due = Vec::new();
        while let Some((at, number)) = self.queue.first().copied() {
            let stream = self.by_number.get(&number);
            let early = stream.map_or(Duration::ZERO, |stream| stream.every / EARLY);
            if at.saturating_duration_since(now) > early {
                break;
            }
            self.queue.pop_first();
            due.push(number);
        }
        due
    }

    /// Reads a stream that was due.
    fn sample(&mut self, number: u64, now: Instant, compute: Option<Compute>) -> Taken {
        let Some(stream) = self.by_number.get_mut(&number) else {
            return Taken::Never;
        };
        stream.due = now + stream.every;
        stream.sample(compute)
    }

    /// Sends what was taken, and puts the stream back in the queue if it is to be read again.
    fn send(&mut self, number: u64, taken: Taken) {
        let Some(stream) = self.by_number.get(&number) else {
            return;
        };
        let again = match taken {
            Taken::Never => false,
            Taken::Nothing => true,
            Taken::Sample(sample) => {
                let sent = stream.samples.try_send(sample);
                !matches!(sent, Err(TrySendError::Closed(_)))
            }
        };
        if again {
            self.queue.insert((stream.due, number));
        }
    }
}

/// What a stream gets when it is due.
#[derive(Debug)]
enum Taken {
    Sample(Sample),
    /// Nothing this time.
    Nothing,
    /// Nothing any more.
    Never,
}

impl Stream {
    fn sample(&mut self, compute: Option<Compute>) -> Taken {
        if self.samples.capacity() == 0 {
            return Taken::Nothing;
        }
        if matches!(self.reader, Source::Unknown)
            && let Some(reader) = self.task.usage_reader()
        {
            self.reader = Source::Reader(reader);
        }
        let reader = match &self.reader {
            Source::Reader(reader) => reader,
            Source::Unknown => return Taken::Nothing,
            Source::Gone => return Taken::Never,
        };
        let now = Instant::now();
        let with_processes = self.figures.wants_processes(now);
        let reading = reader
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .read(with_processes);
        let Some(reading) = reading else {
            self.reader = Source::Gone;
            return Taken::Never;
        };
        let (whole, processes) = self.figures.take(now, reading, compute);
        let stats = TaskStats {
            id: self.task.id().to_owned(),
            timestamp: Some(convert::timestamp(SystemTime::now())),
            agg_resource_usage: Some(whole),
            resource_usage_by_pid: processes,
        };
        Taken::Sample(Box::new(Ok(TaskStatsResponse { stats: Some(stats) })))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::Tasks;
    use crate::task::tests::{TestBackend, info, spec, starts};

    /// Streams of one task with these intervals and next readings, both in milliseconds.
    async fn streams(now: Instant, given: &[(u64, u64)]) -> Streams {
        let (stage, _end) = TestBackend::new(starts());
        let tasks = Tasks::new(
            crate::task::events::EventBus::default(),
            tokio_util::sync::CancellationToken::new(),
        );
        tasks.start(stage, info("i"), spec("i")).await.unwrap();
        let mut streams = Streams::default();
        for (number, (every, due)) in (0..).zip(given) {
            let stream = Stream {
                task: tasks.get("i").unwrap(),
                reader: Source::Unknown,
                every: Duration::from_millis(*every),
                due: now + Duration::from_millis(*due),
                figures: Figures::default(),
                samples: mpsc::channel(1).0,
            };
            streams.add(number, stream);
        }
        streams
    }

    #[tokio::test]
    async fn those_that_are_due_soon_are_taken_too() {
        let now = Instant::now();
        let given = [(1000, 0), (1000, 100), (1000, 101), (10_000, 500)];
        let mut streams = streams(now, &given).await;
        assert_eq!(streams.next_due(), Some(now));
        assert_eq!(streams.take_due(now), [0, 1]);
        assert_eq!(streams.next_due(), Some(now + Duration::from_millis(101)));
        streams.send(0, Taken::Nothing);
        streams.send(1, Taken::Never);
        assert_eq!(streams.take_due(now), [0]);
        streams.remove(2);
        assert_eq!(streams.take_due(now), [3]);
        assert_eq!(streams.next_due(), None);
    }

    #[tokio::test]
    async fn a_removed_stream_is_not_due_any_more() {
        let now = Instant::now();
        let mut streams = streams(now, &[(1000, 0)]).await;
        streams.remove(0);
        streams.remove(0);
        assert_eq!(streams.next_due(), None);
        streams.send(0, Taken::Nothing);
        assert_eq!(streams.next_due(), None);
    }
}
