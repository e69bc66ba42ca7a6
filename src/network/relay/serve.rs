//! The child that forwards what arrives at the sockets of a start. It has no privileges and no environment, reads nothing from the disk, and
//! sees only what it forwards.

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::select_ok;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream, UdpSocket, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use super::datagrams;
use super::{Order, Port};
use crate::sys::process::close_inherited;

/// How long a connection over IPv6 is waited for before one over IPv4 is tried beside it.
const HEAD_START: Duration = Duration::from_millis(250);

/// How long a container may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// How long nothing is accepted after accept(2) has failed, for example because no descriptors are left.
const RETRY_DELAY: Duration = Duration::from_millis(100);

/// The descriptors that this process may have, if the host allows it as many. A connection needs two.
const DESCRIPTORS: u64 = 16 * 1024;

/// How many of those are not for connections.
const RESERVED: usize = 512;

/// Where a port is forwarded to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    pub(super) six: SocketAddr,
    pub(super) four: SocketAddr,
}

/// Serves the sockets that standard input brings, until the process that has started this one closes the other end, or dies.
pub fn run() -> ExitCode {
    close_inherited();
    match prepare().and_then(|(order, sockets, lifeline)| serve(&order, sockets, lifeline)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "relay: {error}");
            ExitCode::FAILURE
        }
    }
}

fn prepare() -> io::Result<(Order, VecDeque<OwnedFd>, OwnedFd)> {
    let input = io::stdin().as_fd().try_clone_to_owned()?;
    let (order, sockets) = receive(&input)?;
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    // It may have died before that.
    if std::os::unix::process::parent_id() != order.parent {
        return Err(io::Error::other("the process that has started it is gone"));
    }
    std::env::set_current_dir("/")?;
    drop_privileges()?;
    Ok((order, sockets, input))
}

/// Everything has been sent before this process was started.
fn receive(input: &OwnedFd) -> io::Result<(Order, VecDeque<OwnedFd>)> {
    let packet = packets::receive(input)?;
    let order: Order = packet.message().map_err(io::Error::other)?;
    let mut sockets = VecDeque::new();
    for port in &order.ports {
        let given = packets::receive(input)?.descriptors;
        match (port.tcp, port.udp) {
            (true, true) => sockets.extend(given.take::<2>().map_err(io::Error::other)?),
            _ => sockets.extend(given.take::<1>().map_err(io::Error::other)?),
        }
    }
    Ok((order, sockets))
}

/// All that it needs is open.
fn drop_privileges() -> io::Result<()> {
    use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs};
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(
        Resource::RLIMIT_NOFILE,
        soft.max(DESCRIPTORS).min(hard),
        hard,
    )?;
    set_no_new_privs(true)?;
    let none = CapabilitySet::empty();
    set_capabilities(
        None,
        CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        },
    )?;
    Ok(())
}

fn serve(order: &Order, mut sockets: VecDeque<OwnedFd>, lifeline: OwnedFd) -> io::Result<()> {
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let limit = usize::try_from(limit)
        .unwrap_or(usize::MAX)
        .min(usize::from(u16::MAX));
    let connections = Arc::new(Semaphore::new((limit.saturating_sub(RESERVED) / 2).max(16)));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        for Port {
            container,
            tcp,
            udp,
        } in order.ports.iter().copied()
        {
            let target = Target {
                six: (order.address6, container).into(),
                four: (order.address, container).into(),
            };
            if tcp && let Some(socket) = sockets.pop_front() {
                let listener = TcpListener::from_std(socket.into())?;
                tokio::spawn(accept(listener, target, Arc::clone(&connections)));
            }
            if udp && let Some(socket) = sockets.pop_front() {
                let socket = UdpSocket::from_std(socket.into())?;
                tokio::spawn(datagrams::forward(socket, target));
            }
        }
        // Nothing more is ever sent, so it becomes readable only when the other end is closed.
        let lifeline = UnixStream::from_std(lifeline.into())?;
        lifeline.readable().await
    })
}

async fn accept(listener: TcpListener, target: Target, connections: Arc<Semaphore>) {
    loop {
        // Those for which there is no room wait in the kernel.
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((client, _)) => drop(tokio::spawn(async move {
                forward(client, target).await;
                drop(permit);
            })),
            Err(_) => sleep(RETRY_DELAY).await,
        }
    }
}

/// One connection, until both sides have closed it. A side that has only ended its own sending still receives.
async fn forward(mut client: TcpStream, target: Target) {
    let Some(mut container) = connect(target).await else {
        reset(&client);
        return;
    };
    for side in [&client, &container] {
        // Without it small packets would wait for others.
        let _ = side.set_nodelay(true);
    }
    if copy_bidirectional(&mut client, &mut container)
        .await
        .is_err()
    {
        // What has been cut off must not look complete.
        reset(&client);
        reset(&container);
    }
}

/// Makes the close of this connection an error for the other side.
fn reset(side: &TcpStream) {
    let _ = side.set_zero_linger();
}

/// Over IPv6; over IPv4 if the container does not listen there, or does not answer soon.
async fn connect(target: Target) -> Option<TcpStream> {
    let connecting = async {
        let mut six = Box::pin(TcpStream::connect(target.six));
        let four = Box::pin(TcpStream::connect(target.four));
        match timeout(HEAD_START, &mut six).await {
            Ok(Ok(connected)) => Some(connected),
            Ok(Err(_)) => four.await.ok(),
            Err(_) => race(six, four).await,
        }
    };
    timeout(CONNECT_TIMEOUT, connecting).await.ok().flatten()
}

async fn race(
    six: impl Future<Output = io::Result<TcpStream>> + Send + Unpin,
    four: impl Future<Output = io::Result<TcpStream>> + Send + Unpin,
) -> Option<TcpStream> {
    use futures_util::future::Either;
    let both = [Either::Left(six), Either::Right(four)];
    let (connected, _) = select_ok(both).await.ok()?;
    Some(connected)
}
