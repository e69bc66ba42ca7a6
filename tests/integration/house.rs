//! Checks that a module uses those that [`MAY_USE`] allows it and no others, and that the list has no cycle; that `docs/architecture.md` has
//! a row for each module of that list and names only files that exist, in the directories of [`PRODUCT`]; and the length and the vocabulary
//! of files. The order in `src/lib.rs` and in the document is not compared with the list.

use std::collections::BTreeMap;
use std::path::Path;

use rstest::rstest;

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
        &["proto", "driver", "task", "backend", "blocking", "sys"],
    ),
    (
        "driver",
        &[
            "proto",
            "config",
            "task",
            "backend",
            "exec",
            "nspawn",
            "blocking",
            "container",
            "signal",
        ],
    ),
    (
        "config",
        &[
            "proto",
            "network",
            "nspawn",
            "container",
            "signal",
            "sys",
            "rootfs_path",
        ],
    ),
    ("task", &["backend", "exec", "container", "signal"]),
    (
        "backend",
        &[
            "exec",
            "supervisor",
            "cleanup",
            "state",
            "lease",
            "mounts",
            "network",
            "nspawn",
            "seccomp",
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
        "exec",
        &[
            "supervisor",
            "state",
            "seccomp",
            "cgroup",
            "blocking",
            "container",
            "sys",
        ],
    ),
    (
        "supervisor",
        &[
            "cleanup",
            "state",
            "lease",
            "journal",
            "mounts",
            "network",
            "nspawn",
            "seccomp",
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
            "network",
            "seccomp",
            "cgroup",
            "container",
            "signal",
            "sys",
        ],
    ),
    (
        "state",
        &[
            "lease",
            "mounts",
            "network",
            "seccomp",
            "cgroup",
            "container",
            "sys",
        ],
    ),
    ("lease", &["network", "cgroup", "failpoint", "sys"]),
    ("journal", &["container"]),
    ("mounts", &["container", "failpoint", "sys"]),
    ("network", &["nspawn", "container", "sys"]),
    ("nspawn", &["container", "rootfs_path"]),
    ("seccomp", &["container", "sys"]),
    ("cgroup", &["container", "sys"]),
];

/// The modules that are crates, under the name that the driver has for them.
const CRATES: &[(&str, &str)] = &[
    ("proto", "proto/src/lib.rs"),
    ("signal", "values/src/signal.rs"),
];

/// The directories with product code.
const PRODUCT: &[&str] = &[
    "src/",
    "dev-agent/",
    "packets/",
    "procfs/",
    "proto/",
    "values/",
];

/// The crates of the workspace that ship, and those of them that each may depend on.
const CRATES_MAY_USE: &[(&str, &[&str])] = &[
    (
        ".",
        &["dev-agent", "proto", "values", "init", "packets", "procfs"],
    ),
    ("dev-agent", &["proto", "values", "procfs"]),
    ("init", &["packets"]),
    ("packets", &[]),
    ("procfs", &[]),
    ("proto", &[]),
    ("values", &[]),
];

/// What `text` imports from a module that the module of this file may not use, or in a way that this test can't read. `file` is relative
/// to `src/`.
fn wrong_imports(file: &Path, text: &str) -> Vec<String> {
    let parts: Vec<_> = file
        .with_extension("")
        .iter()
        .map(|part| part.to_string_lossy().into_owned())
        .collect();
    let module = &parts[0];
    if ["main", "lib"].contains(&module.as_str()) {
        return Vec::new();
    }
    let Some((_, allowed)) = MAY_USE.iter().find(|(name, _)| name == module) else {
        return vec![format!("{module} is not in the list of modules")];
    };
    // How often `super` leads from here to the root of the crate.
    let depth = parts.len() - usize::from(parts.last().is_some_and(|last| last == "mod"));
    let up = "super::".repeat(depth);
    let mut wrong = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let code = code(line);
        let used = used(code);
        for used in used.filter(|used| *used != module.as_str() && !allowed.contains(used)) {
            wrong.push(format!("{}:{}: {used}", file.display(), index + 1));
        }
        // Not a module of the same name in this one.
        let is_own = |used: &str| text.contains(&format!("mod {used}"));
        let is_room = |used: &str| MAY_USE.iter().any(|(name, _)| *name == used);
        if after(code, &up).any(|used| is_room(used) && !is_own(used)) {
            wrong.push(format!("{}:{}: {up}", file.display(), index + 1));
        }
        if code.contains("dev_agent::") {
            wrong.push(format!("{}:{}: dev_agent", file.display(), index + 1));
        }
    }
    wrong
}

/// A line without its comment.
fn code(line: &str) -> &str {
    line.split("//").next().unwrap_or_default()
}

/// The modules that a line names from the root of the crate, and those that are crates.
fn used(code: &str) -> impl Iterator<Item = &str> {
    let names = CRATES.iter().map(|(name, _)| *name);
    let crates = names
        .zip(["nomad_proto::", "job_values::"])
        .filter(|(_, path)| code.contains(path))
        .map(|(name, _)| name);
    after(code, "crate::")
        .chain(after(code, "nomad_driver_nspawn::"))
        .chain(crates)
}

/// The names that follow this path in a line; `{` for several in braces, which this test does not read.
fn after<'a>(line: &'a str, path: &'a str) -> impl Iterator<Item = &'a str> {
    let longer = |before: char| before.is_alphanumeric() || [':', '_'].contains(&before);
    line.match_indices(path)
        .filter(move |(at, _)| !line[..*at].ends_with(longer))
        .filter_map(move |(at, _)| {
            let rest = &line[at + path.len()..];
            let end = rest.find(|char: char| !char.is_alphanumeric() && char != '_');
            match end {
                Some(0) if rest.starts_with('{') => Some("{"),
                Some(0) => None,
                Some(end) => Some(&rest[..end]),
                None => Some(rest),
            }
        })
}

#[test]
fn no_import_goes_backward() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut seen = 0;
    let mut wrong = Vec::new();
    visit(&source, &mut |path, text| {
        seen += 1;
        wrong.extend(wrong_imports(path.strip_prefix(&source).unwrap(), text));
    });
    assert!(seen >= MAY_USE.len(), "only {seen} files were read");
    assert!(
        wrong.is_empty(),
        "imports that are not allowed:\n{}",
        wrong.join("\n")
    );
}

/// Otherwise an import that nobody has decided on would pass.
#[test]
fn the_list_allows_nothing_that_is_not_used() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut unused: Vec<(&str, &str)> = MAY_USE
        .iter()
        .flat_map(|(module, allowed)| allowed.iter().map(|used| (*module, *used)))
        .collect();
    visit(&source, &mut |path, text| {
        let path = path.strip_prefix(&source).unwrap().with_extension("");
        let module = path.iter().next().unwrap().to_str().unwrap();
        for line in text.lines() {
            for used in used(code(line)) {
                unused.retain(|allowed| *allowed != (module, used));
            }
        }
    });
    assert!(unused.is_empty(), "allowed and not used: {unused:?}");
}

/// The ways in which a file can name another module.
#[rstest]
#[case::path("state/lock.rs", "use crate::backend::Backend;", 1)]
#[case::whole_module("state/lock.rs", "use crate::task;", 1)]
#[case::renamed("state/lock.rs", "use crate::task as lower;", 1)]
#[case::from_the_root_of_a_module("state/mod.rs", "use super::task::Task;", 1)]
#[case::a_module_in_it("task/mod.rs", "mod state;\nuse super::state::State;", 0)]
#[case::in_an_expression("cgroup.rs", "    let x = crate::lease::release();", 1)]
#[case::several("state/lock.rs", "use crate::{lease, task};", 1)]
#[case::from_the_root("state/lock.rs", "use super::super::task::Task;", 1)]
#[case::by_the_name_of_the_crate("state/lock.rs", "use nomad_driver_nspawn::task::Task;", 1)]
#[case::protobuf("lease/mod.rs", "use nomad_proto::driver::TaskConfig;", 1)]
#[case::values("lease/mod.rs", "use job_values::duration;", 1)]
#[case::the_development_agent("backend/mod.rs", "use dev_agent::Plugin;", 1)]
#[case::no_module("elsewhere.rs", "", 1)]
#[case::forward("state/lock.rs", "use crate::lease::Resource;", 0)]
#[case::itself("state/lock.rs", "use crate::state::TaskDir;\nuse super::TaskDir;", 0)]
#[case::a_comment("state/lock.rs", "// crate::task starts it", 0)]
#[case::any(
    "main.rs",
    "use nomad_driver_nspawn::task::Task;\nuse dev_agent::cli;",
    0
)]
fn a_backward_import_is_found(#[case] file: &str, #[case] text: &str, #[case] count: usize) {
    let wrong = wrong_imports(Path::new(file), text);
    assert_eq!(wrong.len(), count, "{wrong:?}");
}

/// Otherwise the list itself would allow what it is there to prevent.
#[test]
fn the_list_of_modules_has_no_cycle() {
    let mut left: BTreeMap<_, _> = MAY_USE.iter().copied().collect();
    while !left.is_empty() {
        let before = left.len();
        let names: Vec<_> = left.keys().copied().collect();
        left.retain(|_, uses| uses.iter().any(|used| names.contains(used)));
        assert!(left.len() < before, "a cycle: {names:?}");
    }
}

#[test]
fn a_crate_depends_only_on_those_below_it() {
    for (name, allowed) in CRATES_MAY_USE {
        let manifest = document(&format!("{name}/Cargo.toml"));
        let rest = manifest
            .split_once("\n[dependencies]\n")
            .map_or("", |(_, rest)| rest);
        let section = rest.split("\n[").next().unwrap();
        let paths = section
            .lines()
            .filter_map(|line| line.split_once("path = \"")?.1.split('"').next());
        for path in paths {
            let used = path.trim_start_matches("../");
            assert!(allowed.contains(&used), "{name} depends on {used}");
        }
    }
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
fn every_module_has_a_line_in_the_architecture() {
    let text = document("docs/architecture.md");
    for (module, _) in MAY_USE {
        let lines = match CRATES.iter().find(|(name, _)| name == module) {
            Some((_, path)) => vec![format!("| `{path}` | ")],
            None => vec![
                format!("| `src/{module}/` | "),
                format!("| `src/{module}.rs` | "),
            ],
        };
        assert!(
            lines.iter().any(|line| text.contains(line)),
            "{module} has no line"
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

/// Split by subject, so that one file can be read as a whole.
#[test]
fn no_file_is_longer_than_600_lines() {
    const MOST: usize = 600;
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut seen = 0;
    let mut long = Vec::new();
    let others = ["tests", "init", "fake-nspawn", "benches", "fuzz"];
    for directory in others.iter().chain(PRODUCT) {
        visit(&top.join(directory), &mut |path, text| {
            seen += 1;
            let lines = text.lines().count();
            if lines > MOST {
                let path = path.strip_prefix(top).unwrap();
                long.push(format!("{} has {lines} lines", path.display()));
            }
        });
    }
    assert!(seen > 250, "only {seen} files were read");
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
fn the_old_vocabulary_is_not_used() {
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
