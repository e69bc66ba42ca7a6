//! Secrets, beyond `tests/suite/`: what of the environment is refused or left out, a state directory that others can reach, and the
//! fingerprint. Only the fake has every version, takes requests that no agent sends, and needs no root.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use dev_agent::Plugin;
use nomad_driver_nspawn::proto::driver::FingerprintRequest;
use nomad_driver_nspawn::proto::driver::fingerprint_response::HealthState;
use rstest::rstest;
use serde_json::json;
use support::not_applicable;
use support::secrecy::{Mode, open_to_others, shown};

use crate::harness::{Host, is_root, refusal, within};
use crate::lifecycle::nothing_left;

/// Names that come from Nomad and that no program can get.
#[tokio::test]
async fn invalid_names_are_left_out_and_long_names_arrive() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let mut events = plugin.events().await.unwrap();
    let long = "L".repeat(4096);
    let job = ["", "a=b", "a\0b"]
        .iter()
        .fold(host.shell("env | grep -c '^L*=arrived$'"), |job, name| {
            job.env(name, "s3cret-value")
        });
    let task = host.start(&plugin, job.env(&long, "arrived")).await;
    assert_eq!(task.stdout.all().await, "1\n");
    let event = within("an event", events.message()).await.unwrap().unwrap();
    for name in [r#""""#, r#""a=b""#, r#""a\0b""#] {
        assert!(event.message.contains(name), "{name}: {}", event.message);
    }
    assert!(!event.message.contains("s3cret"), "{}", event.message);
    task.destroy(&plugin).await;
}

/// A job's own option can contain what Nomad's messages can't: bytes that are not UTF-8.
#[rstest]
// environment = [{"A": <ff fe>}], as str and as bin.
#[case::text(&[0xa2, 0xff, 0xfe])]
#[case::binary(&[0xc4, 0x02, 0xff, 0xfe])]
#[tokio::test]
async fn a_value_that_is_not_utf8_is_refused_by_name(#[case] value: &[u8]) {
    let host = Host::new();
    let plugin = host.plugin().await;
    let mut config = vec![0x83];
    let text = |bytes: &mut Vec<u8>, text: &str| {
        bytes.extend([0xd9, u8::try_from(text.len()).unwrap()]);
        bytes.extend(text.as_bytes());
    };
    text(&mut config, "image");
    text(&mut config, host.root().to_str().unwrap());
    text(&mut config, "boot");
    config.push(0xc2);
    text(&mut config, "environment");
    config.extend([0x91, 0x81]);
    text(&mut config, "NOT_TEXT");
    config.extend(value);
    let job = host.shell("exit 0");
    let status = refusal(host.start_packed(&plugin, job, config).await);
    let message = status.message();
    assert!(
        message.contains("config.environment[\"NOT_TEXT\"]"),
        "{message}"
    );
    assert_eq!(host.starts().len(), 0);
}

/// The first fingerprint of a node.
async fn health(plugin: &Plugin) -> (HealthState, String) {
    let mut stream = plugin
        .driver()
        .fingerprint(FingerprintRequest {})
        .await
        .unwrap()
        .into_inner();
    let first = within("a fingerprint", stream.message())
        .await
        .unwrap()
        .unwrap();
    (first.health(), first.health_description)
}

#[rstest]
#[case::a_link("is a symbolic link")]
#[case::writable("is writable by other users (mode 0777)")]
#[case::in_a_writable_one("is writable by other users (mode 0777)")]
#[case::a_file("is not a directory")]
#[tokio::test]
async fn a_state_directory_open_to_others_is_refused_by_name(#[case] words: &str) {
    let host = Host::new();
    let real = host.join("real");
    let inner = real.join("inner");
    fs::create_dir_all(&inner).unwrap();
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    mode(&real, 0o700);
    mode(&inner, 0o700);
    let state = match words {
        "is a symbolic link" => {
            symlink(&real, host.join("link")).unwrap();
            host.join("link")
        }
        "is not a directory" => {
            fs::write(host.join("file"), "").unwrap();
            host.join("file")
        }
        _ => {
            mode(&real, 0o777);
            real.clone()
        }
    };
    let plugin = host.plugin_with(&json!({"state_dir": state})).await;
    let status = refusal(host.try_start(&plugin, host.shell("exit 0")).await);
    let text = status.message();
    assert!(text.contains(words), "{text}");
    assert!(text.contains("plugin.state_dir"), "{text}");
    assert!(text.contains(state.to_str().unwrap()), "{text}");
    assert!(status.details().is_empty(), "trying again changes nothing");
    if is_root() {
        let (state, description) = health(&plugin).await;
        assert_eq!(state, HealthState::Unhealthy);
        assert!(description.contains(words), "{description}");
    }
    assert_eq!(fs::read_dir(&inner).unwrap().count(), 0);
    assert_eq!(host.starts().len(), 0);
}

/// A state directory that an operator has created beforehand is used as it is; its contents are closed all the same.
#[tokio::test]
async fn a_readable_state_directory_contains_private_ones() {
    let host = Host::new();
    let plugin = host.plugin().await;
    let task = host
        .up(&plugin, host.shell("echo up; exec sleep 1000"))
        .await;
    let mode = fs::metadata(host.state()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o755);
    assert_eq!(fs::read_dir(host.state()).unwrap().count(), 1);
    assert_eq!(open_to_others(&host.state()), Vec::<String>::new());
    task.stop(&plugin, Duration::ZERO, "").await;
    assert_eq!(open_to_others(&host.state()), Vec::<String>::new());
    task.destroy(&plugin).await;
}

/// With a small stack limit in the agent's unit the kernel accepts little; the message names what to change. In `boot` mode, where
/// systemd-nspawn itself passes the environment.
#[tokio::test]
async fn more_than_the_kernel_accepts_is_an_error_that_names_the_limit() {
    let host = Host::new();
    let plugin = host.plugin_by("ulimit -S -s 2048; exec \"$0\"").await;
    let job = host.task(&[]).with("boot", json!(true));
    let job = (0..6).fold(job.with("command", json!([])), |job, number| {
        job.env(&format!("BIG{number}"), &"x".repeat(100_000))
    });
    let status = host.try_start(&plugin, job).await;
    let text = refusal(status).message().to_owned();
    for words in ["524288", "LimitSTACK=", "can't execute"] {
        assert!(text.contains(words), "{text}");
    }
    nothing_left(&host, &plugin).await;
}

#[rstest]
#[case(249, false)]
#[case(250, true)]
#[tokio::test]
async fn the_fingerprint_shows_whether_boot_exposes_values(
    #[case] version: u32,
    #[case] hidden: bool,
) {
    let host = Host::new();
    host.scenario(&json!({"version": version}));
    let plugin = host.plugin().await;
    let (state, description) = health(&plugin).await;
    if !is_root() {
        assert_eq!(state, HealthState::Undetected);
        return not_applicable("the fingerprint of systemd-nspawn needs root");
    }
    assert_eq!(state, HealthState::Healthy);
    assert_eq!(description == "Healthy", hidden, "{description}");
    assert_eq!(shown(Mode::Boot, version, false).is_none(), hidden);
}
