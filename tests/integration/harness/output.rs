//! The output of a `run` inside the test process.

use std::io::{self, Write};
use std::sync::Arc;

use tokio::sync::watch;

use super::within;

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
