//! The floor plan of `src/lib.rs`, kept: no room uses one to its left, and nothing uses `host` and `cli`.

use std::collections::BTreeMap;
use std::path::Path;

/// Which rooms each room may use, itself aside. `main` may use all.
const MAY_USE: &[(&str, &[&str])] = &[
    ("proto", &[]),
    ("container", &[]),
    ("signal", &[]),
    (
        "plugin",
        &[
            "proto",
            "driver",
            "config",
            "task",
            "backend",
            "container",
            "signal",
        ],
    ),
    (
        "driver",
        &["proto", "config", "task", "backend", "container", "signal"],
    ),
    ("config", &["proto", "container", "signal"]),
    ("task", &["backend", "container", "signal"]),
    (
        "backend",
        &["supervisor", "nspawn", "cgroup", "container", "signal"],
    ),
    ("supervisor", &["nspawn", "cgroup", "container", "signal"]),
    ("nspawn", &["container", "signal"]),
    ("cgroup", &["container", "signal"]),
    ("host", &["proto", "config", "container", "signal"]),
    (
        "cli",
        &[
            "host",
            "config",
            "task",
            "backend",
            "supervisor",
            "nspawn",
            "cgroup",
            "container",
            "signal",
        ],
    ),
];

#[test]
fn no_import_goes_left() {
    let rooms: BTreeMap<_, _> = MAY_USE.iter().copied().collect();
    let mut seen = 0;
    let mut wrong = Vec::new();
    visit(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        &mut |path, text| {
            let src = path
                .strip_prefix(concat!(env!("CARGO_MANIFEST_DIR"), "/src"))
                .unwrap();
            let first = src
                .components()
                .next()
                .unwrap()
                .as_os_str()
                .to_str()
                .unwrap();
            let room = first.trim_end_matches(".rs");
            if ["main", "lib"].contains(&room) {
                return;
            }
            let allowed = rooms
                .get(room)
                .unwrap_or_else(|| panic!("{room} is not in the floor plan"));
            seen += 1;
            for used in rooms
                .keys()
                .filter(|used| **used != room && !allowed.contains(used))
            {
                if text.contains(&format!("crate::{used}::"))
                    || text.contains(&format!("crate::{used};"))
                {
                    wrong.push(format!("{} uses {used}", src.display()));
                }
            }
            assert!(
                !text.contains("crate::{"),
                "{}: one `use` for each room, so that this test can read them",
                src.display()
            );
        },
    );
    assert!(seen >= rooms.len(), "only {seen} files were read");
    assert!(
        wrong.is_empty(),
        "imports that go left:\n{}",
        wrong.join("\n")
    );
}

fn visit(dir: &Path, see: &mut impl FnMut(&Path, &str)) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            visit(&path, see);
        } else if path.extension().is_some_and(|end| end == "rs") {
            see(&path, &std::fs::read_to_string(&path).unwrap());
        }
    }
}
