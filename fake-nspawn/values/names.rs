//! Names, paths and variables: machine name, UUID, directories in the container, variables, signals, credentials.

use crate::options::Refusal;

/// A machine or host name; an empty one counts as none.
pub(crate) fn host_name(what: &str, text: &str) -> Result<Option<String>, Refusal> {
    if text.is_empty() {
        return Ok(None);
    }
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    if text.len() <= 64 && text.split('.').all(label) {
        return Ok(Some(text.to_owned()));
    }
    Err(Refusal::invalid(format!("Invalid {what}: {text}")))
}

/// 128 bits in hexadecimal, with or without dashes; returned with dashes.
pub(crate) fn uuid(text: &str) -> Result<String, Refusal> {
    let digits = text.replace('-', "");
    let dashes = text
        .match_indices('-')
        .map(|(at, _)| at)
        .collect::<Vec<_>>();
    let shape = dashes.is_empty() || dashes == [8, 13, 18, 23];
    if !shape || digits.len() != 32 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(Refusal::invalid(format!("Invalid UUID: {text}")));
    }
    if digits.bytes().all(|byte| byte == b'0') {
        return Err(Refusal::invalid("Machine UUID may not be all zeroes."));
    }
    Ok(dashed(&digits.to_ascii_lowercase()))
}

/// Inserts the dashes into 32 digits.
fn dashed(digits: &str) -> String {
    [
        &digits[..8],
        &digits[8..12],
        &digits[12..16],
        &digits[16..20],
        &digits[20..],
    ]
    .join("-")
}

pub(crate) fn pivot_root(text: &str) -> Result<String, Refusal> {
    let parts: Vec<_> = text.split(':').collect();
    if parts.len() <= 2 && parts.iter().all(|part| part.starts_with('/')) {
        return Ok(parts[0].to_owned());
    }
    Err(Refusal::invalid(format!(
        "Failed to parse --pivot-root= argument {text}: Invalid argument"
    )))
}

pub(crate) fn chdir(version: u32, text: &str) -> Result<String, Refusal> {
    if !text.starts_with('/') {
        return Err(Refusal::invalid(format!(
            "Working directory {text} is not an absolute path."
        )));
    }
    if version >= 258 && text.split('/').any(|part| part == "..") {
        return Err(Refusal::invalid(format!(
            "Working directory path is not normalized: {text}"
        )));
    }
    Ok(text.to_owned())
}

pub(crate) fn variable_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(|first: char| first.is_ascii_digit())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// A valid value of a variable given as an argument: no Unicode noncharacters, before 248 also no control characters but tab and newline.
pub(crate) fn variable_value(value: &str, version: u32) -> bool {
    value.chars().all(|char| {
        let code = u32::from(char);
        let noncharacter = (0xfdd0..=0xfdef).contains(&code) || code & 0xfffe == 0xfffe;
        let control = char.is_ascii_control() && char != '\t' && char != '\n';
        !noncharacter && (version >= 248 || !control)
    })
}

/// A signal by name or number.
pub(crate) fn signal(text: &str) -> Result<i32, Refusal> {
    let bad = || Refusal::invalid(format!("Cannot parse signal: {text}"));
    let name = text.strip_prefix("SIG").unwrap_or(text);
    let real_time = |rest: &str, sign: char| match rest.strip_prefix(sign) {
        Some(digits) => digits.parse::<i32>().ok(),
        None => rest.is_empty().then_some(0),
    };
    let number = if let Ok(number) = name.parse::<i32>() {
        Some(number)
    } else if let Some(rest) = name.strip_prefix("RTMIN") {
        real_time(rest, '+').map(|offset| crate::process::RTMIN + offset)
    } else if let Some(rest) = name.strip_prefix("RTMAX") {
        real_time(rest, '-').map(|offset| 64 - offset)
    } else {
        format!("SIG{name}")
            .parse::<nix::sys::signal::Signal>()
            .ok()
            .map(|signal| signal as i32)
    };
    number
        .filter(|number| (1..=64).contains(number))
        .ok_or_else(bad)
}

/// A credential; returns its name.
pub(crate) fn credential(option: &str, text: &str, version: u32) -> Result<String, Refusal> {
    let Some((id, value)) = text.split_once(':') else {
        let message = if version >= 254 {
            format!("Missing value for credential parameter: {text}")
        } else {
            format!("Missing value for --{option}=: {text}")
        };
        return Err(Refusal::invalid(message));
    };
    let id = id.replace("\\\\", "\\");
    let is_allowed = |byte: u8| matches!(byte, b' '..=b'~') && byte != b'/';
    if id.is_empty() || !id.bytes().all(is_allowed) || id == "." || id == ".." || id.len() > 255 {
        return Err(Refusal::invalid(format!(
            "Credential name is not valid: {id}"
        )));
    }
    if option == "load-credential" && !value.starts_with('/') {
        let message = format!("Credential not available (no credentials passed at all): {id}");
        return Err(Refusal { message, errno: 2 });
    }
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("a", true)]
    #[case("A-b.C", true)]
    #[case("a_b", false)]
    #[case("a..b", false)]
    #[case("a.", false)]
    #[case("a-", false)]
    #[case("-a", false)]
    #[case("a-.b", false)]
    #[case("é", false)]
    fn a_machine_name_is_a_strict_host_name(#[case] name: &str, #[case] good: bool) {
        assert_eq!(host_name("machine name", name).is_ok(), good);
    }

    #[test]
    fn a_machine_name_has_at_most_64_characters() {
        assert!(host_name("machine name", &"a".repeat(64)).is_ok());
        assert!(host_name("machine name", &"a".repeat(65)).is_err());
    }

    #[rstest]
    #[case("TERM", Some(15))]
    #[case("SIGRTMIN+4", Some(38))]
    #[case("64", Some(64))]
    #[case("0", None)]
    #[case("65", None)]
    #[case("RTMIN+40", None)]
    #[case("FOO", None)]
    fn a_signal_is_a_name_or_a_number(#[case] text: &str, #[case] number: Option<i32>) {
        assert_eq!(signal(text).ok(), number);
    }
}
