//! What the plugin reports about itself before any task, and how it decodes plugin and task configuration: what is accepted, and that
//! everything else is refused before anything is started.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use dev_agent::Plugin;
use nomad_driver_nspawn::proto::base::{ConfigSchemaRequest, PluginInfoRequest, PluginType};
use nomad_driver_nspawn::proto::driver::{PortMapping, TaskConfig};
use nomad_driver_nspawn::proto::hclspec::{Spec, spec::Block};
use rstest::rstest;
use serde_json::{Map, Value, json};

use crate::harness::{Host, Running, argv, environment, refusal};

fn pack(value: &Value) -> Vec<u8> {
    rmp_serde::to_vec(value).unwrap()
}

#[tokio::test] // Conformance check 17.
async fn plugin_info_comes_first() {
    let host = Host::new();
    let plugin = Plugin::launch(host.launch()).await.unwrap();
    let info = plugin
        .base()
        .plugin_info(PluginInfoRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(info.r#type(), PluginType::Driver);
    assert_eq!(info.plugin_api_versions, ["v0.1.0"]);
    assert_eq!(info.name, "nspawn");
    let numbers: Vec<u32> = info
        .plugin_version
        .split('.')
        .map(|part| part.parse().unwrap())
        .collect();
    assert_eq!(numbers.len(), 3);
}

/// Walks a schema as Nomad's parser does and collects the options.
fn options(spec: &Spec, found: &mut BTreeSet<String>) {
    const TYPES: [&str; 7] = [
        "bool",
        "number",
        "string",
        "list(string)",
        "list(number)",
        "list(map(string))",
        "list(map(number))",
    ];
    const IN_SEVERAL_BLOCKS: [&str; 10] = [
        "type", "url", "idmap", "target", "readonly", "nosuid", "nodev", "noexec", "create", "size",
    ];
    match spec.block.as_ref().expect("an empty spec") {
        Block::Object(object) => {
            for (name, inner) in &object.attributes {
                assert!(
                    found.insert(name.clone()) || IN_SEVERAL_BLOCKS.contains(&&**name),
                    "{name}"
                );
                options(inner, found);
            }
        }
        Block::Attr(attribute) => {
            assert!(
                found.contains(&attribute.name),
                "{} under another name",
                attribute.name
            );
            assert!(
                TYPES.contains(&attribute.r#type.as_str()),
                "{}",
                attribute.r#type
            );
        }
        Block::Default(fallback) => {
            let Some(Block::Attr(attribute)) = fallback
                .primary
                .as_ref()
                .and_then(|spec| spec.block.clone())
            else {
                panic!("a default of something else than an attribute")
            };
            let Some(Block::Literal(literal)) = fallback
                .default
                .as_ref()
                .and_then(|spec| spec.block.clone())
            else {
                panic!("a default that is no literal")
            };
            let value: Value = serde_json::from_str(&literal.value).unwrap();
            let fits = match attribute.r#type.as_str() {
                "bool" => value.is_boolean(),
                "number" => value.is_number(),
                "string" => value.is_string(),
                other => panic!("{} has a default of type {other}", attribute.name),
            };
            assert!(fits, "{}: {}", attribute.name, literal.value);
            options(fallback.primary.as_ref().unwrap(), found);
        }
        Block::BlockValue(block) => options(block.nested.as_ref().unwrap(), found),
        Block::BlockList(blocks) => options(blocks.nested.as_ref().unwrap(), found),
        other => panic!("{other:?} is not used here"),
    }
}

#[tokio::test] // Conformance check 18.
async fn the_schemas_convert() {
    let host = Host::new();
    let plugin = Plugin::launch(host.launch()).await.unwrap();
    let answer = plugin
        .base()
        .config_schema(ConfigSchemaRequest {})
        .await
        .unwrap()
        .into_inner();
    let mut found = BTreeSet::new();
    options(&answer.spec.unwrap(), &mut found);
    assert!(
        found.iter().eq([
            "devices",
            "enabled",
            "exec_unfiltered",
            "ipv4",
            "ipv6",
            "network_pool",
            "nspawn_path",
            "private_network",
            "reconcile_after",
            "require_limits",
            "seccomp_cache",
            "state_dir",
            "volumes",
            "volumes_allow"
        ]),
        "{found:?}"
    );
    found.clear();
    options(&plugin.task_schema().await.unwrap(), &mut found);
    for name in [
        "image",
        "boot",
        "bind",
        "port_map",
        "pids_limit",
        "devices",
        "image_download",
        "capability",
    ] {
        assert!(found.contains(name), "{name}");
    }
}

#[tokio::test] // Conformance check 19.
async fn the_same_configuration_twice() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let task = host.start(&plugin, host.shell("exec sleep 1000")).await;
    plugin.configure(&host.config()).await.unwrap();
    plugin.configure(&host.config()).await.unwrap();
    assert!(task.inspect(&plugin).await.is_ok());
    assert_eq!(host.starts().len(), 1);
    task.destroy(&plugin).await;
}

#[rstest] // Conformance check 20.
#[case(json!({"volumes": "perhaps"}), "plugin.volumes: ")]
#[case(json!({"volumes_allow": ["srv"]}), "plugin.volumes_allow[0]: \"srv\" is not a pattern")]
#[case(json!({"enabled": [1]}), "plugin.enabled: ")]
#[case(json!({"devices": 1}), "plugin.devices: ")]
#[case(json!({"state_dir": "relative"}), "plugin.state_dir: \"relative\" ")]
#[case(json!({"nspawn_path": "bin/x"}), "plugin.nspawn_path: \"bin/x\" ")]
#[case(json!({"reconcile_after": "soon"}), "plugin.reconcile_after: \"soon\" is not a duration")]
#[case(json!([1]), "plugin.*: a list is not a block")]
#[tokio::test]
async fn a_bad_configuration_names_the_field(#[case] config: Value, #[case] start: &str) {
    let host = Host::new();
    let plugin = Plugin::launch(host.launch()).await.unwrap();
    let status = refusal(plugin.set_config(pack(&config)).await);
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    assert!(status.message().starts_with(start), "{}", status.message());
}

#[tokio::test] // Conformance check 22.
async fn null_is_the_default() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let mut names = BTreeSet::new();
    options(&plugin.task_schema().await.unwrap(), &mut names);
    let mut config: Map<String, Value> =
        names.into_iter().map(|name| (name, Value::Null)).collect();
    config.insert("image".to_owned(), json!(host.root()));
    let task = host
        .start_packed(&plugin, host.shell(""), pack(&config.into()))
        .await
        .unwrap();
    let words = argv(&host.starts()[0]);
    // The driver picks the range if it may mount anything.
    let range = words
        .iter()
        .find_map(|word| word.strip_prefix("--private-users="));
    assert!(
        range.is_some_and(|range| range == "pick" || range.ends_with(":65536")),
        "{words:?}"
    );
    for word in [
        "--boot",
        "--private-users-ownership=auto",
        "--console=read-only",
    ] {
        assert!(
            words.contains(&word.to_owned()),
            "{word} is not in {words:?}"
        );
    }
    for word in [
        "--read-only",
        "--ephemeral",
        "--as-pid2",
        "--network-veth",
        "--private-network",
    ] {
        assert!(!words.contains(&word.to_owned()), "{word} is in {words:?}");
    }
    task.destroy(&plugin).await;
}

/// `{"image": …, "boot": false, "network_veth": true, "port_map": [{"http": <number>}]}` with the bytes of the number as given.
fn with_number(host: &Host, number: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x84];
    for (name, value) in [
        ("image", json!(host.root())),
        ("boot", json!(false)),
        ("network_veth", json!(true)),
    ] {
        bytes.extend(pack(&json!(name)));
        bytes.extend(pack(&value));
    }
    bytes.extend(pack(&json!("port_map")));
    bytes.extend([0x91, 0x81]);
    bytes.extend(pack(&json!("http")));
    bytes.extend(number);
    bytes
}

/// Starts a task with an allocated port whose number in `port_map` has this encoding.
async fn start_with_number(
    host: &Host,
    plugin: &Plugin,
    number: &[u8],
) -> Result<Running, dev_agent::HostError> {
    let config = with_number(host, number);
    let edit = |task: &mut TaskConfig| {
        task.msgpack_driver_config = config;
        task.resources.get_or_insert_default().ports = vec![PortMapping {
            label: "http".to_owned(),
            value: 25000,
            ..PortMapping::default()
        }];
    };
    let allocation =
        Arc::new(host.allocation(host.shell("").with("user_namespacing", json!(false))));
    Ok(host.start_edited(plugin, allocation, edit).await?)
}

#[rstest] // Conformance check 23.
#[case::fixint(&[80], 80)]
#[case::uint8(&[0xcc, 200], 200)]
#[case::uint16(&[0xcd, 0x1f, 0x90], 8080)]
#[case::uint32(&[0xce, 0, 0, 0x1f, 0x90], 8080)]
#[case::uint64(&[0xcf, 0, 0, 0, 0, 0, 0, 0x1f, 0x90], 8080)]
#[case::int16(&[0xd1, 0x1f, 0x90], 8080)]
#[case::float64(&[0xcb, 0x40, 0xbf, 0x90, 0, 0, 0, 0, 0], 8080)]
#[case::string(b"\xa48080", 8080)]
#[tokio::test]
async fn numbers_come_in_many_encodings(#[case] number: &[u8], #[case] port: i32) {
    let host = Host::new();
    let plugin = host.plugin_in_new_network().await;
    let started = start_with_number(&host, &plugin, number).await.unwrap();
    let inspected = started.inspect(&plugin).await.unwrap();
    let ports = inspected.network_override.unwrap().port_map;
    assert_eq!(ports, HashMap::from([("http".to_owned(), port)]));
    started.destroy(&plugin).await;
}

#[rstest] // Conformance check 23.
#[case::negative(&[0xff], "-1")]
#[case::zero(&[0], "0")]
#[case::large(&[0xce, 0, 1, 0, 0], "65536")]
#[case::fraction(&[0xcb, 0x40, 0x09, 0, 0, 0, 0, 0, 0], "3.125")]
#[case::words(b"\xa3abc", "abc")]
#[tokio::test]
async fn numbers_that_do_not_fit_are_refused(#[case] number: &[u8], #[case] shown: &str) {
    let host = Host::new();
    let plugin = host.plugin().await;
    let status = refusal(start_with_number(&host, &plugin, number).await);
    assert!(
        status.message().starts_with("config.port_map"),
        "{}",
        status.message()
    );
    assert!(status.message().contains(shown), "{}", status.message());
    assert!(host.starts().is_empty());
}

#[tokio::test] // Conformance check 24.
async fn later_maps_win() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let config = json!({
        "image": host.root(), "boot": false, "user_namespacing": false,
        "command": ["/bin/sh", "-c", "echo $A $B"],
        "environment": [{"A": "1", "B": "1"}, {"A": "2"}],
    });
    let task = host
        .start_packed(&plugin, host.shell(""), pack(&config))
        .await
        .unwrap();
    assert_eq!(task.stdout.all().await, "2 1\n");
    task.destroy(&plugin).await;
}

#[tokio::test] // Conformance check 25.
async fn absent_lists_are_empty() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let config = json!({"image": host.root(), "boot": false, "user_namespacing": false});
    let task = host
        .start_packed(&plugin, host.shell(""), pack(&config))
        .await
        .unwrap();
    let words = argv(&host.starts()[0]);
    let is_of_driver = |word: &str| word.ends_with(":/etc/resolv.conf");
    let binds = words.iter().filter(|word| word.starts_with("--bind"));
    let binds = binds.filter(|word| !is_of_driver(word));
    assert_eq!(binds.count(), 3, "Nomad's own and no others: {words:?}");
    assert!(
        words
            .iter()
            .all(|word| !word.starts_with("--capability") && !word.starts_with("--port")),
        "{words:?}"
    );
    assert_eq!(words[words.len() - 2..], ["--", "/proc/self/fd/6"]);
    task.destroy(&plugin).await;
}

#[tokio::test] // Conformance check 26.
async fn a_required_key_that_is_null() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let config = pack(&json!({"image": null, "boot": false}));
    let status = refusal(host.start_packed(&plugin, host.shell(""), config).await);
    assert_eq!(status.message(), "config.image: is required");
    assert!(host.starts().is_empty());
}

#[tokio::test] // Conformance check 27.
async fn unknown_keys_are_ignored() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let config = json!({
        "image": host.root(), "boot": false, "user_namespacing": false, "command": ["/bin/sh", "-c", "exit 6"],
        "of_a_later_version": {"deep": [1, null]},
    });
    let task = host
        .start_packed(&plugin, host.shell(""), pack(&config))
        .await
        .unwrap();
    assert_eq!(task.wait(&plugin).await.code, 6);
    task.destroy(&plugin).await;
}

#[rstest]
#[case("image", json!("no-such/image"), "config.image: \"no-such/image\" does not exist; looked at ")]
#[case("image", json!("../state"), "config.image: \"../state\" leads outside ")]
#[case("image", json!(true), "config.image: ")]
#[case("volatile", json!("maybe"), "config.volatile: \"maybe\" is not one of yes, state, overlay, no")]
#[case("console", json!("tty"), "config.console: \"tty\" is not one of interactive, read-only, passive, pipe, autopipe")]
#[case("resolv_conf", json!("copy"), "config.resolv_conf: \"copy\" is not one of off, ")]
#[case("boot", json!("perhaps"), "config.boot: ")]
#[case("command", json!("sh"), "config.command: ")]
#[case("command", json!(["a", ["b"]]), "config.command[1]: ")]
#[case("capability", json!(["NET_ADMIN"]), "config.capability: \"NET_ADMIN\" is not a capability")]
#[case("working_directory", json!("srv"), "config.working_directory: \"srv\" is not an absolute path")]
#[case("pivot_root", json!("new"), "config.pivot_root: \"new\" is not an absolute path")]
#[case("user", json!("-x"), "config.user: \"-x\" begins with -")]
#[case("private_users", json!("some"), "config.private_users: \"some\" is not one of yes, no, pick, identity, managed, UID, UID:COUNT")]
#[case("environment", json!([{"a=b": "1"}]), "config.environment[\"a=b\"]: is not a valid variable name")]
#[case("bind", json!([{"/no/such/place": "/x"}]), "config.bind[\"/no/such/place\"]: \"/no/such/place\" does not exist")]
#[case("bind", json!([{"../../x": "/x"}]), "config.bind[\"../../x\"]: \"../../x\" leads outside ")]
#[case("bind", json!([{"local": "/x\ny"}]), "config.bind[\"local\"]: \"/x\\ny\" contains a control character")]
#[case("bind", json!([{"private": "/x"}]), "config.bind[\"private\"]: \"private\" is or contains a directory that Nomad hides from tasks")]
#[case("network_zone", json!("thirteenchars"), "config.network_zone: \"thirteenchars\" is not a valid zone name")]
#[case("network_bridge", json!("br 0"), "config.network_bridge: \"br 0\" is not a valid interface name")]
#[case("ports", json!(["http"]), "config.ports[0]: \"http\" is not a port label: the job has no ports")]
#[case("process_two", json!(3), "config.process_two: ")]
#[case("image_download", json!({"url": "https://x/y"}), "config.image_download: ")]
#[tokio::test]
async fn invalid_options_are_refused_before_anything_is_started(
    #[case] option: &str,
    #[case] value: Value,
    #[case] start: &str,
) {
    let host = Host::new();
    let plugin = host.plugin().await;
    let mut config = json!({"image": host.root(), "boot": false, "user_namespacing": true});
    config[option] = value;
    let status = refusal(
        host.start_packed(&plugin, host.shell(""), pack(&config))
            .await,
    );
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    assert!(status.message().starts_with(start), "{}", status.message());
    assert!(
        status.message().starts_with(&format!("config.{option}")),
        "{}",
        status.message()
    );
    assert!(!status.message().contains('\n'), "{:?}", status.message());
    assert!(
        status.details().is_empty(),
        "a mistake is not worth another attempt"
    );
    assert!(host.call_log().is_empty(), "something was called");
    assert_eq!(std::fs::read_dir(host.state()).unwrap().count(), 0);
}

#[tokio::test]
async fn invalid_msgpack_is_refused() {
    let host = Host::new();
    let plugin = host.plugin().await;
    for bytes in [
        &b""[..],
        b"\xc1",
        b"\x81",
        b"\xdf\xff\xff\xff\xff",
        b"plain words",
    ] {
        let result = host
            .start_packed(&plugin, host.shell(""), bytes.to_vec())
            .await;
        let status = refusal(result);
        assert!(
            status.message().starts_with("config"),
            "{}",
            status.message()
        );
    }
    assert!(host.call_log().is_empty());
}

#[tokio::test]
async fn names_that_lead_outside_are_refused() {
    type Edit = fn(&mut TaskConfig);
    let host = Host::new();
    let plugin = host.plugin().await;
    let edits: [(&str, Edit); 4] = [
        ("task.id", |task| task.id = "../../etc/x".to_owned()),
        ("task.name", |task| task.name = "..".to_owned()),
        ("task.alloc_id", |task| task.alloc_id = "a/b".to_owned()),
        ("task.alloc_dir", |task| task.alloc_dir = "alloc".to_owned()),
    ];
    for (option, edit) in edits {
        let allocation = Arc::new(host.allocation(host.shell("")));
        let status = refusal(host.start_edited(&plugin, allocation, edit).await);
        assert!(status.message().starts_with(option), "{}", status.message());
    }
    assert!(host.call_log().is_empty());
}

#[tokio::test]
async fn volumes_can_be_disabled() {
    let host = Host::new();
    let plugin = host.plugin_with(&json!({"volumes": false})).await;
    let outside = host.join("plugins");
    for option in ["bind", "bind_read_only"] {
        let config = json!({"image": host.root(), "boot": false, option: [{outside.to_str().unwrap(): "/x"}]});
        let status = refusal(
            host.start_packed(&plugin, host.shell(""), pack(&config))
                .await,
        );
        assert!(
            status
                .message()
                .contains("volumes are disabled on this node (plugin.volumes = false)"),
            "{}",
            status.message()
        );
    }
    let allocation = Arc::new(host.allocation(host.shell("")));
    let edit = |task: &mut TaskConfig| {
        task.mounts.push(nomad_driver_nspawn::proto::driver::Mount {
            task_path: "/v".to_owned(),
            host_path: outside.display().to_string(),
            ..Default::default()
        });
    };
    let status = refusal(host.start_edited(&plugin, allocation, edit).await);
    assert!(
        status
            .message()
            .starts_with("task.volume_mount[\"/v\"]: volumes are disabled"),
        "{}",
        status.message()
    );
    assert!(host.call_log().is_empty());
    let inside = host.shell("exit 0").with("bind", json!([{"local": "/x"}]));
    let task = host.start(&plugin, inside).await;
    task.wait(&plugin).await;
    task.destroy(&plugin).await;
}

#[tokio::test]
async fn a_jobs_environment_overrides_all() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let job = host
        .shell("echo $WHO $NOMAD_TASK_NAME $NOMAD_ALLOC_DIR")
        .env("WHO", "nomad")
        .with("environment", json!([{"WHO": "job"}]));
    let task = host.start(&plugin, job).await;
    assert_eq!(task.stdout.all().await, "job web /alloc\n");
    let nspawns = environment(&host.starts()[0]);
    assert!(!nspawns.contains_key("WHO"), "only the command needs it");
    task.destroy(&plugin).await;
}
