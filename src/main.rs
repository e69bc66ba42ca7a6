//! Entry point of the binary. Selects what this process is: the plugin if a go-plugin host set the magic cookie, the supervisor
//! (`supervise`), the exec shim that starts systemd-nspawn (`enter`) or what forwards connections on `::1` (`relay`) by their command, and the
//! command line interface otherwise.

use std::ffi::{OsStr, OsString};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use dev_agent::cli;
use nomad_driver_nspawn::backend::NspawnBackend;
use nomad_driver_nspawn::backend::nspawn::{Settings, Timeouts};
use nomad_driver_nspawn::config::{ImageSearchPath, MAX_STATE_DIR_BYTES, PluginConfig};
use nomad_driver_nspawn::container::{Notes, UNKNOWN_END};
use nomad_driver_nspawn::driver::Driver;
use nomad_driver_nspawn::exec::{ExecRequest, command_line};
use nomad_driver_nspawn::go_plugin::{self, HandshakeEnv, HandshakeError, Owner};
use nomad_driver_nspawn::network;
use nomad_driver_nspawn::supervisor;
use nomad_driver_nspawn::sys::process::stay_out_of_core_dumps;
use nomad_driver_nspawn::sys::share_malloc_arena;

/// Where systemd itself looks for registered images, in its order.
const MACHINES: &[&str] = &[
    "/etc/machines",
    "/run/machines",
    "/var/lib/machines",
    "/var/lib/container",
    "/usr/local/lib/machines",
    "/usr/lib/machines",
];

/// What the commands need to know about this driver.
const COMMANDS: cli::Driver = cli::Driver {
    version: env!("CARGO_PKG_VERSION"),
    max_state_dir: MAX_STATE_DIR_BYTES,
    unknown_end: UNKNOWN_END,
    exec,
};

fn exec(arguments: cli::Exec) -> ExitCode {
    stay_out_of_core_dumps();
    command_line::main(command_line::Arguments {
        task: arguments.task,
        request: ExecRequest {
            command: arguments.command,
            user: arguments.user,
            directory: arguments.directory,
            environment: arguments.environment.into_iter().collect(),
            terminal: None,
        },
        tty: arguments.tty,
        state_dir: arguments.state_dir,
        unfiltered: arguments.unfiltered,
    })
}

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let words: Vec<&OsStr> = arguments.iter().skip(1).map(OsString::as_os_str).collect();
    match words.as_slice() {
        [life, directory] if *life == "supervise" => {
            stay_out_of_core_dumps();
            supervisor::supervise::supervise(Path::new(directory))
        }
        [life, directory] if *life == "enter" => {
            stay_out_of_core_dumps();
            supervisor::enter::enter(Path::new(directory))
        }
        // The second word is for people who look at the processes of the host.
        [life, _owner] if *life == "relay" => {
            stay_out_of_core_dumps();
            network::relay::run()
        }
        _ => match HandshakeEnv::from_environment() {
            Ok(handshake_env) => match words.as_slice() {
                [life, directories @ ..] if *life == cli::BOUND_PLUGIN => {
                    serve_owner(handshake_env, directories)
                }
                _ => serve(handshake_env, None),
            },
            Err(HandshakeError::NotAHost) => cli::main(arguments, COMMANDS),
            Err(error) => fail(&error.into()),
        },
    }
}

fn serve(handshake_env: HandshakeEnv, owner: Option<&Owner>) -> ExitCode {
    stay_out_of_core_dumps();
    share_malloc_arena();
    match driver() {
        Ok(driver) => go_plugin::run(handshake_env, driver, owner),
        Err(error) => fail(&error),
    }
}

/// Serves a plugin that the `run` command started. When `run` is gone, this process is the only one left that can remove its
/// directories.
fn serve_owner(handshake_env: HandshakeEnv, directories: &[&OsStr]) -> ExitCode {
    let owner = match Owner::on_stdin().context("duplicate standard input") {
        Ok(owner) => owner,
        Err(error) => return fail(&error),
    };
    let code = serve(handshake_env, Some(&owner));
    if owner.is_gone() {
        cli::remove_directories(directories.iter().map(Path::new));
    }
    code
}

/// The production driver: containers by systemd-nspawn, supervisors started from this same binary.
#[expect(
    clippy::disallowed_methods,
    reason = "`PATH` is read here and passed to the module that searches it"
)]
fn driver() -> anyhow::Result<Driver> {
    let binary = std::env::current_exe().context("find this program's own path")?;
    let plugin_dir = binary
        .parent()
        .context("find this program's directory")?
        .to_owned();
    let search = std::env::var_os("PATH").unwrap_or_default();
    let factory = move |config: &PluginConfig,
                        notes: Notes|
          -> Arc<dyn nomad_driver_nspawn::backend::ContainerBackend> {
        let backend = NspawnBackend::new(Settings {
            state_dir: config.state_dir.clone(),
            nspawn: config.nspawn_path.clone(),
            search: search.clone(),
            // Not the binary's path: an upgrade may have replaced the file while this version runs.
            binary: "/proc/self/exe".into(),
            exec_unfiltered: config.exec_unfiltered,
            seccomp_cache: config.seccomp_cache,
            network_pool: config.network_pool.clone(),
            timeouts: Timeouts::default(),
        });
        Arc::new(backend.with_notes(notes))
    };
    let machine_dirs = MACHINES.iter().map(PathBuf::from).collect();
    Ok(Driver::new(
        factory,
        ImageSearchPath {
            plugin_dir,
            machine_dirs,
        },
    ))
}

fn fail(error: &anyhow::Error) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "nomad-driver-nspawn: {error:#}");
    ExitCode::FAILURE
}
