//! The block `credentials`.

use super::*;

fn named(name: &str) -> String {
    format!("credentials = {{ {name:?} = \"TOP/data\" }}")
}

#[test]
fn a_credential_is_a_name_and_a_file() {
    let host = TestHost::new();
    let secrets = format!("alloc/{ALLOC}/web/secrets");
    host.make(format!("{secrets}/password"));
    host.make("etc/x.key");
    let spec = plain(
        &host,
        r#"
        credentials {
            db-password = "secrets/password"
            tls = "TOP/etc/x.key"
        }
        "#,
    );
    let password = host.path(format!("{secrets}/password"));
    let found: Vec<_> = spec
        .payload
        .credentials
        .iter()
        .map(|one| (&*one.name, &one.source, &*one.option))
        .collect();
    assert_eq!(
        found,
        [
            (
                "db-password",
                &password,
                r#"config.credentials["db-password"]"#
            ),
            (
                "tls",
                &host.path("etc/x.key"),
                r#"config.credentials["tls"]"#
            ),
        ]
    );
    // As the task sees it.
    let spec = plain(&host, r#"credentials = { p = "/secrets/password" }"#);
    assert_eq!(spec.payload.credentials[0].source, password);
    assert_eq!(plain(&host, "").payload.credentials, []);
}

#[test]
fn every_name_of_systemd_is_accepted() {
    let host = TestHost::new();
    let printable: String = (' '..='~').filter(|c| !"/:\"\\".contains(*c)).collect();
    for name in ["a", "db.password", ".hidden", "a b", "...", &printable] {
        let name = name.replace("${", "$").replace("%{", "%");
        let spec = plain(&host, &named(&name));
        assert_eq!(spec.payload.credentials[0].name, name);
    }
    let longest = "x".repeat(255);
    assert_eq!(
        plain(&host, &named(&longest)).payload.credentials[0].name,
        longest
    );
}

#[rstest]
#[case("", r#"config.credentials[""]: the name "" is empty"#)]
#[case(
    ".",
    r#"config.credentials["."]: the name "." is not the name of a file"#
)]
#[case(
    "..",
    r#"config.credentials[".."]: the name ".." is not the name of a file"#
)]
#[case(
    "a/b",
    r#"config.credentials["a/b"]: the name "a/b" contains a character other than printable ASCII without / and :"#
)]
#[case(
    "a:b",
    r#"config.credentials["a:b"]: the name "a:b" contains a character other than printable ASCII without / and :"#
)]
#[case(
    "é",
    r#"config.credentials["é"]: the name "é" contains a character other than printable ASCII without / and :"#
)]
#[case(
    "a\nb",
    r#"config.credentials["a\nb"]: the name "a\nb" contains a character other than printable ASCII without / and :"#
)]
fn a_name_that_systemd_refuses_is_refused(#[case] name: &str, #[case] message: &str) {
    assert_eq!(refusal(&named(name)), message);
}

#[test]
fn a_name_that_is_too_long_is_refused() {
    let message = refusal(&named(&"x".repeat(256)));
    assert!(message.ends_with("is longer than 255 bytes"), "{message}");
}

#[test]
fn a_container_has_a_limited_number_of_credentials() {
    let host = TestHost::new();
    let block = |count: usize| {
        let lines = (0..count).map(|index| format!("c{index} = \"TOP/data\"\n"));
        format!("credentials {{\n{}}}", lines.collect::<String>())
    };
    assert_eq!(plain(&host, &block(256)).payload.credentials.len(), 256);
    assert_eq!(
        refusal(&block(257)),
        "config.credentials: has 257 entries; at most 256 are allowed"
    );
}

#[rstest]
#[case(
    "secrets/none",
    r#"config.credentials["c"]: "secrets/none" does not exist; looked at "TOP/alloc/ALLOC/web/secrets/none""#
)]
#[case(
    "../db/secrets/x",
    r#"config.credentials["c"]: "../db/secrets/x" leads outside "TOP/alloc/ALLOC/web""#
)]
#[case(
    "local/link",
    r#"config.credentials["c"]: "local/link" leads outside "TOP/alloc/ALLOC/web""#
)]
#[case(
    "TOP/alloc/ALLOC/db/secrets/x",
    r#"config.credentials["c"]: "TOP/alloc/ALLOC/db/secrets/x" is or contains a directory that Nomad hides from tasks"#
)]
#[case("", r#"config.credentials["c"]: "" is empty"#)]
fn a_file_that_no_task_may_have_is_refused(#[case] file: &str, #[case] message: &str) {
    let host = TestHost::new();
    host.make(format!("alloc/{ALLOC}/db/secrets/x"));
    host.link(&format!("alloc/{ALLOC}/web/local/link"), "/etc/passwd");
    let body = format!("image = \"tree\"\nboot = false\ncredentials = {{ c = {file:?} }}");
    let body = body.replace("ALLOC", ALLOC);
    assert_eq!(host.refusal(&body), message);
}

#[test]
fn files_of_the_host_need_the_operators_permission() {
    let mut host = TestHost::new();
    let secret = format!("alloc/{ALLOC}/web/secrets/x");
    host.make(secret);
    let body =
        |file: &str| format!("image = \"tree\"\nboot = false\ncredentials = {{ c = \"{file}\" }}");
    host.plugin_config.volumes = false;
    host.check(&body("secrets/x")).unwrap();
    assert_eq!(
        host.refusal(&body("TOP/data")),
        r#"config.credentials["c"]: "TOP/data" is outside the allocation, and volumes are disabled on this node (plugin.volumes = false)"#
    );
}

#[rstest]
#[case(
    r#"bind = { "local" = "/run/host" }"#,
    r#"config.bind["local"]: the target "/run/host" can't"#
)]
#[case(
    r#"bind = { "local" = "/run/host/credentials/x" }"#,
    r#"config.bind["local"]: the target "/run/host/credentials/x" can't"#
)]
#[case(
    r#"tmpfs = ["/run/host/credentials"]"#,
    r#"config.tmpfs[0]: the target "/run/host/credentials" can't"#
)]
#[case(
    r#"bind = { "local" = "/run" }"#,
    r#"config.bind["local"]: the target "/run" can't"#
)]
fn a_mount_in_the_way_is_refused(#[case] mount: &str, #[case] message: &str) {
    let host = TestHost::new();
    // Without credentials it is none.
    plain(&host, mount);
    assert_eq!(
        refusal(&format!("{mount}\n{}", named("c"))),
        format!(
            r#"{message} be combined with config.credentials, whose files are in "/run/host/credentials""#
        )
    );
}
