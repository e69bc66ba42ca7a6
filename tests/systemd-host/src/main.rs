//! `systemd-host IMAGE NAME INIT BIND…`: runs an image of the container engine that DOCKER_HOST names as a host with systemd, until stdin
//! is closed. The container is called NAME, and so are its cgroups; its first process is the shell script INIT. Each BIND is
//! `SOURCE:TARGET:ro` or `SOURCE:TARGET:rw`. Prints the pid of the first process. For `ci/e2e-systemd-host`.

use std::io::Write;
use std::process::Command;

use anyhow::{Context, bail};
use testcontainers::bollard::models::HostConfig;
use testcontainers::bollard::query_parameters::InspectContainerOptions;
use testcontainers::core::{AccessMode, CgroupnsMode, Mount};
use testcontainers::runners::AsyncRunner;
use testcontainers::{ContainerRequest, GenericImage, ImageExt};
use tokio::io::AsyncReadExt;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [image, name, init, binds @ ..] = &*words else {
        bail!("usage: systemd-host IMAGE NAME INIT BIND…");
    };
    let (image, tag) = image.split_once(':').context("an image without a tag")?;
    let mut request = like_privileged(GenericImage::new(image, tag), name)?
        .with_container_name(name)
        .with_cmd(["/bin/sh", "-c", init])
        // systemd looks here for what it runs in.
        .with_env_var("container", "docker");
    for bind in binds {
        request = request.with_mount(mount(bind)?);
    }
    let container = request.start().await.context("the container")?;
    let docker = testcontainers::core::client::docker_client_instance().await?;
    let about = docker
        .inspect_container(container.id(), None::<InspectContainerOptions>)
        .await?;
    let pid = about.state.and_then(|state| state.pid);
    let pid = pid.filter(|pid| *pid > 0).context("it has ended")?;
    writeln!(std::io::stdout(), "{pid}")?;
    tokio::io::stdin().read_to_end(&mut Vec::new()).await?;
    container.rm().await.context("its removal")
}

/// With everything that this machine has, which is not what `privileged` means: the engine then demands capabilities that the kernel knows
/// and this machine may lack, and the start fails.
fn like_privileged(
    image: GenericImage,
    cgroup: &str,
) -> anyhow::Result<ContainerRequest<GenericImage>> {
    let cgroup = format!("/{cgroup}");
    let mut request = image
        .with_cap_add("ALL")
        .with_cgroupns_mode(CgroupnsMode::Private)
        .with_security_opt("seccomp=unconfined")
        .with_security_opt("apparmor=unconfined")
        .with_host_config_modifier(move |host: &mut HostConfig| {
            host.cgroup_parent = Some(cgroup.clone());
            host.network_mode = Some("none".to_owned());
            host.device_cgroup_rules = Some(vec!["a *:* rwm".to_owned()]);
            host.masked_paths = Some(Vec::new());
            host.readonly_paths = Some(Vec::new());
        });
    for capability in lacking()? {
        request = request.with_cap_drop(capability);
    }
    Ok(request)
}

/// The names of the capabilities that the kernel knows and this process can't pass on.
fn lacking() -> anyhow::Result<Vec<String>> {
    let setpriv = |option| -> anyhow::Result<String> {
        let output = Command::new("setpriv").arg(option).output();
        Ok(String::from_utf8(output.context("setpriv")?.stdout)?)
    };
    let dump = setpriv("--dump")?;
    let held = dump
        .lines()
        .find_map(|line| line.strip_prefix("Capability bounding set: "))
        .context("setpriv --dump shows no capability bounding set")?;
    let held: Vec<_> = held.split(',').collect();
    let all = setpriv("--list-caps")?;
    let lacking = all.lines().filter(|name| !held.contains(name));
    Ok(lacking.map(str::to_uppercase).collect())
}

fn mount(bind: &str) -> anyhow::Result<Mount> {
    let words: Vec<&str> = bind.split(':').collect();
    let [source, target, mode] = *words else {
        bail!("{bind} is not SOURCE:TARGET:MODE");
    };
    let mode = match mode {
        "ro" => AccessMode::ReadOnly,
        "rw" => AccessMode::ReadWrite,
        _ => bail!("{bind} has neither the mode ro nor rw"),
    };
    Ok(Mount::bind_mount(source, target).with_access_mode(mode))
}
