//! Prepares one allocation as Nomad's client does before it starts a task: directories, log FIFOs, environment, and the
//! task in its wire form. It mounts nothing (Nomad's secrets directory is a tmpfs, this one is a plain directory) and
//! refuses to delete through mounts that were left behind.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, chown, geteuid, mkfifo};
use serde_json::Value;
use tokio::net::unix::pipe;

use super::error::HostError;
use super::node::Node;
use super::variables::Variables;
use nomad_proto::driver;

/// The owner that Nomad gives the directories of an allocation.
const NOBODY: u32 = 65534;

/// A task of a job, with the settings that the host needs.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskSpec {
    /// The job's id.
    pub job_id: String,
    /// The job's name.
    pub job_name: String,
    /// The job's namespace.
    pub namespace: String,
    /// The job's region.
    pub region: String,
    /// The datacenter the task would run in.
    pub datacenter: String,
    /// The group's name.
    pub group: String,
    /// The task's name.
    pub task: String,
    /// The `config` block as the tree that Nomad stores: blocks are lists of objects.
    pub config: Value,
    /// The `env` block.
    pub env: BTreeMap<String, String>,
    /// `user`, or empty.
    pub user: String,
    /// The metadata of job, group and task, merged.
    pub meta: BTreeMap<String, String>,
    /// The values of `${node.…}`, `${attr.…}` and `${meta.…}`, under their full names.
    pub node: BTreeMap<String, String>,
    /// `resources.cpu` in MHz. Reserved cores override it.
    pub cpu_mhz: i64,
    /// `resources.cores`; 0 means not set.
    pub cores: u32,
    /// `resources.memory` in MiB.
    pub memory_mb: i64,
    /// `resources.memory_max` in MiB; 0 means not set, -1 no limit.
    pub memory_max_mb: i64,
    /// How long the task has to exit after a stop request.
    pub kill_timeout: Duration,
    /// `kill_signal`, or empty for the driver's default.
    pub kill_signal: String,
}

impl TaskSpec {
    /// A task with Nomad's defaults.
    pub fn new(task: &str, config: Value) -> Self {
        Self {
            job_id: task.to_owned(),
            job_name: task.to_owned(),
            namespace: "default".to_owned(),
            region: "global".to_owned(),
            datacenter: "dc1".to_owned(),
            group: task.to_owned(),
            task: task.to_owned(),
            config,
            env: BTreeMap::new(),
            user: String::new(),
            meta: BTreeMap::new(),
            node: BTreeMap::new(),
            cpu_mhz: 100,
            cores: 0,
            memory_mb: 300,
            memory_max_mb: 0,
            kill_timeout: Duration::from_secs(5),
            kill_signal: String::new(),
        }
    }
}

/// The directories of one allocation with one task.
#[derive(Debug)]
pub struct Allocation {
    id: String,
    dir: PathBuf,
    spec: TaskSpec,
    /// The processors that are reserved for the task.
    cores: Vec<u32>,
    variables: Variables,
}

/// The read ends of a task's log FIFOs. A read waits for the first writer, and the stream ends when the last writer
/// closes.
#[derive(Debug)]
pub struct Logs {
    /// The task's stdout.
    pub stdout: pipe::Receiver,
    /// The task's stderr.
    pub stderr: pipe::Receiver,
}

impl Allocation {
    /// Creates the directories of a new allocation in `parent`, which must exist. After an error nothing is left.
    pub fn create(parent: &Path, mut spec: TaskSpec) -> Result<Self, HostError> {
        let id = random_uuid()?;
        let dir = parent.join(&id);
        let mut cores = Vec::new();
        if spec.cores > 0 {
            (cores, spec.cpu_mhz) = Node::read()?.reserve(spec.cores)?;
        }
        let variables = Variables {
            environment: environment(&spec, &id, &cores),
            node: spec.node.clone(),
        };
        let allocation = Self {
            id,
            dir,
            spec,
            cores,
            variables,
        };
        match allocation.make() {
            Ok(()) => Ok(allocation),
            Err(error) => {
                // Return the first error, not one of the cleanup.
                drop(fs::remove_dir_all(&allocation.dir));
                Err(error)
            }
        }
    }

    fn make(&self) -> Result<(), HostError> {
        let task = self.task_dir();
        directory(&self.dir, 0o755, false)?;
        let alloc = self.dir.join("alloc");
        directory(&alloc, 0o777, true)?;
        for name in ["logs", "tmp", "data"] {
            directory(&alloc.join(name), 0o777, true)?;
        }
        directory(&task, 0o777, true)?;
        for name in ["local", "secrets", "private"] {
            directory(&task.join(name), 0o777, true)?;
        }
        directory(&task.join("tmp"), 0o1777, true)?;
        for fifo in [self.stdout_path(), self.stderr_path()] {
            mkfifo(&fifo, Mode::S_IRUSR | Mode::S_IWUSR)
                .map_err(|errno| HostError::io("create the FIFO", fifo)(errno.into()))?;
        }
        Ok(())
    }

    /// The allocation's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The allocation's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The task's directory, which contains `local`, `secrets`, `tmp` and `private`.
    pub fn task_dir(&self) -> PathBuf {
        self.dir.join(&self.spec.task)
    }

    /// The FIFO for the task's stdout.
    pub fn stdout_path(&self) -> PathBuf {
        self.fifo("stdout")
    }

    /// The FIFO for the task's stderr.
    pub fn stderr_path(&self) -> PathBuf {
        self.fifo("stderr")
    }

    fn fifo(&self, stream: &str) -> PathBuf {
        let name = format!(".{}.{stream}.fifo", self.spec.task);
        self.dir.join("alloc/logs").join(name)
    }

    /// The task that the allocation was created for.
    pub fn spec(&self) -> &TaskSpec {
        &self.spec
    }

    /// The values of `${…}` in this task's configuration.
    pub fn variables(&self) -> &Variables {
        &self.variables
    }

    /// Opens the FIFOs for reading. Call it before each start: the driver needs a reader when it opens them.
    pub fn open_logs(&self) -> Result<Logs, HostError> {
        let open = |path: PathBuf| {
            pipe::OpenOptions::new()
                .open_receiver(&path)
                .map_err(HostError::io("open the FIFO", path))
        };
        Ok(Logs {
            stdout: open(self.stdout_path())?,
            stderr: open(self.stderr_path())?,
        })
    }

    /// The task in its wire form for one start, with a new id each time. `config` is the encoded `config` block.
    pub fn task_config(&self, config: Vec<u8>) -> Result<driver::TaskConfig, HostError> {
        let spec = &self.spec;
        let mut start = [0; 4];
        random(&mut start)?;
        let memory_bytes = spec.memory_mb.max(spec.memory_max_mb) * 1024 * 1024;
        let resources = driver::Resources {
            allocated_resources: Some(driver::AllocatedTaskResources {
                cpu: Some(driver::AllocatedCpuResources {
                    cpu_shares: spec.cpu_mhz,
                }),
                memory: Some(driver::AllocatedMemoryResources {
                    memory_mb: spec.memory_mb,
                    memory_max_mb: spec.memory_max_mb,
                }),
                networks: Vec::new(),
            }),
            linux_resources: Some(driver::LinuxResources {
                cpu_shares: spec.cpu_mhz,
                memory_limit_bytes: memory_bytes,
                cpuset_cpus: list(&self.cores),
                percent_ticks: Node::read()?.fraction(spec.cpu_mhz),
                ..driver::LinuxResources::default()
            }),
            ports: Vec::new(),
        };
        Ok(driver::TaskConfig {
            id: format!("{}/{}/{}", self.id, spec.task, hex(&start)),
            name: spec.task.clone(),
            msgpack_driver_config: config,
            env: self.variables.environment.clone().into_iter().collect(),
            resources: Some(resources),
            user: self.variables.replace(&spec.user),
            alloc_dir: text(&self.dir),
            stdout_path: text(&self.stdout_path()),
            stderr_path: text(&self.stderr_path()),
            task_group_name: spec.group.clone(),
            job_name: spec.job_name.clone(),
            alloc_id: self.id.clone(),
            job_id: spec.job_id.clone(),
            namespace: spec.namespace.clone(),
            ..driver::TaskConfig::default()
        })
    }

    /// Removes the directories, unless something is still mounted below them.
    pub fn remove(self) -> Result<(), HostError> {
        remove_unmounted(&self.dir)
    }
}

/// Removes a directory with everything in it, unless something is mounted at or below it.
pub fn remove_unmounted(dir: &Path) -> Result<(), HostError> {
    let table = "/proc/self/mountinfo";
    let mounts = proc_files::own_mounts().map_err(HostError::io("read", table))?;
    let dir = fs::canonicalize(dir).map_err(HostError::io("find", dir))?;
    if let Some(mount) = mount_below(&mounts, &dir) {
        return Err(HostError::Mounted { dir, mount });
    }
    fs::remove_dir_all(&dir).map_err(HostError::io("remove", dir))
}

/// The mount point at or below `dir`, if there is one.
fn mount_below(mounts: &[proc_files::Mount], dir: &Path) -> Option<PathBuf> {
    let mut points = mounts.iter().map(|mount| &mount.target);
    points.find(|point| point.starts_with(dir)).cloned()
}

fn directory(path: &Path, mode: u32, nobody: bool) -> Result<(), HostError> {
    fs::create_dir(path).map_err(HostError::io("make", path))?;
    // Set the mode separately, because the umask reduces the mode given to mkdir.
    fs::set_permissions(path, Permissions::from_mode(mode))
        .map_err(HostError::io("set the mode of", path))?;
    if nobody && geteuid().is_root() {
        chown(
            path,
            Some(Uid::from_raw(NOBODY)),
            Some(Gid::from_raw(NOBODY)),
        )
        .map_err(|errno| HostError::io("change the owner of", path)(errno.into()))?;
    }
    Ok(())
}

/// Nomad's variables, then the job's, in which `${…}` is replaced by the values of Nomad's.
fn environment(spec: &TaskSpec, id: &str, cores: &[u32]) -> BTreeMap<String, String> {
    let own = [
        ("NOMAD_ALLOC_DIR", "/alloc".to_owned()),
        ("NOMAD_TASK_DIR", "/local".to_owned()),
        ("NOMAD_SECRETS_DIR", "/secrets".to_owned()),
        ("NOMAD_ALLOC_ID", id.to_owned()),
        ("NOMAD_SHORT_ALLOC_ID", id[..8].to_owned()),
        (
            "NOMAD_ALLOC_NAME",
            format!("{}.{}[0]", spec.job_id, spec.group),
        ),
        ("NOMAD_ALLOC_INDEX", "0".to_owned()),
        ("NOMAD_TASK_NAME", spec.task.clone()),
        ("NOMAD_GROUP_NAME", spec.group.clone()),
        ("NOMAD_JOB_ID", spec.job_id.clone()),
        ("NOMAD_JOB_NAME", spec.job_name.clone()),
        ("NOMAD_NAMESPACE", spec.namespace.clone()),
        ("NOMAD_REGION", spec.region.clone()),
        ("NOMAD_DC", spec.datacenter.clone()),
        ("NOMAD_MEMORY_LIMIT", spec.memory_mb.to_string()),
        ("NOMAD_CPU_LIMIT", spec.cpu_mhz.to_string()),
    ];
    let mut environment: BTreeMap<_, _> = own.map(|(name, value)| (name.to_owned(), value)).into();
    if spec.memory_max_mb > 0 {
        let limit = spec.memory_max_mb.to_string();
        environment.insert("NOMAD_MEMORY_MAX_LIMIT".to_owned(), limit);
    }
    if !cores.is_empty() {
        environment.insert("NOMAD_CPU_CORES".to_owned(), list(cores));
    }
    let nomads = Variables {
        environment: environment.clone(),
        node: spec.node.clone(),
    };
    for (key, value) in &spec.meta {
        let key: String = key
            .chars()
            .map(|c| {
                if c.is_ascii_alphanumeric() || c == '_' || c == '.' {
                    c
                } else {
                    '_'
                }
            })
            .collect();
        let value = nomads.replace(value);
        environment.insert(format!("NOMAD_META_{}", key.to_uppercase()), value.clone());
        environment.insert(format!("NOMAD_META_{key}"), value);
    }
    let nomads = Variables {
        environment: environment.clone(),
        ..nomads
    };
    for (name, value) in &spec.env {
        environment.insert(name.clone(), nomads.replace(value));
    }
    environment
}

/// Processors as Nomad lists them.
fn list(cores: &[u32]) -> String {
    let cores: Vec<_> = cores.iter().map(u32::to_string).collect();
    cores.join(",")
}

fn random(bytes: &mut [u8]) -> Result<(), HostError> {
    let source = "/dev/urandom";
    let read = |bytes: &mut [u8]| -> io::Result<()> { File::open(source)?.read_exact(bytes) };
    read(bytes).map_err(HostError::io("read", source))
}

/// A random id in the form of Nomad's allocation ids (UUID version 4).
fn random_uuid() -> Result<String, HostError> {
    let mut bytes = [0; 16];
    random(&mut bytes)?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let all = hex(&bytes);
    let parts = [
        &all[..8],
        &all[8..12],
        &all[12..16],
        &all[16..20],
        &all[20..],
    ];
    Ok(parts.join("-"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Nomad sends paths as text.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::io::Write;
    use std::os::unix::fs::FileTypeExt;
    use tokio::io::AsyncReadExt;

    fn spec() -> TaskSpec {
        TaskSpec {
            meta: [("a-b".to_owned(), "${NOMAD_TASK_NAME}!".to_owned())].into(),
            env: [(
                "X".to_owned(),
                "${NOMAD_TASK_DIR}/x ${NOPE} ${NOMAD_META_a_b}".to_owned(),
            )]
            .into(),
            user: "${NOMAD_JOB_NAME}".to_owned(),
            ..TaskSpec::new("web", json!({}))
        }
    }

    #[test]
    fn the_directories_are_those_of_nomad() {
        let parent = tempfile::tempdir().unwrap();
        let allocation = Allocation::create(parent.path(), spec()).unwrap();
        let mode = |path: &str| {
            fs::metadata(allocation.dir().join(path))
                .unwrap()
                .permissions()
                .mode()
                & 0o7777
        };
        assert_eq!(mode(""), 0o755);
        for path in [
            "alloc",
            "alloc/logs",
            "alloc/tmp",
            "alloc/data",
            "web",
            "web/local",
            "web/secrets",
            "web/private",
        ] {
            assert_eq!(mode(path), 0o777, "{path}");
        }
        assert_eq!(mode("web/tmp"), 0o1777);
        assert_eq!(mode("alloc/logs/.web.stdout.fifo"), 0o600);
        assert!(
            fs::metadata(allocation.stderr_path())
                .unwrap()
                .file_type()
                .is_fifo()
        );
        allocation.remove().unwrap();
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_task_config_has_names_environment_and_a_new_id_each_time() {
        let parent = tempfile::tempdir().unwrap();
        let allocation = Allocation::create(parent.path(), spec()).unwrap();
        let first = allocation.task_config(vec![0x80]).unwrap();
        let second = allocation.task_config(vec![0x80]).unwrap();
        assert_ne!(first.id, second.id);
        let parts: Vec<_> = first.id.split('/').collect();
        assert_eq!(
            (parts.len(), parts[0].len(), parts[1], parts[2].len()),
            (3, 36, "web", 8)
        );
        assert_eq!(first.env["NOMAD_ALLOC_NAME"], "web.web[0]");
        assert_eq!(first.env["NOMAD_META_a_b"], "web!");
        assert_eq!(first.env["NOMAD_META_A_B"], "web!");
        assert_eq!(first.env["X"], "/local/x ${NOPE} web!");
        assert_eq!(first.user, "web");
    }

    #[test]
    fn a_task_config_has_the_resources_of_the_task() {
        let parent = tempfile::tempdir().unwrap();
        let resources = |spec| {
            let allocation = Allocation::create(parent.path(), spec).unwrap();
            let task = allocation.task_config(vec![0x80]).unwrap();
            (task.resources.unwrap(), task.env)
        };
        let (shared, env) = resources(TaskSpec {
            cpu_mhz: 200,
            memory_max_mb: -1,
            ..spec()
        });
        let memory = shared.allocated_resources.unwrap().memory.unwrap();
        assert_eq!((memory.memory_mb, memory.memory_max_mb), (300, -1));
        let linux = shared.linux_resources.unwrap();
        assert_eq!(
            (linux.cpu_shares, linux.memory_limit_bytes),
            (200, 300 << 20)
        );
        assert_eq!(linux.cpuset_cpus, "");
        assert!(linux.percent_ticks > 0.0 && linux.percent_ticks < 1.0);
        assert_eq!(env.get("NOMAD_CPU_CORES"), None);
        let (reserved, env) = resources(TaskSpec { cores: 1, ..spec() });
        let linux = reserved.linux_resources.unwrap();
        let first = linux.cpuset_cpus.parse::<u32>().unwrap();
        assert_eq!(env["NOMAD_CPU_CORES"], first.to_string());
        assert_eq!(env["NOMAD_CPU_LIMIT"], linux.cpu_shares.to_string());
        let mhz = reserved
            .allocated_resources
            .unwrap()
            .cpu
            .unwrap()
            .cpu_shares;
        assert_eq!(linux.cpu_shares, mhz);
        assert!(linux.percent_ticks > 0.0 && linux.percent_ticks <= 1.0);
    }

    #[tokio::test]
    async fn logs_wait_for_a_writer_and_end_with_the_last_one() {
        let parent = tempfile::tempdir().unwrap();
        let allocation = Allocation::create(parent.path(), spec()).unwrap();
        let mut logs = allocation.open_logs().unwrap();
        let reader = tokio::spawn(async move {
            let mut text = String::new();
            logs.stdout.read_to_string(&mut text).await.map(|_| text)
        });
        // Gives the reader every chance to mistake "no writer yet" for the end of the stream.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(!reader.is_finished());
        let mut writer = File::options()
            .write(true)
            .open(allocation.stdout_path())
            .unwrap();
        writer.write_all(b"hello\n").unwrap();
        drop(writer);
        assert_eq!(reader.await.unwrap().unwrap(), "hello\n");
    }

    #[test]
    fn a_mount_below_is_found() {
        let table = b"22 1 0:20 / / rw - ext4 x rw\n23 22 0:21 / /a\\040b/c rw - tmpfs x rw\n";
        let mounts = proc_files::parse_mountinfo(table);
        let below = |dir| mount_below(&mounts, Path::new(dir));
        assert_eq!(below("/a b"), Some(PathBuf::from("/a b/c")));
        assert_eq!(below("/a b/c/d"), None);
        assert_eq!(below("/a"), None);
    }
}
