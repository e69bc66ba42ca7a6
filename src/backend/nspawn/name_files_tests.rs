use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};

use rstest::rstest;

use super::*;
use crate::container::{Dns, HostName, Link};
use crate::network::pool::Reserved;

/// A tree with `/etc`, and a task directory.
struct Ground {
    temp: tempfile::TempDir,
}

impl Ground {
    fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        fs::create_dir_all(temp.path().join("tree/etc")).unwrap();
        Self { temp }
    }

    fn tree(&self) -> PathBuf {
        self.temp.path().join("tree")
    }

    fn files(&self, change: impl FnOnce(&mut ContainerSpec)) -> NameFiles {
        self.files_in(None, change)
    }

    /// The files in a network that the driver makes.
    fn files_in(
        &self,
        network: Option<&NetworkPlan>,
        change: impl FnOnce(&mut ContainerSpec),
    ) -> NameFiles {
        let task_dir = TaskDir::new(self.temp.path().join("task"));
        let _ = task_dir.create();
        let spec = ContainerSpec::for_test("web", self.tree()).with(change);
        write(&spec, network, &task_dir).unwrap()
    }

    /// Enables systemd-resolved, to which `/etc/resolv.conf` is a link.
    fn enable_resolved(&self) {
        let link = "../run/systemd/resolve/stub-resolv.conf";
        symlink(link, self.tree().join("etc/resolv.conf")).unwrap();
        let wants = self.tree().join("etc/systemd/system/sysinit.target.wants");
        fs::create_dir_all(&wants).unwrap();
        symlink(
            "/lib/systemd/system/x",
            wants.join("systemd-resolved.service"),
        )
        .unwrap();
    }
}

/// The content of the file that is mounted here.
fn mounted(files: &NameFiles, target: &str) -> Option<String> {
    let mut mounts = files.mounts.iter();
    let mount = mounts.find(|mount| mount.target == Path::new(target))?;
    let mode = fs::metadata(&mount.source).unwrap().permissions().mode();
    assert_eq!((mode & 0o777, mount.read_only), (0o644, true));
    Some(fs::read_to_string(&mount.source).unwrap())
}

fn dns() -> Dns {
    Dns {
        servers: vec!["192.0.2.53".parse().unwrap()],
        searches: vec!["trial.example".to_owned()],
        options: vec!["ndots:3".to_owned()],
    }
}

fn private() -> NetworkNamespace {
    NetworkNamespace::Private {
        link: Link::Routed,
        ports: Vec::new(),
        interfaces: Vec::new(),
    }
}

const WANTED: &str = "nameserver 192.0.2.53\nsearch trial.example\noptions ndots:3\n";

#[rstest]
#[case::of_the_host(NetworkNamespace::Host)]
#[case::of_its_own(private())]
fn a_dns_block_is_in_the_resolv_conf_of_any_network(#[case] namespace: NetworkNamespace) {
    let ground = Ground::new();
    let files = ground.files(|spec| {
        spec.network.namespace = namespace;
        spec.network.dns = dns();
    });
    assert_eq!(mounted(&files, RESOLV_CONF).as_deref(), Some(WANTED));
    assert_eq!(files.resolv_conf.as_deref(), Some("off"));
    assert_eq!(files.notes, Vec::<String>::new());
}

#[test]
fn in_the_hosts_network_the_resolv_conf_is_the_hosts() {
    let host = fs::read_to_string(RESOLV_CONF).ok();
    let ground = Ground::new();
    symlink(
        "../run/none/resolv.conf",
        ground.tree().join("etc/resolv.conf"),
    )
    .unwrap();
    let files = ground.files(|_| {});
    assert_eq!(mounted(&files, RESOLV_CONF), host);
}

#[test]
fn what_the_job_says_is_left_alone() {
    let ground = Ground::new();
    let own = |target: &str| Mount::new("/srv/x", target);
    let files = ground.files(|spec| {
        spec.network.dns = dns();
        spec.network.resolv_conf = Some("copy-host".to_owned());
        spec.mounts = vec![own(HOSTS)];
    });
    assert_eq!(files.mounts, []);
    assert_eq!(files.resolv_conf.as_deref(), Some("copy-host"));
    for target in [RESOLV_CONF, "/etc"] {
        let files = ground.files(|spec| {
            spec.network.dns = dns();
            spec.mounts = vec![own(target)];
        });
        assert_eq!(mounted(&files, RESOLV_CONF), None);
        assert_eq!(files.resolv_conf.as_deref(), Some("off"));
        assert!(files.notes[0].contains("mounts its own /etc/resolv.conf"));
    }
    symlink("/alloc/resolv.conf", ground.tree().join("etc/resolv.conf")).unwrap();
    let files = ground.files(|spec| spec.mounts = vec![own("/alloc")]);
    assert_eq!(mounted(&files, RESOLV_CONF), None);
}

#[test]
fn a_network_of_its_own_and_a_disk_image_are_left_to_systemd_nspawn() {
    let ground = Ground::new();
    let files = ground.files(|spec| spec.network.namespace = private());
    assert_eq!((files.mounts, files.resolv_conf), (vec![], None));
    let files = ground.files(|spec| spec.rootfs.source = Root::Image("/srv/disk.raw".into()));
    assert_eq!((files.mounts, files.resolv_conf), (vec![], None));
}

#[test]
fn links_without_an_end_are_left_alone() {
    let ground = Ground::new();
    for name in ["hosts", "resolv.conf"] {
        symlink(name, ground.tree().join("etc").join(name)).unwrap();
    }
    let files = ground.files(|spec| spec.network.dns = dns());
    assert_eq!((files.mounts, files.resolv_conf), (vec![], None));
    assert!(
        files.notes[0].contains("is not applied"),
        "{:?}",
        files.notes
    );
}

#[test]
fn a_resolved_of_the_image_is_configured_and_not_disturbed() {
    let ground = Ground::new();
    ground.enable_resolved();
    let files = ground.files(|spec| {
        spec.payload.mode = Mode::Boot;
        spec.network.dns = dns();
    });
    assert_eq!(mounted(&files, RESOLV_CONF), None);
    let text = mounted(&files, RESOLVED_CONF).unwrap();
    assert!(
        text.contains("DNS=192.0.2.53\nDomains=trial.example "),
        "{text}"
    );
    assert_eq!(files.resolv_conf.as_deref(), Some("off"));
    assert!(
        files.notes[0].contains("systemd-resolved"),
        "{:?}",
        files.notes
    );
    // A command does not start it.
    let files = ground.files(|spec| spec.network.dns = dns());
    assert_eq!(mounted(&files, RESOLV_CONF).as_deref(), Some(WANTED));
}

#[test]
fn only_a_missing_hosts_file_is_added_in_the_hosts_network() {
    let ground = Ground::new();
    let added = mounted(&ground.files(|_| {}), HOSTS).unwrap();
    assert!(added.ends_with("\n127.0.1.1 web-0f1e\n"), "{added}");
    let named = HostName {
        name: "shop".to_owned(),
        address: None,
    };
    let named = ground.files(|spec| spec.network.host_name = Some(named));
    assert!(mounted(&named, HOSTS).unwrap().ends_with(" shop\n"));
    // Left as a mount point.
    fs::write(ground.tree().join("etc/hosts"), "").unwrap();
    assert!(mounted(&ground.files(|_| {}), HOSTS).is_some());
    fs::write(ground.tree().join("etc/hosts"), "10.0.0.1 db\n").unwrap();
    assert_eq!(mounted(&ground.files(|_| {}), HOSTS), None);
    // The image's is not visible.
    let volatile = ground.files(|spec| spec.rootfs.volatile = Volatile::Yes);
    assert!(mounted(&volatile, HOSTS).is_some());
}

#[test]
fn names_of_the_job_are_added_in_every_network() {
    let ground = Ground::new();
    fs::write(ground.tree().join("etc/hosts"), "10.0.0.1 db\n").unwrap();
    let names = vec![("db.example".to_owned(), "192.0.2.10".parse().unwrap())];
    for namespace in [NetworkNamespace::Host, private()] {
        let files = ground.files(|spec| {
            spec.network.namespace = namespace;
            spec.network.extra_hosts = names.clone();
        });
        let text = mounted(&files, HOSTS).unwrap();
        assert!(text.contains(" web-0f1e\n"), "{text}");
        assert!(text.ends_with("\n192.0.2.10 db.example\n"), "{text}");
        assert!(files.notes.is_empty(), "{:?}", files.notes);
    }
    let files = ground.files(|spec| {
        spec.network.extra_hosts = names;
        spec.mounts
            .push(Mount::new("/srv/hosts", HOSTS).with_read_only(true));
    });
    assert_eq!(mounted(&files, HOSTS), None);
    let [note] = files.notes.as_slice() else {
        panic!("{:?}", files.notes)
    };
    assert!(note.contains("config.extra_hosts"), "{note}");
}

fn plan() -> NetworkPlan {
    let reserved = Reserved {
        address: "198.51.100.7".parse().unwrap(),
        address6: "fd00::7".parse().unwrap(),
    };
    NetworkPlan::new(
        "a/t".to_owned(),
        "t.0123",
        Attachment::Host,
        reserved,
        Vec::new(),
    )
}

#[test]
fn a_network_of_the_driver_has_names_and_is_kept_by_networkd() {
    let ground = Ground::new();
    let files = |mode| {
        ground.files_in(Some(&plan()), |spec| {
            spec.network.namespace = private();
            spec.payload.mode = mode;
        })
    };
    let booted = files(Mode::Boot);
    let text = mounted(&booted, HOSTS).unwrap();
    assert!(
        text.contains("\n198.51.100.7 web-0f1e\nfd00::7 web-0f1e\n"),
        "{text}"
    );
    let networkd = mounted(&booted, NETWORKD).unwrap();
    assert!(networkd.contains("KeepConfiguration=yes"), "{networkd}");
    assert_eq!(mounted(&files(Mode::Plain), NETWORKD), None);
}

/// The files that give an image a machine id are replaced where tasks share the image.
#[rstest]
#[case::an_id(Some("11112222333344445555666677778888\n"), true)]
#[case::empty(Some(""), true)]
#[case::first_boot(Some("uninitialized\n"), false)]
#[case::none(None, false)]
fn a_machine_id_of_a_shared_image_is_replaced(#[case] text: Option<&str>, #[case] replaced: bool) {
    let ground = Ground::new();
    let dbus = ground.tree().join("var/lib/dbus");
    fs::create_dir_all(&dbus).unwrap();
    if let Some(text) = text {
        fs::write(ground.tree().join("etc/machine-id"), text).unwrap();
    }
    fs::write(dbus.join("machine-id"), "1111\n").unwrap();
    let files = |ephemeral, mode| {
        ground.files(|spec| {
            spec.rootfs.ephemeral = ephemeral;
            spec.payload.mode = mode;
        })
    };
    let id = machine_id::of("0f1e/web") + "\n";
    let booted = files(true, Mode::Boot);
    let etc = mounted(&booted, own_id::MACHINE_ID);
    assert_eq!(etc.as_ref(), replaced.then_some(&id));
    assert_eq!(mounted(&booted, own_id::COMMIT).is_some(), replaced);
    assert_eq!(mounted(&booted, "/var/lib/dbus/machine-id"), Some(id));
    let command = files(true, Mode::Plain);
    assert_eq!(mounted(&command, own_id::MACHINE_ID).is_some(), replaced);
    assert_eq!(mounted(&command, own_id::COMMIT), None);
    let kept = files(false, Mode::Boot);
    assert!(
        !kept
            .mounts
            .iter()
            .any(|mount| mount.target.ends_with("machine-id"))
    );
    fs::remove_file(dbus.join("machine-id")).unwrap();
    symlink("/etc/machine-id", dbus.join("machine-id")).unwrap();
    let linked = files(true, Mode::Boot);
    assert_eq!(mounted(&linked, "/var/lib/dbus/machine-id"), None);
}

/// systemd can't make an id itself where it can't store one.
#[rstest]
#[case::read_only(true, Volatile::No, true)]
#[case::only_var_is_writable(false, Volatile::State, true)]
#[case::changes_in_memory(false, Volatile::Overlay, false)]
#[case::only_usr_is_there(false, Volatile::Yes, false)]
#[case::writable(false, Volatile::No, false)]
fn a_system_that_cannot_store_a_machine_id_has_one(
    #[case] read_only: bool,
    #[case] volatile: Volatile,
    #[case] added: bool,
) {
    let ground = Ground::new();
    let files = |mode| {
        ground.files(|spec| {
            spec.rootfs.read_only = read_only;
            spec.rootfs.volatile = volatile;
            spec.payload.mode = mode;
        })
    };
    let id = machine_id::of("0f1e/web") + "\n";
    let booted = files(Mode::Boot);
    let text = mounted(&booted, own_id::MACHINE_ID);
    assert_eq!(text, added.then_some(id));
    assert_eq!(mounted(&booted, own_id::COMMIT).is_some(), added);
    let command = files(Mode::Plain);
    assert_eq!(mounted(&command, own_id::MACHINE_ID), None);
}
