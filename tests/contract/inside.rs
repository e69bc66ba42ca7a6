//! Settings that are applied to a container once systemd-nspawn has made it. What they do is in the end-to-end tests: the containers of
//! the fake have no namespaces and no file systems of their own.

use nomad_driver_nspawn::container::TmpfsSizes;

use super::*;

/// The size of the file system at a path of the host, in blocks.
fn size_of(path: &str) -> u64 {
    rustix::fs::statfs(path).map_or(0, |stat| stat.f_blocks)
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sizes_of_temporary_file_systems_change_nothing_on_the_host(world: World) {
    const PLACES: [&str; 3] = ["/tmp", "/run", "/dev/shm"];
    let before = PLACES.map(size_of);
    let size = Some(1 << 20);
    let started = world
        .start(world.spec("exit 11").with(|spec| {
            spec.resources.tmpfs = TmpfsSizes {
                tmp: size,
                run: size,
                shm: size,
            };
        }))
        .await;
    // A host without cgroups is a note of every start.
    let about_sizes = started.notes.iter().find(|note| note.contains("size"));
    assert_eq!(about_sizes, None);
    assert_eq!(ended(&world.end(&started).await), (11, 0));
    assert_eq!(PLACES.map(size_of), before);
    world.leave(&[&started]).await;
}
