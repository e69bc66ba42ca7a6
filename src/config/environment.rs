//! The environment of the payload. Values are secrets: no message has one.

use std::collections::BTreeMap;

use super::ConfigError;
use super::decode::{entry, quoted};
use super::values::is_variable_name;

const OPTION: &str = "config.environment";

/// The longest single string that the kernel passes to a program, without the end mark.
pub(super) const STRING_MAX: usize = 128 * 1024 - 1;
/// What all words and variables may take together: the kernel's usual 2 MiB, with room for what systemd-nspawn adds.
const TOTAL_MAX: usize = 2 * 1024 * 1024 - 128 * 1024;

/// Who hands the variables to the payload, and so which names they may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EnvTransport {
    /// systemd-nspawn, to the image's init.
    Nspawn,
    /// The driver's own first program: any name that the kernel takes.
    Init,
}

impl EnvTransport {
    fn accepts(self, name: &str) -> bool {
        match self {
            Self::Nspawn => is_variable_name(name),
            Self::Init => !name.is_empty() && !name.contains(['=', '\0']),
        }
    }

    fn refusal(self) -> &'static str {
        match self {
            Self::Nspawn => {
                "is not the name of a variable that a booted container can be given: give letters, digits and _, no digit first"
            }
            Self::Init => {
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
    transport: EnvTransport,
) -> Result<(BTreeMap<String, String>, Option<String>), ConfigError> {
    let mut all = BTreeMap::new();
    let mut left_out = Vec::new();
    for (name, value) in nomads {
        if !transport.accepts(name) {
            left_out.push(quoted(name));
            continue;
        }
        check(&entry("task.env", name), name, value)?;
        all.insert(name.clone(), value.clone());
    }
    all.extend(ours.into_iter().filter(|(name, _)| transport.accepts(name)));
    for (name, value) in jobs.into_iter().flatten() {
        let option = entry(OPTION, name);
        if !transport.accepts(name) {
            return Err(ConfigError::new(option, transport.refusal()));
        }
        check(&option, name, value)?;
        all.insert(name.clone(), value.clone());
    }
    Ok((all, note(&left_out, transport)))
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

/// The shortest value that is looked for in messages. Shorter ones are parts of ordinary words.
const MIN_SECRET_BYTES: usize = 8;

/// The error without the values of these variables: Nomad puts them into any option where a job says `${NAME}`, and messages
/// repeat options. Nomad's own variables are no secrets, its token aside.
pub(super) fn redact(mut error: ConfigError, variables: &BTreeMap<String, String>) -> ConfigError {
    let mut secrets: Vec<(&str, String)> = variables
        .iter()
        .filter(|(name, _)| !name.starts_with("NOMAD_") || *name == "NOMAD_TOKEN")
        .filter(|(_, value)| value.len() >= MIN_SECRET_BYTES)
        .flat_map(|(name, value)| {
            let escaped = format!("{value:?}");
            let escaped = escaped[1..escaped.len() - 1].to_owned();
            [(name.as_str(), value.clone()), (name, escaped)]
        })
        .collect();
    // One may be a part of another.
    secrets.sort_by_key(|(_, value)| std::cmp::Reverse(value.len()));
    for (name, secret) in &secrets {
        let shown = format!("${{{name}}}");
        error.option = redact_value(&error.option, secret, &shown);
        error.reason = redact_value(&error.reason, secret, &shown);
    }
    error
}

/// The text with `shown` for every `secret` in it, and for one that was cut off at the end of a long quotation.
fn redact_value(text: &str, secret: &str, shown: &str) -> String {
    const CUT_OFF: &str = "\"…";
    let beginning: String = secret.chars().take(MIN_SECRET_BYTES).collect();
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(&beginning) {
        let (before, found) = rest.split_at(at);
        let same: usize = found
            .chars()
            .zip(secret.chars())
            .take_while(|(one, other)| one == other)
            .map(|(one, _)| one.len_utf8())
            .sum();
        clean.push_str(before);
        if same == secret.len() || found[same..].starts_with(CUT_OFF) {
            clean.push_str(shown);
            rest = &found[same..];
        } else {
            clean.push_str(&found[..beginning.len()]);
            rest = &found[beginning.len()..];
        }
    }
    clean.push_str(rest);
    clean
}

fn note(left_out: &[String], transport: EnvTransport) -> Option<String> {
    const SHOWN: usize = 20;
    if left_out.is_empty() {
        return None;
    }
    let whose = match transport {
        EnvTransport::Nspawn => "systemd-nspawn",
        EnvTransport::Init => "a program",
    };
    let shown = left_out.get(..SHOWN).unwrap_or(left_out).join(", ");
    let more = match left_out.len().saturating_sub(SHOWN) {
        0 => String::new(),
        count => format!(" and {count} more"),
    };
    Some(format!(
        "environment variables left out, {whose} can't take their names: {shown}{more}"
    ))
}

/// Refuses words and variables that together are more than one program can get.
pub(super) fn check_total_size(
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    fn variables(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        let pairs = pairs.iter();
        pairs
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[rstest]
    #[case::whole("hunter2hunter2", "${TOKEN}")]
    #[case::part("/srv/hunter2hunter2/x", "/srv/${TOKEN}/x")]
    #[case::twice("hunter2hunter2 hunter2hunter2", "${TOKEN} ${TOKEN}")]
    #[case::only_the_beginning("hunter2hunger", "hunter2hunger")]
    #[case::nomads_own("/secrets/file", "/secrets/file")]
    #[case::nomads_token("eyJhbGciOi", "${NOMAD_TOKEN}")]
    #[case::short("yes", "yes")]
    fn no_message_has_a_variables_value(#[case] value: &str, #[case] shown: &str) {
        let all = variables(&[
            ("TOKEN", "hunter2hunter2"),
            ("NOMAD_TOKEN", "eyJhbGciOi"),
            ("NOMAD_SECRETS_DIR", "/secrets"),
            ("SHORT", "yes"),
        ]);
        let error = ConfigError::new(
            entry("config.bind", value),
            format!("{} is bad", quoted(value)),
        );
        let clean = redact(error, &all);
        assert_eq!(clean.option, format!("config.bind[\"{shown}\"]"));
        assert_eq!(clean.reason, format!("\"{shown}\" is bad"));
    }

    proptest! {
        /// Whatever the value is and wherever the quotation ends, no more of it is shown than a value too short to be one.
        #[test]
        fn no_length_and_no_character_shows_a_value(
            before in "[a-z ]{0,220}",
            secret in "[A-Z\n\"\\\\ü☃\t]{8,400}",
        ) {
            let all = variables(&[("name", &secret)]);
            let text = format!("{before}{secret}");
            let clean = redact(ConfigError::new("o", quoted(&text)), &all);
            let escaped = format!("{secret:?}");
            let start: String = escaped.chars().skip(1).take(MIN_SECRET_BYTES).collect();
            prop_assert!(!clean.reason.contains(&start), "{}", clean.reason);
        }
    }
}
