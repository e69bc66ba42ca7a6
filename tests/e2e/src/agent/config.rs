//! What an agent runs with: its configuration, its ports and its binary.

use std::net::TcpListener;
use std::path::{Path, PathBuf};

/// The name of the driver's binary in the agent's plugin directory, and the label of its `plugin` block.
pub(super) const LABEL: &str = "nomad-driver-nspawn";

/// The configuration of an agent with its files in this directory, which listens on these ports for HTTP, RPC and Serf.
pub(super) fn config(dir: &Path, ports: [u16; 3], mark: &str, level: &str) -> String {
    let dir = dir.display();
    let [http, rpc, serf] = ports;
    format!(
        r#"
data_dir             = "{dir}/data"
plugin_dir           = "{dir}/plugins"
bind_addr            = "127.0.0.1"
name                 = "{mark}"
log_level            = "{level}"
disable_update_check = true
ports {{
  http = {http}
  rpc  = {rpc}
  serf = {serf}
}}
advertise {{
  http = "127.0.0.1"
  rpc  = "127.0.0.1"
  serf = "127.0.0.1"
}}
server {{
  enabled          = true
  bootstrap_expect = 1
  raft_multiplier  = 1
}}
client {{
  enabled           = true
  cpu_total_compute = 10000
  memory_total_mb   = 8000
  network_interface = "lo"
  # By default the agent removes the logs of allocations that have ended as soon as 80 % of the disk are used, before the test has read them.
  gc_disk_usage_threshold  = 100
  gc_inode_usage_threshold = 100
  options = {{
    "fingerprint.denylist" = "env_aws,env_gce,env_azure,env_digitalocean,consul,vault"
    "driver.denylist"      = "docker,java,qemu,exec,raw_exec"
  }}
}}
plugin "{LABEL}" {{
  config {{
    state_dir = "{dir}/state"
  }}
}}
"#
    )
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

/// Ports that are free at the moment.
pub(super) fn free_ports() -> [u16; 3] {
    let listeners = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").expect("a free port"));
    listeners.map(|listener| listener.local_addr().expect("its address").port())
}
