//! What all test suites share.

#![expect(
    clippy::disallowed_methods,
    reason = "the test runner says in the environment which test this is"
)]

use std::future::Future;
use std::io::Write as _;
use std::time::Duration;

mod output;
pub mod secrecy;

pub use output::Output;

/// How long anything may take before a test gives up on it. Only a broken test ever waits this long.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Waits for something with a deadline; `what` is named when it does not come.
pub async fn within<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(output) => output,
        Err(_) => panic!("{what}: not within {DEADLINE:?}"),
    }
}

/// Looks again and again until this holds, for what tells nobody that it has changed.
pub async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let looking = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    within(what, looking).await;
}

pub mod trap;

/// Reports that this host cannot run the present test. The test runner has no such result and counts the test as passed, so the
/// caller returns after this; `ci/rerun-failed` collects the lines, and `.ci/run` prints and counts them at the end.
pub fn not_applicable(reason: &str) {
    // Under nextest every test is the main thread of a process of its own.
    let name = std::env::var("NEXTEST_TEST_NAME").ok();
    let name = name.or_else(|| std::thread::current().name().map(str::to_owned));
    let line = format!(
        "NOT APPLICABLE {}: {reason}\n",
        name.as_deref().unwrap_or("unnamed")
    );
    // In one piece, and past the runner, which keeps back what a macro prints.
    let _ = std::io::stderr().write_all(line.as_bytes());
}
