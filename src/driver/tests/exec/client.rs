//! Clients that disappear.

use tokio::time::Instant;

use super::*;

const MINUTE: Duration = Duration::from_secs(60);

/// Waits for the end of the command's input. Returns how long that took in seconds.
async fn until_hung_up(exec: &mut Exec) -> u64 {
    let start = Instant::now();
    let stdin = exec.other.stdin.as_mut().unwrap();
    let mut input = Vec::new();
    stdin.read_to_end(&mut input).await.unwrap();
    start.elapsed().as_secs()
}

#[tokio::test(start_paused = true)]
async fn a_client_whose_heartbeat_stops_is_gone() {
    let mut exec = Exec::start([heartbeat()]).await;
    assert_eq!(until_hung_up(&mut exec).await, 60);
    // The command may end by itself.
    assert!(!exec.other.is_ended());
    let hung_up = Instant::now();
    let other = std::mem::replace(&mut exec.other, piped().1);
    let mut events = exec.driver.events.subscribe();
    let end = async {
        other.ended().await;
        let waited = hung_up.elapsed();
        drop(other);
        waited
    };
    let (received, waited) = tokio::join!(received(exec.responses), end);
    assert_eq!(waited.as_secs(), 1);
    let text = "the client has sent nothing for 60 s";
    assert_eq!(received.error, Some((Code::Aborted, text.to_owned())));
    let event = events.recv().await.unwrap();
    assert_eq!(event.message, format!("exec failed: {text}"));
    assert_eq!(event.task.id, ID);
}

#[tokio::test(start_paused = true)]
async fn a_command_that_ends_when_its_client_is_gone_is_not_waited_for() {
    let mut exec = Exec::start([heartbeat()]).await;
    until_hung_up(&mut exec).await;
    let start = Instant::now();
    exec.other.exit(0);
    assert_eq!(exec.received().await.error.unwrap().0, Code::Aborted);
    assert_eq!(start.elapsed().as_secs(), 0);
}

#[tokio::test(start_paused = true)]
async fn every_message_shows_that_the_client_is_there() {
    let mut exec = Exec::start([heartbeat()]).await;
    for message in [heartbeat(), data("x"), size(1, 1), data("")] {
        tokio::time::sleep(MINUTE - Duration::from_secs(1)).await;
        exec.send(message).await;
    }
    assert_eq!(until_hung_up(&mut exec).await, 60);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_sends_no_heartbeat_is_left_alone() {
    let mut exec = Exec::start([data("x")]).await;
    tokio::time::sleep(100 * MINUTE).await;
    exec.send(close("y")).await;
    assert_eq!(exec.stdin().await, b"xy");
    exec.other.exit(0);
    assert_eq!(exec.received().await.error, None);
}

/// Messages that wait because the command does not read its input may be heartbeats.
#[tokio::test(start_paused = true)]
async fn a_client_is_not_silent_while_its_messages_wait() {
    let mut exec = Exec::start([heartbeat()]).await;
    let sent = fill(&exec, 32 * 1024).await;
    tokio::time::sleep(10 * MINUTE).await;
    let stdin = exec.other.stdin.as_mut().unwrap();
    let mut all = vec![0; sent];
    stdin.read_exact(&mut all).await.unwrap();
    assert_eq!(until_hung_up(&mut exec).await, 60);
}

#[tokio::test(start_paused = true)]
async fn a_stream_without_more_messages_is_not_silent() {
    let mut exec = Exec::start([heartbeat()]).await;
    exec.messages = mpsc::channel(1).0;
    tokio::time::sleep(10 * MINUTE).await;
    assert!(!exec.other.is_ended());
    exec.other.exit(0);
    assert_eq!(exec.received().await.ends.last().unwrap(), "exit 0 0");
}

#[tokio::test]
async fn a_call_that_is_cancelled_ends_the_command() {
    let exec = Exec::start([]).await;
    drop(exec.responses);
    timeout(LIMIT, exec.other.ended()).await.unwrap();
}

#[tokio::test]
async fn a_connection_that_fails_ends_the_command() {
    let mut exec = Exec::start([]).await;
    let failed = Err(Status::unknown("broken"));
    exec.messages.send(failed).await.unwrap();
    timeout(LIMIT, exec.other.ended()).await.unwrap();
    exec.other.kill();
    let error = exec.received().await.error.unwrap();
    assert_eq!(error.1, "the connection to the client is lost");
}

#[tokio::test]
async fn the_stream_ends_when_nothing_of_the_session_is_left() {
    let mut exec = Exec::start([]).await;
    let rest = exec.other.rest.take();
    exec.other.exit(0);
    loop {
        let response = timeout(LIMIT, exec.responses.next()).await.unwrap();
        if response.unwrap().unwrap().exited {
            break;
        }
    }
    timeout(LIMIT, exec.other.ended()).await.unwrap();
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    let mut next = Box::pin(exec.responses.next());
    let polled = std::future::poll_fn(|context| Poll::Ready(next.as_mut().poll(context)));
    assert!(polled.await.is_pending());
    drop(rest);
    assert!(timeout(LIMIT, next).await.unwrap().is_none());
}
