//! The log of the plugins.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;

use crate::within;

/// The log lines of this test's plugins.
#[derive(Debug)]
pub struct Lines {
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
    pub(crate) fn sender(&self) -> mpsc::UnboundedSender<String> {
        self.sender.clone()
    }

    /// All raw lines so far.
    pub fn text(&self) -> Vec<String> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (receiver, lines) = &mut *state;
        while let Ok(line) = receiver.try_recv() {
            lines.push(line);
        }
        lines.clone()
    }

    /// Waits for a line that contains this text and returns it.
    pub async fn contains(&self, text: &str) -> String {
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
