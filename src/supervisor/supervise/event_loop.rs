//! The event loop: epoll with registered sources, and timers. One wait returns the tokens of everything that is ready, in the
//! order of the tokens and not in that of the kernel. It is level-triggered: what is not handled completely is returned again. With
//! nothing registered but idle sources it sleeps in the kernel. Does not handle events; `run` does.
//!
//! A new source is a line in [`Token`], at the place where it is to be handled, and an arm in `Supervisor::handle`.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// What is ready. Everything that is ready at the same time is handled in the order of these lines, except what the two timers
/// [`UnregisteredClients`](Token::UnregisteredClients) and [`PendingSignals`](Token::PendingSignals) are for: it is handled at the end of
/// every turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Token {
    /// systemd-nspawn has sent a notification.
    Notify,
    /// The driver's init has sent a message. Before everything that depends on whether the container is up: a client that
    /// connects is sent the state, and a request acts on it.
    InitChannel,
    /// A client connects.
    ControlSocket,
    /// Timer: clients are accepted again.
    AcceptPause,
    /// A client with this id has sent requests or has closed its connection. Before the exit: a kill that came before the exit
    /// has to count as one.
    Client(u32),
    /// Timer: clients whose connection can't be registered are checked.
    UnregisteredClients,
    /// Timer: signals that the image's init does not handle yet are tried again.
    PendingSignals,
    /// The DHCP client of the container asks.
    Dhcp,
    /// Timer: it is listened to again.
    DhcpPause,
    /// Something has arrived for the container on `::1`.
    Relay,
    /// The command has said something about its state.
    Ready,
    /// Timer: the container has not said that it is ready.
    ReadyStep,
    /// PID 1 has printed something.
    Console,
    /// The container's journal has changed.
    Journal,
    /// Timer: the journal is looked at, because the kernel can't report changes, or because there was more than one turn could handle.
    JournalAgain,
    /// A log of the task that was full can be written again.
    LogWritable,
    /// The mount table of the host has changed.
    MountTable,
    /// Timer: it is looked at again.
    MountPause,
    /// The thread that passes a change of it on has ended.
    MountsChanged,
    /// The leader has exited. Before its parent: what the leader's exit says is lost if the supervisor has already concluded.
    Leader,
    /// A child has exited.
    Signals,
    /// The kernel has killed a process of the container because memory was used up. After the exits: one of them may be the victim's.
    Oom,
    /// Timer: OOM kills are reported.
    OomReport,
    /// Timer: systemd-nspawn, or what has outlived it, takes too long to exit. After everything that could make it needless.
    ExitTimeout,
    /// The thread that releases the resources has ended.
    Released,
}

/// A token that is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ready {
    /// The source or timer.
    pub(super) token: Token,
    /// Whether a source has been hung up. For a pidfd: the process has been waited for.
    pub(super) hung_up: bool,
}

/// What a source is registered for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Interest {
    /// Readable, or hung up.
    Readable,
    /// Hung up only; the kernel reports this without being asked.
    HangUp,
    /// Exceptional: a file of the kernel has new content.
    Exceptional,
    /// Writable without waiting.
    Writable,
}

/// Something with a descriptor to wait for.
pub(super) trait Pollable {
    /// The descriptor; none if it has been closed.
    fn descriptor(&self) -> Option<BorrowedFd<'_>>;
}

impl<F: AsFd> Pollable for F {
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.as_fd())
    }
}

/// Registered sources and timers.
#[derive(Debug)]
pub(super) struct EventLoop {
    registry: Rc<Registry>,
    timers: BTreeMap<Token, Instant>,
    buffer: Vec<EpollEvent>,
}

#[derive(Debug)]
struct Registry {
    epoll: Epoll,
    /// The registered sources by the number that the kernel returns. A number is never used twice, so an event of a source that has
    /// been deregistered is not taken for another's.
    tokens: RefCell<BTreeMap<u64, Token>>,
    next: Cell<u64>,
    #[cfg(test)]
    refuses: Cell<bool>,
}

impl EventLoop {
    /// A loop without sources. Fails if the process or the host has no descriptor or no memory left.
    pub(super) fn new() -> io::Result<Self> {
        let registry = Registry {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            tokens: RefCell::default(),
            next: Cell::new(0),
            #[cfg(test)]
            refuses: Cell::new(false),
        };
        Ok(Self {
            registry: Rc::new(registry),
            timers: BTreeMap::new(),
            buffer: Vec::new(),
        })
    }

    /// A source that is not registered yet.
    pub(super) fn source<F: Pollable>(&self, inner: F, token: Token) -> Source<F> {
        Source {
            inner,
            token,
            number: None,
            registry: Rc::clone(&self.registry),
        }
    }

    /// A source that is registered for reading. Fails if the kernel has no memory left or the user has registered as many as
    /// `fs.epoll.max_user_watches` allows.
    pub(super) fn register<F: Pollable>(&self, inner: F, token: Token) -> io::Result<Source<F>> {
        let mut source = self.source(inner, token);
        source.watch(Interest::Readable)?;
        Ok(source)
    }

    /// Sets a timer, which expires once, or removes it.
    pub(super) fn set_timer(&mut self, token: Token, end: Option<Instant>) {
        match end {
            Some(end) => drop(self.timers.insert(token, end)),
            None => drop(self.timers.remove(&token)),
        }
    }

    /// Waits until a source is ready or a timer has expired, and returns all that are.
    pub(super) fn wait(&mut self) -> io::Result<Vec<Ready>> {
        // Room for all: with less, the order of handling would hold only for those that the kernel returns first.
        let sources = self.registry.tokens.borrow().len();
        self.buffer.resize(sources.max(1), EpollEvent::empty());
        let timeout = self.timeout();
        let found = match self.registry.epoll.wait(&mut self.buffer, timeout) {
            Err(nix::Error::EINTR) => 0,
            other => other?,
        };
        let tokens = self.registry.tokens.borrow();
        let ready = self.buffer[..found].iter().filter_map(|event| {
            Some(Ready {
                token: *tokens.get(&event.data())?,
                hung_up: event.events().contains(EpollFlags::EPOLLHUP),
            })
        });
        let ready = ready.collect();
        drop(tokens);
        Ok(self.with_expired(ready))
    }

    /// Every source, as if all were readable, and the expired timers: for a caller that can't wait.
    pub(super) fn all(&mut self) -> Vec<Ready> {
        let tokens = self.registry.tokens.borrow();
        let ready = tokens.values().map(|token| Ready {
            token: *token,
            hung_up: false,
        });
        let ready = ready.collect();
        drop(tokens);
        self.with_expired(ready)
    }

    fn with_expired(&mut self, mut ready: Vec<Ready>) -> Vec<Ready> {
        if !self.timers.is_empty() {
            let now = Instant::now();
            let expired = self.timers.extract_if(.., |_, end| *end <= now);
            ready.extend(expired.map(|(token, _)| Ready {
                token,
                hung_up: false,
            }));
        }
        ready.sort_by_key(|ready| ready.token);
        ready
    }

    fn timeout(&self) -> EpollTimeout {
        let Some(end) = self.timers.values().min() else {
            return EpollTimeout::NONE;
        };
        match end.saturating_duration_since(Instant::now()) {
            Duration::ZERO => EpollTimeout::ZERO,
            // In whole milliseconds, rounded up: waking up too early would be a wake-up more.
            left => {
                EpollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(EpollTimeout::MAX)
            }
        }
    }

    /// Makes every later registration fail, as on a host without memory.
    #[cfg(test)]
    pub(super) fn refuse(&self, refuses: bool) {
        self.registry.refuses.set(refuses);
    }
}

/// A source of events. It is deregistered when it is dropped.
#[derive(Debug)]
pub(super) struct Source<F: Pollable> {
    inner: F,
    token: Token,
    /// The number of its registration.
    number: Option<u64>,
    registry: Rc<Registry>,
}

impl<F: Pollable> Source<F> {
    /// Registers it, or changes what it is registered for, which can't fail for want of memory.
    pub(super) fn watch(&mut self, interest: Interest) -> io::Result<()> {
        #[cfg(test)]
        if self.registry.refuses.get() {
            return Err(nix::Error::ENOSPC.into());
        }
        let Some(descriptor) = self.inner.descriptor() else {
            return Ok(());
        };
        let flags = match interest {
            Interest::Readable => EpollFlags::EPOLLIN,
            Interest::HangUp => EpollFlags::empty(),
            Interest::Exceptional => EpollFlags::EPOLLPRI,
            Interest::Writable => EpollFlags::EPOLLOUT,
        };
        if let Some(number) = self.number {
            let mut event = EpollEvent::new(flags, number);
            return Ok(self.registry.epoll.modify(descriptor, &mut event)?);
        }
        let number = self.registry.next.get();
        let event = EpollEvent::new(flags, number);
        self.registry.epoll.add(descriptor, event)?;
        self.registry.next.set(number + 1);
        self.registry.tokens.borrow_mut().insert(number, self.token);
        self.number = Some(number);
        Ok(())
    }

    /// Deregisters it.
    pub(super) fn unwatch(&mut self) {
        if let Some(number) = self.number.take() {
            self.registry.tokens.borrow_mut().remove(&number);
            // The kernel deregisters a descriptor that is closed.
            if let Some(descriptor) = self.inner.descriptor() {
                let _ = self.registry.epoll.delete(descriptor);
            }
        }
    }

    /// Whether it is registered.
    pub(super) fn is_watched(&self) -> bool {
        self.number.is_some()
    }
}

impl<F: Pollable> Drop for Source<F> {
    fn drop(&mut self) {
        self.unwatch();
    }
}

impl<F: Pollable> Deref for Source<F> {
    type Target = F;

    fn deref(&self) -> &F {
        &self.inner
    }
}

impl<F: Pollable> DerefMut for Source<F> {
    fn deref_mut(&mut self) -> &mut F {
        &mut self.inner
    }
}

#[cfg(test)]
#[path = "event_loop_tests.rs"]
mod tests;
