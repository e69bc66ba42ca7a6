//! `ci/rerun-failed`: which failed tests are run again, and what counts as passed afterwards.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use rstest::rstest;

/// A fake test binary: the first call fails two tests, a later call for one of them runs `second`. Logs its arguments.
fn toy(directory: &Path, name: &str, first: &str, second: &str) -> String {
    let path = directory.join(name);
    let calls = directory.join("calls").display().to_string();
    let script = format!(
        "#!/bin/sh\necho \"$*\" >>{calls}\ncase \"$*\" in\n*--exact*) {second};;\n*) {first};;\nesac\n"
    );
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path.display().to_string()
}

/// The test runner's output; a second name appears in the output of the first test too.
const TWO_FAIL: &str = "printf '%s\\n' 'NOT APPLICABLE a::none: no such host' 'test a::one ... FAILED' '' 'failures:' '' \
     '---- a::one stdout ----' '    a::no_test' '' 'failures:' '    a::one' '    a::two' '' \
     'test result: FAILED. 3 passed; 2 failed; 0 ignored'; exit 101";
const ONE_PASSES: &str = "echo 'test result: ok. 1 passed; 0 failed; 0 ignored'";
const NONE_PASSES: &str = "echo 'test result: ok. 0 passed; 0 failed; 0 ignored'";

/// Runs the script; returns whether it passed, the notes, and the calls.
fn rerun(directory: &Path, command: &[&str]) -> (bool, String, String) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/ci/rerun-failed");
    let notes = directory.join("notes");
    fs::write(&notes, "").unwrap();
    let output = Command::new(script)
        .args(command)
        .env("CI_NOTES", &notes)
        .output()
        .unwrap();
    let read = |name| fs::read_to_string(directory.join(name)).unwrap();
    (output.status.success(), read("notes"), read("calls"))
}

#[test]
fn a_test_that_passes_the_second_time_is_flaky() {
    let directory = tempfile::tempdir().unwrap();
    let toy = toy(directory.path(), "toy", TWO_FAIL, ONE_PASSES);
    let (passed, notes, calls) = rerun(directory.path(), &[&toy, "--skip", "x"]);
    assert!(passed);
    assert_eq!(
        notes,
        "NOT APPLICABLE a::none: no such host\nFLAKY a::one\nFLAKY a::two\n"
    );
    assert_eq!(
        calls,
        "--skip x\n--skip x --exact a::one\n--skip x --exact a::two\n"
    );
}

#[rstest]
#[case::without_options(&["test"], "test --no-fail-fast", "test --no-fail-fast --")]
#[case::with_options(
    &["test", "-p", "e2e", "--", "--skip", "x"],
    "test -p e2e --no-fail-fast -- --skip x",
    "test -p e2e --no-fail-fast -- --skip x"
)]
fn cargo_gets_test_names_after_the_dashes(
    #[case] words: &[&str],
    #[case] first: &str,
    #[case] second: &str,
) {
    let directory = tempfile::tempdir().unwrap();
    let cargo = toy(directory.path(), "cargo", TWO_FAIL, ONE_PASSES);
    let command = [&[&*cargo], words].concat();
    let (passed, _, calls) = rerun(directory.path(), &command);
    assert!(passed);
    assert_eq!(
        calls,
        format!("{first}\n{second} --exact a::one\n{second} --exact a::two\n")
    );
}

#[rstest]
#[case::failed_twice(TWO_FAIL, "exit 101", 3)]
#[case::not_found_again(TWO_FAIL, NONE_PASSES, 3)]
#[case::nothing_executed(NONE_PASSES, ONE_PASSES, 1)]
#[case::no_name("exit 101", ONE_PASSES, 1)]
#[case::a_build_failed("echo 'error: could not compile'; exit 101", ONE_PASSES, 1)]
fn a_persistent_failure_is_not_flaky(
    #[case] first: &str,
    #[case] second: &str,
    #[case] times: usize,
) {
    let directory = tempfile::tempdir().unwrap();
    let toy = toy(directory.path(), "toy", first, second);
    let (passed, notes, calls) = rerun(directory.path(), &[&toy]);
    assert!(!passed);
    assert!(!notes.contains("FLAKY"), "{notes}");
    assert_eq!(calls.lines().count(), times, "{calls}");
}

#[test]
fn a_test_process_that_died_beside_a_failed_test_fails() {
    let directory = tempfile::tempdir().unwrap();
    let died = TWO_FAIL.replace(
        "; exit 101",
        "; echo \"  process didn't exit successfully\"; exit 101",
    );
    let toy = toy(directory.path(), "toy", &died, ONE_PASSES);
    let (passed, _, calls) = rerun(directory.path(), &[&toy]);
    assert!(!passed);
    assert_eq!(calls, "\n");
}

#[test]
fn many_failures_are_not_flaky() {
    let directory = tempfile::tempdir().unwrap();
    let many = "echo failures:; for n in 1 2 3 4 5 6 7 8 9 10 11; do echo \"    t$n\"; done; echo 'test result: FAILED. 0 passed; 11 failed'; exit 101";
    let toy = toy(directory.path(), "toy", many, ONE_PASSES);
    let (passed, _, calls) = rerun(directory.path(), &[&toy]);
    assert!(!passed);
    assert_eq!(calls, "\n");
}
