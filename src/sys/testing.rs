//! A process for tests to read about.

use std::io::{Read as _, Write as _};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::process::ProcessHandle;

/// A process that has executed its program, which repeats its input. It ends with this.
#[derive(Debug)]
pub(crate) struct Echo {
    child: Child,
    pub(crate) handle: ProcessHandle,
}

impl Echo {
    /// Starts this command, which is or executes `cat`, with these variables besides its own.
    #[expect(clippy::disallowed_methods, reason = "a process to read about")]
    pub(crate) fn start(command: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut child = Command::new(command[0])
            .args(&command[1..])
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        repeat(&mut child);
        let handle = ProcessHandle::open(i32::try_from(child.id()).unwrap()).unwrap();
        Self { child, handle }
    }

    /// Ends it and waits for that, but leaves its exit status to [`reap`](Self::reap).
    pub(crate) fn exit(&mut self) {
        drop(self.child.stdin.take());
        assert!(self.handle.wait(Duration::from_secs(60)));
    }

    /// Takes its exit status, which must be 0.
    pub(crate) fn reap(&mut self) {
        assert!(self.child.wait().unwrap().success());
    }

    /// Checks that it still repeats its input, and ends it.
    pub(crate) fn end(mut self) {
        repeat(&mut self.child);
        self.exit();
        self.reap();
    }
}

fn repeat(child: &mut Child) {
    let mut byte = [7];
    child.stdin.as_mut().unwrap().write_all(&byte).unwrap();
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut byte)
        .unwrap();
}
