use super::*;
use crate::container::{HostInterface, Link};
use rstest::rstest;

const HOST: Target = Target {
    version: 252,
    cgroup: CgroupLayout::Hybrid,
};

fn spec() -> ContainerSpec {
    ContainerSpec::for_test("web", "/srv/root")
}

fn line(spec: &ContainerSpec, host: Target) -> CommandLine {
    command_line(spec, &spec.rootfs.source, &[], host).unwrap()
}

#[test]
fn a_minimal_container_has_the_basic_arguments() {
    insta::assert_snapshot!(line(&spec(), HOST).arguments.join("\n"), @r"
    --settings=no
    --keep-unit
    --register=no
    --link-journal=no
    --oom-score-adjust=0
    --machine=web-0f1e
    --uuid=9835216411ef49a99b8acf8017c672f5
    --directory=/srv/root
    --private-users=no
    --console=pipe
    --quiet
    --
    /proc/self/fd/6
    ");
}

/// The descriptors are those behind the container init's, also where there is none.
#[rstest]
#[case(Mode::Boot)]
#[case(Mode::ProcessTwo)]
#[case(Mode::Plain)]
fn credentials_are_named_and_read_from_descriptors(#[case] mode: Mode) {
    let credential = |name: &str| Credential {
        name: name.to_owned(),
        source: "/srv/s3cret-path".into(),
        option: String::new(),
    };
    let spec = spec().with(|spec| {
        spec.payload.mode = mode;
        spec.payload.credentials = ["db.password", "a b\\n"].map(credential).into();
    });
    for version in [247, 262] {
        let host = Target {
            version,
            cgroup: CgroupLayout::V2,
        };
        let all = line(&spec, host).arguments;
        let ours: Vec<_> = all.iter().filter(|word| word.contains("cred")).collect();
        assert_eq!(
            ours,
            [
                "--load-credential=db.password:/proc/self/fd/8",
                r"--load-credential=a b\\n:/proc/self/fd/9"
            ]
        );
        assert!(!all.iter().any(|word| word.contains("s3cret")), "{all:?}");
    }
}

#[test]
fn every_option_has_its_argument() {
    let full = spec().with(|spec| {
        spec.rootfs.source = Root::Image("/srv/disk.raw".into());
        spec.payload.mode = Mode::ProcessTwo;
        spec.resources.oom_score_adj = 300;
        spec.payload.working_directory = Some("/srv".into());
        spec.payload.user = Some("bob".into());
        spec.rootfs.ephemeral = true;
        spec.rootfs.read_only = true;
        spec.rootfs.volatile = Volatile::Overlay;
        spec.rootfs.pivot_root = Some("/a:/b".into());
        spec.network.resolv_conf = Some("copy-host".into());
        spec.users = Users::Private {
            range: "pick".into(),
            ownership: Some("auto".into()),
        };
        spec.payload.capabilities = vec!["CAP_SYS_TIME".into(), "CAP_NET_ADMIN".into()];
        let limit = |name, soft, hard| Rlimit { name, soft, hard };
        spec.resources.rlimits = vec![
            limit("NOFILE", Some(2048), Some(4096)),
            limit("MEMLOCK", Some(0), None),
        ];
        spec.network.namespace = NetworkNamespace::Private {
            link: Link::Zone("web".into()),
            ports: vec![crate::container::PortForward {
                label: "http".into(),
                address: None,
                host: 25000,
                container: 80,
            }],
            interfaces: [
                (InterfaceMode::Macvlan, "eth1"),
                (InterfaceMode::Ipvlan, "eth2"),
                (InterfaceMode::Moved, "eth3"),
            ]
            .map(|(mode, name)| HostInterface {
                mode,
                name: name.into(),
            })
            .into(),
        };
    });
    insta::assert_snapshot!(line(&full, HOST).arguments.join("\n"), @r"
    --settings=no
    --keep-unit
    --register=no
    --link-journal=no
    --oom-score-adjust=300
    --machine=web-0f1e
    --uuid=9835216411ef49a99b8acf8017c672f5
    --image=/srv/disk.raw
    --ephemeral
    --read-only
    --volatile=overlay
    --pivot-root=/a:/b
    --private-users=pick
    --private-users-ownership=auto
    --resolv-conf=copy-host
    --private-network
    --network-macvlan=eth1
    --network-ipvlan=eth2
    --network-interface=eth3
    --rlimit=RLIMIT_NOFILE=2048:4096
    --rlimit=RLIMIT_MEMLOCK=0:infinity
    --capability=CAP_SYS_TIME,CAP_NET_ADMIN
    --console=pipe
    --quiet
    -u
    bob
    --
    /proc/self/fd/6
    ");
    let init = line(&full, HOST).init.unwrap();
    assert_eq!(init.mode, nspawn_init::InitMode::Init);
    assert_eq!(init.command, full.payload.command);
    assert_eq!(init.directory.as_deref(), Some("/srv"));
    assert!(init.streams);
}

#[test]
fn a_temporary_file_system_has_its_options_and_an_escaped_path() {
    let spec = spec().with(|spec| {
        let plain = Tmpfs {
            target: "/da:ta".into(),
            size: None,
            mode: 0o1777,
            read_only: false,
            restrictions: Restrictions::default(),
            option: "config.tmpfs[0]".into(),
        };
        let strict = Tmpfs {
            target: "/b".into(),
            size: Some(65536),
            mode: 0o50,
            read_only: true,
            restrictions: Restrictions {
                nosuid: true,
                nodev: true,
                noexec: true,
            },
            ..plain.clone()
        };
        spec.tmpfs = vec![plain, strict];
    });
    let words = line(&spec, HOST).arguments;
    let found: Vec<_> = words
        .iter()
        .filter(|word| word.starts_with("--tmpfs"))
        .collect();
    assert_eq!(
        found,
        [
            r"--tmpfs=/da\:ta:mode=1777",
            "--tmpfs=/b:mode=0050,size=65536,ro,nosuid,nodev,noexec"
        ]
    );
}

#[test]
fn a_booted_container_gets_everything_from_systemd_nspawn() {
    let spec = spec().with(|spec| {
        spec.payload.mode = Mode::Boot;
        spec.payload.working_directory = Some("/srv".into());
        spec.payload.command = vec!["systemd.unit=rescue.target".into()];
    });
    let line = line(&spec, HOST);
    assert_eq!(line.init, None);
    insta::assert_snapshot!(line.arguments[8..].join("\n"), @r"
    --private-users=no
    --boot
    --console=pipe
    --quiet
    --chdir=/srv
    --
    systemd.unit=rescue.target
    ");
}

#[rstest]
#[case(Console::Pipe, true)]
#[case(Console::Autopipe, true)]
#[case(Console::ReadOnly, false)]
#[case(Console::Interactive, false)]
fn on_a_terminal_systemd_nspawn_copies_the_output(#[case] console: Console, #[case] streams: bool) {
    let init = line(&spec().with(|spec| spec.payload.console = console), HOST).init;
    assert_eq!(init.unwrap().streams, streams);
}

#[rstest]
#[case(Mode::Boot, Some("--boot"))]
#[case(Mode::ProcessTwo, None)]
#[case(Mode::Plain, None)]
fn a_mode_has_its_arguments(#[case] mode: Mode, #[case] word: Option<&str>) {
    let arguments = line(&spec().with(|spec| spec.payload.mode = mode), HOST).arguments;
    let found: Vec<_> = arguments
        .iter()
        .filter(|word| ["--boot", "--as-pid2"].contains(&word.as_str()))
        .collect();
    assert_eq!(found, Vec::from_iter(word));
}

#[rstest]
#[case(NetworkNamespace::Private { link: Link::None, ports: vec![], interfaces: Vec::new() }, &["--private-network"])]
#[case(NetworkNamespace::Private { link: Link::Routed, ports: vec![], interfaces: Vec::new() }, &["--private-network"])]
#[case(NetworkNamespace::Private { link: Link::Zone("z".into()), ports: vec![], interfaces: Vec::new() }, &["--private-network"])]
#[case(NetworkNamespace::Private { link: Link::Bridge("br0".into()), ports: vec![], interfaces: Vec::new() }, &["--private-network"])]
#[case(NetworkNamespace::Join("/run/netns/a".into()), &[])]
#[case(NetworkNamespace::Host, &[])]
fn a_network_has_its_arguments(#[case] network: NetworkNamespace, #[case] words: &[&str]) {
    let arguments = line(&spec().with(|spec| spec.network.namespace = network), HOST).arguments;
    let found: Vec<_> = arguments
        .iter()
        .filter(|word| word.contains("network") || word.contains("--port"))
        .collect();
    assert_eq!(found, words);
}

#[test]
fn colons_and_backslashes_in_paths_are_escaped() {
    let bind = |source: &str, read_only, idmap| Bind {
        mount: Mount::new(source, "/in side").with_read_only(read_only),
        idmap,
    };
    let binds = [bind("/a:b\\c", false, false), bind("/plain", true, true)];
    let arguments = command_line(&spec(), &spec().rootfs.source, &binds, HOST)
        .unwrap()
        .arguments;
    assert!(
        arguments.contains(&r"--bind=/a\:b\\c:/in side".to_owned()),
        "{arguments:?}"
    );
    assert!(
        arguments.contains(&"--bind-ro=/plain:/in side:rbind,idmap".to_owned()),
        "{arguments:?}"
    );
}

fn secretive(mode: Mode) -> ContainerSpec {
    let environment = BTreeMap::from([
        ("TOKEN".to_owned(), "s3cret\nline".to_owned()),
        ("LD_PRELOAD".to_owned(), "/evil.so".to_owned()),
    ]);
    spec().with(|spec| {
        spec.payload.mode = mode;
        spec.payload.environment = environment;
    })
}

#[rstest]
#[case(247, Mode::Plain)]
#[case(247, Mode::ProcessTwo)]
#[case(252, Mode::Plain)]
#[case(262, Mode::ProcessTwo)]
fn values_are_not_passed_to_systemd_nspawn(#[case] version: u32, #[case] mode: Mode) {
    let spec = secretive(mode);
    let line = line(&spec, Target { version, ..HOST });
    let seen = format!("{:?} {:?}", line.arguments, line.environment);
    for word in ["s3cret", "TOKEN", "evil", "LD_PRELOAD"] {
        assert!(!seen.contains(word), "{seen}");
    }
    let result = line.init.unwrap().environment;
    assert_eq!(result, Vec::from_iter(spec.payload.environment));
}

#[test]
fn booted_values_are_not_arguments_if_the_version_supports_it() {
    let spec = secretive(Mode::Boot);
    let new = line(&spec, HOST);
    assert!(new.arguments.contains(&"--setenv=TOKEN".to_owned()));
    assert_eq!(
        new.environment.get("TOKEN").map(String::as_str),
        Some("s3cret\nline")
    );
    assert!(
        !new.environment.contains_key("LD_PRELOAD"),
        "a job must not steer systemd-nspawn itself"
    );
    assert!(
        new.arguments
            .contains(&"--setenv=LD_PRELOAD=/evil.so".to_owned())
    );
    let version = 249;
    let old = line(&spec, Target { version, ..HOST });
    assert!(
        old.arguments
            .contains(&"--setenv=TOKEN=s3cret\nline".to_owned()),
        "249 knows no other way"
    );
}

/// systemd-nspawn prints the whole assignment that it rejects to the task's log.
#[rstest]
#[case::noncharacter(252, "LANG", "s3cret\u{fffe}", Some("U+FFFE"))]
#[case::another(252, "LANG", "s3cret\u{1ffff}", Some("U+FFFE"))]
#[case::in_the_block(252, "LANG", "s3cret\u{fdd0}", Some("U+FFFE"))]
#[case::no_argument(250, "TOKEN", "s3cret\u{fffe}", None)]
#[case::old_and_any_name(249, "TOKEN", "s3cret\u{fffe}", Some("U+FFFE"))]
#[case::control(247, "TOKEN", "s3cret\u{1b}", Some("a control character"))]
#[case::delete(247, "TOKEN", "s3cret\u{7f}", Some("a control character"))]
#[case::tab_and_newline(247, "TOKEN", "s3cret\t\n", None)]
#[case::control_later(248, "TOKEN", "s3cret\u{1b}\u{7f}", None)]
#[case::other_planes(249, "TOKEN", "s3cret\u{10fffd}\u{fdcf}\u{fdf0}", None)]
fn a_value_that_cannot_be_an_argument_is_refused_by_name(
    #[case] version: u32,
    #[case] name: &str,
    #[case] value: &str,
    #[case] why: Option<&str>,
) {
    let spec = spec().with(|spec| {
        spec.payload.mode = Mode::Boot;
        spec.payload.environment = BTreeMap::from([(name.to_owned(), value.to_owned())]);
    });
    let result = command_line(&spec, &spec.rootfs.source, &[], Target { version, ..HOST });
    let Some(why) = why else {
        result.unwrap();
        return;
    };
    let error = result.unwrap_err().to_string();
    for word in [name, why, &version.to_string(), "allowed"] {
        assert!(error.contains(word), "{word}: {error}");
    }
    assert!(!error.contains("s3cret"), "{error}");
}

#[rstest]
#[case::argument(249, 9)]
#[case::reserved(252, 9)]
#[case::hidden(252, 0)]
fn the_length_limit_of_a_variable_depends_on_its_transport(
    #[case] version: u32,
    #[case] less: usize,
) {
    let name = if less == 0 || version < 250 {
        "BIG"
    } else {
        "LANG"
    };
    let most = 128 * 1024 - 1 - less;
    for (length, fits) in [(most, true), (most + 1, less == 0)] {
        let spec = spec().with(|spec| {
            spec.payload.mode = Mode::Boot;
            spec.payload.environment =
                BTreeMap::from([(name.to_owned(), "x".repeat(length - name.len() - 1))]);
        });
        let result = command_line(&spec, &spec.rootfs.source, &[], Target { version, ..HOST });
        match fits {
            true => assert!(result.is_ok(), "{:?}", result.map(drop)),
            false => {
                let error = result.unwrap_err().to_string();
                let words = [name, &length.to_string(), &most.to_string()];
                assert!(words.iter().all(|word| error.contains(word)), "{error}");
            }
        }
    }
}

#[rstest]
#[case(
    "identity",
    None,
    248,
    "private_users = \"identity\" needs systemd-nspawn 249 or later, and this host has 248"
)]
#[case(
    "managed",
    None,
    257,
    "private_users = \"managed\" needs systemd-nspawn 258 or later, and this host has 257"
)]
#[case(
    "pick",
    Some("map"),
    247,
    "private_users_ownership = \"map\" needs systemd-nspawn 249 or later, and this host has 247"
)]
fn an_option_that_the_version_lacks_is_refused(
    #[case] range: &str,
    #[case] ownership: Option<&str>,
    #[case] version: u32,
    #[case] text: &str,
) {
    let users = Users::Private {
        range: range.into(),
        ownership: ownership.map(Into::into),
    };
    let spec = spec().with(|spec| spec.users = users);
    let error =
        command_line(&spec, &spec.rootfs.source, &[], Target { version, ..HOST }).unwrap_err();
    assert_eq!(error.to_string(), text);
}

#[test]
fn before_249_a_picked_range_implies_chown() {
    let users = Users::Private {
        range: "pick".into(),
        ownership: Some("auto".into()),
    };
    let arguments = line(
        &spec().with(|spec| spec.users = users),
        Target {
            version: 247,
            ..HOST
        },
    )
    .arguments;
    assert!(arguments.contains(&"--private-users=pick".to_owned()));
    assert!(
        !arguments
            .iter()
            .any(|word| word.contains("ownership") || word.contains("chown"))
    );
}
