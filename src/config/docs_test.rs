//! Checks `docs/configuration.md`: it lists the same options as the table, and Nomad would accept its examples and those of
//! `docs/volumes.md`
//! and `docs/booted-systems.md`.

use super::decode;
use super::options::{
    BindOptions, DeviceOptions, ImageDownload, Kind, MountOptions, NetworkPool, OptionSpec,
    Options as _, OverlayOptions, PluginOptions, TaskOptions, TmpfsOptions,
};
use super::testing;

const TEXT: &str = include_str!("../../docs/configuration.md");

const VOLUMES: &str = include_str!("../../docs/volumes.md");

const BOOTED_SYSTEMS: &str = include_str!("../../docs/booted-systems.md");

/// The part of the document below a `## ` heading.
fn chapter(title: &str) -> &'static str {
    let heading = format!("\n## {title}\n");
    let (_, rest) = TEXT.split_once(&heading).expect(title);
    rest.split("\n## ").next().unwrap_or(rest)
}

fn described(option: &OptionSpec) -> String {
    let kind = option.kind.expression();
    match (option.required, option.default) {
        (true, _) => format!("`{kind}`, required"),
        (false, Some(default)) => format!("`{kind}`, default `{default}`"),
        (false, None) => format!("`{kind}`, unset by default"),
    }
}

#[rstest::rstest]
#[case("Plugin options", PluginOptions::OPTIONS)]
#[case("Task options", TaskOptions::OPTIONS)]
#[case("The `image_download` block", ImageDownload::OPTIONS)]
#[case("The `devices` block", DeviceOptions::OPTIONS)]
#[case("The `network_pool` block", NetworkPool::OPTIONS)]
#[case("The `mount` block", MountOptions::OPTIONS)]
#[case("The `overlay` block", OverlayOptions::OPTIONS)]
#[case("The `bind_options` block", BindOptions::OPTIONS)]
#[case("The `tmpfs_options` block", TmpfsOptions::OPTIONS)]
fn every_option_is_documented(#[case] title: &str, #[case] options: &[OptionSpec]) {
    let mut sections = chapter(title).split("\n### `").skip(1);
    for option in options {
        let section = sections.next().unwrap_or_default();
        let (name, rest) = section.split_once("`\n\n").unwrap_or_default();
        assert_eq!(name, option.name, "in the order of the table");
        let (first, rest) = rest.split_once("\n\n").unwrap_or_default();
        assert_eq!(first, described(option), "{name}");
        assert!(
            rest.starts_with(option.doc.trim()),
            "{name} begins with {:?}",
            option.doc
        );
        if !matches!(option.kind, Kind::Block(_)) && title == "Task options" {
            assert!(rest.contains("On the command line: "), "{name}");
        }
    }
    assert_eq!(sections.next(), None, "an option that does not exist");
}

#[test]
fn every_example_is_valid() {
    let examples = [TEXT, VOLUMES, BOOTED_SYSTEMS].map(|text| text.split("```hcl\n").skip(1));
    let examples: Vec<_> = examples.into_iter().flatten().collect();
    let mut blocks = 0;
    for example in &examples {
        let (body, _) = example.split_once("```").expect("the example ends");
        let tree: hcl::Value = hcl::from_str(body).unwrap_or_else(|e| panic!("{body}: {e}"));
        blocks += configs(&tree, false, body);
    }
    assert!(
        blocks >= examples.len(),
        "an example without a config block"
    );
    assert!(examples.len() > TaskOptions::OPTIONS.len() / 2);
}

/// Checks every `config` block in the tree and returns their number.
fn configs(tree: &hcl::Value, plugin: bool, example: &str) -> usize {
    let Some(object) = tree.as_object() else {
        return 0;
    };
    let mut count = 0;
    for (key, value) in object {
        if key != "config" {
            count += configs(value, plugin || key == "plugin", example);
            continue;
        }
        count += 1;
        let schema = match plugin {
            true => super::plugin_schema(),
            false => super::task_schema(),
        };
        let value = testing::object(&schema, value).unwrap_or_else(|e| panic!("{example}: {e}"));
        let bytes = testing::encode(&value);
        let read = match plugin {
            true => super::PluginConfig::decode(&bytes).map(drop),
            false => decode::block::<TaskOptions>(&bytes, "config").map(drop),
        };
        read.unwrap_or_else(|e| panic!("{example}: {e}"));
    }
    count
}

#[rstest::rstest]
#[case("plugin", PluginOptions::OPTIONS)]
#[case("task", TaskOptions::OPTIONS)]
fn the_readme_lists_every_option(#[case] which: &str, #[case] options: &[OptionSpec]) {
    let readme = include_str!("../../README.md");
    for option in options {
        let name = option.name;
        let default = match (option.required, option.default) {
            (true, _) => "required".to_owned(),
            (false, Some(default)) => format!("`{default}`"),
            (false, None) => String::new(),
        };
        let kind = option.kind.expression();
        // The second heading with a name gets a number in its anchor.
        let plugins = PluginOptions::OPTIONS
            .iter()
            .any(|other| other.name == name);
        let number = if which == "task" && plugins { "-1" } else { "" };
        let row =
            format!("| [`{name}`](docs/configuration.md#{name}{number}) | `{kind}` | {default} | ");
        assert!(readme.contains(&row), "{which}: there is no row {row:?}");
    }
    let rows = readme.matches("](docs/configuration.md#").count();
    let all = PluginOptions::OPTIONS.len() + TaskOptions::OPTIONS.len();
    assert_eq!(rows, all, "an option that does not exist");
}
