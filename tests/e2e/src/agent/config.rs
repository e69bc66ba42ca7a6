//! What the agents run with: their configurations, their ports and their binary.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// The name of the driver's binary in the agent's plugin directory, and the label of its `plugin` block.
pub(super) const LABEL: &str = "nomad-driver-nspawn";

/// Where Debian and the project itself install the CNI plugins.
const CNI: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];

/// What differs between the agents of the tests.
#[derive(Debug, Clone, Copy)]
pub(super) struct Options<'a> {
    pub(super) level: &'a str,
    pub(super) drivers_off: &'a str,
    /// The interface whose address jobs are reached by.
    pub(super) interface: &'a str,
    /// Whether groups may have networks of their own.
    pub(super) bridges: bool,
    /// Where the driver's state directory is made, unless below the agent's directory.
    pub(super) state_in: Option<&'a str>,
}

/// The ports of both agents, on 127.0.0.1.
#[derive(Debug)]
pub(super) struct Ports {
    /// Of the server's HTTP API.
    pub(super) http: u16,
    rpc: u16,
    serf: u16,
    /// Of the client's HTTP API.
    pub(super) client: u16,
}

impl Ports {
    /// Ports that are free at the moment.
    pub(super) fn free() -> Self {
        let [http, rpc, serf, client] = [(); 4].map(|()| free_port());
        Self {
            http,
            rpc,
            serf,
            client,
        }
    }
}

/// A port that is free, and that neither the kernel gives to an outgoing connection nor Nomad to a task before the agent has bound it. Each
/// call returns another one; another process of tests probably starts elsewhere.
fn free_port() -> u16 {
    static NEXT: LazyLock<AtomicU32> = LazyLock::new(|| {
        let random = u32::from_str_radix(&crate::unique(), 16);
        AtomicU32::new(random.expect("a number"))
    });
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed) % 10_000;
        let port = 10_000 + u16::try_from(number).expect("a small number");
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Writes `server.hcl` and `client.hcl`, with everything of the two agents in this directory.
pub(super) fn write(dir: &Path, state: &Path, ports: &Ports, mark: &str, options: Options<'_>) {
    let level = options.level;
    let both = format!(
        r#"
bind_addr            = "127.0.0.1"
name                 = "{mark}"
log_level            = "{level}"
disable_update_check = true
advertise {{
  http = "127.0.0.1"
  rpc  = "127.0.0.1"
  serf = "127.0.0.1"
}}
"#
    );
    let text = format!("{both}{}", server(dir, ports));
    fs::write(dir.join("server.hcl"), text).expect("the server's configuration");
    let text = format!("{both}{}", client(dir, state, ports, options));
    fs::write(dir.join("client.hcl"), text).expect("the client's configuration");
}

fn server(dir: &Path, ports: &Ports) -> String {
    let dir = dir.display();
    let Ports {
        http, rpc, serf, ..
    } = ports;
    format!(
        r#"
data_dir = "{dir}/server"
ports {{
  http = {http}
  rpc  = {rpc}
  serf = {serf}
}}
server {{
  enabled          = true
  bootstrap_expect = 1
  raft_multiplier  = 1
}}
"#
    )
}

fn client(dir: &Path, state: &Path, ports: &Ports, options: Options<'_>) -> String {
    let Options {
        drivers_off,
        interface,
        ..
    } = options;
    let cni = match options.bridges {
        true => format!("cni_path = {:?}", cni()),
        false => String::new(),
    };
    let (dir, state) = (dir.display(), state.display());
    let Ports { client, rpc, .. } = ports;
    format!(
        r#"
data_dir   = "{dir}/data"
plugin_dir = "{dir}/plugins"
ports {{
  http = {client}
}}
client {{
  enabled           = true
  servers           = ["127.0.0.1:{rpc}"]
  cpu_total_compute = 10000
  memory_total_mb   = 8000
  network_interface = "{interface}"
  {cni}
  # By default the agent removes the logs of allocations that have ended as soon as 80 % of the disk are used, before the test has read them.
  gc_disk_usage_threshold  = 100
  gc_inode_usage_threshold = 100
  host_volume "database" {{
    path = "{dir}/database"
  }}
  options = {{
    "fingerprint.denylist" = "env_aws,env_gce,env_azure,env_digitalocean,consul,vault"
    "driver.denylist"      = "{drivers_off}"
  }}
}}
plugin "raw_exec" {{
  config {{
    enabled = true
  }}
}}
plugin "{LABEL}" {{
  config {{
    state_dir = "{state}"
  }}
}}
"#
    )
}

/// The directory of the CNI plugins.
fn cni() -> &'static str {
    let found = CNI
        .iter()
        .find(|path| Path::new(path).join("bridge").exists());
    found.expect("the CNI plugins are not installed (Debian: containernetworking-plugins)")
}

/// The Nomad binary: `NOMAD_BIN`, or `nomad` in `PATH`.
pub(super) fn nomad() -> PathBuf {
    if let Some(given) = std::env::var_os("NOMAD_BIN") {
        let given = PathBuf::from(given);
        assert!(given.is_file(), "NOMAD_BIN: {} is no file", given.display());
        return given;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join("nomad"))
        .find(|path| path.is_file())
        .expect("no nomad along PATH: install Nomad or set NOMAD_BIN")
}
