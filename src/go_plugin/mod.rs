//! The go-plugin side of the plugin process: handshake, gRPC server on one unix socket, log. Knows nothing of containers.
//! Shutting down never stops tasks and does not wait for open calls. Nomad retries an interrupted call against the next plugin
//! process; answering WaitTask early would look like the task exiting.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::Server;
use tonic_health::ServingStatus;

use crate::blocking;
use crate::driver::Driver;
use crate::proto::base::base_plugin_server::BasePluginServer;
use crate::proto::driver::driver_server::DriverServer;
use crate::proto::plugin::grpc_broker_server::GrpcBrokerServer;
use crate::proto::plugin::grpc_controller_server::GrpcControllerServer;
use crate::proto::plugin::grpc_stdio_server::GrpcStdioServer;
use crate::sys;

mod controller;
mod handshake;
mod listen;
pub mod log;
mod owner;

pub use handshake::{HandshakeEnv, HandshakeError};
pub use listen::ListenError;
pub use owner::Owner;

use controller::{Controller, NoopBroker, NoopStdio};

/// The largest request that is accepted. The environment of a task can exceed tonic's own limit of 4 MiB.
const MAX_REQUEST_BYTES: usize = 256 << 20;
/// How much a client may send on one call before it is read. Enough for the full speed of a unix socket.
const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
/// The same for all calls of a connection: the most that HTTP/2 allows. With a lower limit, input of commands that do not read it would
/// use it up, and no call of the agent would be served any more.
const CONNECTION_WINDOW_BYTES: u32 = (1 << 31) - 1;
/// How long to wait on exit for queued log lines to be written.
const LOG_FLUSH_TIMEOUT: Duration = Duration::from_millis(100);
/// How often [`keep_blocking_thread_alive`] queues a job: below tokio's idle timeout of ten seconds, so that the thread never
/// exits, and above half of it, so that if two threads take the jobs in turn, one of them exits.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(6);
/// Worker threads for requests unless the environment sets another number. Nothing that blocks runs on them, see [`blocking`].
const WORKERS: usize = 4;
/// How long killing and removing all tasks may take once the owner is gone.
const OWNER_GONE: Duration = Duration::from_secs(30);
/// How long to wait for task actors to finish on shutdown.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(50);

/// Why serving ended without a request to stop.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket could not be created.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The handshake line could not be written.
    #[error("write the handshake line")]
    PrintHandshake(#[source] std::io::Error),
    /// The signal handlers could not be installed.
    #[error("watch for signals")]
    Signals(#[source] std::io::Error),
    /// Standard input is not the pipe to an owner.
    #[error("watch the owner through standard input")]
    Owner(#[source] std::io::Error),
    /// The server failed.
    #[error("serve the socket")]
    Server(#[from] tonic::transport::Error),
}

/// Serves `driver` to the host described by `handshake_env` until the host requests shutdown or SIGTERM arrives. The socket is
/// removed on return. Tasks keep running, except when an `owner` was given and is gone: then they are killed and removed, and the
/// process should exit at once without waiting for what the runtime still holds.
///
/// A terminal sends SIGINT and SIGHUP to its whole process group, but they are meant for the agent, which still needs this plugin
/// to stop its tasks. They are ignored by installing handlers instead of SIG_IGN, because SIG_IGN is inherited by every program
/// started from here.
pub async fn serve(
    driver: Driver,
    handshake_env: HandshakeEnv,
    owner: Option<&Owner>,
) -> Result<(), ServeError> {
    let print_handshake = |socket: &Path| handshake_env.print_handshake(socket);
    serve_and_print(driver, &handshake_env, owner, print_handshake).await
}

async fn serve_and_print(
    driver: Driver,
    handshake_env: &HandshakeEnv,
    owner: Option<&Owner>,
    print_handshake: impl FnOnce(&Path) -> std::io::Result<()>,
) -> Result<(), ServeError> {
    let watch = |kind| signal(kind).map_err(ServeError::Signals);
    let mut terminate = watch(SignalKind::terminate())?;
    let _ignored = (
        watch(SignalKind::interrupt())?,
        watch(SignalKind::hangup())?,
    );
    let root = driver.root();

    let (health, health_service) = tonic_health::server::health_reporter();
    health
        .set_service_status("plugin", ServingStatus::Serving)
        .await;
    let (listener, socket) = listen::listen(
        &handshake_env.socket_dir,
        handshake_env.socket_group.as_deref(),
    )?;
    let server = Server::builder()
        .max_concurrent_streams(Some(u32::MAX))
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .add_service(health_service)
        .add_service(GrpcControllerServer::new(Controller { root: root.clone() }))
        .add_service(GrpcStdioServer::new(NoopStdio))
        .add_service(GrpcBrokerServer::new(NoopBroker))
        .add_service(
            BasePluginServer::new(driver.clone()).max_decoding_message_size(MAX_REQUEST_BYTES),
        )
        .add_service(DriverServer::new(driver.clone()).max_decoding_message_size(MAX_REQUEST_BYTES))
        .serve_with_incoming(listen::connections(listener));
    print_handshake(socket.path()).map_err(ServeError::PrintHandshake)?;
    tracing::debug!(version = env!("CARGO_PKG_VERSION"), "serving");
    let dir = handshake_env.socket_dir.clone();
    tokio::task::spawn_blocking(move || listen::remove_stale_sockets(&dir));

    let owner_gone = async {
        match owner {
            Some(owner) => owner.wait().await,
            None => std::future::pending().await,
        }
    };
    let ended = tokio::select! {
        ended = server => ended.map_err(ServeError::from),
        () = root.cancelled() => Ok(()),
        _ = terminate.recv() => Ok(()),
        gone = owner_gone => gone.map_err(ServeError::Owner),
    };
    drop(socket);
    if owner.is_some_and(Owner::is_gone) {
        tracing::warn!("the process that started this plugin has exited: killing its tasks");
        driver.end_tasks(OWNER_GONE).await;
    }
    driver.close(SHUTDOWN_TIMEOUT).await;
    ended
}

/// tokio's blocking threads exit after ten idle seconds, and tokio panics if it then can't spawn a new one (EAGAIN). Keeps one
/// alive so that a host at its process limit does not crash the plugin, and uses it to return the memory of calls that are over.
async fn keep_blocking_thread_alive() {
    loop {
        let _ = tokio::task::spawn_blocking(sys::return_free_memory).await;
        tokio::time::sleep(KEEPALIVE_INTERVAL).await;
    }
}

/// Runs the plugin process from the handshake to the exit status. Logs to stderr in the agent's format. With an `owner`, the
/// tasks end when the owner is gone.
pub fn run(handshake_env: HandshakeEnv, driver: Driver, owner: Option<&Owner>) -> ExitCode {
    let writer = log::install();
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(handshake_env.workers.unwrap_or(WORKERS))
        .max_blocking_threads(blocking::THREADS)
        .enable_all()
        .build();
    let code = match runtime {
        Ok(runtime) => {
            runtime.spawn(keep_blocking_thread_alive());
            let served = runtime.block_on(serve(driver, handshake_env, owner));
            // Open calls are cut off when the process exits; it must not wait for them.
            runtime.shutdown_background();
            report(served)
        }
        Err(error) => {
            tracing::error!(%error, "threads can't be started: check the limit of processes");
            ExitCode::FAILURE
        }
    };
    writer.flush(LOG_FLUSH_TIMEOUT);
    code
}

/// Raises the soft limit of open files to the hard limit: every task takes two descriptors, and an agent that is not started by a
/// service manager has a limit of 1,024. Containers do not inherit it, because systemd-nspawn sets their limits itself.
fn raise_descriptor_limit() {
    let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return;
    };
    if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, most, most) {
        tracing::debug!(%error, "the limit of open files can't be raised");
    }
}

fn report(served: Result<(), ServeError>) -> ExitCode {
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let error = crate::backend::chain(&error);
            tracing::error!(error, "the plugin's socket can't be served");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests;
