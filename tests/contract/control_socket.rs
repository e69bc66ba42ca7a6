//! The control sockets of a supervisor, as plugins of other versions of the driver use them.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;

use nix::sys::signal::kill;
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::*;

/// Connects as a plugin does that knows no packets.
fn connect(started: &Started) -> UnixStream {
    let socket = TaskDir::new(&started.state).control_stream();
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plugin_that_knows_no_packets_controls_a_task(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    let stream = connect(&started);
    let exchanged = tokio::task::spawn_blocking(move || {
        let lines = BufReader::new(&stream).lines();
        let mut events = lines.map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
        let mut received = vec![events.next().unwrap()];
        for request in [
            r#"{"request":1,"verb":{"signal":0}}"#,
            r#"{"request":2,"verb":"later"}"#,
            r#"{"request":3,"verb":{"signal":15}}"#,
        ] {
            writeln!(&stream, "{request}").unwrap();
            received.push(events.next().unwrap());
        }
        received.extend(events);
        received
    });
    let received = within(exchanged).await.unwrap();
    let [up, null, unknown, term, exited] = &received[..] else {
        panic!("{received:?}");
    };
    assert_eq!(up["started"]["id"], json!(started.id));
    assert_eq!(null, &json!({"done": {"request": 1, "error": null}}));
    assert_eq!(unknown["done"]["request"], json!(2));
    assert!(unknown["done"]["error"].is_string(), "{unknown}");
    assert_eq!(term, &json!({"done": {"request": 3, "error": null}}));
    assert_eq!(exited["exited"]["code"], json!(3));
    assert_eq!(ended(&world.end(&started).await), (3, 0));
    world.leave(&[&started]).await;
}

/// A supervisor of a driver that knew no packets has no such socket.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_whose_supervisor_has_no_packet_socket_is_recovered(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    fs::remove_file(TaskDir::new(&started.state).control_socket()).unwrap();
    let other = NspawnBackend::new(world.settings.clone());
    let found = within(other.attach(&started)).await.unwrap();
    assert_eq!(*found, started);
    within(other.stop(&started, Some(signal("TERM")), AMPLE))
        .await
        .unwrap();
    let exit = within(other.wait(&started)).await.unwrap();
    assert_eq!(ended(&exit), (3, 0));
    world.leave(&[&started]).await;
}

/// As a plugin does that asks a supervisor to kill its container and does not wait for the answer.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_by_a_client_that_closes_at_once_is_carried_out(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    let supervisor = Pid::from_raw(started.supervisor.pid);
    kill(supervisor, nix::sys::signal::Signal::SIGSTOP).unwrap();
    let mut stream = connect(&started);
    stream
        .write_all(b"{\"request\":1,\"verb\":\"kill\"}\n")
        .unwrap();
    drop(stream);
    kill(supervisor, nix::sys::signal::Signal::SIGCONT).unwrap();
    assert_eq!(ended(&world.end(&started).await), (137, 9));
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_sends_an_invalid_message_is_dropped(world: World) {
    let started = world
        .up(world.spec("trap 'exit 18' TERM; echo up; while :; do sleep 0.05; done"))
        .await;
    let mut stream = connect(&started);
    let dropped = tokio::task::spawn_blocking(move || {
        stream.write_all(b"\x00\xff{\"verb\":\n\n").unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
    });
    within(dropped).await.unwrap();
    within(world.backend.stop(&started, Some(signal("TERM")), AMPLE))
        .await
        .unwrap();
    assert_eq!(ended(&world.end(&started).await), (18, 0));
    world.leave(&[&started]).await;
}
