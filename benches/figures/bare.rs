//! A container of systemd-nspawn by hand, with the driver's arguments, in a cgroup of its own.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use nomad_driver_nspawn::cgroup::{Group, Layout, Place};

/// An upper bound for every step.
const LONG: Duration = Duration::from_secs(60);

/// What a container needs before it is started.
#[derive(Debug)]
pub(crate) struct Bare {
    name: String,
    socket: PathBuf,
    notify: UnixDatagram,
    place: Place,
    filters: bool,
}

impl Bare {
    /// Prepares a container with this machine name. Its notification socket is in `directory`.
    pub(crate) fn prepare(directory: &Path, name: &str) -> anyhow::Result<Self> {
        let place = Layout::of_this_host().place(None, name);
        let place = place.context("no cgroups")?;
        Group::new(&place.tracking.group).create()?;
        let socket = directory.join(format!("{name}.notify"));
        let _ = fs::remove_file(&socket);
        let notify = UnixDatagram::bind(&socket)?;
        notify.set_read_timeout(Some(LONG))?;
        Ok(Self {
            name: name.to_owned(),
            socket,
            notify,
            place,
            filters: true,
        })
    }

    /// Has no seccomp filters built, which takes most of a start and never the same time.
    pub(crate) fn without_filters(self) -> Self {
        Self {
            filters: false,
            ..self
        }
    }

    /// Starts it with this script.
    pub(crate) fn spawn(&self, tree: &Path, alloc: &Path, script: &str) -> anyhow::Result<Child> {
        self.spawn_with(&[], tree, alloc, script)
    }

    /// The same with further options.
    #[expect(
        clippy::disallowed_methods,
        reason = "the baseline is started without the driver"
    )]
    pub(crate) fn spawn_with(
        &self,
        options: &[&str],
        tree: &Path,
        alloc: &Path,
        script: &str,
    ) -> anyhow::Result<Child> {
        let enter = "echo 0 > \"$1\"/cgroup.procs; shift; exec systemd-nspawn \"$@\"";
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", enter, "sh"])
            .arg(&self.place.tracking.group);
        command.args([
            "--settings=no",
            "--keep-unit",
            "--register=no",
            "--link-journal=no",
            "--console=pipe",
            "--quiet",
            "--oom-score-adjust=0",
            "--private-users=no",
        ]);
        command.args(options);
        command.arg(format!("--machine={}", self.name));
        command.arg(format!("--directory={}", tree.display()));
        // The same mounts: the cost of Nomad's directories is not a cost of the driver.
        for target in ["/alloc", "/local", "/secrets"] {
            command.arg(format!("--bind={}:{target}", alloc.display()));
        }
        command
            .args(["--", "/bin/sh", "-c", script])
            .env("NOTIFY_SOCKET", &self.socket);
        if !self.filters {
            command.env("SYSTEMD_SECCOMP", "0");
        }
        Ok(command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?)
    }

    /// Waits until the container is up, and returns the pid of its first process.
    pub(crate) fn leader(&self) -> anyhow::Result<i32> {
        let mut buffer = [0; 4096];
        loop {
            let length = self.notify.recv(&mut buffer)?;
            let text = String::from_utf8_lossy(&buffer[..length]);
            if let Some(pid) = text
                .lines()
                .find_map(|line| line.strip_prefix("X_NSPAWN_LEADER_PID="))
            {
                return Ok(pid.parse()?);
            }
        }
    }

    /// Removes what is left of a container that has ended.
    pub(crate) fn remove(self) -> anyhow::Result<()> {
        let group = Group::new(&self.place.tracking.group);
        group.wait_empty(LONG);
        group.remove()?;
        if let Some(mirror) = self.place.tracking.mirror {
            Group::new(mirror).remove()?;
        }
        let _ = fs::remove_dir(Path::new("/run/systemd/nspawn/propagate").join(&self.name));
        Ok(fs::remove_file(self.socket)?)
    }
}
