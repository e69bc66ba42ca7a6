//! The job files in `examples/`, from the file to the container's specification.

use std::fs;
use std::path::Path;

use dev_agent::cli::Job;
use dev_agent::configure::encode;
use dev_agent::{Allocation, TaskSpec};
use nomad_driver_nspawn::config::{
    self, AllocatedPort, AllocatedResources, ImageSearchPath, TaskContext,
};
use nomad_driver_nspawn::container::ContainerSpec;

/// Everything between a file and the container: operators try the examples first. Whether a cluster has the volumes and
/// ports of an example is not checked: each has a port `http`.
#[test]
fn every_example_becomes_a_container() {
    let mut seen = Vec::new();
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    for entry in fs::read_dir(examples).unwrap() {
        let path = entry.unwrap().path();
        let source = fs::read_to_string(&path).unwrap();
        let job = Job::read(&source).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!(job.tasks().count(), 1, "{}", path.display());
        for spec in job.tasks() {
            container(spec).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        }
        seen.push(path.file_name().unwrap().to_owned());
    }
    seen.sort();
    assert_eq!(
        seen,
        [
            "boot.nomad.hcl",
            "database.nomad.hcl",
            "hello.nomad.hcl",
            "resources.nomad.hcl",
            "service.nomad.hcl",
            "volume.nomad.hcl",
            "web-bridge.nomad.hcl",
            "web-own-network.nomad.hcl"
        ]
    );
}

/// Encodes a task's `config` block by the schema and validates it as a container, on a machine with the image `debian`.
fn container(spec: &TaskSpec) -> Result<ContainerSpec, String> {
    let machine = tempfile::tempdir().unwrap();
    let image = machine.path().join("machines/debian");
    for directory in ["etc", "usr/lib/systemd", "sbin"] {
        fs::create_dir_all(image.join(directory)).unwrap();
    }
    for file in ["etc/os-release", "usr/lib/systemd/systemd"] {
        fs::write(image.join(file), "").unwrap();
    }
    let allocation = Allocation::create(machine.path(), spec.clone()).unwrap();
    let schema = config::task_schema();
    let bytes = encode(
        Some(&schema),
        &spec.config,
        allocation.variables(),
        "config",
    )
    .map_err(|error| error.to_string())?;
    let context = TaskContext {
        id: format!("{}/{}/00000000", allocation.id(), spec.task),
        task: spec.task.clone(),
        alloc_id: allocation.id().to_owned(),
        alloc_dir: allocation.dir().to_owned(),
        environment: allocation.variables().environment.clone(),
        resources: resources(&allocation),
        ports: vec![AllocatedPort {
            label: "http".to_owned(),
            host: 25_080,
            to: 80,
            address: None,
            task_level: false,
        }],
        ..TaskContext::default()
    };
    let plugin_config = config::PluginConfig::decode(&[]).map_err(|error| error.to_string())?;
    let search_path = ImageSearchPath {
        plugin_dir: machine.path().to_owned(),
        machine_dirs: vec![machine.path().join("machines")],
    };
    let validated = config::container(&bytes, &context, &plugin_config, &search_path);
    validated
        .map(|validated| validated.spec)
        .map_err(|error| error.to_string())
}

/// What the host of `run` allocates to its task.
fn resources(allocation: &Allocation) -> AllocatedResources {
    let task = allocation.task_config(Vec::new()).unwrap();
    let resources = task.resources.unwrap();
    let memory = resources.allocated_resources.unwrap().memory.unwrap();
    let linux = resources.linux_resources.unwrap();
    AllocatedResources {
        memory_mb: memory.memory_mb,
        memory_max_mb: memory.memory_max_mb,
        cpu_mhz: linux.cpu_shares,
        cpu_fraction: linux.percent_ticks,
        cores: linux.cpuset_cpus,
    }
}
