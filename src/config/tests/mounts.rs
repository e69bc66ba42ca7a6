//! Mounts: volumes, binds, `mount` blocks and temporary file systems.

use crate::container::Propagation;

use super::*;

#[test]
fn mounts_have_nomads_first_and_binds_last() {
    let mut host = TestHost::new();
    host.make(format!("alloc/{ALLOC}/web/local/conf/."));
    host.make("volume/.");
    host.context.mounts = vec![VolumeMount {
        source: host.path("volume"),
        target: "/v".into(),
        read_only: true,
        propagation: String::new(),
    }];
    let spec = plain(
        &host,
        r#"
        bind = { "local/conf" = "/etc/conf", "TOP/data" = "/da:ta" }
        bind_read_only = { "/local/conf" = "/etc/other" }
        "#,
    );
    let conf = host.path(format!("alloc/{ALLOC}/web/local/conf"));
    let expected: Vec<(PathBuf, &str, bool)> = vec![
        (host.path("volume"), "/v", true),
        (host.path("data"), "/da:ta", false),
        (conf.clone(), "/etc/conf", false),
        (conf, "/etc/other", true),
    ];
    let found: Vec<_> = spec.mounts[3..]
        .iter()
        .map(|m| (m.source.clone(), m.target.to_str().unwrap(), m.read_only))
        .collect();
    assert_eq!(found, expected);
}

#[test]
fn without_volumes_only_the_allocation_can_be_mounted() {
    let mut host = TestHost::new();
    host.plugin_config.volumes = false;
    let body = "image = \"tree\"\nboot = false\n";
    assert_eq!(plain(&host, r#"bind = { "local" = "/x" }"#).mounts.len(), 4);
    assert_eq!(
        host.refusal(&format!("{body}bind = {{ \"TOP/data\" = \"/x\" }}")),
        r#"config.bind["TOP/data"]: "TOP/data" is outside the allocation, and volumes are disabled on this node (plugin.volumes = false)"#
    );
    host.context.mounts = vec![VolumeMount {
        source: host.path("data"),
        target: "/v".into(),
        read_only: false,
        propagation: String::new(),
    }];
    assert_eq!(
        host.refusal(body),
        r#"task.volume_mount["/v"]: volumes are disabled on this node (plugin.volumes = false)"#
    );
}

fn volume(target: &str, propagation: &str) -> VolumeMount {
    VolumeMount {
        source: "/".into(),
        target: target.into(),
        read_only: false,
        propagation: propagation.into(),
    }
}

#[test]
fn a_volume_has_the_propagation_of_its_block_and_a_bind_that_of_systemd_nspawn() {
    let mut host = TestHost::new();
    host.context.mounts = vec![
        volume("/unset", ""),
        volume("/private", "private"),
        volume("/slave", "host-to-task"),
    ];
    let spec = plain(&host, r#"bind = { "TOP/data" = "/bind" }"#);
    let modes = spec.mounts.iter().map(|mount| mount.propagation);
    use Propagation::{HostToTask, Private};
    assert_eq!(
        modes.collect::<Vec<_>>(),
        [
            HostToTask, HostToTask, HostToTask, Private, Private, HostToTask, HostToTask
        ]
    );
}

#[rstest]
#[case(
    "bidirectional",
    r#"task.volume_mount["/v"].propagation_mode: "bidirectional" is not supported, because mounts that a task makes can't reach the host: use one of private, host-to-task"#
)]
#[case(
    "slave",
    r#"task.volume_mount["/v"].propagation_mode: "slave" is not one of private, host-to-task"#
)]
fn a_propagation_that_is_not_supported_is_refused(#[case] word: &str, #[case] message: &str) {
    let mut host = TestHost::new();
    host.context.mounts = vec![volume("/v", word)];
    assert_eq!(host.refusal("image = \"tree\"\nboot = false"), message);
}
