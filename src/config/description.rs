//! Describes a container for people. Nomad substitutes the values of variables into any option where a job has `${NAME}`, and a value may
//! be a secret, so their names are put back.

use std::collections::BTreeMap;

use super::environment::redact_all;
use crate::container::{ContainerSpec, Description, Link, NetworkNamespace, Root};

/// The longest description of a command, in bytes: it is stored with every task.
const MAX_COMMAND_BYTES: usize = 1024;

/// Describes this container, whose options may contain the values of `variables`.
pub(super) fn describe(spec: &ContainerSpec, variables: &BTreeMap<String, String>) -> Description {
    let (Root::Directory(image) | Root::Image(image)) = &spec.rootfs.source;
    let words: Vec<String> = spec
        .payload
        .command
        .iter()
        .map(|word| shown(&redact_all(word, variables)))
        .collect();
    Description {
        image: redact_all(&image.to_string_lossy(), variables),
        command: cut_off(words.join(" ")),
        network: redact_all(&network(&spec.network.namespace), variables),
    }
}

/// A word of a command line, in quotes if it would not be recognized as one word.
fn shown(word: &str) -> String {
    let is_plain =
        |char: char| !char.is_whitespace() && !char.is_control() && !"\"'\\".contains(char);
    match !word.is_empty() && word.chars().all(is_plain) {
        true => word.to_owned(),
        false => format!("{word:?}"),
    }
}

fn cut_off(mut text: String) -> String {
    if text.len() > MAX_COMMAND_BYTES {
        text.truncate(text.floor_char_boundary(MAX_COMMAND_BYTES));
        text.push('…');
    }
    text
}

fn network(namespace: &NetworkNamespace) -> String {
    match namespace {
        NetworkNamespace::Host => "host".to_owned(),
        NetworkNamespace::Join(path) => format!("namespace {}", path.display()),
        NetworkNamespace::OfTask { task, .. } => format!("task {task}"),
        NetworkNamespace::Private { link, .. } => match link {
            Link::None => "none".to_owned(),
            Link::Routed => "veth".to_owned(),
            Link::Zone(zone) => format!("zone {zone}"),
            Link::Bridge(bridge) => format!("bridge {bridge}"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn command(words: &[&str], variables: &[(&str, &str)]) -> String {
        let spec = ContainerSpec::for_test("t", "/srv/image").with(|spec| {
            spec.payload.command = words.iter().map(|word| (*word).to_owned()).collect();
        });
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let description = describe(&spec, &variables.iter().map(owned).collect());
        assert_eq!(description.image, "/srv/image");
        assert_eq!(description.network, "host");
        description.command
    }

    #[rstest]
    #[case::plain(&["/bin/sh", "-c", "exec sleep 5", ""], &[], r#"/bin/sh -c "exec sleep 5" """#)]
    #[case::long_value(&["run", "--key=0123456789abcdef"], &[("KEY", "0123456789abcdef")], "run --key=${KEY}")]
    #[case::inside_a_word(&["run", "x0123456789y"], &[("KEY", "0123456789")], "run x${KEY}y")]
    #[case::short_value(&["run", "-p", "abc", "--x=abc,abcd"], &[("PW", "abc")], "run -p ${PW} --x=${PW},abcd")]
    #[case::one_in_another(&["run", "abcdefgh12345678"], &[("A", "abcdefgh"), ("B", "abcdefgh12345678")], "run ${B}")]
    #[case::in_quotes(&["sh", "-c", "echo a\"b c12345"], &[("Q", "a\"b c12345")], r#"sh -c "echo ${Q}""#)]
    #[case::empty_value(&["run"], &[("EMPTY", "")], "run")]
    #[case::nomads_own(&["run", "/alloc/web"], &[("NOMAD_TASK_NAME", "web")], "run /alloc/web")]
    #[case::identity(&["run", "0e1f"], &[("NOMAD_TOKEN_vault", "0e1f")], "run ${NOMAD_TOKEN_vault}")]
    #[case::nomads_token(&["run", "0e1f"], &[("NOMAD_TOKEN", "0e1f")], "run ${NOMAD_TOKEN}")]
    fn a_command_shows_names_in_place_of_values(
        #[case] words: &[&str],
        #[case] variables: &[(&str, &str)],
        #[case] wanted: &str,
    ) {
        assert_eq!(command(words, variables), wanted);
    }

    #[test]
    fn a_long_command_is_cut_off() {
        let word = "ä".repeat(MAX_COMMAND_BYTES);
        let shown = command(&["x", &word], &[]);
        assert!(shown.len() <= MAX_COMMAND_BYTES + "…".len() && shown.ends_with("ä…"));
        let secret = format!("{}secret", "x".repeat(MAX_COMMAND_BYTES - 3));
        assert_eq!(command(&[&secret], &[("S", &secret)]), "${S}");
    }

    #[test]
    fn the_kind_of_network_is_named() {
        let private = |link| NetworkNamespace::Private {
            link,
            ports: Vec::new(),
            interfaces: Vec::new(),
        };
        for (namespace, wanted) in [
            (
                NetworkNamespace::Join("/run/netns/a".into()),
                "namespace /run/netns/a",
            ),
            (private(Link::Zone("web".to_owned())), "zone web"),
            (private(Link::Bridge("br0".to_owned())), "bridge br0"),
            (private(Link::Routed), "veth"),
            (private(Link::None), "none"),
        ] {
            assert_eq!(network(&namespace), wanted);
        }
    }
}
