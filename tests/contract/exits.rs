//! The exit table: every exit code, every signal that can be the cause of death, and the kernel's core dump flag, in both modes that have a
//! command.

use std::ops::RangeInclusive;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::sync::Arc;

use nomad_driver_nspawn::container::Mount;
use tokio::task::JoinSet;

use super::*;

const WITH_A_COMMAND: [Mode; 2] = [Mode::Plain, Mode::ProcessTwo];
/// How many containers of a table run concurrently.
const TOGETHER: usize = 2;
/// Codes with a meaning to the kernel, a shell or systemd-nspawn, and some without.
const SOME_CODES: [i32; 16] = [
    0, 1, 2, 7, 77, 126, 127, 128, 129, 133, 134, 137, 139, 143, 254, 255,
];
/// The script's exit code if the signal did not kill it.
const LIVED_ON: i32 = 77;
/// SIGQUIT. Shells tend to ignore it, and so do their children.
const QUIT: i32 = 3;
const SIGNALS: RangeInclusive<i32> = 1..=64;

/// Ignored by default: SIGCHLD, SIGCONT, SIGURG, SIGWINCH.
const IGNORED: [i32; 4] = [17, 18, 23, 28];
/// These stop a process until it is continued: SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU.
const STOPPING: [i32; 4] = [19, 20, 21, 22];
/// These dump core if core dumps are enabled: SIGQUIT, SIGILL, SIGTRAP, SIGABRT, SIGBUS, SIGFPE, SIGSEGV, SIGXCPU, SIGXFSZ, SIGSYS.
const DUMPING: [i32; 10] = [3, 4, 5, 6, 7, 8, 11, 24, 25, 31];

const DUMPED: &str = "the command dumped core";

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_code_of_0_is_0(world: World) {
    code(world, Mode::Plain, 0, 0).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_code_of_42_is_42(world: World) {
    code(world, Mode::Plain, 42, 42).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_code_of_255_is_255(world: World) {
    code(world, Mode::Plain, 255, 255).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_code_of_a_second_process_is_reported(world: World) {
    code(world, Mode::ProcessTwo, 7, 7).await;
}

/// systemd-nspawn uses this code internally and returns 1 instead; from 6.15 on the kernel reports the real code.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_code_of_133_is_reported(world: World) {
    let reported = if world.kernel_tells() { 133 } else { 1 };
    code(world, Mode::Plain, 133, reported).await;
}

async fn code(world: World, mode: Mode, code: i32, reported: i32) {
    let started = world
        .start(
            world
                .spec(&format!("exit {code}"))
                .with(|spec| spec.payload.mode = mode),
        )
        .await;
    let exit = world.end(&started).await;
    assert_eq!(
        (ended(&exit), exit.oom_killed, exit.error.clone()),
        ((reported, 0), false, None)
    );
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_payload_is_no_success(world: World) {
    let started = world.up(world.spec(HEARS_TERM)).await;
    strike(started.leader.pid, Signal::KILL);
    let exit = world.end(&started).await;
    assert_ne!(exit.code, 0);
    world.leave(&[&started]).await;
}

/// A row of the table.
struct Row {
    spec: ContainerSpec,
    /// A signal to send from outside once the container runs.
    sent: Option<Signal>,
    /// The expected code and signal.
    reported: (i32, i32),
}

/// Runs all rows, some of them concurrently, in one tree that none of them writes.
async fn all(world: World, rows: Vec<Row>) {
    let world = Arc::new(world);
    let mut under_way = JoinSet::new();
    let mut rows = rows.into_iter();
    loop {
        while under_way.len() < TOGETHER
            && let Some(Row {
                spec,
                sent,
                reported,
            }) = rows.next()
        {
            let world = Arc::clone(&world);
            let spec = spec.with(|spec| {
                spec.rootfs.read_only = true;
                spec.payload.stdout = None;
                spec.payload.stderr = None;
            });
            under_way.spawn(async move {
                let (mode, command) = (spec.payload.mode, spec.payload.command.clone());
                let started = world.start(spec).await;
                if let Some(signal) = sent {
                    within(world.backend.signal(&started, signal))
                        .await
                        .unwrap();
                }
                let exit = world.end(&started).await;
                assert_eq!(ended(&exit), reported, "{mode:?} {command:?}: {exit:?}");
                assert!(!exit.oom_killed);
                let dumps = mode == Mode::ProcessTwo || world.kernel_tells();
                let dumped = by_pipe().filter(|_| dumps && DUMPING.contains(&reported.1));
                assert_eq!(exit.error, dumped, "{mode:?} {command:?}");
                within(world.backend.remove(&started.id)).await.unwrap();
            });
        }
        match under_way.join_next().await {
            Some(row) => row.unwrap(),
            None => break,
        }
    }
    let world = Arc::into_inner(world).unwrap();
    world.leave(&[]).await;
}

fn spec(world: &World, mode: Mode, name: &str, script: &str) -> ContainerSpec {
    world
        .named(&format!("{mode:?}-{name}").to_lowercase(), script)
        .with(|spec| spec.payload.mode = mode)
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_code_is_reported(world: World) {
    codes(world, &WITH_A_COMMAND).await;
}

/// Only plain mode: for a PID 2 the driver's own init reports the end on any kernel.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_code_is_reported_on_an_older_kernel(world: World) {
    codes(world.on_an_old_kernel(), &[Mode::Plain]).await;
}

async fn codes(world: World, modes: &[Mode]) {
    let mut rows = Vec::new();
    for mode in modes.iter().copied() {
        // The fake can't add to what covers the other codes: the tests of the container init, and of `exit_status`.
        let is_short = world.is_fake() && (mode, world.old_kernel) != (Mode::Plain, false);
        for code in (0..=255).filter(|code| !is_short || SOME_CODES.contains(code)) {
            // systemd-nspawn uses this code internally and returns 1 instead; from 6.15 on the kernel reports the real code.
            let reported = match (mode, code) {
                (Mode::Plain, 133) if !world.kernel_tells() => 1,
                _ => code,
            };
            rows.push(Row {
                spec: spec(&world, mode, &code.to_string(), &format!("exit {code}")),
                sent: None,
                reported: (reported, 0),
            });
        }
    }
    all(world, rows).await;
}

/// A PID 2 can be killed by any signal that it sends to itself.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_signal_is_reported(world: World) {
    let mut rows = Vec::new();
    for number in SIGNALS {
        let goes_on = if STOPPING.contains(&number) {
            // The subshell sends SIGCONT once the process is seen stopped, however long that takes.
            "(while read -r stat </proc/$$/stat; do case $stat in *') T '*) kill -18 $$; break;; esac; sleep 0.01; done) & "
        } else {
            ""
        };
        let reported = if IGNORED.contains(&number) || STOPPING.contains(&number) {
            (LIVED_ON, 0)
        } else {
            (128 + number, number)
        };
        let script = format!("ulimit -S -c 0; {goes_on}kill -{number} $$; exit {LIVED_ON}");
        let mut spec = spec(&world, Mode::ProcessTwo, &number.to_string(), &script);
        let mut sent = None;
        if number == QUIT {
            spec.payload.command = vec!["/bin/sleep".into(), "1000".into()];
            sent = Signal::from_number(QUIT);
        }
        rows.push(Row {
            spec,
            sent,
            reported,
        });
    }
    all(world, rows).await;
}

/// A signal that PID 1 sends to itself does not kill it, but a fault does; the same faults are tested for PID 2.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_fault_is_reported(world: World) {
    faults(world, &WITH_A_COMMAND).await;
}

/// Here the signal is known only from systemd-nspawn's stderr, and nothing reports a core dump.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_fault_is_reported_on_an_older_kernel(world: World) {
    faults(world.on_an_old_kernel(), &[Mode::Plain]).await;
}

async fn faults(world: World, modes: &[Mode]) {
    let mut rows = Vec::new();
    for (number, code) in FAULTS {
        put_program(&world, &number.to_string(), code);
        for mode in modes.iter().copied() {
            let script = format!("ulimit -S -c 0; exec ./{number}");
            rows.push(Row {
                spec: with_programs(&world, spec(&world, mode, &number.to_string(), &script)),
                sent: None,
                reported: (128 + number, *number),
            });
        }
    }
    all(world, rows).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_core_dump_is_reported(world: World) {
    let (segv, code) = FAULTS[0];
    put_program(&world, "fault", code);
    let wanted = dumps_at_all(&world).then(|| DUMPED.to_owned());
    for mode in WITH_A_COMMAND {
        if mode == Mode::Plain && !world.kernel_tells() {
            not_applicable("as the first process: the kernel tells of a core dump from 6.15 on");
            continue;
        }
        for (limit, reported) in [("$(ulimit -H -c)", &wanted), ("0", &by_pipe())] {
            let script = format!("ulimit -S -c {limit}; exec ./fault");
            let started = world
                .start(with_programs(&world, spec(&world, mode, "dumps", &script)))
                .await;
            let exit = world.end(&started).await;
            assert_eq!(ended(&exit), (128 + segv, segv), "{mode:?}");
            assert_eq!(&exit.error, reported, "{mode:?} {limit}");
            within(world.backend.remove(&started.id)).await.unwrap();
        }
    }
    world.leave(&[]).await;
}

/// Whether the program dumps core without any container.
fn dumps_at_all(world: &World) -> bool {
    let status = std::process::Command::new("/bin/sh")
        .args(["-c", "ulimit -S -c $(ulimit -H -c); exec ./fault"])
        .current_dir(programs(world))
        .status()
        .unwrap();
    status.core_dumped()
}

/// What is reported for a process with a core limit of 0: a core_pattern pipe gets the dump all the same (core(5)).
fn by_pipe() -> Option<String> {
    let pattern = fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    pattern.starts_with('|').then(|| DUMPED.to_owned())
}

/// Faulting programs by signal: read address 0, execute an invalid instruction, hit a breakpoint, divide by 0.
#[cfg(target_arch = "x86_64")]
const FAULTS: &[(i32, &[u8])] = &[
    (11, &[0x31, 0xc0, 0x8a, 0x00]),
    (4, &[0x0f, 0x0b]),
    (5, &[0xcc]),
    (8, &[0x31, 0xc9, 0x31, 0xd2, 0xf7, 0xf1]),
];
/// Faulting programs by signal: read address 0, execute an invalid instruction, hit a breakpoint. Division by 0 is no fault on this
/// architecture.
#[cfg(target_arch = "aarch64")]
const FAULTS: &[(i32, &[u8])] = &[
    (11, &[0x00, 0x00, 0x80, 0xd2, 0x00, 0x00, 0x40, 0xf9]),
    (4, &[0x00, 0x00, 0x00, 0x00]),
    (5, &[0x00, 0x00, 0x20, 0xd4]),
];

/// Starts in the directory of [`put_program`]. A payload of the fake sees the host's paths, so the container mounts the directory under the
/// same path.
fn with_programs(world: &World, spec: ContainerSpec) -> ContainerSpec {
    let programs = programs(world);
    spec.with(|spec| {
        spec.mounts = vec![Mount::new(programs.clone(), programs.clone())];
        spec.payload.working_directory = Some(programs.to_string_lossy().into_owned());
    })
}

fn programs(world: &World) -> PathBuf {
    world.scratch.path().join("programs")
}

/// Writes the smallest ELF program with these instructions.
fn put_program(world: &World, name: &str, code: &[u8]) {
    const HEADERS: u64 = 64 + 56;
    const BASE: u64 = 0x40_0000;
    let machine: u16 = if cfg!(target_arch = "x86_64") {
        62
    } else {
        183
    };
    let length = HEADERS + code.len() as u64;
    let mut elf = Vec::new();
    // 64 bit, little endian, version 1; then an executable whose only program header follows this header (elf(5)).
    elf.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend_from_slice(&2_u16.to_le_bytes());
    elf.extend_from_slice(&machine.to_le_bytes());
    elf.extend_from_slice(&1_u32.to_le_bytes());
    for word in [BASE + HEADERS, 64, 0] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    elf.extend_from_slice(&0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 64, 0, 0] {
        elf.extend_from_slice(&half.to_le_bytes());
    }
    // One segment with the whole file, readable and executable.
    elf.extend_from_slice(&1_u32.to_le_bytes());
    elf.extend_from_slice(&5_u32.to_le_bytes());
    for word in [0, BASE, BASE, length, length, 0x1000] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    elf.extend_from_slice(code);
    let directory = programs(world);
    fs::create_dir_all(&directory).unwrap();
    let path = directory.join(name);
    fs::write(&path, elf).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}
