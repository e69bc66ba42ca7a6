//! A container exits by itself while another process of its task is stopped.

use std::io::Write as _;

use nix::sys::stat::Mode as Permissions;
use nomad_driver_nspawn::container::Mount;

use super::*;

/// A FIFO that a payload reads before it exits. It has the same path on the host and in the container, for both kinds of payload.
struct Gate {
    directory: PathBuf,
}

impl Gate {
    fn new(world: &World) -> Self {
        let directory = world.scratch.path().join("gate");
        fs::create_dir(&directory).unwrap();
        let rights = Permissions::from_bits_truncate(0o666);
        nix::unistd::mkfifo(&directory.join("go"), rights).unwrap();
        Self { directory }
    }

    /// A container whose script runs in the directory of the gate.
    fn spec(&self, world: &World, mode: Mode, script: &str) -> ContainerSpec {
        world.spec(script).with(|spec| {
            spec.payload.mode = mode;
            spec.mounts = vec![Mount::new(self.directory.clone(), self.directory.clone())];
            spec.payload.working_directory = Some(self.directory.to_string_lossy().into_owned());
        })
    }

    /// Lets the payload continue. Waits until it reads.
    async fn open(&self) {
        let path = self.directory.join("go");
        let opened = tokio::task::spawn_blocking(move || {
            let mut gate = fs::File::options().write(true).open(path).unwrap();
            writeln!(gate).unwrap();
        });
        within(opened).await.unwrap();
    }
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_nspawn_does_not_hide_an_exit(world: World) {
    let gate = Gate::new(&world);
    for mode in [Mode::Plain, Mode::ProcessTwo] {
        fs::write(world.file("stdout"), "").unwrap();
        let started = world
            .up(gate.spec(&world, mode, "echo up; read line < go; exit 3"))
            .await;
        let nspawn = TaskDir::new(&started.state).running().unwrap().nspawn;
        strike(nspawn.pid, signal("SIGSTOP"));
        gate.open().await;
        let exit = world.end(&started).await;
        assert_eq!((ended(&exit), exit.error), ((3, 0), None), "{mode:?}");
        within(world.backend.remove(&started.id)).await.unwrap();
    }
    world.leave(&[]).await;
}
