//! The output of the plugins, and of a `run` inside the test process.

use super::*;

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

    /// Waits for a line that contains this text and returns it.
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

/// A writer that keeps what is written, for a `run` inside the test process.
#[derive(Debug, Clone)]
pub(crate) struct Written(Arc<watch::Sender<Vec<u8>>>);

impl Default for Written {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(Vec::new())))
    }
}

impl Written {
    /// Everything written so far.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.borrow()).into_owned()
    }

    /// Waits until this text has been written.
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
