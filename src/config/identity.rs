//! Checks the names of a start, because they become parts of paths, and derives the machine name. Does no look-ups on
//! the host.

use sha2::{Digest as _, Sha256};

use crate::container::Identity;

use super::decode::quoted;
use super::values::has_control;
use super::{ConfigError, TaskContext};

/// The longest machine name that systemd-nspawn accepts.
const MACHINE_MAX: usize = 64;
/// The length of an allocation id.
const ALLOC_MAX: usize = 36;
/// The longest id of a start. Nomad's ids are as long as an allocation id, a task name and ten more characters.
const ID_MAX: usize = 512;
/// The longest file name.
const NAME_MAX: usize = 255;

/// The identity of a start, with names that can be part of a path.
pub(super) fn identity(context: &TaskContext) -> Result<Identity, ConfigError> {
    check(context)?;
    Ok(Identity {
        id: context.id.clone(),
        alloc_dir: context.alloc_dir.clone(),
        machine: machine(&context.task, &context.alloc_id),
    })
}

/// Rejects names that can't be part of a path.
fn check(context: &TaskContext) -> Result<(), ConfigError> {
    let fault = |option: &str, value: &str, reason: &str| {
        Err(ConfigError::new(
            option,
            format!("{} {reason}", quoted(value)),
        ))
    };
    for (option, name) in [
        ("task.name", &context.task),
        ("task.alloc_id", &context.alloc_id),
    ] {
        if name.len() > NAME_MAX || has_control(name) || !is_file_name(name) {
            return fault(
                option,
                name,
                "is not a valid directory name: use 1 to 255 bytes without / and control characters such as a tab, and not . or ..",
            );
        }
    }
    let id = &context.id;
    if id.len() > ID_MAX || has_control(id) || id.split('/').any(|part| !is_file_name(part)) {
        return fault(
            "task.id",
            id,
            "is not a valid id: use names separated by /, none of them . or .., without control characters, at most 512 bytes in all",
        );
    }
    Ok(())
}

fn is_file_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains('/')
}

/// The machine name: `<task>-<allocation id>`, with everything replaced that systemd-nspawn does not accept in a name.
fn machine(task: &str, alloc_id: &str) -> String {
    let alloc = label(alloc_id, ALLOC_MAX);
    let task = label(task, MACHINE_MAX - 1 - alloc.len());
    format!("{task}-{alloc}")
}

/// Returns `name` if it can be part of a machine name; otherwise the usable part of it and a hash of the whole name, so
/// that different names stay different.
fn label(name: &str, most: usize) -> String {
    const HASH_DIGITS: usize = 8;
    if name.len() <= most && name.split('.').all(is_label) {
        return name.to_owned();
    }
    let kept: String = name
        .chars()
        .map(|char| match char.is_ascii_alphanumeric() {
            true => char,
            false => '-',
        })
        .take(most - HASH_DIGITS - 1)
        .collect();
    let digest = Sha256::digest(name.as_bytes());
    let digits = digest.iter().take(HASH_DIGITS / 2);
    let hash: String = digits.map(|byte| format!("{byte:02x}")).collect();
    match kept.trim_matches('-') {
        "" => hash,
        kept => format!("{kept}-{hash}"),
    }
}

/// Whether this is a label of a host name.
pub(super) fn is_label(part: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    !part.is_empty()
        && !part.starts_with('-')
        && !part.ends_with('-')
        && part.bytes().all(is_allowed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    const ALLOC: &str = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0";

    #[rstest]
    #[case("web", "web-0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0")]
    #[case("Web.1", "Web.1-0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0")]
    #[case("my_task", "my-task-5d8517a4-0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0")]
    #[case("\u{fc}", "607474ca-0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0")]
    fn machine_names(#[case] task: &str, #[case] machine_name: &str) {
        assert_eq!(machine(task, ALLOC), machine_name);
    }

    #[test]
    fn long_names_with_a_common_prefix_stay_distinct() {
        let (one, two) = ("a".repeat(60) + "1", "a".repeat(60) + "2");
        assert_eq!(machine(&one, ALLOC).len(), MACHINE_MAX);
        assert_ne!(machine(&one, ALLOC), machine(&two, ALLOC));
        assert_ne!(machine("a_b", ALLOC), machine("a b", ALLOC));
    }

    proptest! {
        #[test]
        fn any_name_becomes_a_valid_host_name(task in ".*", alloc in ".*") {
            let name = machine(&task, &alloc);
            prop_assert!((1..=MACHINE_MAX).contains(&name.len()), "{name}");
            for part in name.split('.') {
                prop_assert!(!part.is_empty() && !part.starts_with('-') && !part.ends_with('-'), "{name}");
                prop_assert!(part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'), "{name}");
            }
        }
    }

    #[rstest]
    #[case("", "web", ALLOC, "task.id")]
    #[case("a/../b", "web", ALLOC, "task.id")]
    #[case("/a", "web", ALLOC, "task.id")]
    #[case("a/b\nc", "web", ALLOC, "task.id")]
    #[case("a/./b", ".", ALLOC, "task.name")]
    #[case("a/../b", "..", ALLOC, "task.name")]
    #[case("a/t\tx/b", "t\tx", ALLOC, "task.name")]
    #[case("a", "", ALLOC, "task.name")]
    #[case("a", "..", ALLOC, "task.name")]
    #[case("a", "x/y", ALLOC, "task.name")]
    #[case("a", "web", "", "task.alloc_id")]
    #[case("a", "web", "../x", "task.alloc_id")]
    fn names_that_leave_their_directory_are_refused(
        #[case] id: &str,
        #[case] task: &str,
        #[case] alloc_id: &str,
        #[case] option: &str,
    ) {
        let context = TaskContext {
            id: id.into(),
            task: task.into(),
            alloc_id: alloc_id.into(),
            ..TaskContext::default()
        };
        assert_eq!(check(&context).unwrap_err().option, option);
        let long = TaskContext {
            id: "a/".repeat(300) + "a",
            task: "web".into(),
            alloc_id: ALLOC.into(),
            ..context
        };
        assert_eq!(check(&long).unwrap_err().option, "task.id");
    }
}
