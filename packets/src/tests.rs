//! Tests of packets: what arrives, what is rejected, and that nothing is left open of it.

use std::fs::File;
use std::io::{Read, Write};

use rustix::io::{FdFlags, fcntl_getfd};

use super::*;

/// A pipe: read end, write end.
fn pipe() -> (File, OwnedFd) {
    let (read, write) = std::io::pipe().unwrap();
    (File::from(OwnedFd::from(read)), write.into())
}

/// Sends without the limits of [`send`].
fn send_raw(socket: &OwnedFd, message: &[u8], descriptors: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    }
    let slices = [IoSlice::new(message)];
    sendmsg(socket, &slices, &mut control, SendFlags::NOSIGNAL).unwrap();
}

fn kind<T: fmt::Debug>(result: io::Result<T>) -> io::ErrorKind {
    result.unwrap_err().kind()
}

/// No process holds the write end of this pipe any more.
fn is_closed(mut read: File) {
    rustix::io::ioctl_fionbio(&read, true).unwrap();
    assert_eq!(read.read(&mut [0]).unwrap(), 0);
}

#[test]
fn descriptors_arrive_and_are_close_on_exec() {
    let (ours, theirs) = pair().unwrap();
    let (mut read, write) = pipe();
    let (other_read, other_write) = pipe();
    let sent = [write.as_fd(), other_read.as_fd(), other_write.as_fd()];
    send(&ours, &encode(&"message"), &sent).unwrap();
    drop(write);
    let packet = receive(&theirs).unwrap();
    assert_eq!(packet.message::<String>(), Ok("message".to_owned()));
    let received: [OwnedFd; 3] = packet.descriptors.take().unwrap();
    for descriptor in &received {
        assert_eq!(fcntl_getfd(descriptor).unwrap(), FdFlags::CLOEXEC);
    }
    let [write, _, _] = received;
    File::from(write).write_all(b"through it").unwrap();
    let mut text = String::new();
    read.read_to_string(&mut text).unwrap();
    assert_eq!(text, "through it");
}

#[test]
fn a_wrong_number_of_descriptors_is_refused_and_they_are_closed() {
    let (ours, theirs) = pair().unwrap();
    // 64 exceed the space that is provided for them.
    for count in [1, 2, 4, 5, 64] {
        let (read, write) = pipe();
        send_raw(&ours, b"1", &vec![write.as_fd(); count]);
        drop(write);
        let packet = receive(&theirs).unwrap();
        assert_eq!(packet.message::<u8>(), Ok(1));
        assert!(packet.descriptors.take::<3>().is_err(), "{count}");
        is_closed(read);
    }
    let null = File::open("/dev/null").unwrap();
    for count in [1, 64] {
        send_raw(&ours, b"1", &vec![null.as_fd(); count]);
        let packet = receive(&theirs).unwrap();
        assert_eq!(
            packet.descriptors.take::<0>().unwrap_err(),
            WrongDescriptors
        );
    }
    send(&ours, b"1", &[]).unwrap();
    assert!(receive(&theirs).unwrap().descriptors.take::<0>().is_ok());
}

#[test]
fn what_is_too_much_is_not_sent() {
    let (ours, theirs) = pair().unwrap();
    let null = File::open("/dev/null").unwrap();
    let error = send(&ours, b"1", &[null.as_fd(); MAX_DESCRIPTORS + 1]).unwrap_err();
    assert_eq!(Errno::from_io_error(&error), Some(Errno::INVAL));
    let error = send(&ours, &[b' '; MAX_PACKET_BYTES + 1], &[]).unwrap_err();
    assert_eq!(Errno::from_io_error(&error), Some(Errno::MSGSIZE));
    assert_eq!(kind(receive(&theirs)), io::ErrorKind::WouldBlock);
}

#[test]
fn the_longest_packet_arrives_and_a_longer_one_is_rejected() {
    let (ours, theirs) = pair().unwrap();
    let mut longest = b"1".to_vec();
    longest.resize(MAX_PACKET_BYTES, b' ');
    send(&ours, &longest, &[]).unwrap();
    assert_eq!(receive(&theirs).unwrap().message::<u8>(), Ok(1));
    longest.push(b' ');
    let (read, write) = pipe();
    send_raw(&ours, &longest, &[write.as_fd()]);
    drop(write);
    send(&ours, b"2", &[]).unwrap();
    let packet = receive(&theirs).unwrap();
    assert_eq!(packet.message::<u8>(), Err(Malformed::TooLong));
    assert_eq!(packet.bytes.capacity(), 0);
    drop(packet);
    is_closed(read);
    assert_eq!(receive(&theirs).unwrap().message::<u8>(), Ok(2));
}

#[test]
fn a_buffer_is_as_long_as_its_packet() {
    let (ours, theirs) = pair().unwrap();
    send(&ours, &encode(&"message"), &[]).unwrap();
    assert_eq!(receive(&theirs).unwrap().bytes.capacity(), 9);
}

#[test]
fn an_empty_packet_is_no_end_of_the_connection() {
    let (ours, theirs) = pair().unwrap();
    let (read, write) = pipe();
    send_raw(&ours, b"", &[write.as_fd()]);
    drop(write);
    send(&ours, b"2", &[]).unwrap();
    let packet = receive(&theirs).unwrap();
    assert!(packet.message::<u8>().is_err());
    drop(packet);
    is_closed(read);
    assert_eq!(receive(&theirs).unwrap().message::<u8>(), Ok(2));
    assert_eq!(kind(receive(&theirs)), io::ErrorKind::WouldBlock);
    drop(ours);
    assert_eq!(kind(receive(&theirs)), io::ErrorKind::UnexpectedEof);
}

#[test]
fn what_a_peer_sent_before_it_was_gone_is_received() {
    for unread in [false, true] {
        let (ours, theirs) = pair().unwrap();
        if unread {
            send(&theirs, b"0", &[]).unwrap();
        }
        let (mut read, write) = pipe();
        send(&ours, b"1", &[write.as_fd()]).unwrap();
        drop(write);
        send(&ours, b"2", &[]).unwrap();
        drop(ours);
        let packet = receive(&theirs).unwrap();
        assert_eq!(packet.message::<u8>(), Ok(1));
        let [write] = packet.descriptors.take().unwrap();
        File::from(write).write_all(b"x").unwrap();
        assert_eq!(read.read(&mut [0; 9]).unwrap(), 1);
        assert_eq!(receive(&theirs).unwrap().message::<u8>(), Ok(2));
        for _ in 0..2 {
            assert_eq!(kind(receive(&theirs)), io::ErrorKind::UnexpectedEof);
        }
        assert_eq!(kind(send(&theirs, b"3", &[])), io::ErrorKind::BrokenPipe);
    }
}

#[test]
fn a_peer_that_does_not_read_is_not_waited_for() {
    let (ours, theirs) = pair().unwrap();
    // Whatever the flags of the socket.
    rustix::io::ioctl_fionbio(&ours, false).unwrap();
    rustix::io::ioctl_fionbio(&theirs, false).unwrap();
    assert_eq!(kind(receive(&theirs)), io::ErrorKind::WouldBlock);
    let error = std::iter::repeat_with(|| send(&ours, &[b' '; 4096], &[])).find_map(Result::err);
    assert_eq!(error.unwrap().kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn the_sender_is_reported_on_request() {
    let (ours, theirs) = pair().unwrap();
    send(&ours, b"1", &[]).unwrap();
    assert_eq!(receive(&theirs).unwrap().sender, None);
    report_senders(&theirs).unwrap();
    let null = File::open("/dev/null").unwrap();
    send(&ours, b"1", &[null.as_fd(); MAX_DESCRIPTORS]).unwrap();
    let packet = receive(&theirs).unwrap();
    let own = i32::try_from(std::process::id()).unwrap();
    assert_eq!(packet.sender, Some(own));
    assert!(packet.descriptors.take::<MAX_DESCRIPTORS>().is_ok());
}

#[test]
fn a_listener_accepts_connections() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    assert_eq!(kind(connect(&path)), io::ErrorKind::NotFound);
    let listener = listen(&path).unwrap();
    assert_eq!(kind(accept(&listener)), io::ErrorKind::WouldBlock);
    let ours = connect(&path).unwrap();
    let theirs = accept(&listener).unwrap();
    for socket in [&listener, &ours, &theirs] {
        assert_eq!(fcntl_getfd(socket).unwrap(), FdFlags::CLOEXEC);
    }
    send(&ours, b"1", &[]).unwrap();
    assert_eq!(receive(&theirs).unwrap().message::<u8>(), Ok(1));
    // Sent before the connection was accepted.
    let ours = connect(&path).unwrap();
    send(&ours, b"2", &[]).unwrap();
    drop(ours);
    let theirs = accept(&listener).unwrap();
    assert_eq!(receive(&theirs).unwrap().message::<u8>(), Ok(2));
    drop(listener);
    assert_eq!(kind(connect(&path)), io::ErrorKind::ConnectionRefused);
}

#[test]
fn no_error_and_no_debug_form_shows_the_content() {
    let (ours, theirs) = pair().unwrap();
    send(&ours, &encode(&"s3cret"), &[]).unwrap();
    let packet = receive(&theirs).unwrap();
    let error = packet.message::<u8>().unwrap_err();
    for text in [format!("{packet:?}"), format!("{error:?} {error}")] {
        assert!(!text.contains("s3cret"), "{text}");
    }
}
