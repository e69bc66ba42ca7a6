//! The environment of the payload. Values are secrets: no message has one.

use std::collections::BTreeMap;

use super::ConfigError;
use super::decode::{entry, quoted};
use super::words::is_variable_name;

const OPTION: &str = "config.environment";

/// The longest single string that the kernel passes to a program, without the end mark.
pub(super) const STRING_MAX: usize = 128 * 1024 - 1;
/// What all words and variables may take together: the kernel's usual 2 MiB, with room for what systemd-nspawn adds.
const TOTAL_MAX: usize = 2 * 1024 * 1024 - 128 * 1024;

/// Who hands the variables to the payload, and so which names they may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Carrier {
    /// systemd-nspawn, to the image's init.
    Nspawn,
    /// The driver's own first program: any name that the kernel takes.
    Own,
}

impl Carrier {
    fn takes(self, name: &str) -> bool {
        match self {
            Self::Nspawn => is_variable_name(name),
            Self::Own => !name.is_empty() && !name.contains(['=', '\0']),
        }
    }

    fn refusal(self) -> &'static str {
        match self {
            Self::Nspawn => {
                "is not the name of a variable that a booted container can be given: give letters, digits and _, no digit first"
            }
            Self::Own => {
                "is not the name of a variable: give at least one character, and neither = nor NUL"
            }
        }
    }
}

/// Nomad's environment, then `ours`, then the job's option; a later one wins. The second part is a note about names that
/// the carrier can't take.
pub(super) fn environment(
    nomads: &BTreeMap<String, String>,
    ours: BTreeMap<String, String>,
    jobs: Option<&BTreeMap<String, String>>,
    carrier: Carrier,
) -> Result<(BTreeMap<String, String>, Option<String>), ConfigError> {
    let mut all = BTreeMap::new();
    let mut left_out = Vec::new();
    for (name, value) in nomads {
        if !carrier.takes(name) {
            left_out.push(quoted(name));
            continue;
        }
        check(&entry("task.env", name), name, value)?;
        all.insert(name.clone(), value.clone());
    }
    all.extend(ours.into_iter().filter(|(name, _)| carrier.takes(name)));
    for (name, value) in jobs.into_iter().flatten() {
        let option = entry(OPTION, name);
        if !carrier.takes(name) {
            return Err(ConfigError::new(option, carrier.refusal()));
        }
        check(&option, name, value)?;
        all.insert(name.clone(), value.clone());
    }
    Ok((all, note(&left_out)))
}

fn check(option: &str, name: &str, value: &str) -> Result<(), ConfigError> {
    if value.contains('\0') {
        return Err(ConfigError::new(option, "a NUL character is not allowed"));
    }
    let length = name.len() + 1 + value.len();
    if length > STRING_MAX {
        let reason =
            format!("has {length} bytes with its name; a program takes at most {STRING_MAX}");
        return Err(ConfigError::new(option, reason));
    }
    Ok(())
}

fn note(left_out: &[String]) -> Option<String> {
    const SHOWN: usize = 20;
    let shown = left_out.get(..SHOWN).unwrap_or(left_out).join(", ");
    match left_out.len() {
        0 => None,
        count if count > SHOWN => Some(format!(
            "environment variables left out, systemd-nspawn can't take their names: {shown} and {} more",
            count - SHOWN
        )),
        _ => Some(format!(
            "environment variables left out, systemd-nspawn can't take their names: {shown}"
        )),
    }
}

/// Refuses words and variables that together are more than one program can get.
pub(super) fn fits(
    command: &[String],
    environment: &BTreeMap<String, String>,
) -> Result<(), ConfigError> {
    // Each string has an end mark and a pointer.
    const EACH: usize = 9;
    let words: usize = command.iter().map(|word| word.len() + EACH).sum();
    let variables: usize = environment
        .iter()
        .map(|(name, value)| name.len() + value.len() + 1 + EACH)
        .sum();
    if words + variables <= TOTAL_MAX {
        return Ok(());
    }
    let option = if words > variables {
        "config.command"
    } else {
        OPTION
    };
    let reason = format!(
        "command and environment have {} bytes together; a program takes at most {TOTAL_MAX}",
        words + variables
    );
    Err(ConfigError::new(option, reason))
}
