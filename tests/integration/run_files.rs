//! The files that a `run` reads, and where it puts its own.

use std::fs;
use std::time::Duration;

use tokio::io::AsyncWriteExt;

use crate::harness::Host;
use crate::run_command::{RunCommand, job, refused_without_root};

const LONG: Duration = Duration::from_secs(600);

#[tokio::test]
async fn a_job_file_may_come_from_standard_input() {
    let host = Host::new();
    let program = env!("CARGO_BIN_EXE_nomad-driver-nspawn");
    let mut run = RunCommand::with_program(&host, program, &["run", "-"])
        .piped_stdin()
        .start();
    let mut stdin = run.stdin.take().unwrap();
    let job = job(&host, "exit 7", LONG);
    stdin.write_all(job.as_bytes()).await.unwrap();
    drop(stdin);
    if refused_without_root(&mut run).await {
        return;
    }
    run.ends_with(7).await;
}

#[tokio::test]
async fn a_byte_order_mark_is_ignored() {
    let host = Host::new();
    let job = format!("\u{feff}{}", job(&host, "exit 7", LONG));
    let mut run = RunCommand::new(&host, &job).start();
    if refused_without_root(&mut run).await {
        return;
    }
    run.ends_with(7).await;
}

/// Socket paths have at most 107 bytes. The allocation, which can be large, still goes to TMPDIR.
#[tokio::test]
async fn a_long_tmpdir_holds_the_allocation_and_no_sockets() {
    let host = Host::new();
    let long = host.join("t".repeat(100));
    fs::create_dir(&long).unwrap();
    let script = "trap 'exit 7' TERM; echo up; while :; do sleep 0.05; done";
    let mut run = RunCommand::new(&host, &job(&host, script, LONG))
        .env("TMPDIR", long.to_str().unwrap())
        .start();
    if refused_without_root(&mut run).await {
        return;
    }
    run.prints("up").await;
    let entries = || {
        fs::read_dir(&long)
            .unwrap()
            .map(|entry| entry.unwrap().path())
    };
    let made: Vec<_> = entries().collect();
    assert_eq!(made.len(), 1, "{made:?}");
    let plugin = fs::read_to_string(format!("/proc/{}/cmdline", run.plugin())).unwrap();
    let short = plugin
        .trim_end_matches('\0')
        .rsplit('\0')
        .next()
        .unwrap()
        .to_owned();
    assert!(fs::exists(format!("{short}/state")).unwrap(), "{plugin:?}");
    run.signal(nix::sys::signal::Signal::SIGTERM);
    run.ends_with(7).await;
    assert_eq!(entries().count(), 0);
    assert!(!fs::exists(&short).unwrap(), "{short}");
}
