//! Sessions with a terminal: a real one of this host, whose other side the test has.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, open as open_file};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::tcgetwinsize;

use super::other_side::{piped, session};
use super::*;
use crate::exec::{Streams, Terminal};

/// A new terminal: the master side, and the side of the command. `None` if this user can't open one.
fn terminal() -> Option<(OwnedFd, File)> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let Ok(master) = open_file("/dev/pts/ptmx", flags, Mode::empty()) else {
        support::not_applicable("only root can open /dev/pts/ptmx on this host");
        return None;
    };
    unlockpt(&master).unwrap();
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let side = ioctl_tiocgptpeer(&master, flags).unwrap();
    Some((master, File::from(side)))
}

/// A session with this master side whose command runs.
fn with(master: &OwnedFd) -> (Session, OtherSide) {
    let terminal = Terminal::new(master.try_clone().unwrap()).unwrap();
    let (session, other) = session(Streams::Terminal(terminal));
    other.report(&SessionEvent::Running);
    (session, other)
}

impl Exec {
    /// A session with a terminal, and the command's side of that.
    async fn with_terminal(messages: Vec<Message>) -> Option<(Self, File)> {
        let (master, side) = terminal()?;
        let exec = Self::of(move || with(&master), true, messages).await;
        Some((exec, side))
    }

    /// Reads output until it ends with these words.
    async fn until(&mut self, words: &str) -> String {
        let mut output = String::new();
        while !output.ends_with(words) {
            let response = timeout(LIMIT, self.responses.next()).await.unwrap();
            let operation = response.unwrap().unwrap().stdout.unwrap();
            output.push_str(std::str::from_utf8(&operation.data).unwrap());
        }
        output
    }
}

/// What `side` can read without waiting for long.
async fn read(side: &File) -> String {
    let mut side = side.try_clone().unwrap();
    let read = tokio::task::spawn_blocking(move || {
        let mut buffer = [0; 4096];
        let count = side.read(&mut buffer).unwrap();
        String::from_utf8(buffer[..count].to_vec()).unwrap()
    });
    timeout(LIMIT, read).await.unwrap().unwrap()
}

#[tokio::test]
async fn the_size_that_is_sent_first_is_that_of_the_start() {
    let sizes = [size(50, 60), size(100, 101)];
    let expected = TerminalSize {
        rows: 100,
        columns: 101,
    };
    let exec = Exec::of(piped, true, sizes.clone()).await;
    assert_eq!(exec.request.terminal, Some(expected));
    let exec = Exec::of(piped, false, sizes.clone()).await;
    assert_eq!(exec.request.terminal, None);
    // Nothing that is read in search of it is lost.
    let after = [size(100, 101), data("one "), size(1, 1), close("two")];
    let mut exec = Exec::of(piped, true, after).await;
    assert_eq!(exec.request.terminal, Some(expected));
    assert_eq!(exec.stdin().await, b"one two");
    let mut exec = Exec::of(piped, true, [close("one"), size(1, 1)]).await;
    assert_eq!(exec.request.terminal, Some(TerminalSize::default()));
    assert_eq!(exec.stdin().await, b"one");
}

#[tokio::test(start_paused = true)]
async fn a_size_is_not_waited_for_long() {
    let start = tokio::time::Instant::now();
    let exec = Exec::of(piped, true, []).await;
    assert_eq!(exec.request.terminal, Some(TerminalSize::default()));
    assert_eq!(start.elapsed().as_millis(), 20);
    let (mock, _others) = sessions(piped);
    let (driver, _end) = running(mock).await;
    let (sender, receiver) = mpsc::channel(1);
    sender.send(Ok(setup(&["x"], true))).await.unwrap();
    drop(sender);
    // Nor where no message can follow.
    driver
        .exec_stream(ReceiverStream::new(receiver))
        .await
        .unwrap();
}

#[tokio::test]
async fn sizes_are_limited_to_what_a_terminal_can_have() {
    for (given, rows, columns) in [
        (size(i32::MAX, 70_000), u16::MAX, u16::MAX),
        (size(0, 10), 24, 80),
        (size(10, -1), 24, 80),
        (size(1, 65_535), 1, 65_535),
    ] {
        let exec = Exec::of(piped, true, [given.clone()]).await;
        let expected = TerminalSize { rows, columns };
        assert_eq!(exec.request.terminal, Some(expected), "{given:?}");
    }
}

#[tokio::test]
async fn a_terminal_is_resized_and_echoes_what_is_typed() {
    let Some((mut exec, side)) = Exec::with_terminal(vec![]).await else {
        return;
    };
    for (rows, columns) in [(10, 20), (30, 40)] {
        exec.send(size(rows, columns)).await;
    }
    exec.send(size(0, 5)).await;
    exec.send(data("hello\n")).await;
    assert_eq!(exec.until("hello\r\n").await, "hello\r\n");
    assert_eq!(read(&side).await, "hello\n");
    let now = tcgetwinsize(&side).unwrap();
    assert_eq!((now.ws_row, now.ws_col), (30, 40));
    (&side).write_all(b"bye\n").unwrap();
    assert_eq!(exec.until("bye\r\n").await, "bye\r\n");
    exec.other.exit(3);
    let received = exec.received().await;
    assert_eq!(received.ends, ["stdout", "exit 3 0"]);
}

/// In the protocol it is the end of the input, but a terminal has none of its own.
#[tokio::test]
async fn a_close_is_ctrl_d_and_no_hang_up() {
    let Some((exec, side)) = Exec::with_terminal(vec![]).await else {
        return;
    };
    exec.send(close("")).await;
    assert_eq!(read(&side).await, "");
    exec.send(data("more\n")).await;
    assert_eq!(read(&side).await, "more\n");
}

/// A process in the background still has the terminal open.
#[tokio::test]
async fn output_before_the_exit_is_complete_and_what_follows_is_not_waited_for() {
    let Some((mut exec, side)) = Exec::with_terminal(vec![]).await else {
        return;
    };
    (&side).write_all(&[b'x'; 4000]).unwrap();
    exec.other.exit(0);
    let received = timeout(LIMIT, exec.received()).await.unwrap();
    assert_eq!(received.stdout, [b'x'; 4000]);
    assert_eq!(received.ends, ["stdout", "exit 0 0"]);
    drop(side);
}

#[tokio::test(start_paused = true)]
async fn a_terminal_that_is_opened_again_is_read_again() {
    let Some((master, side)) = terminal() else {
        return;
    };
    let again = master.try_clone().unwrap();
    let mut exec = Exec::of(move || with(&master), true, []).await;
    drop(side);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let side = ioctl_tiocgptpeer(&again, flags).unwrap();
    File::from(side.try_clone().unwrap())
        .write_all(b"again\n")
        .unwrap();
    assert_eq!(exec.until("again\r\n").await, "again\r\n");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_gone_hangs_up() {
    let Some((master, side)) = terminal() else {
        return;
    };
    let master = std::sync::Mutex::new(Some(master));
    // The session has the only descriptor of the master side.
    let make = move || with(&master.lock().unwrap().take().unwrap());
    let mut exec = Exec::of(make, true, [heartbeat()]).await;
    exec.other.rest = None;
    let other = std::mem::replace(&mut exec.other, piped().1);
    let start = tokio::time::Instant::now();
    let (received, ()) = tokio::join!(exec.received(), other.ended());
    assert_eq!(received.error.unwrap().0, Code::Aborted);
    assert_eq!(start.elapsed().as_secs(), 61);
    // After a hang-up nothing can be written.
    let error = (&side).write_all(b"x").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(5));
}
