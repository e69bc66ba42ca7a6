//! What the task, the plugins and a run in this process print.

use super::*;

/// What comes out of a task's FIFO.
#[derive(Debug)]
pub(crate) struct Output {
    seen: watch::Receiver<Seen>,
}

#[derive(Debug, Default)]
pub(super) struct Seen {
    bytes: Vec<u8>,
    ended: bool,
}

impl Output {
    pub(super) fn collect(mut from: pipe::Receiver) -> Self {
        let (sender, seen) = watch::channel(Seen::default());
        tokio::spawn(async move {
            let mut buffer = vec![0; 64 * 1024];
            loop {
                let n = from.read(&mut buffer).await.unwrap_or(0);
                sender.send_modify(|seen| {
                    seen.bytes.extend_from_slice(&buffer[..n]);
                    seen.ended = n == 0;
                });
                if n == 0 {
                    return;
                }
            }
        });
        Self { seen }
    }

    /// Waits until this text has come, and gives all that has.
    pub(crate) async fn contains(&self, text: &str) -> String {
        let all = |seen: &Seen| String::from_utf8_lossy(&seen.bytes).into_owned();
        let mut receiver = self.seen.clone();
        let wait = receiver.wait_for(|seen| seen.ended || all(seen).contains(text));
        let found = all(&within(text, wait).await.unwrap());
        assert!(
            found.contains(text),
            "the output ended without {text:?}: {found:?}"
        );
        found
    }

    /// Waits until the last writer is gone, and gives all that came.
    pub(crate) async fn all(&self) -> String {
        let mut receiver = self.seen.clone();
        let wait = receiver.wait_for(|seen| seen.ended);
        let seen = within("the end of the output", wait).await.unwrap();
        String::from_utf8_lossy(&seen.bytes).into_owned()
    }
}

/// The log lines of this test's plugins.
#[derive(Debug)]
pub(crate) struct Lines {
    sender: mpsc::UnboundedSender<String>,
    state: Arc<Mutex<(mpsc::UnboundedReceiver<String>, Vec<String>)>>,
}

impl Default for Lines {
    fn default() -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        Self {
            sender,
            state: Arc::new(Mutex::new((receiver, Vec::new()))),
        }
    }
}

impl Lines {
    pub(super) fn sender(&self) -> mpsc::UnboundedSender<String> {
        self.sender.clone()
    }

    /// All raw lines so far.
    pub(crate) fn text(&self) -> Vec<String> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (receiver, lines) = &mut *state;
        while let Ok(line) = receiver.try_recv() {
            lines.push(line);
        }
        lines.clone()
    }

    /// Waits for a line that has this text in it, and gives it.
    pub(crate) async fn contains(&self, text: &str) -> String {
        let wait = async {
            let mut seen = 0;
            loop {
                let lines = self.text();
                if let Some(line) = lines[seen..].iter().find(|line| line.contains(text)) {
                    return line.clone();
                }
                seen = lines.len();
                std::future::poll_fn(|context| {
                    let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                    let (receiver, lines) = &mut *state;
                    receiver.poll_recv(context).map(|line| lines.extend(line))
                })
                .await;
            }
        };
        within(text, wait).await
    }
}

/// A place to write that remembers what was written, for a run in this process.
#[derive(Debug, Clone)]
pub(crate) struct Written(Arc<watch::Sender<Vec<u8>>>);

impl Default for Written {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(Vec::new())))
    }
}

impl Written {
    /// What was written so far.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.borrow()).into_owned()
    }

    /// Waits until this text was written.
    pub(crate) async fn contains(&self, text: &str) {
        let mut receiver = self.0.subscribe();
        let wait = receiver.wait_for(|bytes| String::from_utf8_lossy(bytes).contains(text));
        within(text, wait).await.unwrap();
    }
}

impl Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.send_modify(|all| all.extend_from_slice(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
