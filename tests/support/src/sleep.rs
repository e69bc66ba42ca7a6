//! A process that a test recognizes among all others of the host.

use std::fmt;
use std::fs;
use std::sync::atomic::{AtomicU32, Ordering};

static COUNT: AtomicU32 = AtomicU32::new(0);

/// `sleep` for a time that no other test sleeps for, in this process or another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sleep {
    seconds: String,
}

impl Sleep {
    /// A new one.
    #[expect(clippy::new_without_default, reason = "each is different")]
    pub fn new() -> Self {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Self {
            seconds: format!("{}.{}", 1000 + count, std::process::id()),
        }
    }

    /// How many processes of the host run it.
    pub fn running(&self) -> usize {
        let wanted = format!("sleep\0{}\0", self.seconds);
        let lines = fs::read_dir("/proc").unwrap().flatten();
        let lines = lines.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
        lines.filter(|line| *line == wanted.as_bytes()).count()
    }
}

/// The command, for a shell.
impl fmt::Display for Sleep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sleep {}", self.seconds)
    }
}
