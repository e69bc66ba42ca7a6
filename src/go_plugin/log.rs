//! Log output of the plugin process as Nomad's agent reads it: one JSON object per line on stderr, in hclog's format. The agent
//! crashes on a line in which hclog's own keys are not strings, and shows a line with another timestamp format raw; so the lines
//! are formatted here by hand. Never fails: write errors are ignored, because the agent that read the pipe may be dead while
//! tasks and this process continue. Never waits, because a stuck reader must not delay a task.

use std::fmt;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};

/// Lines queued for a slow reader; further ones are counted and dropped.
const QUEUE_LINES: usize = 1024;
/// The agent reads lines of up to 64 KiB; a longer one would lose its format.
const MAX_LINE_BYTES: usize = 60 * 1024;
/// Bytes that each value keeps when a line is too long.
const MAX_SHORTENED_VALUE_BYTES: usize = 4 * 1024;

/// An entry in the queue of the writer thread.
enum Entry {
    Line(String),
    /// Answered when everything queued before it has been written.
    Flush(SyncSender<()>),
}

/// Handle to the writer thread. Cheap to clone; never blocks.
#[derive(Clone)]
pub struct LogWriter {
    queue: SyncSender<Entry>,
    dropped: Arc<AtomicU64>,
}

impl fmt::Debug for LogWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogWriter")
            .field("dropped", &self.dropped)
            .finish_non_exhaustive()
    }
}

impl LogWriter {
    /// Starts the thread that writes to `out`. If no thread can be started, all lines are dropped.
    pub fn start(out: impl Write + Send + 'static) -> Self {
        let (queue, entries) = sync_channel(QUEUE_LINES);
        let dropped = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&dropped);
        // The join handle is dropped on purpose: a thread stuck in a write to a full pipe could never be joined.
        let _ = std::thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || write_entries(out, &entries, &counter));
        Self { queue, dropped }
    }

    fn line(&self, line: String) {
        if self.queue.try_send(Entry::Line(line)).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits up to `limit` until all lines queued so far are written. Returns false on timeout or if the queue is full.
    pub fn flush(&self, limit: Duration) -> bool {
        let (done, written) = sync_channel(1);
        self.queue.try_send(Entry::Flush(done)).is_ok()
            && written.recv_timeout(limit) != Err(RecvTimeoutError::Timeout)
    }
}

fn write_entries(mut out: impl Write, entries: &Receiver<Entry>, dropped: &AtomicU64) {
    for entry in entries {
        match entry {
            Entry::Line(line) => {
                let _ = out.write_all(line.as_bytes());
            }
            Entry::Flush(done) => {
                let _ = done.try_send(());
            }
        }
        let lost = dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let mut fields = Map::new();
            fields.insert("lines".to_owned(), lost.into());
            let text = "log lines were dropped: stderr is not read fast enough";
            let _ = out.write_all(line("warn", "log", text, fields).as_bytes());
        }
    }
}

/// Makes this process log to stderr in the agent's format, panics included. Only the first call in a process takes effect.
pub fn install() -> LogWriter {
    let writer = LogWriter::start(std::io::stderr());
    let filter = Targets::new()
        .with_default(LevelFilter::WARN)
        .with_target("nomad_driver_nspawn", LevelFilter::DEBUG);
    let layer = HclogLayer {
        writer: writer.clone(),
    }
    .with_filter(filter);
    let _ = tracing::subscriber::set_global_default(tracing_subscriber::registry().with(layer));
    let panics = writer.clone();
    std::panic::set_hook(Box::new(move |info| panics.line(panic_line(info))));
    writer
}

/// Formats a panic without using tracing, which may be what panicked.
fn panic_line(info: &std::panic::PanicHookInfo<'_>) -> String {
    let payload = info.payload();
    let text = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    let mut fields = Map::new();
    if let Some(place) = info.location() {
        fields.insert("place".to_owned(), place.to_string().into());
    }
    line("error", "panic", &format!("internal error: {text}"), fields)
}

/// The layer that turns tracing events into lines.
#[derive(Debug)]
pub(super) struct HclogLayer {
    writer: LogWriter,
}

impl<S: Subscriber> Layer<S> for HclogLayer {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let level = match *event.metadata().level() {
            Level::TRACE => "trace",
            Level::DEBUG => "debug",
            Level::INFO => "info",
            Level::WARN => "warn",
            Level::ERROR => "error",
        };
        let target = event.metadata().target();
        let module = target
            .strip_prefix("nomad_driver_nspawn::")
            .unwrap_or(target);
        self.writer
            .line(line(level, module, &fields.message, fields.others));
    }
}

/// Formats one complete line. The four keys with `@` are strings and are set last, so that no field can overwrite them.
fn line(level: &str, module: &str, message: &str, mut fields: Map<String, Value>) -> String {
    for (key, value) in [
        ("@level", level),
        ("@module", module),
        ("@message", message),
    ] {
        fields.insert(key.to_owned(), value.into());
    }
    let now = format!("{:.6}", jiff::Timestamp::now());
    fields.insert("@timestamp".to_owned(), now.into());
    let mut text = Value::Object(fields).to_string();
    if text.len() > MAX_LINE_BYTES {
        let mut short = Map::new();
        for (key, value) in [
            ("@level", level),
            ("@module", module),
            ("@message", message),
        ] {
            let end = value.floor_char_boundary(MAX_SHORTENED_VALUE_BYTES);
            short.insert(key.to_owned(), value[..end].into());
        }
        let now = format!("{:.6}", jiff::Timestamp::now());
        short.insert("@timestamp".to_owned(), now.into());
        short.insert("shortened".to_owned(), true.into());
        text = Value::Object(short).to_string();
    }
    text.push('\n');
    text
}

#[derive(Default)]
struct Fields {
    message: String,
    others: Map<String, Value>,
}

impl Fields {
    fn set(&mut self, field: &Field, value: Value) {
        let name = field.name().trim_start_matches('@');
        self.others.insert(name.to_owned(), value);
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        } else {
            self.set(field, format!("{value:?}").into());
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message = value.to_owned();
        } else {
            self.set(field, value.into());
        }
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.set(field, value.into());
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.set(field, crate::backend::chain(value).into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Mutex, mpsc};

    /// A writer whose content tests can read.
    #[derive(Clone, Default)]
    struct Paper(Arc<Mutex<Vec<u8>>>);

    impl Write for Paper {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Paper {
        fn lines(&self) -> Vec<Value> {
            let bytes = self.0.lock().unwrap().clone();
            let text = String::from_utf8(bytes).unwrap();
            text.lines()
                .map(|line| serde_json::from_str(line).unwrap())
                .collect()
        }
    }

    const LIMIT: Duration = Duration::from_secs(10);

    fn logged(emit: impl FnOnce()) -> Vec<Value> {
        let paper = Paper::default();
        let writer = LogWriter::start(paper.clone());
        let layer = HclogLayer {
            writer: writer.clone(),
        };
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), emit);
        assert!(writer.flush(LIMIT));
        paper.lines()
    }

    #[test]
    fn a_line_has_the_agents_format() {
        let lines =
            logged(|| tracing::info!(task = "a/b/c", count = 3, up = true, "it {}", "runs"));
        let [line] = lines.as_slice() else {
            panic!("{lines:?}")
        };
        assert_eq!(line["@level"], "info");
        assert_eq!(line["@message"], "it runs");
        assert_eq!(line["@module"], "go_plugin::log::tests");
        assert_eq!(line["task"], "a/b/c");
        assert_eq!(line["count"], 3);
        assert_eq!(line["up"], true);
        let stamp = line["@timestamp"].as_str().unwrap();
        assert_eq!(stamp.len(), "2006-01-02T15:04:05.000000Z".len(), "{stamp}");
        assert_eq!(&stamp[19..20], ".");
        assert!(stamp.ends_with('Z') && stamp.parse::<jiff::Timestamp>().is_ok());
    }

    #[test]
    fn no_field_replaces_a_reserved_key() {
        let lines = logged(|| {
            tracing::warn!({ "@level" = 7, "@message" = true, "@timestamp" = 1.5 }, "text\nwith \"quotes\"");
        });
        for key in ["@level", "@message", "@timestamp", "@module"] {
            assert!(lines[0][key].is_string(), "{key}");
        }
        assert_eq!(lines[0]["@message"], "text\nwith \"quotes\"");
        assert_eq!(lines[0]["level"], 7);
    }

    #[test]
    fn an_error_is_reported_with_its_causes() {
        let cause = std::io::Error::other("disk on fire");
        let error = crate::backend::BackendError::Io {
            step: "read",
            path: "/x".into(),
            source: cause,
        };
        let lines = logged(|| {
            tracing::error!(error = &error as &dyn std::error::Error, "no");
        });
        assert_eq!(lines[0]["error"], "read /x: disk on fire");
    }

    #[test]
    fn a_line_never_exceeds_the_readers_buffer() {
        let long = "\u{1}ä".repeat(100_000);
        let text = line("info", "m", &long, Map::new());
        assert!(text.len() <= MAX_LINE_BYTES, "{}", text.len());
        let value: Value = serde_json::from_str(&text).unwrap();
        assert!(value["@message"].is_string());
    }

    #[test]
    fn a_broken_pipe_is_ignored() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
        }
        let writer = LogWriter::start(Broken);
        writer.line("x\n".to_owned());
        assert!(writer.flush(LIMIT), "the thread goes on");
    }

    #[test]
    fn a_stuck_reader_blocks_nothing_and_dropped_lines_are_counted() {
        struct Stuck(mpsc::Receiver<()>, Paper);
        impl Write for Stuck {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                // Blocks until the test drops the sender; from then on it returns at once.
                let _ = self.0.recv();
                self.1.write(bytes)
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let (release, held) = mpsc::channel();
        let paper = Paper::default();
        let writer = LogWriter::start(Stuck(held, paper.clone()));
        for number in 0..QUEUE_LINES * 2 {
            writer.line(line("info", "m", &number.to_string(), Map::new()));
        }
        assert!(!writer.flush(Duration::ZERO), "nothing more fits");
        drop(release);
        let deadline = std::time::Instant::now() + LIMIT;
        while !writer.flush(LIMIT) {
            assert!(std::time::Instant::now() < deadline);
            std::thread::yield_now();
        }
        let lines = paper.lines();
        assert!(
            lines
                .iter()
                .any(|line| line["lines"].as_u64().is_some_and(|lost| lost >= 1000))
        );
    }
}
