//! Overlays.

use crate::container::{Changes, MountIds, Overlay, Propagation, Restrictions};

use super::*;

/// A host with the directories `base`, `site` and `kept`, and a file.
fn host() -> TestHost {
    let host = TestHost::new();
    for path in ["base/.", "base/inner/.", "site/.", "kept/.", "file"] {
        host.make(path);
    }
    host
}

fn block(extra: &str) -> String {
    format!("overlay {{\ntarget = \"/app\"\n{extra}\n}}")
}

const LOWER: &str = "lower = [\"TOP/site\", \"TOP/base\"]\n";

/// The overlay of a task with this block and these options.
fn overlay(host: &TestHost, extra: &str, task: &str) -> Mount {
    let text = format!("{}\n{task}", block(&format!("{LOWER}{extra}")));
    plain(host, &text).mounts.pop().unwrap()
}

fn wanted(host: &TestHost, changes: Changes) -> Mount {
    Mount {
        propagation: Propagation::Private,
        ids: MountIds::Mapped,
        overlay: Some(Overlay {
            below: vec![host.path("base")],
            changes,
        }),
        option: Some("config.overlay[0]".to_owned()),
        ..Mount::new(host.path("site"), "/app")
    }
}

#[test]
fn changes_are_discarded_kept_or_refused() {
    let host = host();
    let discarded = |size| Changes::Discarded { size };
    let kept = |directory: &str, create| Changes::Kept {
        directory: host.path(directory),
        create,
    };
    for (extra, changes) in [
        ("", discarded(None)),
        ("size = \"64m\"", discarded(Some(64 << 20))),
        ("upper = \"TOP/kept\"", kept("kept", false)),
        ("upper = \"TOP/kept\"\ncreate = true", kept("kept", false)),
        ("upper = \"TOP/new/a\"\ncreate = true", kept("new/a", true)),
    ] {
        let found = overlay(&host, extra, "");
        assert_eq!(found, wanted(&host, changes), "{extra}");
    }
    let found = overlay(&host, "readonly = true", "");
    let read_only = wanted(&host, Changes::Refused).with_read_only(true);
    assert_eq!(found, read_only);
}

#[test]
fn discarded_changes_take_half_of_the_memory_at_most() {
    let mut host = host();
    host.context.resources.memory_mb = 128;
    let found = overlay(&host, "", "").overlay.unwrap().changes;
    let half = Changes::Discarded {
        size: Some(64 << 20),
    };
    assert_eq!(found, half);
    let body = format!(
        "image = \"tree\"\nboot = false\n{}",
        block(&format!("{LOWER}size = \"1g\""))
    );
    assert_eq!(
        host.refusal(&body),
        r#"config.overlay[0].size: "1g" is more than the memory limit of the task, 134217728 bytes"#
    );
}

#[test]
fn what_is_denied_and_the_owners_are_those_of_the_block() {
    let host = host();
    let all = "nosuid = true\nnodev = true\nnoexec = true\nidmap = false";
    let found = overlay(&host, all, "");
    let restrictions = Restrictions {
        nosuid: true,
        nodev: true,
        noexec: true,
    };
    assert_eq!(found.restrictions, restrictions);
    assert_eq!(found.ids, MountIds::Unmapped);
    assert_eq!(overlay(&host, "", "idmap = false").ids, MountIds::Unmapped);
    let kept = "upper = \"TOP/kept\"";
    let without = overlay(&host, kept, "idmap = false\nuser_namespacing = false");
    assert_eq!(without.ids, MountIds::Unmapped);
}

/// The kernel makes no overlay of one directory.
#[test]
fn one_directory_that_is_read_only_is_a_bind() {
    let host = host();
    let text = block("lower = [\"TOP/base\"]\nreadonly = true");
    let found = plain(&host, &text).mounts.pop().unwrap();
    let wanted = Mount {
        source: host.path("base"),
        overlay: None,
        ..wanted(&host, Changes::Refused).with_read_only(true)
    };
    assert_eq!(found, wanted);
    let text = block("lower = [\"TOP/base\"]");
    let found = plain(&host, &text).mounts.pop().unwrap().overlay.unwrap();
    assert_eq!(found.below, Vec::<PathBuf>::new());
}

#[rstest]
#[case("lower = []", "lower: has 0 directories: name 1 to 64")]
#[case(
    "lower = [\"TOP/base\", \"TOP/none\"]",
    r#"lower[1]: "TOP/none" does not exist; looked at "TOP/none""#
)]
#[case("lower = [\"TOP/file\"]", r#"lower[0]: "TOP/file" is not a directory"#)]
#[case(
    "lower = [\"private\"]",
    r#"lower[0]: "private" is or contains a directory that Nomad hides from tasks"#
)]
#[case(
    "lower = [\"TOP/base\", \"TOP/base/.\"]",
    r#"lower[1]: "TOP/base" is the same directory as that of config.overlay[0].lower[0]"#
)]
#[case(
    "lower = [\"TOP/base\", \"TOP/base/inner\"]",
    r#"lower[1]: "TOP/base/inner" lies in the directory of config.overlay[0].lower[0]"#
)]
#[case(
    "lower = [\"TOP/base/inner\"]\nupper = \"TOP/base\"",
    r#"upper: "TOP/base" contains the directory of config.overlay[0].lower[0]"#
)]
#[case(
    "lower = [\"TOP/base\"]\nupper = \"TOP/base/new\"\ncreate = true",
    r#"upper: "TOP/base/new" lies in the directory of config.overlay[0].lower[0]"#
)]
#[case(
    "lower = [\"TOP/base\"]\nupper = \"TOP/new\"",
    r#"upper: "TOP/new" does not exist; looked at "TOP/new""#
)]
#[case(
    "lower = [\"TOP/base\"]\nupper = \"TOP/file\"",
    r#"upper: "TOP/file" is not a directory"#
)]
#[case(
    "lower = [\"TOP/base\"]\nupper = \"TOP/kept\"\nreadonly = true",
    "upper: can't be combined with readonly = true"
)]
#[case(
    "lower = [\"TOP/base\"]\nsize = \"1m\"\nreadonly = true",
    "size: can't be combined with readonly = true"
)]
#[case(
    "lower = [\"TOP/base\"]\nsize = \"1m\"\nupper = \"TOP/kept\"",
    "size: can't be combined with upper, whose file system is the limit"
)]
#[case(
    "lower = [\"TOP/base\"]\nsize = \"0\"",
    r#"size: "0" is no size: use at least 1 byte, or leave it out"#
)]
#[case(
    "lower = [\"TOP/base\"]\ncreate = true",
    "create: can't be combined with an overlay without upper"
)]
#[case(
    "lower = [\"TOP/base\"]\nupper = \"TOP/kept\"\nidmap = false",
    "upper: can't be combined with idmap = false in a user namespace: what is kept would belong to nobody. Remove one of the two, or set config.user_namespacing = false"
)]
fn a_bad_overlay_block_is_refused_with_a_reason(#[case] extra: &str, #[case] reason: &str) {
    let host = host();
    let body = format!("image = \"tree\"\nboot = false\n{}", block(extra));
    assert_eq!(host.refusal(&body), format!("config.overlay[0].{reason}"));
}

#[test]
fn too_many_directories_are_refused() {
    let host = host();
    let names: Vec<_> = (0..65).map(|n| format!("TOP/many/{n}")).collect();
    for n in 0..65 {
        host.make(format!("many/{n}/."));
    }
    let text = |names: &[String]| block(&format!("lower = {names:?}"));
    assert_eq!(
        host.refusal(&format!("image = \"tree\"\nboot = false\n{}", text(&names))),
        "config.overlay[0].lower: has 65 directories: name 1 to 64"
    );
    plain(&host, &text(&names[1..]));
}

#[test]
fn two_overlays_do_not_keep_their_changes_in_one_directory() {
    let host = host();
    let one = |target: &str, upper: &str| {
        format!("overlay {{\n{LOWER}target = \"{target}\"\nupper = \"{upper}\"\n}}\n")
    };
    let body = |upper: &str| {
        let (first, second) = (one("/a", "TOP/kept"), one("/b", upper));
        format!("image = \"tree\"\nboot = false\n{first}{second}")
    };
    host.make("kept/inner/.");
    host.check(&body("local")).unwrap();
    assert_eq!(
        host.refusal(&body("TOP/kept")),
        r#"config.overlay[1].upper: "TOP/kept" is the same directory as that of config.overlay[0].upper"#
    );
    assert_eq!(
        host.refusal(&body("TOP/kept/inner")),
        r#"config.overlay[1].upper: "TOP/kept/inner" lies in the directory of config.overlay[0].upper"#
    );
}

#[test]
fn its_directories_are_what_the_operator_allows() {
    let mut host = host();
    let body = |lower: &str, upper: &str| {
        let block = block(&format!("lower = [\"{lower}\"]\nupper = \"{upper}\""));
        format!("image = \"tree\"\nboot = false\n{block}")
    };
    let pattern = format!("{}/ba*", host.path("").display());
    host.plugin_config.volumes_allow =
        AllowedPaths::of("plugin.volumes_allow", &[pattern]).unwrap();
    host.check(&body("TOP/base", "local")).unwrap();
    let refused = r#" on this node, which matches none of plugin.volumes_allow: "TOP/ba*""#;
    for (lower, upper, option, path) in [
        ("TOP/site", "local", "lower[0]", "TOP/site"),
        ("TOP/base", "TOP/kept", "upper", "TOP/kept"),
    ] {
        let message = format!("config.overlay[0].{option}: the source is {path:?}{refused}");
        assert_eq!(host.refusal(&body(lower, upper)), message);
    }
    host.plugin_config.volumes = false;
    assert_eq!(
        host.refusal(&body("local", "TOP/kept")),
        r#"config.overlay[0].upper: "TOP/kept" is outside the allocation, and volumes are disabled on this node (plugin.volumes = false)"#
    );
}

#[rstest]
#[case("readonly = true", "/app/in-site", None)]
#[case("readonly = true", "/app/in-base", None)]
#[case("readonly = true", "/app/new", Some(r#"config.tmpfs[0]: the target "/app/new" can't be created in config.overlay[0], which is read-only: create "TOP/site/new" on the host"#))]
#[case("", "/app/new", None)]
#[case(
    "",
    "/app",
    Some(r#"config.tmpfs[0]: the target "/app" is also that of config.overlay[0]"#)
)]
fn a_mount_point_may_be_in_any_of_its_directories(
    #[case] extra: &str,
    #[case] target: &str,
    #[case] message: Option<&str>,
) {
    let host = host();
    host.make("site/in-site/.");
    host.make("base/in-base/.");
    let block = block(&format!("{LOWER}{extra}"));
    let body = format!("image = \"tree\"\nboot = false\n{block}\ntmpfs = [\"{target}\"]");
    match message {
        None => drop(host.check(&body).unwrap()),
        Some(message) => assert_eq!(host.refusal(&body), message),
    }
}
