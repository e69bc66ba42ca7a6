//! The process that a plugin of `run` belongs to. Nomad's plugins outlive their agent; this one ends its tasks and itself when
//! its owner is gone, however that ended: the kernel closes the other end of the pipe that is our standard input.

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
    /// Takes standard input for that pipe. Fails when it can't be duplicated.
    pub fn on_stdin() -> io::Result<Self> {
        Ok(Self {
            pipe: io::stdin().as_fd().try_clone_to_owned()?,
            gone: AtomicBool::new(false),
        })
    }

    /// Waits until the owner is gone. Fails at once when standard input is not a pipe. Needs a runtime.
    pub(super) async fn wait(&self) -> io::Result<()> {
        let mut pipe = pipe::Receiver::from_owned_fd(self.pipe.try_clone()?)?;
        let mut buffer = [0; 64];
        // An owner has nothing to say; what comes all the same is passed over.
        while pipe.read(&mut buffer).await? > 0 {}
        self.gone.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Whether serving has ended because the owner was gone, so that nobody else removes its files.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }
}
