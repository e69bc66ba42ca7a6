//! Tests of the plugin's end of the control socket.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use super::*;
use crate::supervisor::protocol::MAX_LINE_BYTES;
use rstest::rstest;

/// A process to wait for; dropping this kills it.
#[derive(Debug)]
struct Sleeper(std::process::Child);

impl Sleeper {
    #[expect(clippy::disallowed_methods, reason = "a process to wait for")]
    fn new() -> Self {
        let mut command = std::process::Command::new("sleep");
        Self(command.arg("600").spawn().unwrap())
    }

    fn process(&self) -> Process {
        let pid = i32::try_from(self.0.id()).unwrap();
        ProcessHandle::open(pid).unwrap().process()
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The blocking pool has one thread here: a wait that occupied it would keep the other waits from finishing.
#[test]
fn many_departures_are_awaited_without_a_thread_each() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(1)
        .build()
        .unwrap();
    let mut all = [Sleeper::new(), Sleeper::new(), Sleeper::new()];
    let names = all.each_ref().map(Sleeper::process);
    all[2].0.kill().unwrap();
    runtime.block_on(async {
        tokio::select! {
            biased;
            () = wait_for_exit(names[0]) => panic!("the first has not ended"),
            () = wait_for_exit(names[1]) => panic!("the second has not ended"),
            () = wait_for_exit(names[2]) => {}
        }
    });
}

/// A container whose supervisor is played by this test.
struct Odd {
    _temp: tempfile::TempDir,
    task_dir: TaskDir,
    leader: Sleeper,
    started: Started,
}

impl Odd {
    fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        let task_dir = TaskDir::new(temp.path().join("x"));
        task_dir.create().unwrap();
        let leader = Sleeper::new();
        let started = Started {
            state: task_dir.path().to_owned(),
            leader: leader.process(),
            ..Started::for_test("a/t/1", &crate::sys::kernel::boot_id().unwrap())
        };
        let running = crate::state::task_dir::Running {
            started: started.clone(),
            nspawn: leader.process(),
            copy: None,
            uids: None,
            alloc_dir: None,
        };
        task_dir.write_running(&running).unwrap();
        Self {
            _temp: temp,
            task_dir,
            leader,
            started,
        }
    }

    /// The client of a plugin that has reconnected, and the supervisor's end of the connection.
    async fn attached(&self, socket: Socket) -> (SupervisorClient, Peer) {
        let stream = UnixListener::bind(self.task_dir.control_stream()).unwrap();
        stream.set_nonblocking(true).unwrap();
        let packets = (socket == Socket::Packets)
            .then(|| packets::listen(&self.task_dir.control_socket()).unwrap());
        let tracker = TaskTracker::new();
        let found = attach(
            &self.task_dir,
            &self.started,
            StartNotes::default(),
            &tracker,
        )
        .await;
        let connection = match packets {
            Some(packets) => packets::accept(packets).unwrap(),
            None => stream.accept().unwrap().0.into(),
        };
        (found.unwrap().unwrap(), Peer(connection, socket))
    }
}

/// What a supervisor listens on: a supervisor of this driver on both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Socket {
    Packets,
    Stream,
}

/// The supervisor's end of a connection.
struct Peer(OwnedFd, Socket);

impl Peer {
    /// Sends this text as one message.
    fn send(&self, text: &str) {
        match self.1 {
            Socket::Packets => self.send_raw(text.as_bytes(), &[]),
            Socket::Stream => self.send_raw(format!("{text}\n").as_bytes(), &[]),
        }
    }

    /// Waits for a request.
    async fn readable(&self) {
        use nix::poll::{PollFd, PollFlags, poll};
        let socket = self.0.try_clone().unwrap();
        let ready = tokio::task::spawn_blocking(move || {
            poll(
                &mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)],
                60_000u16,
            )
        });
        assert_eq!(ready.await.unwrap(), Ok(1));
    }

    /// Sends without the limits of the driver. The client may have closed the connection before everything is sent.
    fn send_raw(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        rustix::io::ioctl_fionbio(&self.0, false).unwrap();
        let bytes = [std::io::IoSlice::new(bytes)];
        let _ = sendmsg(&self.0, &bytes, &mut control, SendFlags::NOSIGNAL);
    }
}

fn text(event: &Event) -> String {
    String::from_utf8(packets::encode(event)).unwrap()
}

#[rstest]
#[tokio::test]
async fn news_that_are_not_known_are_passed_over(
    #[values(Socket::Packets, Socket::Stream)] socket: Socket,
) {
    let odd = Odd::new();
    let (one, supervisor) = odd.attached(socket).await;
    supervisor.send(r#"{"thawed":{"by":1}}"#);
    supervisor.send(&text(&Event::Started(odd.started.clone())));
    let up = one.start_outcome().await;
    assert!(
        matches!(&up, Status::Up(started) if **started == odd.started),
        "{up:?}"
    );
    let pending = tokio::spawn({
        let one = one.clone();
        async move { one.request(Action::Stop).await }
    });
    supervisor.readable().await;
    supervisor.send(r#"{"frozen":{}}"#);
    supervisor.send(r#"{"done":{"request":1,"error":"no","since":2}}"#);
    assert_eq!(pending.await.unwrap(), Err("no".to_owned()));
    assert!(crate::sys::process::is_alive(odd.leader.process()));
}

const STARTED_IN_PART: &str = r#"{"started":{"id":1}}"#;

#[rstest]
#[case::no_message(Socket::Stream, vec![b"nonsense\n".to_vec()])]
#[case::half_known(Socket::Stream, vec![STARTED_IN_PART.into(), b"\nnull\n".to_vec()])]
#[case::no_text(Socket::Stream, vec![vec![0xff, b'\n']])]
#[case::without_end(Socket::Stream, vec![vec![b' '; MAX_LINE_BYTES + 100_000]])]
#[case::no_packet(Socket::Packets, vec![b"nonsense".to_vec()])]
#[case::half_known_packets(Socket::Packets, vec![STARTED_IN_PART.into(), b"null".to_vec()])]
#[case::empty(Socket::Packets, vec![Vec::new()])]
#[case::too_long(Socket::Packets, vec![vec![b' '; packets::MAX_PACKET_BYTES + 1]])]
#[tokio::test]
async fn after_an_invalid_message_the_container_is_killed(
    #[case] socket: Socket,
    #[case] sent: Vec<Vec<u8>>,
) {
    let odd = Odd::new();
    let (one, supervisor) = odd.attached(socket).await;
    for bytes in sent {
        // The client reads concurrently: a stream's buffer does not hold the longest.
        let supervisor = Peer(supervisor.0.try_clone().unwrap(), socket);
        let sent = tokio::task::spawn_blocking(move || supervisor.send_raw(&bytes, &[]));
        sent.await.unwrap();
    }
    is_killed(odd, one).await;
}

#[tokio::test]
async fn descriptors_that_an_event_does_not_take_are_an_invalid_message() {
    let odd = Odd::new();
    let (one, supervisor) = odd.attached(Socket::Packets).await;
    let null = File::open("/dev/null").unwrap();
    // An event that is not known may take some.
    supervisor.send_raw(br#"{"frozen":{}}"#, &[null.as_fd()]);
    let started = text(&Event::Started(odd.started.clone()));
    supervisor.send(&started);
    assert!(matches!(one.start_outcome().await, Status::Up(_)));
    supervisor.send_raw(started.as_bytes(), &[null.as_fd()]);
    is_killed(odd, one).await;
}

/// The client kills the container and records why.
async fn is_killed(mut odd: Odd, one: SupervisorClient) {
    let reaping = std::thread::spawn(move || odd.leader.0.wait().map(|status| (status, odd)));
    let end = one.end().await.unwrap();
    let (status, odd) = reaping.join().unwrap().unwrap();
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&status),
        Some(9)
    );
    let error = end.error.as_deref().unwrap_or_default();
    let expected = "its supervisor sent an invalid message";
    assert!(error.contains(expected), "{error}");
    assert_eq!(odd.task_dir.exit().unwrap(), Some(end));
}

/// Answers as a supervisor of a driver without a packet socket does: with the recorded events, on a stream. Returns the requests.
fn old_supervisor(listener: UnixListener) -> Vec<String> {
    const EVENTS: &str = include_str!("frozen/news.jsonl");
    let send = |mut stream: &UnixStream, start: &str| {
        let event = EVENTS.lines().find(|event| event.starts_with(start));
        writeln!(stream, "{}", event.unwrap()).unwrap();
    };
    let (stream, _) = listener.accept().unwrap();
    send(&stream, r#"{"started""#);
    let mut requests = Vec::new();
    let mut lines = BufReader::new(&stream).lines();
    for answer in [r#"{"done":{"request":1"#, r#"{"done":{"request":2"#] {
        requests.push(lines.next().unwrap().unwrap());
        send(&stream, answer);
    }
    send(&stream, r#"{"exited""#);
    requests
}

#[tokio::test]
async fn a_supervisor_of_a_driver_without_packets_is_controlled() {
    let odd = Odd::new();
    let listener = UnixListener::bind(odd.task_dir.control_stream()).unwrap();
    let supervisor = std::thread::spawn(move || old_supervisor(listener));
    let tracker = TaskTracker::new();
    let found = attach(&odd.task_dir, &odd.started, StartNotes::default(), &tracker).await;
    let one = found.unwrap().unwrap();
    let up = one.start_outcome().await;
    assert!(
        matches!(&up, Status::Up(started) if started.machine == "web-0f1e2d3c"),
        "{up:?}"
    );
    assert_eq!(one.request(Action::Signal(15)).await, Ok(()));
    assert_eq!(one.request(Action::Stop).await, Err("why".to_owned()));
    let end = one.end().await.unwrap();
    assert_eq!((end.code, end.oom_killed), (137, true));
    one.wait_until_gone().await;
    let requests = supervisor.join().unwrap();
    let recorded = include_str!("frozen/requests.jsonl");
    assert_eq!(requests, Vec::from_iter(recorded.lines().take(2)));
}

/// Such as one whose container is not up yet. After the end, the connection shows how long resources are released.
#[rstest]
#[tokio::test]
async fn a_supervisor_without_a_running_record_is_asked_and_waited_for(
    #[values(Socket::Packets, Socket::Stream)] socket: Socket,
) {
    let odd = Odd::new();
    let stream = UnixListener::bind(odd.task_dir.control_stream()).unwrap();
    let sockets = (socket == Socket::Packets)
        .then(|| packets::listen(&odd.task_dir.control_socket()).unwrap());
    let client = attach_unrecorded(&odd.task_dir, &TaskTracker::new()).await;
    let client = client.unwrap();
    let connection = match sockets {
        Some(listener) => packets::accept(listener).unwrap(),
        None => stream.accept().unwrap().0.into(),
    };
    let supervisor = Peer(connection, socket);
    let answer = async {
        supervisor.readable().await;
        supervisor.send(&text(&Event::Done {
            request: 1,
            error: None,
        }));
    };
    let (asked, ()) = tokio::join!(client.request(Action::Kill), answer);
    asked.unwrap();
    let failure = StartFailure::new(StartStep::Nspawn, Cause::Unknown, "killed");
    supervisor.send(&text(&Event::Failed(failure)));
    assert_eq!(client.end().await, None);
    assert!(client.is_connected(), "it is still releasing");
    drop(supervisor);
    client.wait_until_gone().await;
    assert!(!client.is_connected());
}
