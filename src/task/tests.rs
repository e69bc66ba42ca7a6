//! The task actors against a mock backend that cooperates, and one that does not.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use mockall::predicate::{always, eq};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::*;
use crate::backend::{MockContainerBackend, UsageReader};
use crate::container::{Probe, Process, StartedNetwork};

mod exec;
mod neighbour;
mod notes;

const ID: &str = "a/t/1";
const LIMIT: Duration = Duration::from_secs(20);

/// The generated mock, which answers at once, extended by what it can't do: waiting for an exit, and a start that takes long.
#[derive(Debug)]
pub(crate) struct TestBackend {
    pub(crate) mock: MockContainerBackend,
    pub(crate) end: watch::Sender<Option<Exit>>,
    pub(crate) oom_kills: watch::Sender<u64>,
    /// The note about the next network that has been restored.
    pub(crate) restored: Mutex<Option<String>>,
    pub(crate) gate: Semaphore,
}

impl TestBackend {
    /// A backend on which everything except the exit happens at once.
    pub(crate) fn new(mock: MockContainerBackend) -> (Arc<Self>, watch::Sender<Option<Exit>>) {
        let end = watch::Sender::new(None);
        let gate = Semaphore::new(Semaphore::MAX_PERMITS);
        let stage = Self {
            mock,
            end: end.clone(),
            oom_kills: watch::Sender::new(0),
            restored: Mutex::default(),
            gate,
        };
        (Arc::new(stage), end)
    }

    async fn pass(&self) {
        self.gate.acquire().await.unwrap().forget();
    }
}

#[async_trait::async_trait]
impl ContainerBackend for TestBackend {
    async fn probe(&self) -> Probe {
        self.mock.probe().await
    }

    async fn start(&self, spec: ContainerSpec) -> Result<Arc<Started>, BackendError> {
        self.pass().await;
        self.mock.start(spec).await
    }

    async fn attach(&self, started: &Started) -> Result<Arc<Started>, BackendError> {
        self.pass().await;
        self.mock.attach(started).await
    }

    async fn wait(&self, _: &Started) -> Result<Exit, BackendError> {
        let mut end = self.end.subscribe();
        Ok(end
            .wait_for(Option::is_some)
            .await
            .unwrap()
            .clone()
            .unwrap())
    }

    async fn oom_kills(&self, _: &Started, seen: u64) -> Option<u64> {
        let mut kills = self.oom_kills.subscribe();
        let more = kills.wait_for(|kills| *kills > seen).await.unwrap();
        Some(*more)
    }

    async fn network_restored(&self, _: &Started) -> Option<String> {
        let note = self.restored.lock().unwrap().take();
        match note {
            Some(note) => Some(note),
            None => std::future::pending().await,
        }
    }

    async fn signal(&self, started: &Started, signal: Signal) -> Result<(), BackendError> {
        self.mock.signal(started, signal).await
    }

    async fn exec(&self, started: &Started, request: ExecRequest) -> Result<Session, BackendError> {
        self.pass().await;
        self.mock.exec(started, request).await
    }

    async fn stop(
        &self,
        started: &Started,
        signal: Option<Signal>,
        grace: Duration,
    ) -> Result<(), BackendError> {
        self.mock.stop(started, signal, grace).await
    }

    async fn remove(&self, id: &str) -> Result<(), BackendError> {
        self.mock.remove(id).await
    }

    async fn addresses(&self, _: &Started) -> Vec<IpAddr> {
        Vec::new()
    }

    fn usage_reader(&self, started: &Started) -> Box<dyn UsageReader> {
        self.mock.usage_reader(started)
    }

    async fn reconcile(&self, alloc_roots: &BTreeSet<PathBuf>) {
        self.mock.reconcile(alloc_roots).await;
    }
}

pub(crate) fn started(id: &str) -> Started {
    Started {
        state: "/run/nomad-driver-nspawn/x".into(),
        supervisor: Process {
            pid: 10,
            start: 100,
        },
        leader: Process {
            pid: 11,
            start: 101,
        },
        cgroup: Some("/sys/fs/cgroup/x".into()),
        started_at: SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
        notes: vec!["a note".to_owned()],
        ..Started::for_test(id, "11111111-2222-3333-4444-555555555555")
    }
}

pub(crate) fn exit(code: i32, signal: i32) -> Exit {
    Exit {
        code,
        signal,
        oom_killed: false,
        error: None,
        ended_at: SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_001),
    }
}

pub(crate) fn info(id: &str) -> TaskInfo {
    TaskInfo {
        id: id.to_owned(),
        name: "t".to_owned(),
        alloc_id: "a".to_owned(),
        description: None,
    }
}

pub(crate) fn spec(id: &str) -> ContainerSpec {
    ContainerSpec::for_test("t", "/").with(|spec| id.clone_into(&mut spec.identity.id))
}

pub(crate) fn starts() -> MockContainerBackend {
    let mut mock = MockContainerBackend::new();
    mock.expect_start()
        .returning(|spec| Ok(started(&spec.identity.id).into()));
    mock
}

fn trouble() -> BackendError {
    BackendError::Stuck {
        machine: "t-a".to_owned(),
        reason: "it hangs".to_owned(),
    }
}

fn tasks() -> Tasks {
    Tasks::new(EventBus::default(), CancellationToken::new())
}

/// A task that runs on this backend.
async fn running(stage: &Arc<TestBackend>) -> (Tasks, Task) {
    let tasks = tasks();
    let start = tasks.start(stage.clone(), info(ID), spec(ID));
    start.await.unwrap();
    let task = tasks.get(ID).unwrap();
    (tasks, task)
}

/// The task, as soon as its start has begun.
async fn known(tasks: &Tasks) -> Task {
    loop {
        match tasks.get(ID) {
            Ok(task) => break task,
            Err(_) => tokio::task::yield_now().await,
        }
    }
}

async fn in_time<T>(work: impl Future<Output = T>) -> T {
    timeout(LIMIT, work).await.expect("in time")
}

#[tokio::test]
async fn every_waiter_gets_the_same_exit() {
    let (stage, end) = TestBackend::new(starts());
    let (_tasks, task) = running(&stage).await;
    let early =
        [task.clone(), task.clone()].map(|task| tokio::spawn(async move { task.wait().await }));
    end.send_replace(Some(exit(7, 0)));
    for wait in early {
        assert_eq!(in_time(wait).await.unwrap().unwrap().unwrap(), exit(7, 0));
    }
    assert_eq!(in_time(task.wait()).await.unwrap().unwrap(), exit(7, 0));
}

#[tokio::test]
async fn a_second_start_of_an_id_is_refused() {
    let mut mock = MockContainerBackend::new();
    mock.expect_start()
        .times(1)
        .returning(|spec| Ok(started(&spec.identity.id).into()));
    let (stage, _end) = TestBackend::new(mock);
    let tasks = tasks();
    tasks
        .start(stage.clone(), info(ID), spec(ID))
        .await
        .unwrap();
    let second = tasks.start(stage, info(ID), spec(ID)).await;
    assert!(matches!(second, Err(TaskError::AlreadyKnown(id)) if id == ID));
    assert!(tasks.get(ID).unwrap().status().started.is_some());
}

#[tokio::test]
async fn after_a_failed_start_the_id_is_free() {
    let mut mock = MockContainerBackend::new();
    mock.expect_start().times(1).returning(|_| Err(trouble()));
    mock.expect_start()
        .times(1)
        .returning(|spec| Ok(started(&spec.identity.id).into()));
    let (stage, _end) = TestBackend::new(mock);
    let tasks = tasks();
    let first = tasks.start(stage.clone(), info(ID), spec(ID)).await;
    assert!(matches!(first, Err(TaskError::Backend(_))));
    assert!(tasks.start(stage, info(ID), spec(ID)).await.is_ok());
}

#[tokio::test]
async fn a_stop_returns_after_the_exit_and_may_be_repeated() {
    let mut mock = starts();
    let (ends, heard) = std::sync::mpsc::channel::<watch::Sender<Option<Exit>>>();
    mock.expect_stop()
        .with(always(), eq(Some(Signal::TERM)), eq(Duration::from_secs(3)))
        .times(1)
        .returning(move |_, _, _| {
            heard.recv().unwrap().send_replace(Some(exit(143, 15)));
            Ok(())
        });
    let (stage, end) = TestBackend::new(mock);
    ends.send(end).unwrap();
    let (_tasks, task) = running(&stage).await;
    for _ in 0..2 {
        in_time(task.stop(Some(Signal::TERM), Duration::from_secs(3)))
            .await
            .unwrap();
        assert_eq!(task.status().exit, Some(exit(143, 15)));
    }
    assert!(matches!(
        task.signal(Signal::INT).await,
        Err(TaskError::NotRunning)
    ));
}

#[tokio::test]
async fn a_failed_stop_is_reported_and_may_be_retried() {
    let mut mock = starts();
    mock.expect_stop()
        .times(2)
        .returning(|_, _, _| Err(trouble()));
    let (stage, _end) = TestBackend::new(mock);
    let (_tasks, task) = running(&stage).await;
    for _ in 0..2 {
        assert!(matches!(
            in_time(task.stop(None, Duration::ZERO)).await,
            Err(TaskError::Backend(_))
        ));
    }
}

#[tokio::test]
async fn force_kills_a_running_task_and_reports_its_real_exit() {
    let mut mock = starts();
    let (ends, heard) = std::sync::mpsc::channel::<watch::Sender<Option<Exit>>>();
    mock.expect_stop()
        .with(always(), eq(Some(Signal::KILL)), eq(Duration::ZERO))
        .times(1)
        .returning(move |_, _, _| {
            heard.recv().unwrap().send_replace(Some(exit(137, 9)));
            Ok(())
        });
    mock.expect_remove()
        .with(eq(ID))
        .times(1)
        .returning(|_| Ok(()));
    let (stage, end) = TestBackend::new(mock);
    ends.send(end).unwrap();
    let (tasks, task) = running(&stage).await;
    let pending = tokio::spawn({
        let task = task.clone();
        async move { task.wait().await }
    });
    let unforced = tasks.destroy(stage.clone(), ID, false).await;
    assert!(matches!(unforced, Err(TaskError::StillRunning)));
    in_time(tasks.destroy(stage.clone(), ID, true))
        .await
        .unwrap();
    assert_eq!(
        in_time(pending).await.unwrap().unwrap().unwrap(),
        exit(137, 9)
    );
    assert!(matches!(tasks.get(ID), Err(TaskError::Unknown)));
    assert!(matches!(
        task.signal(Signal::INT).await,
        Err(TaskError::Unknown)
    ));
}

#[tokio::test]
async fn a_wait_that_arrives_during_the_removal_gets_the_exit() {
    let mut mock = starts();
    mock.expect_stop().times(1).returning(|_, _, _| Ok(()));
    mock.expect_remove().times(1).returning(|_| Ok(()));
    let (stage, end) = TestBackend::new(mock);
    let tasks = tasks();
    tasks
        .start(stage.clone(), info(ID), spec(ID))
        .await
        .unwrap();
    let destroyed = tokio::spawn({
        let tasks = tasks.clone();
        async move { tasks.destroy(stage, ID, true).await }
    });
    while tasks.get(ID).is_ok() {
        tokio::task::yield_now().await;
    }
    let task = tasks.get_any(ID).unwrap();
    let wait = tokio::spawn(async move { task.wait().await });
    end.send_replace(Some(exit(137, 9)));
    assert_eq!(in_time(wait).await.unwrap().unwrap().unwrap(), exit(137, 9));
    in_time(destroyed).await.unwrap().unwrap();
    assert!(matches!(tasks.get_any(ID), Err(TaskError::Unknown)));
}

#[tokio::test]
async fn destroying_an_unknown_id_removes_leftovers() {
    let mut mock = MockContainerBackend::new();
    mock.expect_remove()
        .with(eq("x/y/z"))
        .times(2)
        .returning(|_| Ok(()));
    let (stage, _end) = TestBackend::new(mock);
    let tasks = tasks();
    for _ in 0..2 {
        in_time(tasks.destroy(stage.clone(), "x/y/z", true))
            .await
            .unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_failed_removal_is_reported_once_and_retried() {
    let mut mock = starts();
    mock.expect_remove().times(3).returning(|_| Err(trouble()));
    mock.expect_remove().times(1).returning(|_| Ok(()));
    let (stage, end) = TestBackend::new(mock);
    let (tasks, task) = running(&stage).await;
    end.send_replace(Some(exit(0, 0)));
    task.wait().await.unwrap().unwrap();
    let destroyed = tasks.destroy(stage.clone(), ID, false).await;
    assert!(matches!(destroyed, Err(TaskError::Backend(_))));
    assert!(
        matches!(tasks.get(ID), Err(TaskError::Unknown)),
        "it is out of sight"
    );
    assert!(matches!(
        tasks.start(stage, info(ID), spec(ID)).await,
        Err(TaskError::AlreadyKnown(_))
    ));
    tasks.actors.close();
    timeout(Duration::from_secs(60), tasks.actors.wait())
        .await
        .expect("the retries succeed");
}

/// Meanwhile a later driver may be installed that can remove it, or recover it.
#[tokio::test(start_paused = true)]
async fn a_removal_that_is_refused_is_not_tried_again() {
    let mut mock = MockContainerBackend::new();
    mock.expect_remove().returning(|_| {
        Err(BackendError::Unsupported {
            machine: "t-a".to_owned(),
            reason: "a later driver started it".to_owned(),
        })
    });
    let (stage, _end) = TestBackend::new(mock);
    let tasks = tasks();
    assert!(tasks.destroy(stage, ID, true).await.is_err());
    tasks.actors.close();
    timeout(Duration::from_millis(500), tasks.actors.wait())
        .await
        .expect("it is given up at once");
    assert!(tasks.store.get_any(ID).is_none());
}

#[tokio::test(start_paused = true)]
async fn a_removal_that_keeps_failing_is_abandoned() {
    let mut mock = MockContainerBackend::new();
    mock.expect_remove().times(6).returning(|_| Err(trouble()));
    let (stage, _end) = TestBackend::new(mock);
    let tasks = tasks();
    assert!(tasks.destroy(stage, ID, true).await.is_err());
    tasks.actors.close();
    timeout(Duration::from_secs(600), tasks.actors.wait())
        .await
        .expect("it is given up");
    assert!(tasks.store.get_any(ID).is_none());
}

#[tokio::test]
async fn a_panic_is_an_error_of_this_task_alone() {
    let mut mock = MockContainerBackend::new();
    mock.expect_start()
        .withf(|spec| spec.identity.id == "bad")
        .returning(|_| panic!("on purpose"));
    mock.expect_start()
        .withf(|spec| spec.identity.id == ID)
        .returning(|spec| Ok(started(&spec.identity.id).into()));
    let (stage, _end) = TestBackend::new(mock);
    let tasks = tasks();
    let bad = tasks.start(stage.clone(), info("bad"), spec("bad")).await;
    assert!(matches!(bad, Err(TaskError::Panicked)));
    assert!(tasks.start(stage, info(ID), spec(ID)).await.is_ok());
}

#[tokio::test]
async fn recovering_a_known_task_attaches_once() {
    let mut mock = MockContainerBackend::new();
    mock.expect_attach()
        .times(1)
        .returning(|started| Ok(started.clone().into()));
    let (stage, end) = TestBackend::new(mock);
    let tasks = tasks();
    for _ in 0..2 {
        let found = tasks
            .recover(stage.clone(), info(ID), started(ID))
            .await
            .unwrap();
        assert_eq!(*found, started(ID));
    }
    end.send_replace(Some(exit(3, 0)));
    let task = tasks.get(ID).unwrap();
    assert_eq!(in_time(task.wait()).await.unwrap().unwrap(), exit(3, 0));
}

#[tokio::test(start_paused = true)]
async fn recovery_has_a_time_limit() {
    let (stage, _end) = TestBackend::new(MockContainerBackend::new());
    stage.gate.forget_permits(usize::MAX);
    let tasks = tasks();
    let lost = timeout(
        Duration::from_secs(6),
        tasks.recover(stage, info(ID), started(ID)),
    )
    .await;
    assert!(matches!(lost, Ok(Err(TaskError::AttachTimeout(_)))));
    assert!(matches!(tasks.get(ID), Err(TaskError::Unknown)));
}

#[tokio::test]
async fn requests_during_a_start_wait_for_it() {
    let mut mock = starts();
    mock.expect_signal()
        .with(always(), eq(Signal::INT))
        .times(1)
        .returning(|_, _| Ok(()));
    let (stage, _end) = TestBackend::new(mock);
    stage.gate.forget_permits(usize::MAX);
    let tasks = tasks();
    let start = tokio::spawn({
        let (tasks, stage) = (tasks.clone(), stage.clone());
        async move { tasks.start(stage, info(ID), spec(ID)).await.map(drop) }
    });
    let task = known(&tasks).await;
    let signal = tokio::spawn(async move { task.signal(Signal::INT).await });
    tokio::task::yield_now().await;
    assert!(!signal.is_finished());
    stage.gate.add_permits(1);
    in_time(start).await.unwrap().unwrap();
    in_time(signal).await.unwrap().unwrap();
}

#[tokio::test]
async fn the_exit_of_the_plugin_ends_no_task() {
    let (stage, _end) = TestBackend::new(starts());
    let (tasks, task) = running(&stage).await;
    tasks.close(LIMIT).await;
    assert!(in_time(task.wait()).await.is_none(), "no conclusion");
}

/// Nomad takes an error of StartTask for the failure of the task, and one of StopTask or RecoverTask for an answer about it.
#[tokio::test]
async fn a_call_interrupted_by_a_shutdown_is_not_reported_as_unknown_task() {
    let (stage, _end) = TestBackend::new(starts());
    stage.gate.forget_permits(usize::MAX);
    let tasks = tasks();
    let begin = |id: &'static str| {
        let (tasks, stage) = (tasks.clone(), stage.clone());
        tokio::spawn(async move { tasks.start(stage, info(id), spec(id)).await.map(drop) })
    };
    let start = begin(ID);
    let task = known(&tasks).await;
    let recover = tokio::spawn({
        let (tasks, stage) = (tasks.clone(), stage.clone());
        async move { tasks.recover(stage, info(ID), started(ID)).await.map(drop) }
    });
    let stop = tokio::spawn({
        let task = task.clone();
        async move { task.stop(None, Duration::ZERO).await }
    });
    tokio::task::yield_now().await;
    tasks.close(LIMIT).await;
    let late = tokio::spawn(async move { task.signal(Signal::INT).await });
    let destroy = tokio::spawn({
        let (tasks, stage) = (tasks.clone(), stage.clone());
        async move { tasks.destroy(stage, "x/y/z", true).await }
    });
    let later = begin("a/u/1");
    for call in [start, recover, stop, late, destroy, later] {
        let result = in_time(call).await.unwrap();
        assert!(matches!(result, Err(TaskError::ShuttingDown)), "{result:?}");
    }
}
