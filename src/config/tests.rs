//! Tests the whole module through its public interface: every option with valid and invalid values and the exact
//! message, and that no input makes it panic. Long because it consists of tables: one row for each rejected value.

use proptest::prelude::*;
use rmpv::Value;
use rstest::rstest;

use std::time::Duration;

use super::testing::{ALLOC, TestHost, encode};
use super::*;
use crate::container::{
    Console, ContainerSpec, Identity, Mode, Mount, NetworkNamespace, PortForward, Root, Users,
    Volatile,
};

mod bytes;
mod credentials;
mod environment;
mod mounts;
mod overlays;
mod plugin;
mod ports;
mod resources;
mod system;

/// A start with only the required options, and `extra`.
fn plain(host: &TestHost, extra: &str) -> ContainerSpec {
    let body = format!("image = \"tree\"\nboot = false\n{extra}");
    host.check(&body)
        .unwrap_or_else(|e| panic!("{body}: {e}"))
        .spec
}

fn refusal(extra: &str) -> String {
    TestHost::new().refusal(&format!("image = \"tree\"\nboot = false\n{extra}"))
}

#[test]
fn the_smallest_job_has_the_defaults() {
    let host = TestHost::new();
    let validated = host.check("image = \"system\"").unwrap();
    let own = |source: &str, target: &str| Mount::new(host.context.alloc_dir.join(source), target);
    let root = host.path("plugins/system");
    let expected = ContainerSpec::for_test("web", root).with(|spec| {
        spec.identity = Identity {
            id: format!("{ALLOC}/web/00c0ffee"),
            alloc_dir: host.context.alloc_dir.clone(),
            machine: format!("web-{ALLOC}"),
        };
        spec.description.image = host.path("plugins/system").display().to_string();
        "host".clone_into(&mut spec.description.network);
        spec.payload.mode = Mode::Boot;
        spec.payload.command = vec![];
        spec.users = Users::Private {
            range: "pick".into(),
            ownership: Some("auto".into()),
        };
        spec.mounts = vec![
            own("alloc", "/alloc"),
            own("web/local", "/local"),
            own("web/secrets", "/secrets"),
        ];
    });
    assert_eq!(validated.spec, expected);
    assert_eq!(validated.notes, Vec::<String>::new());
}

#[test]
fn a_job_with_many_options() {
    let mut host = TestHost::new();
    host.context.stdout = "/logs/out".into();
    host.context.stderr = "/dev/null".into();
    host.context.user = "job".into();
    host.make("plugins/tree/new/usr/.");
    let spec = plain(
        &host,
        r#"
        process_two = true
        command = ["/bin/sh", "-c", "true", ""]
        ephemeral = true
        read_only = true
        console = "autopipe"
        volatile = "overlay"
        resolv_conf = "bind-stub"
        user = "www"
        working_directory = "/srv/x"
        pivot_root = "/new:/old"
        capability = ["cap_net_admin", "CAP_BPF,CAP_NET_ADMIN", "ALL"]
        private_users = "65536:131072"
        "#,
    );
    assert_eq!(spec.payload.mode, Mode::ProcessTwo);
    assert_eq!(spec.payload.command, ["/bin/sh", "-c", "true", ""]);
    assert!(spec.rootfs.ephemeral && spec.rootfs.read_only);
    assert_eq!(spec.payload.console, Console::Autopipe);
    assert_eq!(spec.rootfs.volatile, Volatile::Overlay);
    assert_eq!(spec.network.resolv_conf.as_deref(), Some("bind-stub"));
    assert_eq!(spec.payload.user.as_deref(), Some("www"));
    assert_eq!(spec.payload.working_directory.as_deref(), Some("/srv/x"));
    assert_eq!(spec.rootfs.pivot_root.as_deref(), Some("/new:/old"));
    assert_eq!(
        spec.payload.capabilities,
        ["CAP_NET_ADMIN", "CAP_BPF", "all"]
    );
    assert_eq!(spec.payload.stdout, Some("/logs/out".into()));
    assert_eq!(spec.payload.stderr, None);
    let users = Users::Private {
        range: "65536:131072".into(),
        ownership: Some("auto".into()),
    };
    assert_eq!(spec.users, users);
}

#[rstest]
#[case(
    r#"volatile = "maybe""#,
    r#"config.volatile: "maybe" is not one of yes, state, overlay, no"#
)]
#[case(
    r#"console = "tty""#,
    r#"config.console: "tty" is not one of interactive, read-only, passive, pipe, autopipe"#
)]
#[case(r#"resolv_conf = "copy""#, r#"config.resolv_conf: "copy" is not one of off, copy-host, copy-static, copy-uplink, copy-stub, replace-host, replace-static, replace-uplink, replace-stub, bind-host, bind-static, bind-uplink, bind-stub, delete, auto"#)]
#[case(r#"private_users = "some""#, r#"config.private_users: "some" is not one of yes, no, pick, identity, managed, UID, UID:COUNT"#)]
#[case(r#"private_users = "1:2:3""#, r#"config.private_users: "1:2:3" is not one of yes, no, pick, identity, managed, UID, UID:COUNT"#)]
#[case(
    r#"private_users = "+1""#,
    r#"config.private_users: "+1" is not one of yes, no, pick, identity, managed, UID, UID:COUNT"#
)]
#[case(
    r#"private_users = "65535""#,
    r#"config.private_users: "65535" begins with a user id that the kernel reserves"#
)]
#[case(
    r#"private_users = "0:0""#,
    r#"config.private_users: "0:0" is an empty range of user ids"#
)]
#[case(
    r#"private_users = "4294967294""#,
    r#"config.private_users: "4294967294" goes beyond the last user id, 4294967294"#
)]
#[case(r#"private_users = "managed""#, r#"config.private_users: "managed" needs a private network: set config.network_veth, network_zone or network_bridge"#)]
#[case(
    r#"private_users_ownership = "own""#,
    r#"config.private_users_ownership: "own" is not one of off, chown, map, auto"#
)]
#[case(
    "private_users_ownership = \"chown\"\nread_only = true",
    r#"config.private_users_ownership: "chown" can't be combined with config.read_only"#
)]
#[case(
    "private_users_ownership = \"chown\"\nvolatile = \"state\"",
    r#"config.private_users_ownership: "chown" can't be combined with config.volatile"#
)]
#[case(r#"capability = ["CAP_BPF", "NET_ADMIN"]"#, r#"config.capability: "NET_ADMIN" is not a capability: use names such as CAP_NET_ADMIN, or all"#)]
#[case(
    r#"working_directory = "srv""#,
    r#"config.working_directory: "srv" is not an absolute path"#
)]
#[case(
    r#"pivot_root = "new""#,
    r#"config.pivot_root: "new" is not an absolute path"#
)]
#[case(
    r#"pivot_root = "/new:old""#,
    r#"config.pivot_root: "old" is not an absolute path"#
)]
#[case(r#"pivot_root = "/new:""#, r#"config.pivot_root: "" is empty"#)]
#[case(
    r#"pivot_root = "/a:/b:/c""#,
    r#"config.pivot_root: "/a:/b:/c" is not NEW or NEW:OLD"#
)]
#[case(
    r#"pivot_root = "/a:/a/""#,
    r#"config.pivot_root: "/a:/a/" names the same path for the new and the old root"#
)]
#[case(
    r#"pivot_root = "/nowhere""#,
    r#"config.pivot_root: "/nowhere" is not a directory of the image"#
)]
#[case(r#"user = "-x""#, r#"config.user: "-x" begins with -"#)]
#[case(
    r#"user = "a\nb""#,
    r#"config.user: "a\nb" contains a control character"#
)]
#[case(r#"user = "www:www""#, r#"config.user: "www:www" contains a :, but a group can't be given; systemd-nspawn looks up the groups of the user"#)]
#[case(r#"environment = { "a=b" = "1" }"#, r#"config.environment["a=b"]: is not a valid variable name: use at least one character, and neither = nor NUL"#)]
#[case(r#"environment = { "" = "1" }"#, r#"config.environment[""]: is not a valid variable name: use at least one character, and neither = nor NUL"#)]
#[case(
    r#"environment = { X = "a\u0000b" }"#,
    r#"config.environment["X"]: a NUL character is not allowed"#
)]
#[case(
    r#"command = ["a", "b\u0000c"]"#,
    "config.command[1]: a NUL character is not allowed"
)]
#[case(r#"network_zone = "thirteenchars""#, r#"config.network_zone: "thirteenchars" is not a valid zone name: use 1 to 12 letters, digits, -, _ and dots"#)]
#[case(r#"network_bridge = "br 0""#, r#"config.network_bridge: "br 0" is not a valid interface name: use 1 to 15 printable characters other than space, :, / and %, not only digits"#)]
#[case(r#"network_bridge = "17""#, r#"config.network_bridge: "17" is not a valid interface name: use 1 to 15 printable characters other than space, :, / and %, not only digits"#)]
#[case(
    "network_zone = \"a\"\nnetwork_bridge = \"b\"",
    r#"config.network_bridge: "b" can't be combined with config.network_zone"#
)]
#[case(
    r#"ports = ["http"]"#,
    r#"config.ports[0]: "http" is not a port label: the job has no ports"#
)]
#[case(
    r#"image_download { url = "https://x/y" }"#,
    "config.image_download: downloading is not implemented: use a directory or a disk image on the client, or fetch a disk image in one file with an artifact block"
)]
#[case(
    "image_download {\n url = \"ftp://x/y\"\n}",
    r#"config.image_download.url: "ftp://x/y" does not begin with http:// or https://"#
)]
#[case(
    "image_download {\n url = \"\"\n}",
    "config.image_download.url: is required"
)]
#[case(
    "image_download {\n url = \"http://x\"\n type = \"zip\"\n}",
    r#"config.image_download.type: "zip" is not one of tar, raw, docker"#
)]
#[case(
    "image_download {\n url = \"http://x\"\n verify = \"yes\"\n}",
    r#"config.image_download.verify: "yes" is not one of no, checksum, signature"#
)]
#[case(
    r#"bind = { "TOP/nothing" = "/x" }"#,
    r#"config.bind["TOP/nothing"]: "TOP/nothing" does not exist; looked at "TOP/nothing""#
)]
#[case(
    r#"bind = { "TOP/data" = "x" }"#,
    r#"config.bind["TOP/data"]: "x" is not an absolute path"#
)]
#[case(
    r#"bind = { "TOP/data" = "/x\ny" }"#,
    r#"config.bind["TOP/data"]: "/x\ny" contains a control character"#
)]
#[case(
    r#"bind = { "TOP/data" = "" }"#,
    r#"config.bind["TOP/data"]: "" is empty"#
)]
#[case(r#"bind = { "" = "/x" }"#, r#"config.bind[""]: "" is empty"#)]
#[case(
    r#"bind = { "TOP/data" = "/" }"#,
    r#"config.bind["TOP/data"]: the target "/" would hide the image"#
)]
#[case(
    r#"bind = { "TOP/data" = "/a/../b" }"#,
    r#"config.bind["TOP/data"]: "/a/../b" contains .."#
)]
#[case(
    r#"bind = { "TOP/data" = "/x:norbind,idmap" }"#,
    r#"config.bind["TOP/data"]: "/x:norbind,idmap" ends in mount options, which are not supported"#
)]
#[case(
    r#"bind = { "TOP/data" = "/local/" }"#,
    r#"config.bind["TOP/data"]: the target "/local" is also that of Nomad's own directory /local"#
)]
#[case(
    "bind = { \"TOP/data\" = \"/x\" }\nbind_read_only = { \"TOP/data\" = \"//x/.\" }",
    r#"config.bind_read_only["TOP/data"]: the target "/x" is also that of config.bind["TOP/data"]"#
)]
#[case(
    r#"bind = { "../db/local" = "/x" }"#,
    r#"config.bind["../db/local"]: "../db/local" leads outside "TOP/alloc/ALLOC/web""#
)]
#[case(
    r#"bind = { "local/link" = "/x" }"#,
    r#"config.bind["local/link"]: "local/link" leads outside "TOP/alloc/ALLOC/web""#
)]
#[case(
    r#"bind = { "/local/link" = "/x" }"#,
    r#"config.bind["/local/link"]: "/local/link" leads outside "TOP/alloc/ALLOC/web/local""#
)]
#[case(r#"bind = { "TOP/alloc/ALLOC/web/local/link" = "/x" }"#, r#"config.bind["TOP/alloc/ALLOC/web/local/link"]: "TOP/alloc/ALLOC/web/local/link" leads outside "TOP/alloc/ALLOC/web""#)]
#[case(
    r#"bind = { "private" = "/x" }"#,
    r#"config.bind["private"]: "private" is or contains a directory that Nomad hides from tasks"#
)]
#[case(
    r#"bind = { "." = "/x" }"#,
    r#"config.bind["."]: "." is or contains a directory that Nomad hides from tasks"#
)]
#[case(r#"bind = { "TOP/alloc/ALLOC/db/secrets" = "/x" }"#, r#"config.bind["TOP/alloc/ALLOC/db/secrets"]: "TOP/alloc/ALLOC/db/secrets" is or contains a directory that Nomad hides from tasks"#)]
#[case(r#"bind = { "TOP/alloc/ALLOC" = "/x" }"#, r#"config.bind["TOP/alloc/ALLOC"]: "TOP/alloc/ALLOC" is or contains a directory that Nomad hides from tasks"#)]
fn what_is_wrong_is_said(#[case] extra: &str, #[case] message: &str) {
    let host = TestHost::new();
    host.link(&format!("alloc/{ALLOC}/web/local/link"), "/etc");
    let extra = extra.replace("ALLOC", ALLOC);
    let body = format!("image = \"tree\"\nboot = false\n{extra}");
    assert_eq!(host.refusal(&body), message);
}

#[rstest]
#[case(r#"image = """#, "config.image: is required")]
#[case(
    "image = \"system\"\nprocess_two = true",
    "config.process_two: true can't be combined with config.boot, which is true by default: set config.boot = false"
)]
#[case("image = \"system\"\nuser = \"www\"", r#"config.user: "www" can't be combined with config.boot, which is true by default: set config.boot = false"#)]
#[case(r#"image = "tree""#, r#"config.image: "TOP/plugins/tree" contains no operating system: it lacks etc/os-release and usr/lib/os-release; to run a command instead of an init, set config.boot = false"#)]
#[case(
    "image = \"empty\"\nboot = false",
    r#"config.image: "TOP/plugins/empty" contains no operating system: it lacks the directory usr"#
)]
#[case(r#"image = "noinit""#, r#"config.image: "TOP/plugins/noinit" contains no operating system: it lacks an init (usr/lib/systemd/systemd, lib/systemd/systemd or sbin/init); to run a command instead of an init, set config.boot = false"#)]
#[case(r#"image = "web""#, r#"config.image: "web" does not exist; looked at "TOP/plugins/web", "TOP/machines/web", "TOP/machines/web.raw""#)]
#[case(
    r#"image = "a/web""#,
    r#"config.image: "a/web" does not exist; looked at "TOP/plugins/a/web""#
)]
#[case(
    r#"image = "../machines""#,
    r#"config.image: "../machines" leads outside "TOP/plugins""#
)]
#[case(
    r#"image = "out""#,
    r#"config.image: "out" leads outside "TOP/plugins""#
)]
#[case(
    r#"image = "/local/none""#,
    r#"config.image: "/local/none" does not exist; looked at "/local/none""#
)]
#[case(
    r#"image = "/dev/null""#,
    r#"config.image: "/dev/null" is neither a directory nor a disk image nor a block device"#
)]
#[case(
    "image = \"/\"\nboot = false",
    r#"config.image: "/" needs config.ephemeral = true, or config.volatile yes or state"#
)]
#[case(
    "image = \"/\"\nboot = false\nvolatile = \"yes\"",
    r#"config.image: "/" can't be used in a user namespace: set config.user_namespacing = false"#
)]
#[case(
    "image = \"unmerged\"\nboot = false\nvolatile = \"yes\"\nuser_namespacing = false",
    r#"config.volatile: "yes" needs an image whose /bin is a symbolic link into /usr; use state or overlay"#
)]
fn a_bad_image_is_refused_with_a_reason(#[case] body: &str, #[case] message: &str) {
    let host = TestHost::new();
    host.make("plugins/noinit/etc/os-release");
    host.make("plugins/unmerged/usr/.");
    host.make("plugins/unmerged/bin/.");
    host.link("plugins/out", "../data");
    // An init that exists on the host but not in the image.
    host.make("plugins/noinit/sbin/.");
    host.link("plugins/noinit/sbin/init", "/proc/self/status");
    assert_eq!(host.refusal(body), message);
}

#[test]
fn images_are_found_in_the_search_path() {
    let host = TestHost::new();
    host.make("machines/disk.raw");
    host.make("plugins/both/usr/.");
    host.make("machines/both/usr/.");
    host.make(format!("alloc/{ALLOC}/web/local/root/usr/."));
    host.make(format!("alloc/{ALLOC}/alloc/root/usr/."));
    host.make("plugins/linked/etc/os-release");
    host.make("plugins/linked/usr/bin/init");
    host.make("plugins/linked/sbin/.");
    host.link("plugins/linked/sbin/init", "/usr/bin/init");
    let root = |image: &str| {
        let body = format!("image = \"{image}\"\nboot = {}", image == "linked");
        host.check(&body)
            .unwrap_or_else(|e| panic!("{e}"))
            .spec
            .rootfs
            .source
    };
    let directory = |path: &str| Root::Directory(host.path(path.replace("ALLOC", ALLOC)));
    assert_eq!(root("disk"), Root::Image(host.path("machines/disk.raw")));
    assert_eq!(root("both"), directory("plugins/both"));
    assert_eq!(root("linked"), directory("plugins/linked"));
    assert_eq!(root("./tree"), directory("plugins/tree"));
    assert_eq!(root("TOP/plugins/tree"), directory("plugins/tree"));
    assert_eq!(root("/local/root"), directory("alloc/ALLOC/web/local/root"));
    assert_eq!(root("/alloc/root"), directory("alloc/ALLOC/alloc/root"));
    let written = format!("TOP/alloc/{ALLOC}/web/local/root");
    assert_eq!(root(&written), directory("alloc/ALLOC/web/local/root"));
}

#[test]
fn the_tasks_user_is_used_and_named() {
    let mut host = TestHost::new();
    host.context.user = "job".into();
    assert_eq!(plain(&host, "").payload.user.as_deref(), Some("job"));
    assert_eq!(
        plain(&host, "user = \"\"").payload.user.as_deref(),
        Some("job")
    );
    assert_eq!(
        host.refusal("image = \"system\""),
        r#"task.user: "job" can't be combined with config.boot, which is true by default: set config.boot = false"#
    );
}

#[rstest]
#[case("user_namespacing = false", None)]
#[case("private_users = \"no\"", None)]
#[case("user_namespacing = false\nprivate_users = \"pick\"", None)]
#[case("private_users = \"yes\"", Some(("yes", None)))]
#[case("private_users = \"identity\"", Some(("identity", None)))]
#[case("private_users = \"100\"", Some(("100", Some("auto"))))]
#[case("private_users = \"4294901759\"", Some(("4294901759", Some("auto"))))]
#[case("private_users_ownership = \"chown\"", Some(("pick", Some("chown"))))]
#[case("private_users = \"managed\"\nnetwork_veth = true", Some(("managed", None)))]
fn user_namespaces(#[case] extra: &str, #[case] expected: Option<(&str, Option<&str>)>) {
    let expected = match expected {
        None => Users::Host,
        Some((range, ownership)) => Users::Private {
            range: range.into(),
            ownership: ownership.map(Into::into),
        },
    };
    assert_eq!(plain(&TestHost::new(), extra).users, expected);
}

/// A host on which the group has the ports `web` (18080 → 80) and `raw` (19000), and the task the ports `old` and
/// `same`.
fn with_ports() -> TestHost {
    let mut host = TestHost::new();
    let port = |label: &str, host, to, task_level| AllocatedPort {
        label: label.into(),
        host,
        to,
        address: None,
        task_level,
    };
    host.context.ports = vec![
        port("web", 18080, 80, false),
        port("raw", 19000, 0, false),
        port("old", 20001, 0, true),
        port("same", 20002, 0, true),
    ];
    host.context.environment = [("NOMAD_PORT_web", "18080"), ("NOMAD_PORT_raw", "19000")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
    host
}

#[rstest]
#[case::no_directory("nothing", "task.alloc_dir")]
#[case::relative("", "task.alloc_dir")]
fn a_missing_allocation_is_an_error(#[case] path: &str, #[case] option: &str) {
    let mut host = TestHost::new();
    host.context.alloc_dir = match path {
        "" => "relative".into(),
        path => host.path(path),
    };
    let error = host.check("image = \"tree\"\nboot = false").unwrap_err();
    assert_eq!(error.option, option);
}

#[test]
fn a_task_directory_that_is_a_link_is_refused() {
    let host = TestHost::new();
    let local = format!("alloc/{ALLOC}/web/local");
    std::fs::remove_dir(host.path(&local)).unwrap();
    host.link(&local, "/etc");
    let message = host.refusal("image = \"tree\"\nboot = false");
    assert!(message.starts_with("task.alloc_dir: "), "{message}");
}

fn anything() -> impl Strategy<Value = Value> {
    let word = prop_oneof![
        Just("tree".to_owned()),
        Just("/".to_owned()),
        Just("no".to_owned()),
        Just("old".to_owned()),
        Just("local/../..".to_owned()),
        ".{0,8}",
    ];
    let leaf = prop_oneof![
        Just(Value::Nil),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        word.prop_map(Value::from),
        any::<Vec<u8>>().prop_map(Value::Binary),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        let pairs = prop::collection::vec((inner.clone(), inner.clone()), 0..4);
        prop_oneof![
            prop::collection::vec(inner, 0..4).prop_map(Value::Array),
            pairs.prop_map(Value::Map),
        ]
    })
}

fn blocks() -> impl Strategy<Value = Value> {
    let names = [PluginOptions::OPTIONS, TaskOptions::OPTIONS]
        .concat()
        .iter()
        .map(|option| option.name)
        .collect::<Vec<_>>();
    let pair = (
        prop::sample::select(names).prop_map(Value::from),
        anything(),
    );
    prop::collection::vec(pair, 0..6).prop_map(|mut pairs| {
        // So that the checks behind the image are reached as well.
        pairs.push(("image".into(), "tree".into()));
        Value::Map(pairs)
    })
}

fn is_named(error: &ConfigError) -> bool {
    ["config.", "plugin.", "task."]
        .iter()
        .any(|place| error.option.starts_with(place))
        && !error.to_string().contains('\n')
}

#[test]
fn no_bytes_panic() {
    let host = TestHost::new();
    proptest!(|(bytes: Vec<u8>)| {
        if let Err(error) = host.raw(&bytes) {
            prop_assert!(is_named(&error), "{error:?}");
        }
        if let Err(error) = PluginConfig::decode(&bytes) {
            prop_assert!(is_named(&error), "{error:?}");
        }
    });
}

#[test]
fn no_values_panic() {
    let host = with_ports();
    proptest!(|(value in prop_oneof![blocks(), anything()])| {
        let bytes = encode(&value);
        if let Err(error) = host.raw(&bytes) {
            prop_assert!(is_named(&error), "{error:?}");
        }
        if let Err(error) = PluginConfig::decode(&bytes) {
            prop_assert!(is_named(&error), "{error:?}");
        }
    });
}
