//! Runs one cell: brings a task to the step, kills the victim, does what Nomad does next, and checks the expected result. Waits for events,
//! each with a deadline; never sleeps for a fixed time.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dev_agent::calls::StartedTask;
use dev_agent::{Allocation, HostError, Plugin, TaskExit};
use nomad_driver_nspawn::cgroup::Layout;
use nomad_driver_nspawn::container::Process;
use nomad_driver_nspawn::failpoint::Failpoint;
use nomad_driver_nspawn::proto::driver::{
    InspectTaskRequest, InspectTaskResponse, SignalTaskRequest, TaskConfig, TaskState,
};
use nomad_driver_nspawn::signal::Signal;
use nomad_driver_nspawn::state::task_dir::TaskDir;
use nomad_driver_nspawn::sys::kernel;
use nomad_driver_nspawn::sys::process::{ProcessHandle, first_child, is_alive};
use support::limits::Dump;
use support::{DEADLINE, not_applicable, within};
use tokio::io::AsyncReadExt;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::World;
use super::plan::{Again, Cell, Hold, Owed, Step, Victim};
use support::trap::Trap;

mod calls;
mod exec;
mod network;
mod result;

use calls::{
    attach, collect, hang_up, hang_up_or, is_our_program, is_running, limits_memory, limits_of,
    out_of_memory, own_end, signal, strike, supervisor_below,
};
use exec::Command;
use network::{Network, config_of, with_network};

/// The task's exit code once its gate is opened.
const CODE: i32 = 5;
/// The memory of a task that uses it up, in MiB: far more than any other process in its cgroup has.
const MEMORY_MIB: i64 = 32;
/// A grace period that no cell uses up.
const AMPLE: Duration = Duration::from_secs(600);

/// A call that has not returned.
type Call<T> = JoinHandle<Result<T, HostError>>;

/// Polls for state that has no notification.
async fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    within(what, async {
        loop {
            if let Some(found) = look() {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await
}

/// Runs the cell and returns a word for the result.
pub(super) async fn play<W: World>(world: W, cell: Cell) -> String {
    if cell.step.is_out_of_memory() && !limits_memory() {
        not_applicable("needs root and the memory controller");
        world.unused();
        return "not here".to_owned();
    }
    let Some(network) = Network::of(cell) else {
        world.unused();
        return "not here".to_owned();
    };
    let mut game = Game::new(&world, cell, network).await;
    game.reach().await;
    game.kill().await;
    let word = game.next().await;
    game.again().await;
    let plugin = game.leave().await;
    world.leave(plugin).await;
    word
}

/// The state of one cell.
struct Game<'w, W> {
    world: &'w W,
    cell: Cell,
    hold: Hold,
    owed: Owed,
    network: Network,
    /// The plugin process.
    process: Plugin,
    /// The agent's connection to it.
    line: Arc<Plugin>,
    allocation: Allocation,
    config: TaskConfig,
    printed: watch::Receiver<String>,
    trap: Option<Trap>,
    start: Option<Call<StartedTask>>,
    started: Option<StartedTask>,
    /// The limits of the task when it was started.
    limits: Option<Dump>,
    wait: Option<Call<TaskExit>>,
    /// The further command that runs in the task.
    command: Option<Command>,
    action: Option<Call<()>>,
    ids: Vec<String>,
}

impl<'w, W: World> Game<'w, W> {
    async fn new(world: &'w W, cell: Cell, network: Network) -> Self {
        let (hold, owed) = cell.plan().unwrap();
        let process = within("the plugin", network.plugin(world)).await;
        let line = attach(world, &process).await;
        let (_, gate) = world.gate();
        let end = match cell.step.is_out_of_memory() {
            true => "x=0123456789abcdef; while :; do x=$x$x; done".to_owned(),
            false => format!("exit {CODE}"),
        };
        let text = format!(
            "trap '' TERM INT; trap 'echo usr1' USR1; echo up; while ! test -e {gate}; do sleep 0.02; done; {end}"
        );
        let is_second = cell.victim == Victim::Init;
        let mut task = world.shell(&text).with("process_two", is_second);
        if cell.step.is_out_of_memory() {
            task = task
                .with_memory(MEMORY_MIB)
                .with("memory_swap", format!("{MEMORY_MIB}m"));
        }
        let allocation = world.allocation(with_network(task, cell.step));
        let config = config_of(&line, &allocation, cell.step).await;
        let printed = collect(&allocation);
        Self {
            world,
            cell,
            hold,
            owed,
            network,
            process,
            line,
            allocation,
            ids: vec![config.id.clone()],
            config,
            printed,
            trap: None,
            start: None,
            started: None,
            limits: None,
            wait: None,
            command: None,
            action: None,
        }
    }

    fn id(&self) -> String {
        self.config.id.clone()
    }

    fn open_gate(&self) {
        std::fs::write(self.world.gate().0, "").unwrap();
    }

    fn set_trap(&mut self) {
        self.trap = match self.hold {
            Hold::Driver(point) => Some(Trap::at(&self.world.state(), point)),
            Hold::Nspawn(moment) => Some(self.world.hold_nspawn(moment)),
            Hold::Nobody => None,
        };
    }

    async fn reached(&mut self) {
        if let Some(trap) = &mut self.trap {
            within("the step", trap.reached()).await;
        }
    }

    async fn up(&self) {
        let mut printed = self.printed.clone();
        let up = printed.wait_for(|text| text.contains("up"));
        within("the payload's first word", up).await.unwrap();
    }

    /// Brings the task to the step of the cell.
    async fn reach(&mut self) {
        let (step, id) = (self.cell.step, self.id());
        if step.is_start() || matches!(self.hold, Hold::Nspawn(_)) {
            self.set_trap();
        }
        let (line, config) = (Arc::clone(&self.line), self.config.clone());
        self.start = Some(tokio::spawn(async move { line.start(config).await }));
        if step.is_start() {
            self.reached().await;
            self.network.is_made(step);
            return;
        }
        let start = self.start.take().unwrap();
        self.started = Some(within("StartTask", start).await.unwrap().unwrap());
        self.up().await;
        self.limits = self.started.as_ref().map(limits_of);
        if step == Step::Recovering {
            self.process.kill().await;
            self.renew().await;
        } else {
            let (line, id) = (Arc::clone(&self.line), id.clone());
            self.wait = Some(tokio::spawn(async move { line.wait(&id).await }));
            // Sent after WaitTask on the same connection, so that WaitTask has arrived once this returns.
            self.inspect().await;
        }
        if self.trap.is_none() {
            self.set_trap();
        }
        let line = Arc::clone(&self.line);
        match step {
            Step::Exec => self.run_command().await,
            Step::Signalled => {
                self.action = Some(tokio::spawn(async move { signal(&line, id).await }));
            }
            Step::Stopping => {
                self.action = Some(tokio::spawn(async move { line.stop(&id, AMPLE, "").await }));
            }
            Step::Exited
            | Step::EndRecorded
            | Step::EndTold
            | Step::OutOfMemory
            | Step::OutOfMemoryRecorded => self.open_gate(),
            Step::Destroying => {
                self.action = Some(tokio::spawn(async move { line.destroy(&id, true).await }));
            }
            Step::Removing => {
                self.open_gate();
                let exit = within("WaitTask", self.wait.take().unwrap()).await;
                own_end(&exit.unwrap().unwrap());
                self.action = Some(tokio::spawn(async move { line.destroy(&id, false).await }));
            }
            Step::Recovering => {
                let handle = self.stored();
                self.action = Some(tokio::spawn(async move { line.recover(handle).await }));
            }
            _ => {}
        }
        self.reached().await;
        if self.hold == Hold::Driver(Failpoint::Exited) {
            assert!(!is_running(self.leader().pid), "the leader has exited");
        }
    }

    /// What Nomad has stored about the task.
    fn stored(&self) -> nomad_driver_nspawn::proto::driver::TaskHandle {
        let mut handle = self.started.as_ref().unwrap().handle.clone();
        let config = handle.config.as_mut().unwrap();
        config.msgpack_driver_config.clear();
        handle
    }

    /// The container's PID 1.
    fn leader(&self) -> Process {
        let state = &self.started.as_ref().unwrap().handle.driver_state;
        let state: serde_json::Value = serde_json::from_slice(state).unwrap();
        serde_json::from_value(state["started"]["leader"].clone()).unwrap()
    }

    /// The pid of the container's PID 1, recorded or not.
    fn first_process(&self) -> i32 {
        if self.started.is_some() {
            return self.leader().pid;
        }
        let nspawn = first_child(self.supervisor()).expect("systemd-nspawn");
        first_child(nspawn).expect("a leader")
    }

    fn supervisor(&self) -> i32 {
        supervisor_below(&self.world.state()).expect("a supervisor")
    }

    async fn kill(&mut self) {
        match self.cell.victim {
            Victim::Plugin => {
                self.process.kill().await;
            }
            Victim::Agent => {
                if let Some(call) = self.start.take() {
                    hang_up(call).await;
                }
                if let Some(call) = self.wait.take() {
                    if self.cell.step == Step::EndTold {
                        // The supervisor is held after it has sent the event; the plugin has received it and may have returned it already.
                        hang_up_or(call, |answer| own_end(&answer.unwrap())).await;
                    } else {
                        hang_up(call).await;
                    }
                }
                if let Some(call) = self.action.take() {
                    hang_up(call).await;
                }
            }
            Victim::Supervisor => strike(self.supervisor()),
            Victim::Nspawn => strike(first_child(self.supervisor()).expect("systemd-nspawn")),
            Victim::Leader => strike(self.first_process()),
            Victim::Init => {
                let leader = self.first_process();
                let ours = || self.world.init(leader).filter(|pid| is_our_program(*pid));
                strike(eventually("the first program", ours).await);
            }
        }
        self.command_has_ended().await;
        if matches!(self.cell.victim, Victim::Plugin | Victim::Agent) {
            // The next agent connects before the held process continues, and makes its calls as soon as that happens.
            self.renew().await;
        }
        self.trap = None;
    }

    /// A new agent, with a new plugin if the old one has exited.
    async fn renew(&mut self) {
        if self.process.has_exited() {
            self.process = within("the next plugin", self.network.plugin(self.world)).await;
        }
        self.line = attach(self.world, &self.process).await;
    }

    /// What Nomad does next, until the first container has ended.
    async fn next(&mut self) -> String {
        match self.cell.victim {
            Victim::Plugin => {
                // Calls to the dead plugin return an error and do not hang.
                if let Some(call) = self.start.take() {
                    assert!(within("StartTask", call).await.unwrap().is_err());
                }
                if let Some(call) = self.action.take() {
                    assert!(within("the call", call).await.unwrap().is_err());
                }
                if let Some(call) = self.wait.take() {
                    let answer = within("WaitTask", call).await.unwrap();
                    match answer {
                        Ok(exit) if self.cell.step == Step::EndTold => own_end(&exit),
                        answer => assert!(answer.is_err(), "{answer:?}"),
                    }
                }
                self.take_over().await;
            }
            Victim::Agent => self.take_over().await,
            _ => self.go_on().await,
        }
        match self.owed {
            Owed::Undone(_) => {
                self.is_undone().await;
                return "undone".to_owned();
            }
            Owed::NoSuccess if self.started.is_none() => {
                self.is_undone().await;
                return "undone".to_owned();
            }
            Owed::Lost(_) | Owed::Removed => {
                let waited = within("WaitTask", self.line.wait(&self.id())).await;
                assert!(waited.is_err(), "nothing is known of it: {waited:?}");
                return if self.owed == Owed::Removed {
                    "removed"
                } else {
                    "lost"
                }
                .to_owned();
            }
            Owed::Same => {
                self.is_the_same().await;
                self.runs_commands().await;
            }
            Owed::ItsOwnEnd | Owed::ItsOwnEndOrKilled(_) | Owed::Killed(_) | Owed::NoSuccess => {}
        }
        let exit = self.end().await;
        self.runs_no_command().await;
        let id = self.id();
        within("DestroyTask", self.line.destroy(&id, false))
            .await
            .unwrap();
        if let Owed::Same = self.owed {
            return "same".to_owned();
        }
        self.check(&exit);
        match self.owed {
            Owed::ItsOwnEnd => format!("ended {}", exit.code),
            _ => format!("dead {}", exit.code),
        }
    }

    /// The plugin or the agent has died.
    async fn take_over(&mut self) {
        if self.started.is_none() {
            // Nomad has no handle: all it can do is start the task again.
            return;
        }
        let id = self.id();
        match self.owed {
            Owed::Removed => {
                within("DestroyTask", self.line.destroy(&id, true))
                    .await
                    .unwrap();
            }
            Owed::Lost(words) => self.refuses_to_recover(words).await,
            _ => within("RecoverTask", self.line.recover(self.stored()))
                .await
                .unwrap(),
        }
    }

    async fn refuses_to_recover(&self, words: &str) {
        let answer = within("RecoverTask", self.line.recover(self.stored())).await;
        let error = answer.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        // Nomad does this with a task that can't be recovered.
        within("DestroyTask", self.line.destroy(&self.id(), true))
            .await
            .unwrap();
    }

    /// The plugin is alive and must answer the pending calls.
    async fn go_on(&mut self) {
        if let Some(call) = self.start.take() {
            let answer = within("StartTask", call).await.unwrap();
            match (answer, self.owed) {
                (Err(error), Owed::Undone(words)) => {
                    assert!(!words.is_empty(), "a start that is answered has a reason");
                    assert!(error.to_string().contains(words), "{error}");
                }
                (Err(error), Owed::NoSuccess) => {
                    assert!(
                        error.to_string().contains("terminated by signal KILL"),
                        "{error}"
                    );
                }
                (Ok(started), Owed::Killed(_) | Owed::NoSuccess) => self.started = Some(started),
                (answer, owed) => panic!("{owed:?} is owed, and StartTask gave {answer:?}"),
            }
        }
        if let Some(call) = self.action.take() {
            let answer = within("the call", call).await.unwrap();
            match self.owed {
                Owed::Lost(words) => {
                    let error = answer.unwrap_err().to_string();
                    assert!(error.contains(words), "{error}");
                    within("DestroyTask", self.line.destroy(&self.id(), true))
                        .await
                        .unwrap();
                }
                _ => answer.unwrap(),
            }
        }
    }

    async fn inspect(&self) -> InspectTaskResponse {
        let request = InspectTaskRequest { task_id: self.id() };
        let mut client = self.line.driver();
        let answer = within("InspectTask", client.inspect_task(request)).await;
        answer.unwrap().into_inner()
    }

    /// Waits for the exit several times: every caller gets the same one.
    async fn end(&mut self) -> TaskExit {
        let id = self.id();
        if self.owed == Owed::Same {
            if self.cell.step == Step::Stopping {
                within("StopTask", self.line.stop(&id, Duration::ZERO, ""))
                    .await
                    .unwrap();
            } else {
                self.open_gate();
            }
        }
        let early = match self.wait.take() {
            None => None,
            Some(call) => Some(within("WaitTask", call).await.unwrap().unwrap()),
        };
        if let (Some(exit), Step::Destroying) = (&early, self.cell.step) {
            return exit.clone();
        }
        let (one, two) = within("WaitTask", async {
            tokio::join!(self.line.wait(&id), self.line.wait(&id))
        })
        .await;
        let (one, two) = (one.unwrap(), two.unwrap());
        let three = within("WaitTask", self.line.wait(&id)).await.unwrap();
        assert!(
            one == two && two == three && early.as_ref().is_none_or(|early| *early == one),
            "one end: {early:?} {one:?} {two:?} {three:?}"
        );
        if self.owed == Owed::Same {
            match self.cell.step {
                Step::Stopping => assert_eq!((one.code, one.signal, &one.error), (137, 9, &None)),
                _ => self.is_its_own(&one),
            }
        }
        one
    }

    /// Starts the same task again immediately.
    async fn again(&mut self) {
        self.open_gate();
        let config = match self.cell.again {
            Again::SameId => self.config.clone(),
            Again::NewId => config_of(&self.line, &self.allocation, self.cell.step).await,
        };
        let id = config.id.clone();
        self.ids.push(id.clone());
        if let Err(error) = within("the next StartTask", self.line.start(config)).await {
            panic!(
                "the next start: {error}\n{}",
                self.world.log().text().join("\n")
            );
        }
        let exit = within("the next WaitTask", self.line.wait(&id)).await;
        self.is_its_own(&exit.unwrap());
        within("the next DestroyTask", self.line.destroy(&id, false))
            .await
            .unwrap();
    }

    /// Checks that nothing is left.
    async fn leave(self) -> Plugin {
        let state = self.world.state();
        eventually("an empty state directory", || {
            support::starts_in(&state).is_empty().then_some(())
        })
        .await;
        let layout = Layout::of_this_host();
        for id in &self.ids {
            let task_dir = TaskDir::for_task(&state, id);
            let leaf = task_dir.path().file_name().unwrap().to_str().unwrap();
            let groups = layout.find(leaf);
            assert!(groups.is_empty(), "left: {groups:?}");
        }
        self.world.is_clean(&self.process).await;
        self.network.is_gone();
        drop(self.line);
        let log = self.world.log().text().join("\n");
        assert!(!log.contains("panicked"), "{log}");
        self.process
    }
}
