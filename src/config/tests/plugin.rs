//! The operator's `plugin` block.

use super::*;

#[rstest]
#[case(&[], true, "/run/nomad-driver-nspawn", None)]
#[case(
    b"\x88\xa7enabled\xc2\xa7volumes\xc2\xa7devices\xc2\xaerequire_limits\xc3\xafexec_unfiltered\xc3\xadseccomp_cache\xc2\xa9state_dir\xa2/x\xabnspawn_path\xa4/n/s",
    false,
    "/x",
    Some("/n/s")
)]
#[case(
    b"\x82\xa9state_dir\xa0\xabnspawn_path\xa0",
    true,
    "/run/nomad-driver-nspawn",
    None
)]
fn valid_plugin_configurations_are_decoded(
    #[case] bytes: &[u8],
    #[case] switches: bool,
    #[case] state_dir: &str,
    #[case] nspawn_path: Option<&str>,
) {
    let expected = PluginConfig {
        enabled: switches,
        volumes: switches,
        volumes_allow: AllowedPaths::default(),
        devices: switches,
        require_limits: !switches,
        exec_unfiltered: !switches,
        seccomp_cache: switches,
        private_network: false,
        network_pool: crate::network::pool::Pool::default(),
        state_dir: state_dir.into(),
        nspawn_path: nspawn_path.map(Into::into),
        reconcile_after: Some(Duration::from_secs(600)),
    };
    assert_eq!(PluginConfig::decode(bytes), Ok(expected));
}

#[rstest]
#[case("", Some(600_000))]
#[case("1m30s", Some(90_000))]
#[case("250ms", Some(250))]
#[case("0", None)]
#[case("0s", None)]
fn reconcile_after_is_decoded(#[case] text: &str, #[case] milliseconds: Option<u64>) {
    let options = std::collections::BTreeMap::from([("reconcile_after", text)]);
    let decoded = PluginConfig::decode(&rmp_serde::to_vec_named(&options).unwrap()).unwrap();
    let want = milliseconds.map(Duration::from_millis);
    assert_eq!(decoded.reconcile_after, want);
}

#[rstest]
#[case(
    b"\x81\xa7enabled\x01",
    "plugin.enabled: a number is not true or false"
)]
#[case(
    b"\x81\xa9state_dir\xa1x",
    r#"plugin.state_dir: "x" is not an absolute path"#
)]
#[case(
    b"\x81\xabnspawn_path\xa1x",
    r#"plugin.nspawn_path: "x" is not an absolute path"#
)]
#[case(
    b"\x81\xafreconcile_after\xa2-1",
    r#"plugin.reconcile_after: "-1" is not a duration: use a number with a unit, such as 30s, 1m30s or 500ms"#
)]
#[case(b"\x90", "plugin.*: a list is not a block")]
fn invalid_plugin_configurations_are_refused(#[case] bytes: &[u8], #[case] message: &str) {
    assert_eq!(
        PluginConfig::decode(bytes).unwrap_err().to_string(),
        message
    );
}

#[test]
fn a_state_directory_leaves_room_for_the_sockets_below_it() {
    let decode = |path: &str| {
        let options = std::collections::BTreeMap::from([("state_dir", path)]);
        PluginConfig::decode(&rmp_serde::to_vec_named(&options).unwrap())
    };
    let longest = format!("/{}", "x".repeat(63));
    assert!(decode(&longest).is_ok());
    let error = decode(&format!("{longest}x")).unwrap_err();
    assert_eq!(error.option, "plugin.state_dir");
    assert!(error.reason.contains("64 bytes"), "{error}");
}

fn allow(patterns: &[&str]) -> Result<AllowedPaths, ConfigError> {
    let options = std::collections::BTreeMap::from([("volumes_allow", patterns)]);
    let decoded = PluginConfig::decode(&rmp_serde::to_vec_named(&options).unwrap());
    decoded.map(|config| config.volumes_allow)
}

#[rstest]
#[case(&[], "/etc", true)]
#[case(&["/srv"], "/srv", true)]
#[case(&["/srv"], "/srv/a/b", true)]
#[case(&["/srv"], "/srvx", false)]
#[case(&["/srv"], "/", false)]
#[case(&["/srv//data/"], "/srv/data", true)]
#[case(&["/srv/*"], "/srv", false)]
#[case(&["/srv/*"], "/srv/a", true)]
#[case(&["/srv/*"], "/srv/.a/b", true)]
#[case(&["/srv/*/data"], "/srv/a/b/data", false)]
#[case(&["/srv/*/data"], "/srv/a/data/b", true)]
#[case(&["/srv/**/data"], "/srv/a/b/data", true)]
#[case(&["/srv/v[0-9]?"], "/srv/v1a", true)]
#[case(&["/srv/v[0-9]?"], "/srv/v1/", false)]
#[case(&["/a", "/b"], "/b/c", true)]
#[case(&["/"], "/etc", true)]
fn a_pattern_matches_a_path_or_a_directory_above_it(
    #[case] patterns: &[&str],
    #[case] path: &str,
    #[case] allowed: bool,
) {
    let found = allow(patterns).unwrap();
    assert_eq!(found.allows(std::path::Path::new(path)), allowed);
}

#[rstest]
#[case("", r#""" is empty"#)]
#[case("srv", r#""srv" is not a pattern of absolute paths, such as /srv/*"#)]
#[case(
    "/srv/../etc",
    r#""/srv/../etc" contains .., which no path has once it is looked up"#
)]
#[case(
    "/srv/a**",
    r#""/srv/a**" is not a pattern: recursive wildcards must form a single path component"#
)]
#[case("/srv/[a", r#""/srv/[a" is not a pattern: invalid range pattern"#)]
fn a_bad_pattern_is_refused(#[case] text: &str, #[case] reason: &str) {
    let message = allow(&["/good", text]).unwrap_err().to_string();
    assert_eq!(message, format!("plugin.volumes_allow[1]: {reason}"));
}
