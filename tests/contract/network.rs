//! The network namespace of a group. Each scenario makes its own; nothing of the host's network changes.

use std::sync::mpsc;
use std::thread;

use nix::sched::{CloneFlags, unshare};
use nomad_driver_nspawn::container::{Dns, HostName, Mount};

use super::*;

const FIRST_PORT: &str = "/proc/sys/net/ipv4/ip_unprivileged_port_start";
const PING_GROUPS: &str = "/proc/sys/net/ipv4/ping_group_range";

/// A network namespace that exists as long as a thread of this process.
struct Namespace {
    path: PathBuf,
    questions: Option<mpsc::Sender<&'static str>>,
    answers: mpsc::Receiver<String>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Namespace {
    /// `None` without the privilege, which is reported.
    fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            not_applicable("making a network namespace needs root");
            return None;
        }
        let (questions, asked) = mpsc::channel::<&str>();
        let (answer, answers) = mpsc::channel();
        let thread = thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let id = nix::unistd::gettid();
            answer.send(id.to_string()).unwrap();
            for file in asked {
                let text = fs::read_to_string(file).unwrap();
                answer
                    .send(text.replace('\t', " ").trim().to_owned())
                    .unwrap();
            }
        });
        let id = answers.recv().unwrap();
        let path = format!("/proc/{}/task/{id}/ns/net", std::process::id());
        Some(Self {
            path: path.into(),
            questions: Some(questions),
            answers,
            thread: Some(thread),
        })
    }

    /// The content of a file as it is in the namespace.
    fn read(&self, file: &'static str) -> String {
        self.questions.as_ref().unwrap().send(file).unwrap();
        self.answers.recv().unwrap()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.questions = None;
        let _ = self.thread.take().unwrap().join();
    }
}

/// After a reboot Nomad's namespaces are gone, or the plain files are left over which they were mounted.
#[rstest]
#[case::gone("gone", "does not exist")]
#[case::plain_file("plain", "is not a network namespace")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_without_its_network_namespace_is_refused_and_may_be_tried_again(
    world: World,
    #[case] name: &str,
    #[case] reason: &str,
) {
    let path = world.scratch.path().join(name);
    fs::write(world.scratch.path().join("plain"), "").unwrap();
    let error = world
        .refused(
            world
                .spec("echo ran")
                .with(|spec| spec.network.namespace = NetworkNamespace::Join(path.clone())),
        )
        .await;
    assert!(error.is_transient(), "{error:?}");
    let text = error.to_string();
    assert!(text.contains(path.to_str().unwrap()), "{text}");
    assert!(text.contains(reason), "{text}");
    assert_eq!(world.said("stdout"), "");
    world.leave(&[]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_is_never_in_the_network_of_the_host(world: World) {
    let path = format!("/proc/{}/ns/net", std::process::id());
    let error = world
        .refused(
            world
                .spec("echo ran")
                .with(|spec| spec.network.namespace = NetworkNamespace::Join(path.into())),
        )
        .await
        .to_string();
    assert!(error.contains("network namespace of the host"), "{error}");
    assert_eq!(world.said("stdout"), "");
    world.leave(&[]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_groups_network_is_open_to_programs_without_privileges(world: World) {
    let Some(namespace) = Namespace::new() else {
        return world.leave(&[]).await;
    };
    let host = [FIRST_PORT, PING_GROUPS].map(|file| fs::read_to_string(file).unwrap());
    let group = NetworkNamespace::Join(namespace.path.clone());
    let started = world
        .start(
            world
                .spec("exit 21")
                .with(|spec| spec.network.namespace = group),
        )
        .await;
    assert_eq!(ended(&world.end(&started).await), (21, 0));
    assert_eq!(namespace.read(FIRST_PORT), "0");
    assert_eq!(namespace.read(PING_GROUPS), "0 2147483647");
    let after = [FIRST_PORT, PING_GROUPS].map(|file| fs::read_to_string(file).unwrap());
    assert_eq!(after, host, "a setting of the host has changed");
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sysctl_of_the_job_is_kept_in_the_groups_network(world: World) {
    let Some(namespace) = Namespace::new() else {
        return world.leave(&[]).await;
    };
    let group = NetworkNamespace::Join(namespace.path.clone());
    let own = world.named("own", "exit 22").with(|spec| {
        spec.network.namespace = group.clone();
        let sysctl = ("net.ipv4.ip_unprivileged_port_start", "80");
        spec.resources.sysctls = [sysctl]
            .map(|(name, value)| (name.into(), value.into()))
            .into();
    });
    let own = world.start(own).await;
    assert_eq!(ended(&world.end(&own).await), (22, 0));
    assert_eq!(namespace.read(FIRST_PORT), "80");
    // Another task of the group keeps it too.
    let other = world
        .named("other", "exit 23")
        .with(|spec| spec.network.namespace = group);
    let other = world.start(other).await;
    assert_eq!(ended(&world.end(&other).await), (23, 0));
    assert_eq!(namespace.read(FIRST_PORT), "80");
    world.leave(&[&own, &other]).await;
}

fn dns() -> Dns {
    Dns {
        servers: vec!["192.0.2.53".parse().unwrap()],
        searches: vec!["trial.example".to_owned()],
        options: vec!["ndots:3".to_owned()],
    }
}

/// The fake shows the files of the host to its payload.
#[rstest]
#[case::writable(false)]
#[case::read_only(true)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dns_block_is_in_the_resolv_conf(world: World, #[case] read_only: bool) {
    const TEXT: &str = "nameserver 192.0.2.53\nsearch trial.example\noptions ndots:3\n";
    let _ = fs::remove_file(world.tree.join("etc/resolv.conf"));
    let spec = world.spec("cat /etc/resolv.conf; exit 24").with(|spec| {
        spec.rootfs.read_only = read_only;
        spec.network.resolv_conf = None;
        spec.network.dns = dns();
    });
    let started = world.start(spec).await;
    let file = fs::read_to_string(started.state.join("resolver"));
    assert_eq!(ended(&world.end(&started).await), (24, 0));
    assert_eq!(file.unwrap(), TEXT);
    if !world.is_fake() {
        assert_eq!(world.said("stdout"), TEXT);
    }
    assert_eq!(notes_about_dns(&started), Vec::<&String>::new());
    world.leave(&[&started]).await;
}

/// There are others on hosts without cgroups.
fn notes_about_dns(started: &Started) -> Vec<&String> {
    let notes = started.notes.iter();
    notes
        .filter(|note| note.contains("resolv.conf") || note.contains("dns"))
        .collect()
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resolv_conf_of_the_job_is_kept(world: World) {
    let own = world.file("own");
    fs::write(&own, "nameserver 192.0.2.1\n").unwrap();
    let spec = world.spec("cat /etc/resolv.conf; exit 25").with(|spec| {
        spec.network.resolv_conf = None;
        spec.network.dns = dns();
        spec.mounts = vec![Mount::new(own.clone(), "/etc/resolv.conf")];
    });
    let started = world.start(spec).await;
    assert_eq!(ended(&world.end(&started).await), (25, 0));
    if !world.is_fake() {
        assert_eq!(world.said("stdout"), "nameserver 192.0.2.1\n");
    }
    assert_eq!(fs::read_to_string(own).unwrap(), "nameserver 192.0.2.1\n");
    let [note] = *notes_about_dns(&started) else {
        panic!("{:?}", started.notes)
    };
    assert!(note.contains("mounts its own /etc/resolv.conf"), "{note}");
    world.leave(&[&started]).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_has_the_host_name_of_its_group(world: World) {
    let Some(namespace) = Namespace::new() else {
        return world.leave(&[]).await;
    };
    let spec = world.spec("hostname; exit 26").with(|spec| {
        spec.network.namespace = NetworkNamespace::Join(namespace.path.clone());
        spec.network.host_name = Some(HostName {
            name: "shop".to_owned(),
            address: Some("172.26.64.7".parse().unwrap()),
        });
    });
    let started = world.start(spec).await;
    let file = fs::read_to_string(started.state.join("hosts")).unwrap();
    assert_eq!(ended(&world.end(&started).await), (26, 0));
    assert!(file.ends_with("\n172.26.64.7 shop\n"), "{file}");
    if !world.is_fake() {
        assert_eq!(world.said("stdout"), "shop\n");
    }
    world.leave(&[&started]).await;
}
