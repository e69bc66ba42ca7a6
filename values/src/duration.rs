//! Parses durations as job files and operators write them, in Go's notation. Negative durations are rejected, because
//! no option has a use for them.

use std::time::Duration;

/// A text that is not a duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a duration: use a number with a unit, such as 30s, 1m30s or 500ms")]
pub struct NotADuration(String);

const UNITS: [(&str, u64); 8] = [
    // Longer names first: `ms` must not be read as `m`.
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000),
    ("μs", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// Parses `1h2m3.5s`, `500ms`, `0`.
pub fn parse(text: &str) -> Result<Duration, NotADuration> {
    let refuse = || NotADuration(text.to_owned());
    let mut rest = text.trim();
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    if rest.is_empty() {
        return Err(refuse());
    }
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let end = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or_else(refuse)?;
        let (number, tail) = rest.split_at(end);
        let (unit, nanoseconds) = UNITS
            .iter()
            .find(|(unit, _)| tail.starts_with(unit))
            .ok_or_else(refuse)?;
        let part = part(number, *nanoseconds).ok_or_else(refuse)?;
        total = total.checked_add(part).ok_or_else(refuse)?;
        rest = &tail[unit.len()..];
    }
    Ok(total)
}

fn part(number: &str, nanoseconds: u64) -> Option<Duration> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let whole: u64 = if whole.is_empty() {
        0
    } else {
        whole.parse().ok()?
    };
    let mut total = whole.checked_mul(nanoseconds)?;
    let mut unit = nanoseconds;
    for digit in fraction.chars() {
        unit /= 10;
        total = total.checked_add(u64::from(digit.to_digit(10)?) * unit)?;
    }
    Some(Duration::from_nanos(total))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("5s", 5_000)]
    #[case("1m30s", 90_000)]
    #[case("500ms", 500)]
    #[case("1.5h", 5_400_000)]
    #[case(".5s", 500)]
    #[case("0", 0)]
    #[case("0s", 0)]
    fn durations_as_go_writes_them_are_read(#[case] text: &str, #[case] milliseconds: u64) {
        assert_eq!(parse(text), Ok(Duration::from_millis(milliseconds)));
    }

    #[rstest]
    #[case("")]
    #[case("5")]
    #[case("s")]
    #[case("-5s")]
    #[case("5 s")]
    #[case("5x")]
    #[case("1.2.3s")]
    #[case("99999999999999999999s")]
    fn other_texts_are_refused_by_name(#[case] text: &str) {
        assert_eq!(parse(text), Err(NotADuration(text.to_owned())));
    }
}
