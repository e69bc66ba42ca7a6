//! Checks the module order given in `src/lib.rs`: no module uses one to its left.

use std::collections::BTreeMap;
use std::path::Path;

/// The modules that each module may use besides itself. `main` may use all.
const MAY_USE: &[(&str, &[&str])] = &[
    ("proto", &[]),
    ("blocking", &[]),
    ("signal", &[]),
    ("container", &[]),
    ("failpoint", &[]),
    ("sys", &["container", "signal"]),
    ("rootfs_path", &[]),
    (
        "go_plugin",
        &[
            "proto",
            "driver",
            "config",
            "task",
            "backend",
            "blocking",
            "container",
            "signal",
            "sys",
        ],
    ),
    (
        "driver",
        &[
            "proto",
            "config",
            "task",
            "backend",
            "nspawn",
            "blocking",
            "container",
            "signal",
        ],
    ),
    ("config", &["proto", "container", "signal", "rootfs_path"]),
    ("task", &["backend", "container", "signal"]),
    (
        "backend",
        &[
            "supervisor",
            "cleanup",
            "state",
            "lease",
            "nspawn",
            "cgroup",
            "blocking",
            "container",
            "failpoint",
            "signal",
            "sys",
            "rootfs_path",
        ],
    ),
    (
        "supervisor",
        &[
            "cleanup",
            "state",
            "lease",
            "nspawn",
            "cgroup",
            "blocking",
            "container",
            "failpoint",
            "signal",
            "sys",
        ],
    ),
    (
        "cleanup",
        &[
            "state",
            "lease",
            "cgroup",
            "container",
            "failpoint",
            "signal",
            "sys",
        ],
    ),
    ("state", &["lease", "cgroup", "container", "failpoint"]),
    ("lease", &["cgroup", "container", "failpoint", "sys"]),
    ("nspawn", &["container", "sys", "signal", "rootfs_path"]),
    ("cgroup", &["container", "sys", "signal"]),
];

/// The modules that are crates, under the name that the driver has for them.
const CRATES: &[(&str, &str)] = &[
    ("proto", "proto/src/lib.rs"),
    ("signal", "values/src/signal.rs"),
];

/// The directories with product code.
const PRODUCT: &[&str] = &["src/", "dev-agent/", "proto/", "values/"];

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

/// The commands of the development agent use its host, which the tests use without them.
#[test]
fn the_host_of_the_development_agent_does_not_use_its_commands() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("dev-agent/src");
    let mut seen = 0;
    visit(&source, &mut |path, text| {
        if !path.starts_with(source.join("cli")) {
            seen += 1;
            let uses = ["crate::cli", "super::cli"].map(|used| text.contains(used));
            assert_eq!(uses, [false; 2], "{} uses cli", path.display());
        }
    });
    assert!(seen > 10, "only {seen} files were read");
}

/// A document at the top of the repository.
fn document(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap()
}

/// The parts of the text that are between backquotes on one line and begin with a directory of product code.
fn sources(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .flat_map(|line| line.split('`').skip(1).step_by(2))
        .filter(|quoted| {
            PRODUCT
                .iter()
                .any(|directory| quoted.starts_with(directory))
        })
}

#[test]
fn the_architecture_names_files_that_exist() {
    let text = document("docs/architecture.md");
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let gone: Vec<_> = sources(&text)
        .filter(|path| !top.join(path).exists())
        .collect();
    assert!(gone.is_empty(), "there is no {}", gone.join(", "));
    assert!(sources(&text).count() > MAY_USE.len());
}

#[test]
fn every_room_has_a_line_in_the_architecture() {
    let text = document("docs/architecture.md");
    for (room, _) in MAY_USE {
        let lines = match CRATES.iter().find(|(name, _)| name == room) {
            Some((_, path)) => vec![format!("| `{path}` | ")],
            None => vec![
                format!("| `src/{room}/` | "),
                format!("| `src/{room}.rs` | "),
            ],
        };
        assert!(
            lines.iter().any(|line| text.contains(line)),
            "{room} has no line"
        );
    }
}

/// The two commands for a new machine come first, and CI begins with the same ones.
#[test]
fn the_readme_begins_with_two_commands_and_so_does_ci() {
    let readme = document("README.md");
    let mut code = Vec::new();
    let mut inside = false;
    for line in readme.lines() {
        match line.trim_start().starts_with("```") {
            true => inside = !inside,
            false if inside => code.push(line),
            false => {}
        }
    }
    assert_eq!(code[..2], ["ci/quickstart", "cargo test"]);
    let runs: Vec<_> =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(".ci/run"))
            .unwrap()
            .lines()
            .filter_map(|line| line.strip_prefix("run ")?.split_once(' '))
            .map(|(_, command)| command.to_owned())
            .collect();
    assert_eq!(runs[..2], code[..2]);
}

/// Tests are split by subject, so that one file can be read as a whole.
#[test]
fn no_file_of_tests_is_longer_than_600_lines() {
    const MOST: usize = 600;
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut seen = 0;
    let mut long = Vec::new();
    let others = ["tests", "init", "fake-nspawn"];
    for directory in others.iter().chain(PRODUCT) {
        visit(&top.join(directory), &mut |path, text| {
            let path = path.strip_prefix(top).unwrap();
            let is_test = |part: &str| part == "tests" || part.ends_with("tests.rs");
            if !path.iter().any(|part| part.to_str().is_some_and(is_test)) {
                return;
            }
            seen += 1;
            let lines = text.lines().count();
            if lines > MOST {
                long.push(format!("{} has {lines} lines", path.display()));
            }
        });
    }
    assert!(seen > 60, "only {seen} files were read");
    assert!(
        long.is_empty(),
        "split by subject what has more than {MOST} lines:\n{}",
        long.join("\n")
    );
}

/// Words of an earlier private vocabulary; each has a standard term now.
const OLD_VOCABULARY: &[&str] = &["desk", "birth", "farewell", "remains", "put_down", "told"];

/// What may still contain one: serialized names and names of failpoints, which stay as they were.
const KEPT: &[&str] = &["\"end_told\""];

#[test]
fn no_word_of_the_old_vocabulary_is_used() {
    let mut found = Vec::new();
    for directory in PRODUCT {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join(directory);
        visit(&directory, &mut |path, text| {
            for (index, line) in text.lines().enumerate() {
                let line = KEPT
                    .iter()
                    .fold(line.to_lowercase(), |line, kept| line.replace(kept, ""));
                let words = |by: fn(char) -> bool| line.split(by).collect::<Vec<_>>();
                let whole = words(|char| !char.is_ascii_alphanumeric() && char != '_');
                let parts = words(|char| !char.is_ascii_alphanumeric());
                for old in OLD_VOCABULARY {
                    if whole.contains(old) || parts.contains(old) {
                        found.push(format!("{}:{}: {old}", path.display(), index + 1));
                    }
                }
            }
        });
    }
    assert!(
        found.is_empty(),
        "{} words of the old vocabulary:\n{}",
        found.len(),
        found.join("\n")
    );
}
