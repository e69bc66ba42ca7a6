//! Builds and checks the environment of the payload. Values are secrets: no message contains one.

use std::collections::BTreeMap;

use super::ConfigError;
use super::decode::{entry, quoted};
use super::values::is_variable_name;

const OPTION: &str = "config.environment";

/// The longest single string that the kernel passes to a program, without the terminating NUL.
pub(super) const STRING_MAX: usize = 128 * 1024 - 1;
/// The limit for all arguments and variables together: the kernel's usual 2 MiB, minus a reserve for what
/// systemd-nspawn adds.
const TOTAL_MAX: usize = 2 * 1024 * 1024 - 128 * 1024;

/// How the variables get to the payload, which decides which names they may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EnvTransport {
    /// systemd-nspawn passes them to the image's init.
    Nspawn,
    /// The driver's own container init passes them: any name that the kernel accepts.
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
                "is not a valid variable name in a booted container: use letters, digits and _, and no digit first"
            }
            Self::Init => {
                "is not a valid variable name: use at least one character, and neither = nor NUL"
            }
        }
    }
}

/// Merges Nomad's environment, then `ours`, then the job's option; later ones override earlier ones. The second part of
/// the result is a note about names that the transport can't pass.
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
            format!("has {length} bytes including its name; at most {STRING_MAX} are allowed");
        return Err(ConfigError::new(option, reason));
    }
    Ok(())
}

/// The shortest value that is searched for in messages. Shorter ones occur as parts of ordinary words.
const MIN_SECRET_BYTES: usize = 8;

/// Removes the values of these variables from the error: Nomad substitutes them into any option where a job has
/// `${NAME}`, and messages quote options. Nomad's own variables are not secrets, except for its tokens.
pub(super) fn redact(mut error: ConfigError, variables: &BTreeMap<String, String>) -> ConfigError {
    let mut secrets: Vec<(&str, String)> = secrets(variables)
        .filter(|(_, value)| value.len() >= MIN_SECRET_BYTES)
        .flat_map(|(name, value)| {
            let escaped = format!("{value:?}");
            let escaped = escaped[1..escaped.len() - 1].to_owned();
            [(name, value.to_owned()), (name, escaped)]
        })
        .collect();
    // Longest first, because one value may be part of another.
    secrets.sort_by_key(|(_, value)| std::cmp::Reverse(value.len()));
    for (name, secret) in &secrets {
        let shown = format!("${{{name}}}");
        error.option = redact_value(&error.option, secret, &shown);
        error.reason = redact_value(&error.reason, secret, &shown);
    }
    error
}

/// The variables that may be secrets.
fn secrets(variables: &BTreeMap<String, String>) -> impl Iterator<Item = (&str, &str)> {
    variables
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .filter(|(name, _)| !name.starts_with("NOMAD_") || name.starts_with("NOMAD_TOKEN"))
}

/// Replaces every value of these variables in the text with its name. Short values are replaced only where they stand alone, between
/// characters that are neither letters nor digits, because they occur as parts of ordinary words.
pub(super) fn redact_all(text: &str, variables: &BTreeMap<String, String>) -> String {
    let mut secrets: Vec<(&str, &str)> = secrets(variables)
        .filter(|(_, value)| !value.is_empty())
        .collect();
    secrets.sort_by_key(|(_, value)| std::cmp::Reverse(value.len()));
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        let alone = |value: &str| {
            let joins = |char: Option<char>| char.is_some_and(char::is_alphanumeric);
            !joins(clean.chars().next_back()) && !joins(rest[value.len()..].chars().next())
        };
        let found = secrets.iter().find(|(_, value)| {
            rest.starts_with(value) && (value.len() >= MIN_SECRET_BYTES || alone(value))
        });
        match found {
            Some((name, value)) => {
                clean.push_str("${");
                clean.push_str(name);
                clean.push('}');
                rest = &rest[value.len()..];
            }
            None => {
                clean.push(next);
                rest = &rest[next.len_utf8()..];
            }
        }
    }
    clean
}

/// Replaces every `secret` in the text with `shown`, including one that is cut off at the end of a long quotation.
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
    let rejected = match transport {
        EnvTransport::Nspawn => "systemd-nspawn does not accept",
        EnvTransport::Init => "a program can't be given",
    };
    let shown = left_out.get(..SHOWN).unwrap_or(left_out).join(", ");
    let more = match left_out.len().saturating_sub(SHOWN) {
        0 => String::new(),
        count => format!(" and {count} more"),
    };
    Some(format!(
        "environment variables left out, because {rejected} their names: {shown}{more}. Rename them in the env block"
    ))
}

/// Rejects a command and variables that together exceed what one program can be passed.
pub(super) fn check_total_size(
    command: &[String],
    environment: &BTreeMap<String, String>,
) -> Result<(), ConfigError> {
    // Each string has a terminating NUL and a pointer.
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
        "command and environment have {} bytes in total; at most {TOTAL_MAX} are allowed",
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
    fn no_message_contains_the_value_of_a_variable(#[case] value: &str, #[case] shown: &str) {
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
        /// For any value and any cut-off point of the quotation, the message shows no more of the value than would be
        /// too short to be a secret.
        #[test]
        fn values_of_any_length_and_character_are_redacted(
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
