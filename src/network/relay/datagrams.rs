//! UDP: each client of a port gets a socket of its own towards the container, so that answers find their way back. What a client may use is
//! bounded, and a client that is silent is forgotten.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::time::{Instant, sleep};

use super::serve::Target;

/// How many clients a port has at the same time. For a new one the one that has been silent longest is forgotten.
const MAX_CLIENTS: usize = 128;

/// How long a client may be silent, in both directions, until it is forgotten. What firewalls use for a stream of datagrams.
const IDLE: Duration = Duration::from_secs(120);

/// How many datagrams may wait for the task of a client; more are lost.
const QUEUE: usize = 32;

/// How many datagrams are kept until it is known that the container receives over IPv6.
const KEPT: usize = 8;

/// The longest datagram.
const MAX_DATAGRAM: usize = 65535;

/// How long nothing is received after recvfrom(2) has failed.
const RETRY_DELAY: Duration = Duration::from_millis(100);

struct Client {
    datagrams: Sender<Vec<u8>>,
    last: Instant,
}

/// Forwards the datagrams of a port for ever.
pub(super) async fn forward(socket: UdpSocket, target: Target) {
    let socket = Arc::new(socket);
    // Whether the container refuses IPv6. What one client finds out holds for the next.
    let only_four = Arc::new(AtomicBool::new(false));
    let mut clients: HashMap<SocketAddr, Client> = HashMap::new();
    loop {
        let (datagram, from) = match receive(&socket).await {
            Ok(received) => received,
            Err(_) => {
                sleep(RETRY_DELAY).await;
                continue;
            }
        };
        let Some(datagram) = pass_on(&mut clients, from, datagram) else {
            continue;
        };
        make_room(&mut clients);
        let (datagrams, theirs) = mpsc::channel(QUEUE);
        // There is room in a new one.
        let _ = datagrams.try_send(datagram);
        let last = Instant::now();
        clients.insert(from, Client { datagrams, last });
        let flow = Flow {
            socket: Arc::clone(&socket),
            client: from,
            target,
            only_four: Arc::clone(&only_four),
        };
        tokio::spawn(async move {
            // If there is no descriptor, what the client sends is lost, as datagrams may be.
            let _ = flow.run(theirs).await;
        });
    }
}

/// Gives a datagram to the task of its client. Returns it if there is no such task (any more).
fn pass_on(
    clients: &mut HashMap<SocketAddr, Client>,
    from: SocketAddr,
    datagram: Vec<u8>,
) -> Option<Vec<u8>> {
    let Some(client) = clients.get_mut(&from) else {
        return Some(datagram);
    };
    client.last = Instant::now();
    match client.datagrams.try_send(datagram) {
        Err(TrySendError::Closed(datagram)) => Some(datagram),
        Ok(()) | Err(TrySendError::Full(_)) => None,
    }
}

/// Leaves room for one more.
fn make_room(clients: &mut HashMap<SocketAddr, Client>) {
    if clients.len() < MAX_CLIENTS {
        return;
    }
    clients.retain(|_, client| !client.datagrams.is_closed());
    if clients.len() >= MAX_CLIENTS {
        let oldest = clients.iter().min_by_key(|(_, client)| client.last);
        if let Some(address) = oldest.map(|(address, _)| *address) {
            clients.remove(&address);
        }
    }
}

/// What one client sends and gets.
struct Flow {
    socket: Arc<UdpSocket>,
    client: SocketAddr,
    target: Target,
    only_four: Arc<AtomicBool>,
}

impl Flow {
    /// Until it has been silent for too long or has been forgotten.
    async fn run(self, mut datagrams: Receiver<Vec<u8>>) -> io::Result<()> {
        let mut four = self.only_four.load(Ordering::Relaxed);
        let mut container = self.connect(four).await?;
        let mut kept = Vec::new();
        // Over IPv4 there is nothing left to change to.
        let mut undecided = !four;
        loop {
            let event = tokio::select! {
                datagram = datagrams.recv() => match datagram {
                    Some(datagram) => {
                        let sent = container.send(&datagram).await;
                        if undecided && kept.len() < KEPT {
                            kept.push(datagram);
                        }
                        sent.map(drop)
                    }
                    None => return Ok(()),
                },
                answer = receive_or_fail(&container) => match answer {
                    Ok(answer) => {
                        undecided = false;
                        kept = Vec::new();
                        // A client that is gone does not need it.
                        let _ = self.socket.send_to(&answer, self.client).await;
                        Ok(())
                    }
                    Err(error) => Err(error),
                },
                () = sleep(IDLE) => return Ok(()),
            };
            // Reported once for what was sent before: nobody listens there, or there is no way.
            if event.is_err() && undecided {
                (four, undecided) = (true, false);
                self.only_four.store(true, Ordering::Relaxed);
                container = self.connect(four).await?;
                for datagram in std::mem::take(&mut kept) {
                    let _ = container.send(&datagram).await;
                }
            } else if event.is_err() && four {
                // The next client tries IPv6 again: the container may listen there only, but not yet.
                self.only_four.store(false, Ordering::Relaxed);
                return Ok(());
            } else if event.is_err() {
                // It no longer listens there.
                undecided = true;
            }
        }
    }

    async fn connect(&self, four: bool) -> io::Result<UdpSocket> {
        let (from, to): (SocketAddr, _) = match four {
            true => ((Ipv4Addr::UNSPECIFIED, 0).into(), self.target.four),
            false => ((Ipv6Addr::UNSPECIFIED, 0).into(), self.target.six),
        };
        let socket = UdpSocket::bind(from).await?;
        socket.connect(to).await?;
        Ok(socket)
    }
}

/// One datagram of a client. The buffer exists only while there is one, so that idle sockets cost little.
async fn receive(socket: &UdpSocket) -> io::Result<(Vec<u8>, SocketAddr)> {
    loop {
        socket.readable().await?;
        let mut buffer = vec![0; MAX_DATAGRAM];
        match socket.try_recv_from(&mut buffer) {
            Ok((length, from)) => return Ok((shortened(buffer, length), from)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// The same of the container, or what the kernel reports of a datagram that was sent to it, which makes a socket not readable but faulty.
async fn receive_or_fail(socket: &UdpSocket) -> io::Result<Vec<u8>> {
    loop {
        socket.ready(Interest::READABLE | Interest::ERROR).await?;
        let mut buffer = vec![0; MAX_DATAGRAM];
        // One after the other: tokio does not know what both together are.
        for interest in [Interest::READABLE, Interest::ERROR] {
            let received = socket.try_io(interest, || {
                let fd = socket.as_raw_fd();
                Ok(recv(fd, &mut buffer, MsgFlags::MSG_DONTWAIT)?)
            });
            match received {
                Ok(length) => return Ok(shortened(buffer, length)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn shortened(mut buffer: Vec<u8>, length: usize) -> Vec<u8> {
    buffer.truncate(length);
    buffer.shrink_to_fit();
    buffer
}
