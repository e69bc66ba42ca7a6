//! Tests of the plugin's end of the control socket.

use super::*;

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
            id: "a/t/1".into(),
            machine: "t-a".into(),
            state: task_dir.path().to_owned(),
            boot: crate::sys::kernel::boot_id().unwrap(),
            supervisor: Process { pid: 0, start: 0 },
            leader: leader.process(),
            mode: crate::container::Mode::Plain,
            cgroup: None,
            started_at: SystemTime::UNIX_EPOCH,
            notes: Vec::new(),
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
    async fn attached(&self) -> (SupervisorClient, UnixStream) {
        let listener = tokio::net::UnixListener::bind(self.task_dir.control_socket()).unwrap();
        let tracker = TaskTracker::new();
        let found = attach(&self.task_dir, &self.started, &tracker).await;
        let one = found.unwrap().unwrap();
        let (connection, _) = listener.accept().await.unwrap();
        (one, connection)
    }
}

#[tokio::test]
async fn news_that_are_not_known_are_passed_over() {
    let odd = Odd::new();
    let (one, mut connection) = odd.attached().await;
    connection
        .write_all(b"{\"thawed\":{\"by\":1}}\n")
        .await
        .unwrap();
    connection
        .write_all(&protocol::encode(&Event::Started(odd.started.clone())))
        .await
        .unwrap();
    let up = one.start_outcome().await;
    assert!(
        matches!(&up, Status::Up(started) if **started == odd.started),
        "{up:?}"
    );
    let pending = tokio::spawn({
        let one = one.clone();
        async move { one.request(Action::Stop).await }
    });
    connection.readable().await.unwrap();
    connection
        .write_all(b"{\"frozen\":{}}\n{\"done\":{\"request\":1,\"error\":\"no\",\"since\":2}}\n")
        .await
        .unwrap();
    assert_eq!(pending.await.unwrap(), Err("no".to_owned()));
    assert!(crate::sys::process::is_alive(odd.leader.process()));
}

#[rstest::rstest]
#[case::no_message(b"nonsense\n".to_vec())]
#[case::half_known(b"{\"started\":{\"id\":1}}\nnull\n".to_vec())]
#[case::no_text(vec![0xff, b'\n'])]
#[case::without_end(vec![b' '; protocol::MAX_LINE_BYTES + 100_000])]
#[tokio::test]
async fn a_supervisor_that_talks_nonsense_is_lost_and_its_container_ended(#[case] said: Vec<u8>) {
    let mut odd = Odd::new();
    let (one, mut connection) = odd.attached().await;
    // The client may have closed the connection before everything is sent.
    let _ = connection.write_all(&said).await;
    let reaping = std::thread::spawn(move || odd.leader.0.wait().map(|status| (status, odd)));
    let end = one.end().await.unwrap();
    let (status, odd) = reaping.join().unwrap().unwrap();
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&status),
        Some(9)
    );
    let error = end.error.as_deref().unwrap_or_default();
    assert!(error.contains("its supervisor talked nonsense"), "{error}");
    assert_eq!(odd.task_dir.exit().unwrap(), Some(end));
}
