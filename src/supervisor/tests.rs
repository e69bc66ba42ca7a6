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
