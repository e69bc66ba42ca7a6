//! The owner of a plugin that the `run` command started. Nomad's plugins outlive their agent; this one ends its tasks and exits
//! when its owner is gone, for whatever reason: the kernel then closes the other end of the pipe on standard input.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;

/// The process that holds the other end of the pipe on standard input for as long as it lives.
#[derive(Debug)]
pub struct Owner {
    pipe: OwnedFd,
    gone: AtomicBool,
}

impl Owner {
    /// Uses standard input as that pipe. Fails when it can't be duplicated.
    pub fn on_stdin() -> io::Result<Self> {
        Ok(Self {
            pipe: io::stdin().as_fd().try_clone_to_owned()?,
            gone: AtomicBool::new(false),
        })
    }

    /// Waits until the owner is gone. Fails at once when standard input is not a pipe. Requires a tokio runtime.
    pub(super) async fn wait(&self) -> io::Result<()> {
        let mut pipe = pipe::Receiver::from_owned_fd(self.pipe.try_clone()?)?;
        let mut buffer = [0; 64];
        // The owner sends nothing; any data is discarded.
        while pipe.read(&mut buffer).await? > 0 {}
        self.gone.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Whether serving ended because the owner is gone, in which case this process has to remove the owner's files.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }
}
