//! The two small tools: machinectl and systemctl as they are on a host whose first process is not systemd, unless the scenario
//! has an answer for the verb. They act on nothing.

use std::ffi::OsString;
use std::path::Path;

use crate::ledger::{Event, Ledger};
use crate::scenario::{Answer, Scenario};

/// Acts machinectl or systemctl; gives the exit status.
pub(crate) fn act(directory: &Path, tool: &str, words: &[OsString]) -> anyhow::Result<i32> {
    let scenario = Scenario::beside(directory)?;
    let mut ledger = Ledger::beside(directory)?;
    ledger.call(words, tool, false)?;
    let texts: Vec<_> = words[1..]
        .iter()
        .map(|word| word.to_string_lossy())
        .collect();
    let status = if texts.iter().any(|word| word == "--version") {
        say(&version(scenario.version))
    } else {
        let verb = texts
            .iter()
            .find(|word| !word.starts_with('-'))
            .map_or("", |word| word);
        let answers = if tool == "machinectl" {
            &scenario.machinectl
        } else {
            &scenario.systemctl
        };
        give(
            &answers
                .get(verb)
                .cloned()
                .unwrap_or_else(|| no_systemd(tool, verb)),
        )
    };
    ledger.write(&Event::Exit { status })?;
    Ok(status)
}

fn no_systemd(tool: &str, verb: &str) -> Answer {
    if (tool, verb) == ("systemctl", "is-system-running") {
        return Answer {
            stdout: "offline\n".to_owned(),
            stderr: String::new(),
            status: 1,
        };
    }
    let stderr = "System has not been booted with systemd as init system (PID 1). Can't operate.\nFailed to connect to bus: Host is down\n";
    Answer {
        stdout: String::new(),
        stderr: stderr.to_owned(),
        status: 1,
    }
}

#[expect(clippy::print_stderr, reason = "the tool's own words")]
fn give(answer: &Answer) -> i32 {
    say(&answer.stdout);
    eprint!("{}", answer.stderr);
    answer.status
}

/// Prints on stdout; gives the status of success.
#[expect(clippy::print_stdout, reason = "the tool's own words")]
pub(crate) fn say(text: &str) -> i32 {
    print!("{text}");
    0
}

/// What `--version` prints.
pub(crate) fn version(number: u32) -> String {
    let package = if number == 252 {
        "252.39-1~deb12u2".to_owned()
    } else {
        format!("{number}-1")
    };
    format!(
        "systemd {number} ({package})\n+PAM +AUDIT +SELINUX +APPARMOR +IMA +SMACK +SECCOMP +GCRYPT -GNUTLS +OPENSSL +ACL +BLKID +CURL +ELFUTILS +FIDO2 +IDN2 -IDN +IPTC +KMOD +LIBCRYPTSETUP +LIBFDISK +PCRE2 -PWQUALITY +P11KIT +QRENCODE +TPM2 +BZIP2 +LZ4 +XZ +ZLIB +ZSTD -BPF_FRAMEWORK -XKBCOMMON +UTMP +SYSVINIT default-hierarchy=unified\n"
    )
}
