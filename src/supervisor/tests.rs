//! The plugin's end of a lifeline.

use super::*;

/// A process to wait for; it ends with this.
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
        process::Held::by_pid(pid).unwrap().process()
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The blocking pool has one thread here: whoever waited in it would keep the others from hearing anything.
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
            () = departed(names[0]) => panic!("the first has not ended"),
            () = departed(names[1]) => panic!("the second has not ended"),
            () = departed(names[2]) => {}
        }
    });
}

/// A container whose supervisor is this test.
struct Odd {
    _temp: tempfile::TempDir,
    records: Records,
    leader: Sleeper,
    started: Started,
}

impl Odd {
    fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        let records = Records::at(temp.path().join("x"));
        records.create().unwrap();
        let leader = Sleeper::new();
        let started = Started {
            id: "a/t/1".into(),
            machine: "t-a".into(),
            state: records.path().to_owned(),
            boot: crate::nspawn::probe::boot_id().unwrap(),
            supervisor: Process { pid: 0, start: 0 },
            leader: leader.process(),
            mode: crate::container::Mode::Plain,
            cgroup: None,
            started_at: SystemTime::UNIX_EPOCH,
            notes: Vec::new(),
        };
        let running = record::Running {
            started: started.clone(),
            nspawn: leader.process(),
            copy: None,
            uids: None,
            alloc_dir: None,
        };
        records.write_running(&running).unwrap();
        Self {
            _temp: temp,
            records,
            leader,
            started,
        }
    }

    /// A plugin that has found it again, and the supervisor's end of the line.
    async fn attached(&self) -> (Supervised, UnixStream) {
        let listener = tokio::net::UnixListener::bind(self.records.lifeline()).unwrap();
        let tracker = TaskTracker::new();
        let found = attach(&self.records, &self.started, &tracker).await;
        let one = found.unwrap().unwrap();
        let (line, _) = listener.accept().await.unwrap();
        (one, line)
    }
}

#[tokio::test]
async fn news_that_are_not_known_are_passed_over() {
    let odd = Odd::new();
    let (one, mut line) = odd.attached().await;
    line.write_all(b"{\"thawed\":{\"by\":1}}\n").await.unwrap();
    line.write_all(&line::line(&News::Started(odd.started.clone())))
        .await
        .unwrap();
    let up = one.settled().await;
    assert!(
        matches!(&up, Status::Up(started) if **started == odd.started),
        "{up:?}"
    );
    let asked = tokio::spawn({
        let one = one.clone();
        async move { one.ask(Verb::Stop).await }
    });
    line.readable().await.unwrap();
    line.write_all(b"{\"frozen\":{}}\n{\"done\":{\"request\":1,\"error\":\"no\",\"since\":2}}\n")
        .await
        .unwrap();
    assert_eq!(asked.await.unwrap(), Err("no".to_owned()));
    assert!(process::is_alive(odd.leader.process()));
}

#[rstest::rstest]
#[case::no_message(b"nonsense\n".to_vec())]
#[case::half_known(b"{\"started\":{\"id\":1}}\nnull\n".to_vec())]
#[case::no_text(vec![0xff, b'\n'])]
#[case::without_end(vec![b' '; line::LONGEST + 100_000])]
#[tokio::test]
async fn a_supervisor_that_talks_nonsense_is_lost_and_its_container_ended(#[case] said: Vec<u8>) {
    let mut odd = Odd::new();
    let (one, mut line) = odd.attached().await;
    // It may have been given up before it has said everything.
    let _ = line.write_all(&said).await;
    let reaping = std::thread::spawn(move || odd.leader.0.wait().map(|status| (status, odd)));
    let end = one.end().await.unwrap();
    let (status, odd) = reaping.join().unwrap().unwrap();
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&status),
        Some(9)
    );
    let error = end.error.as_deref().unwrap_or_default();
    assert!(error.contains("its supervisor talked nonsense"), "{error}");
    assert_eq!(odd.records.exit().unwrap(), Some(end));
}
