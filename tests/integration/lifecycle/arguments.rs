//! The arguments, environment and descriptors of systemd-nspawn.

use super::*;

#[tokio::test]
async fn systemd_nspawn_inherits_nothing_from_the_plugin() {
    let host = Host::new();
    let plugin = Plugin::launch(host.launch().set("OPERATORS_OWN", "marker-of-the-agent"))
        .await
        .unwrap();
    plugin.configure(&host.config()).await.unwrap();
    let task = host.start(&plugin, host.shell("env; exit 0")).await;
    let inside = task.stdout.all().await;
    let start = &host.starts()[0];
    let outside = environment(start);
    for (name, value) in &outside {
        let plugins = name.starts_with("PLUGIN_")
            || name.contains("COOKIE")
            || name == "OPERATORS_OWN"
            || name == "TMPDIR";
        assert!(
            !plugins && !value.contains("marker-of-the-agent"),
            "{name}={value}"
        );
    }
    assert!(
        !inside.contains("COOKIE") && !inside.contains("marker-of-the-agent"),
        "{inside}"
    );
    assert!(
        outside["NOTIFY_SOCKET"].starts_with(host.state().to_str().unwrap()),
        "{outside:?}"
    );
    assert!(!inside.contains(&outside["NOTIFY_SOCKET"]), "{inside}");
    // Its standard streams, and what it passes on to the driver's init; no descriptor of plugin or supervisor.
    let descriptors = start["descriptors"].as_object().unwrap();
    let wanted = [
        ("0", "/dev/null"),
        ("1", "/dev/null"),
        ("2", "/words"),
        ("3", "socket:["),
        ("4", ".web.stdout.fifo"),
        ("5", ".web.stderr.fifo"),
        ("6", "/memfd:nspawn-init (deleted)"),
        ("7", "/init (deleted)"),
    ];
    assert_eq!(descriptors.len(), wanted.len(), "{descriptors:?}");
    for (number, part) in wanted {
        assert!(
            descriptors[number].as_str().unwrap().contains(part),
            "{number} is not {part}: {descriptors:?}"
        );
    }
    assert_eq!(start["signal_mask"], "0000000000000000");
    let ignored = u64::from_str_radix(start["ignored"].as_str().unwrap(), 16).unwrap();
    // 32 and 33 are reserved by the C library, which does not allow changing them: they are inherited from the parent of the tests.
    assert_eq!(ignored & !(0b11 << 31), 0, "{ignored:x}");
    task.destroy(&plugin).await;
}

#[rstest]
#[case::old(
    247,
    "--private-users=4194304:65536",
    "--setenv=WHO=me",
    "--private-users-ownership=auto"
)]
#[case::less_old(
    249,
    "--private-users-ownership=auto",
    "--setenv=WHO=me",
    "--setenv=WHO"
)]
#[case::new(
    252,
    "--private-users-ownership=auto",
    "--setenv=WHO",
    "--setenv=WHO=me"
)]
#[tokio::test]
async fn an_old_systemd_nspawn_gets_only_its_own_options(
    #[case] version: u32,
    #[case] has: &str,
    #[case] has_too: &str,
    #[case] has_not: &str,
) {
    let host = Host::new();
    host.scenario(&json!({"version": version}));
    let plugin = host.plugin().await;
    let job = |boot: bool| {
        host.shell("echo $WHO")
            .env("WHO", "me")
            .with("boot", json!(boot))
            .with("user_namespacing", json!(true))
            .with("private_users", json!("4194304:65536"))
    };
    // A command gets its variables from the driver's own init, in every version.
    let task = host.start(&plugin, job(false)).await;
    assert_eq!(task.stdout.all().await, "me\n");
    let words = argv(&host.starts()[0]);
    assert!(!words.iter().any(|word| word.starts_with("--setenv=")));
    task.destroy(&plugin).await;

    let task = host
        .start(&plugin, job(true).with("command", json!([])))
        .await;
    let words = argv(&host.starts()[1]);
    for word in [has, has_too] {
        assert!(
            words.iter().any(|found| found == word),
            "{word} is not in {words:?}"
        );
    }
    assert!(
        words.iter().all(|found| found != has_not),
        "{has_not} is in {words:?}"
    );
    task.destroy(&plugin).await;
}

#[tokio::test]
async fn an_option_that_the_installed_version_lacks_is_refused_by_name() {
    let host = Host::new();
    host.scenario(&json!({"version": 248}));
    let plugin = host.plugin().await;
    let job = host
        .shell("exit 0")
        .with("user_namespacing", json!(true))
        .with("private_users", json!("identity"));
    let status = refusal(host.try_start(&plugin, job).await);
    assert!(
        status
            .message()
            .contains("needs systemd-nspawn 249 or later, and this host has 248"),
        "{}",
        status.message()
    );
    assert!(host.starts().is_empty() && status.details().is_empty());
}
