//! Runs the program `nft`: loads statements in one transaction, and lists tables, chains and the elements of the driver's table. Statements
//! are nft's own language and not its JSON: JSON can't define a map to an address and a port (`Invalid map type`, nft 1.0.6).

use std::io::{self, Write as _};
use std::net::IpAddr;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use super::rules::{EVERY, Element, Set, TABLE};

/// Where the program is looked for. The first is along `PATH`, which often lacks the directories of the superuser in a service.
const PROGRAMS: [&str; 3] = ["nft", "/usr/sbin/nft", "/sbin/nft"];

/// An element of the driver's table, as it is in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) element: Element,
    /// Its comment; empty if it has none.
    pub(super) owner: String,
}

/// Loads these statements: all or none of them.
pub(super) fn load(statements: &str) -> io::Result<()> {
    run(&["-f", "-"], statements).map(drop)
}

/// Whether the driver's table exists.
pub(super) fn table_exists() -> io::Result<bool> {
    let tables = list(&["tables"])?;
    Ok(objects(&tables, "table").any(|table| table["family"] == "inet" && table["name"] == TABLE))
}

/// All chains, as nft describes them.
pub(super) fn chains() -> io::Result<Vec<Value>> {
    let all = list(&["chains"])?;
    Ok(objects(&all, "chain").cloned().collect())
}

/// The elements of the driver's table; `None` if it does not exist.
pub(super) fn elements() -> io::Result<Option<Vec<Held>>> {
    let list = || list(&["table", "inet", TABLE]).map(|listed| Some(parse(&listed)));
    list().or_else(|error| {
        // Only the text of the error says that the table is missing. It may have been made since.
        match table_exists() {
            Ok(false) => Ok(None),
            Ok(true) => list(),
            Err(_) => Err(error),
        }
    })
}

/// Whether the driver's table has elements; `None` if it does not exist. Reads one set, of which every plan has an element.
pub(super) fn has_elements() -> io::Result<Option<bool>> {
    match list(&["set", "inet", TABLE, EVERY.name()]) {
        Ok(listed) => Ok(Some(!parse(&listed).is_empty())),
        Err(error) => match table_exists() {
            Ok(false) => Ok(None),
            Ok(true) | Err(_) => Err(error),
        },
    }
}

fn list(what: &[&str]) -> io::Result<Value> {
    let arguments = [&["-j", "list"], what].concat();
    let listed = run(&arguments, "")?;
    serde_json::from_slice(&listed).map_err(|error| {
        let text = format!("nft {}: {error}", arguments.join(" "));
        io::Error::new(io::ErrorKind::InvalidData, text)
    })
}

fn objects<'a>(listed: &'a Value, kind: &'a str) -> impl Iterator<Item = &'a Value> {
    let all = listed["nftables"].as_array().into_iter().flatten();
    all.filter_map(move |object| object.get(kind))
}

fn parse(listed: &Value) -> Vec<Held> {
    let mut held = Vec::new();
    for kind in ["map", "set"] {
        for object in objects(listed, kind) {
            let Some(set) = object["name"].as_str().and_then(Set::of_name) else {
                continue;
            };
            let elements = object["elem"].as_array().into_iter().flatten();
            held.extend(elements.filter_map(|element| match kind {
                "map" => parse_element(set, element.get(0)?, element.get(1)),
                _ => parse_element(set, element, None),
            }));
        }
    }
    held
}

fn parse_element(set: Set, key: &Value, value: Option<&Value>) -> Option<Held> {
    // An element without a comment is only its key.
    let about = key.get("elem");
    let comment = about.and_then(|about| about["comment"].as_str());
    let key = about.map_or(key, |about| &about["val"]);
    let value = match value {
        Some(value) => Some(parts(value)?),
        None => None,
    };
    Some(Held {
        element: Element {
            set,
            key: parts(key)?,
            value,
        },
        owner: comment.unwrap_or_default().to_owned(),
    })
}

/// The parts of a key or a value, each written as Rust writes it.
fn parts(value: &Value) -> Option<Vec<String>> {
    let part = |part: &Value| match part {
        Value::String(text) => Some(match text.parse::<IpAddr>() {
            Ok(address) => address.to_string(),
            Err(_) => text.clone(),
        }),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    };
    match value.get("concat") {
        Some(parts) => parts.as_array()?.iter().map(part).collect(),
        None => Some(vec![part(value)?]),
    }
}

/// What the program printed. If it fails, the error is what it printed about that.
fn run(arguments: &[&str], input: &str) -> io::Result<Vec<u8>> {
    run_first_of(&PROGRAMS, arguments, input)
}

fn run_first_of(programs: &[&str], arguments: &[&str], input: &str) -> io::Result<Vec<u8>> {
    for program in programs {
        match run_program(program, arguments, input) {
            Ok(output) if output.status.success() => return Ok(output.stdout),
            Ok(output) => return Err(failure(arguments, &output)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    let text = "the program nft is not installed; it forwards the ports of containers with a network of their own, and is in the package nftables";
    Err(io::Error::new(io::ErrorKind::NotFound, text))
}

#[expect(clippy::disallowed_methods, reason = "nft is a program")]
fn run_program(program: &str, arguments: &[&str], input: &str) -> io::Result<Output> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    // A program that ends early says why when it has ended.
    let _ = child
        .stdin
        .take()
        .map(|mut stdin| stdin.write_all(input.as_bytes()));
    child.wait_with_output()
}

fn failure(arguments: &[&str], output: &Output) -> io::Error {
    let text = String::from_utf8_lossy(&output.stderr);
    // The lines that follow show the statement and what is meant in it.
    let errors: Vec<&str> = text
        .lines()
        .filter(|line| line.contains("rror"))
        .take(3)
        .collect();
    let said = match errors.is_empty() {
        true => text.trim().to_owned(),
        false => errors.join("; "),
    };
    io::Error::other(format!(
        "nft {}: {} ({said})",
        arguments.join(" "),
        output.status
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As nft 0.9.8 and 1.0.6 list it.
    const LISTED: &str = r#"{"nftables": [{"metainfo": {"version": "1.0.6"}}, {"table": {"family": "inet", "name": "nomad_driver_nspawn", "handle": 1}},
        {"map": {"family": "inet", "name": "ports4", "table": "nomad_driver_nspawn", "type": "inet_service", "handle": 1, "map": "ipv4_addr . inet_service",
            "elem": [[{"elem": {"val": 8080, "comment": "a/b"}}, {"concat": ["10.1.1.1", 80]}], [9090, {"concat": ["10.1.1.1", 90]}]]}},
        {"map": {"family": "inet", "name": "of_another_version", "elem": [[1, 2]]}},
        {"set": {"family": "inet", "name": "links6", "elem": [{"elem": {"val": {"concat": ["nd-abc", "fd00:0::1"]}, "comment": "c/d"}}]}},
        {"set": {"family": "inet", "name": "addresses6", "type": "ipv6_addr", "handle": 6}},
        {"chain": {"family": "inet", "table": "nomad_driver_nspawn", "name": "output", "handle": 11}}]}"#;

    fn held(set: Set, key: &[&str], value: Option<&[&str]>, owner: &str) -> Held {
        let owned = |parts: &[&str]| parts.iter().map(|&part| part.to_owned()).collect();
        Held {
            element: Element {
                set,
                key: owned(key),
                value: value.map(owned),
            },
            owner: owner.to_owned(),
        }
    }

    #[test]
    fn elements_are_read_with_their_owners() {
        let want = [
            held(Set::Ports4, &["8080"], Some(&["10.1.1.1", "80"]), "a/b"),
            held(Set::Ports4, &["9090"], Some(&["10.1.1.1", "90"]), ""),
            held(Set::Links6, &["nd-abc", "fd00::1"], None, "c/d"),
        ];
        assert_eq!(parse(&serde_json::from_str(LISTED).unwrap()), want);
    }

    #[test]
    fn an_error_is_what_nft_said_without_the_statement() {
        use std::os::unix::process::ExitStatusExt as _;
        let output = Output {
            status: std::process::ExitStatus::from_raw(256),
            stdout: Vec::new(),
            stderr: b"/dev/stdin:1:1-5: Error: Could not process rule: File exists\nadd x\n^^^^^\n"
                .to_vec(),
        };
        assert_eq!(
            failure(&["-f", "-"], &output).to_string(),
            "nft -f -: exit status: 1 (/dev/stdin:1:1-5: Error: Could not process rule: File exists)"
        );
    }

    #[test]
    fn a_missing_program_is_reported_with_its_package() {
        let error = run_first_of(&["/nowhere/nft", "/nowhere/else/nft"], &[], "").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(error.to_string().contains("package nftables"), "{error}");
        // The next one is tried, and its input and arguments arrive.
        let said = run_first_of(&["/nowhere/nft", "cat"], &["-"], "input").unwrap();
        assert_eq!(said, b"input");
        let error = run_first_of(&["false"], &["-x"], "input").unwrap_err();
        assert!(error.to_string().contains("exit status: 1"), "{error}");
    }
}
