//! Collects a task's output.

use std::fmt;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::watch;

use crate::within;

/// The output read from a task's FIFO.
#[derive(Debug)]
pub struct Output {
    seen: watch::Receiver<Seen>,
}

#[derive(Default)]
struct Seen {
    bytes: Vec<u8>,
    ended: bool,
}

impl fmt::Debug for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.bytes))
    }
}

impl Output {
    /// Reads the FIFO until end of file.
    pub fn collect(mut from: pipe::Receiver) -> Self {
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

    /// Waits until the output contains this text and returns everything read so far.
    pub async fn contains(&self, text: &str) -> String {
        let all = |seen: &Seen| String::from_utf8_lossy(&seen.bytes).into_owned();
        let mut receiver = self.seen.clone();
        let wait = receiver.wait_for(|seen| seen.ended || all(seen).contains(text));
        let found = all(&within(text, wait).await.expect("the output"));
        assert!(
            found.contains(text),
            "the output ended without {text:?}: {found:?}"
        );
        found
    }

    /// Waits until the last writer has closed the FIFO and returns everything read.
    pub async fn all(&self) -> String {
        let mut receiver = self.seen.clone();
        let wait = receiver.wait_for(|seen| seen.ended);
        let seen = within("the end of the output", wait)
            .await
            .expect("the output");
        String::from_utf8_lossy(&seen.bytes).into_owned()
    }
}
