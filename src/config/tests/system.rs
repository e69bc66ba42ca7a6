//! Systems that an image boots.

use super::*;
use crate::container::{Journal, JournalFormat, Readiness};
use std::time::Duration;

fn payload(stdout: &str, options: &str) -> crate::container::Payload {
    let mut host = TestHost::new();
    host.context.stdout = stdout.into();
    host.make("plugins/tree/etc/os-release");
    host.make("plugins/tree/sbin/init");
    let text = format!("image = \"tree\"\n{options}");
    host.check(&text).unwrap().spec.payload
}

#[test]
fn a_booted_system_is_followed_without_being_asked() {
    let default = payload("/logs/out", "");
    assert_eq!(default.console, Console::Relayed);
    assert_eq!(default.journal, Some(Journal::default()));
    let off = payload("/logs/out", "journal = false\nconsole = \"pipe\"");
    assert_eq!((off.console, off.journal), (Console::Pipe, None));
    let command = payload("/logs/out", "boot = false");
    assert_eq!((command.console, command.journal), (Console::Pipe, None));
    // What is printed is kept nowhere.
    let silent = payload("/dev/null", "");
    assert_eq!((silent.console, silent.journal), (Console::Pipe, None));
}

#[test]
fn units_have_their_full_names() {
    let options = r#"
        journal_format = "json"
        journal_units = ["nginx", "a.b", "getty@tty1.service", "dev-sda\\x2d1.mount"]
    "#;
    let units = [
        "nginx.service",
        "a.b.service",
        "getty@tty1.service",
        "dev-sda\\x2d1.mount",
    ];
    let expected = Journal {
        format: JournalFormat::Json,
        units: units.map(str::to_owned).to_vec(),
    };
    assert_eq!(payload("/logs/out", options).journal, Some(expected));
}

#[rstest]
#[case("", Readiness::Started)]
#[case("ready = \"started\"", Readiness::Started)]
#[case("ready = \"notify\"", Readiness::Notify(Duration::from_secs(90)))]
#[case(
    "boot = false\nready = \"notify\"\nready_timeout = \"1.5s\"",
    Readiness::Notify(Duration::from_millis(1500))
)]
fn a_task_is_ready_when_its_job_says_so(#[case] options: &str, #[case] expected: Readiness) {
    assert_eq!(payload("/logs/out", options).readiness, expected);
}

#[rstest]
#[case(
    "ready = \"healthy\"",
    "config.ready: \"healthy\" is not one of started, notify"
)]
#[case(
    "ready_timeout = \"9s\"",
    "config.ready_timeout: \"9s\" has no effect without config.ready = \"notify\": add it, or remove the option"
)]
#[case(
    "ready = \"notify\"\nready_timeout = \"0s\"",
    "config.ready_timeout: \"0s\" is not more than 0 and at most 24h"
)]
#[case(
    "ready = \"notify\"\nready_timeout = \"25h\"",
    "config.ready_timeout: \"25h\" is not more than 0 and at most 24h"
)]
#[case(
    "journal_format = \"export\"",
    "config.journal_format: \"export\" is not one of short, cat, json"
)]
#[case(
    "journal = true\nboot = false",
    "config.journal: true needs an image that boots: set config.boot = true, or remove the option"
)]
#[case(
    "journal_units = [\"a\"]\nboot = false",
    "config.journal_units: needs an image that boots: set config.boot = true, or remove the option"
)]
#[case(
    "journal_units = [\"a\"]\njournal = false",
    "config.journal_units: has no effect with config.journal = false: remove one of the two"
)]
#[case(
    "journal_units = [\"a\", \"web*\"]",
    "config.journal_units[1]: \"web*\" is not the name of a unit, such as nginx.service"
)]
#[case(
    "journal_units = [\"\"]",
    "config.journal_units[0]: \"\" is not the name of a unit, such as nginx.service"
)]
#[case(
    "journal_units = [\"../x\"]",
    "config.journal_units[0]: \"../x\" is not the name of a unit, such as nginx.service"
)]
fn what_makes_no_sense_is_refused(#[case] options: &str, #[case] expected: &str) {
    let host = TestHost::new();
    let error = host.check(&format!("image = \"tree\"\n{options}"));
    assert_eq!(error.unwrap_err().to_string(), expected);
}
