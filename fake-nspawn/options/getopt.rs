//! Matches words of the command line with the table, as getopt_long(3) does.

use super::Refusal;
use super::table::Takes::{Nothing, Value};
use super::table::{Row, rows};

/// The name of an option in the table, and its argument.
pub(super) type Found = (&'static str, Option<String>);

/// Reads an option after its two dashes.
pub(super) fn long_option<'a>(
    version: u32,
    text: &str,
    rest: &mut impl Iterator<Item = &'a String>,
) -> Result<Found, Refusal> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (text, None),
    };
    let matching: Vec<_> = rows(version)
        .filter(|row| row.0.starts_with(name))
        .collect();
    let Row(known, _, takes, ..) = match (matching.iter().find(|row| row.0 == name), &matching[..])
    {
        (Some(row), _) => row,
        (None, [row]) => row,
        (None, []) => return Err(getopt(format!("unrecognized option '--{text}'"))),
        (None, several) => {
            let names: Vec<_> = several.iter().map(|row| format!("'--{}'", row.0)).collect();
            let names = names.join(" ");
            return Err(getopt(format!(
                "option '--{text}' is ambiguous; possibilities: {names}"
            )));
        }
    };
    let value = match (takes, value) {
        (Nothing, Some(_)) => {
            return Err(getopt(format!(
                "option '--{known}' doesn't allow an argument"
            )));
        }
        (Value, None) => match rest.next() {
            Some(next) => Some(next.clone()),
            None => return Err(getopt(format!("option '--{known}' requires an argument"))),
        },
        (_, value) => value,
    };
    Ok((known, value))
}

/// Reads the letters after one dash.
pub(super) fn short_options<'a>(
    version: u32,
    letters: &str,
    rest: &mut impl Iterator<Item = &'a String>,
    found: &mut Vec<Found>,
) -> Result<(), Refusal> {
    let mut left = letters.chars();
    while let Some(letter) = left.next() {
        let Some(Row(name, _, takes, ..)) = rows(version).find(|row| row.1 == Some(letter)) else {
            return Err(getopt(format!("invalid option -- '{letter}'")));
        };
        if *takes == Nothing {
            found.push((name, None));
            continue;
        }
        let value = match left.as_str() {
            "" => rest.next().cloned(),
            glued => Some(glued.to_owned()),
        };
        let Some(value) = value else {
            return Err(getopt(format!("option requires an argument -- '{letter}'")));
        };
        found.push((name, Some(value)));
        break;
    }
    Ok(())
}

fn getopt(message: String) -> Refusal {
    Refusal::invalid(format!("systemd-nspawn: {message}"))
}
