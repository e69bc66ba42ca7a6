//! Helpers shared by all test suites.

#![expect(
    clippy::disallowed_methods,
    reason = "the test runner passes the name of the test in the environment"
)]

use std::future::Future;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub mod limits;
mod lines;
pub mod netns;
mod output;
pub mod secrecy;
mod sleep;
pub mod trap;
pub mod wire;

pub use lines::Lines;
pub use output::Output;
pub use sleep::Sleep;

/// How long a test waits for anything before it fails. Only a broken test ever waits this long.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Waits for a future with a deadline; the panic message contains `what`.
pub async fn within<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(output) => output,
        Err(_) => panic!("{what}: not within {DEADLINE:?}"),
    }
}

/// A call that signals which other tests cause in this process do not end. Whoever starts a process on a runtime has it handle SIGCHLD, and a
/// socket with a timeout is then interrupted for good.
pub fn uninterrupted<T>(mut call: impl FnMut() -> std::io::Result<T>) -> std::io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Polls until the condition holds, for state that has no change notification.
pub async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let looking = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    within(what, looking).await;
}

/// Runs a tool to its successful end, and returns what it has printed.
#[expect(clippy::disallowed_methods, reason = "tools that the tests use")]
pub fn run(program: &str, words: &[&str]) -> String {
    let output = std::process::Command::new(program).args(words).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {words:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What starts have left in a state directory. The filters that are kept for later starts are not theirs.
pub fn starts_in(state: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(state).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    let reserved = std::fs::read_dir(state.join(".addresses"));
    let reserved = reserved.into_iter().flatten().flatten();
    paths
        .filter(|path| {
            ![".addresses", ".seccomp"]
                .iter()
                .any(|name| path.ends_with(name))
        })
        .chain(reserved.map(|entry| entry.path()))
        .collect()
}

/// Reports that this host can't run the current test. The test runner has no such result and counts the test as passed, so the caller
/// returns afterwards; `ci/rerun-failed` collects the lines, and `.ci/run` prints and counts them at the end.
pub fn not_applicable(reason: &str) {
    // Under nextest each test runs in the main thread of its own process.
    let name = std::env::var("NEXTEST_TEST_NAME").ok();
    let name = name.or_else(|| std::thread::current().name().map(str::to_owned));
    let line = format!(
        "NOT APPLICABLE {}: {reason}\n",
        name.as_deref().unwrap_or("unnamed")
    );
    // In a single write, and not through a print macro, whose output the runner captures.
    let _ = std::io::stderr().write_all(line.as_bytes());
}
