//! Checks `docs/testing.md` against the sources: the table of conformance checks names existing tests and leaves none out.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// The rows of the table: the check's number and the text of its last column.
fn rows() -> Vec<(u32, String)> {
    let text =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/testing.md")).unwrap();
    let cells = |line: &str| {
        line.trim_matches('|')
            .split('|')
            .map(|cell| cell.trim().to_owned())
            .collect::<Vec<_>>()
    };
    text.lines()
        .map(cells)
        .filter_map(|cells| Some((cells.first()?.parse().ok()?, cells.get(2)?.clone())))
        .collect()
}

/// The names of all functions in the tests.
fn functions(directory: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            functions(&path, found);
        } else if path.extension().is_some_and(|kind| kind == "rs") {
            for line in fs::read_to_string(&path).unwrap().lines() {
                let name = line
                    .split_once("fn ")
                    .and_then(|(_, rest)| rest.split_once(['(', '<']));
                found.extend(name.map(|(name, _)| name.to_owned()));
            }
        }
    }
}

/// The tests with `// Conformance check N.` behind their attribute, and that number.
fn conformance_checks(directory: &Path, found: &mut Vec<(u32, String)>) {
    for entry in fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            conformance_checks(&path, found);
            continue;
        }
        if path.extension().is_none_or(|kind| kind != "rs") {
            continue;
        }
        let mut number = None;
        for line in fs::read_to_string(&path).unwrap().lines() {
            let line = line.trim_start();
            if let Some((_, rest)) = line.split_once("] // Conformance check ") {
                number = rest.trim_end_matches('.').parse().ok();
            } else if let Some((_, rest)) = line.split_once("fn ")
                && let Some((name, _)) = rest.split_once(['(', '<'])
                && let Some(number) = number.take()
            {
                found.push((number, name.to_owned()));
            }
        }
    }
}

/// The parts of the text between backquotes.
fn quoted(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

#[test]
fn the_table_has_every_check_once() {
    let numbers: Vec<u32> = rows().iter().map(|(number, _)| *number).collect();
    assert_eq!(numbers, (1..=84).collect::<Vec<_>>());
    for (number, proof) in rows() {
        let has_proof = quoted(&proof).next().is_some() || proof.contains("later work");
        assert!(
            has_proof,
            "check {number} is proved nowhere and waits for nothing: {proof:?}"
        );
    }
}

#[test]
fn the_table_names_existing_tests_and_every_check() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut functions_found = BTreeSet::new();
    for directory in ["tests", "src"] {
        functions(&top.join(directory), &mut functions_found);
    }
    let mut named = Vec::new();
    for (number, proof) in rows() {
        for name in quoted(&proof) {
            assert!(
                functions_found.contains(name),
                "check {number}: there is no test {name}"
            );
            named.push((number, name.to_owned()));
        }
    }
    let mut checks = Vec::new();
    conformance_checks(&top.join("tests"), &mut checks);
    let missing: Vec<_> = checks
        .iter()
        .filter(|check| !named.contains(*check))
        .collect();
    assert!(checks.len() > 60, "only {} checks were found", checks.len());
    assert!(
        missing.is_empty(),
        "not in the table of docs/testing.md: {missing:?}"
    );
}

#[test]
fn every_test_of_a_trouble_exists() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(top.join("docs/testing.md")).unwrap();
    let (_, rest) = text.split_once("\n## Trouble below the driver\n").unwrap();
    let (section, _) = rest.split_once("\n## ").unwrap();
    let mut found = BTreeSet::new();
    functions(&top.join("tests"), &mut found);
    let named: Vec<&str> = quoted(section).collect();
    assert!(named.len() > 12, "{named:?}");
    for name in named {
        assert!(found.contains(name), "there is no test {name}");
    }
}
