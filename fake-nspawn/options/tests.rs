//! Command lines, and what is refused.

use super::*;
use rstest::rstest;

fn read(version: u32, words: &[&str]) -> Result<Parsed, Refusal> {
    let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
    parse(version, &words, |name| {
        (name == "SET").then(|| "from outside".to_owned())
    })
}

fn run(words: &[&str]) -> Options {
    match read(252, words) {
        Ok(Parsed::Run(options)) => *options,
        other => panic!("{other:?}"),
    }
}

fn refused(version: u32, words: &[&str]) -> String {
    read(version, words).expect_err("was taken").message
}

#[test]
fn long_and_short_options_are_parsed() {
    for words in [
        &["--directory=/a"][..],
        &["--directory", "/a"],
        &["-D", "/a"],
        &["-D/a"],
        &["--dir=/a"],
    ] {
        assert_eq!(run(words).directory.as_deref(), Some("/a"), "{words:?}");
    }
}

#[test]
fn parsing_stops_at_the_first_operand() {
    assert_eq!(
        run(&["-q", "echo", "--nope", "--", "-D"]).command,
        ["echo", "--nope", "--", "-D"]
    );
    assert_eq!(run(&["-q", "--", "--nope"]).command, ["--nope"]);
}

#[test]
fn the_last_of_two_resource_limits_wins() {
    let options = run(&[
        "--rlimit=NOFILE=5",
        "--rlimit=RLIMIT_NOFILE=1:2",
        "--rlimit=CORE=0:infinity",
    ]);
    let limits = options.rlimits.into_iter();
    let limits: Vec<_> = limits
        .map(|limit| (limit.name, limit.soft, limit.hard))
        .collect();
    let wanted = [("NOFILE", 1, 2), ("CORE", 0, u64::MAX)];
    assert_eq!(
        limits,
        wanted.map(|(name, soft, hard)| (name.to_owned(), soft, hard))
    );
}

#[test]
fn the_help_lists_the_options_of_the_version() {
    assert!(help(258).contains("--cleanup") && !help(257).contains("--cleanup"));
    assert!(help(250).contains("--suppress-sync=") && !help(249).contains("--suppress-sync"));
}

#[test]
fn the_last_setting_of_a_variable_wins_and_a_bare_name_is_copied() {
    let options = run(&["-EA=1", "--setenv", "A=2=3", "-E", "SET", "-E", "UNSET"]);
    let wanted = [("A", "2=3"), ("SET", "from outside"), ("UNSET", "")];
    let wanted: Vec<_> = wanted
        .iter()
        .map(|(n, v)| (n.to_string(), v.to_string()))
        .collect();
    assert_eq!(options.environment, wanted);
}

#[rstest]
#[case(252, &["--x"], "systemd-nspawn: unrecognized option '--x'")]
#[case(252, &["-Y"], "systemd-nspawn: invalid option -- 'Y'")]
#[case(252, &["--directory"], "systemd-nspawn: option '--directory' requires an argument")]
#[case(252, &["--read-only=yes"], "systemd-nspawn: option '--read-only' doesn't allow an argument")]
#[case(
    252,
    &["--no"],
    "systemd-nspawn: option '--no' is ambiguous; possibilities: '--no-new-privileges' '--notify-ready' '--no-pager'"
)]
#[case(253, &["--image-policy=x"], "systemd-nspawn: unrecognized option '--image-policy=x'")]
#[case(249, &["--suppress-sync=yes"], "systemd-nspawn: unrecognized option '--suppress-sync=yes'")]
#[case(249, &["-E", "SET"], "Environment variable assignment 'SET' is not valid.")]
#[case(252, &["--rlimit=NOFILE"], "--rlimit= expects an '=' assignment.")]
#[case(252, &["--rlimit=FILES=1"], "Unknown resource limit: FILES")]
#[case(252, &["--rlimit=NOFILE=2:1"], "Failed to parse resource limit: 2:1")]
#[case(252, &["--rlimit=NOFILE=-1"], "Failed to parse resource limit: -1")]
#[case(252, &["--rlimit=NICE=41"], "Failed to parse resource limit: 41")]
#[case(252, &["--rlimit=NICE=infinity"], "Failed to parse resource limit: infinity")]
#[case(
    252,
    &["--rlimit=RLIMIT_CPU=18446744073709"],
    "Failed to parse resource limit: 18446744073709"
)]
#[case(252, &["-b", "-a"], "--boot and --as-pid2 may not be combined.")]
#[case(252, &["--volatile", "--private-users-ownership=chown"],
    "--read-only and --private-users-ownership=chown may not be combined.")]
#[case(252, &["-E", "1X="], "Cannot assign environment variable 1X=: Invalid argument")]
#[case(252, &["-E", "X=\u{fffe}"], "Cannot assign environment variable X=\u{fffe}: Invalid argument")]
#[case(247, &["-E", "X=\u{1b}"], "Environment variable assignment 'X=\u{1b}' is not valid.")]
#[case(252, &["-p", "80"], "Cannot use --port= without private networking.")]
#[case(252, &["-n", "-p80", "-p", "tcp:80"], "Duplicate port specification: tcp:80")]
#[case(252, &["-D", "/a", "-i", "/b"], "--directory= and --image= may not be combined.")]
#[case(252, &["--ambient-capability=CAP_NET_ADMIN"],
    "AmbientCapability= setting is not fully covered by Capability= setting.")]
fn what_systemd_nspawn_refuses_is_refused(
    #[case] version: u32,
    #[case] words: &[&str],
    #[case] message: &str,
) {
    assert_eq!(refused(version, words), message);
}
