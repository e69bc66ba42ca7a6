//! The environment.

use super::*;

#[test]
fn the_jobs_environment_wins_and_invalid_names_are_reported() {
    let mut host = TestHost::new();
    host.context.environment = [
        ("A", "nomad"),
        ("B", "nomad"),
        ("my-key", "x"),
        ("a.b", "y"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    host.make("plugins/tree/etc/os-release");
    host.make("plugins/tree/usr/bin/init");
    host.make("plugins/tree/sbin/.");
    host.link("plugins/tree/sbin/init", "/usr/bin/init");
    let own = (
        "boot = false",
        vec![
            ("A", "nomad"),
            ("B", "job\nline"),
            ("a.b", "y"),
            ("my-key", "x"),
        ],
        vec![],
    );
    let booted = ("boot = true", vec![("A", "nomad"), ("B", "job\nline")], vec![
            "environment variables left out, because systemd-nspawn does not accept their names: \"a.b\", \"my-key\". Rename them in the env block".to_owned()
    ]);
    for (mode, expected, notes) in [own, booted] {
        let body = format!("image = \"tree\"\n{mode}\nenvironment = {{ B = \"job\\nline\" }}");
        let validated = host.check(&body).unwrap();
        let expected = expected
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(validated.spec.payload.environment, expected.collect());
        assert_eq!(validated.notes, notes);
    }
    assert_eq!(
        host.refusal("image = \"tree\"\nenvironment = { \"a-b\" = \"1\" }"),
        "config.environment[\"a-b\"]: is not a valid variable name in a booted container: use letters, digits and _, and no digit first"
    );
}

#[test]
fn oversized_commands_and_variables_are_refused_by_name() {
    let long = "x".repeat(128 * 1024);
    assert_eq!(
        refusal(&format!("command = [\"a\", \"{long}\"]")),
        "config.command[1]: has 131072 bytes; at most 131071 are allowed"
    );
    assert_eq!(
        refusal(&format!("environment = {{ A = \"{long}\" }}")),
        r#"config.environment["A"]: has 131074 bytes including its name; at most 131071 are allowed"#
    );
    let many = format!("\"{}\",", &long[1..]).repeat(16);
    let message = refusal(&format!("command = [{many}]"));
    assert!(
        message.starts_with("config.command: command and environment have "),
        "{message}"
    );
    let mut host = TestHost::new();
    host.context.environment = [("A".to_owned(), long)].into();
    let message = host.refusal("image = \"tree\"\nboot = false");
    assert!(
        message.starts_with(r#"task.env["A"]: has 131074 bytes"#),
        "{message}"
    );
}
