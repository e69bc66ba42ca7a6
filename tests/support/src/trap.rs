//! Holds a process at one step: a process that reaches the step waits until the trap is dropped or the process is killed.

use std::path::{Path, PathBuf};

use nomad_driver_nspawn::failpoint::Failpoint;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

/// A step at which processes are held.
#[derive(Debug)]
pub struct Trap {
    socket: PathBuf,
    listener: UnixListener,
    held: Vec<BufReader<UnixStream>>,
}

impl Trap {
    /// Holds every driver process that reaches this failpoint and uses this state directory.
    pub fn at(state: &Path, point: Failpoint) -> Self {
        Self::named(state, point.name())
    }

    /// The same for another step; the fake gets the path of [`socket`](Self::socket) in its scenario.
    pub fn named(state: &Path, name: &str) -> Self {
        let mut directory = state.file_name().unwrap().to_owned();
        directory.push(".pause");
        let directory = state.with_file_name(directory);
        std::fs::create_dir_all(&directory).unwrap();
        let socket = directory.join(name);
        Self {
            listener: UnixListener::bind(&socket).unwrap(),
            socket,
            held: Vec::new(),
        }
    }

    /// The path of the listening socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Waits until a process is held here; returns its role and its pid.
    pub async fn reached(&mut self) -> (String, i32) {
        let (stream, _) = self.listener.accept().await.unwrap();
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        stream.read_line(&mut line).await.unwrap();
        self.held.push(stream);
        let (life, pid) = line.trim_end().split_once(' ').unwrap();
        (life.to_owned(), pid.parse().unwrap())
    }
}

impl Drop for Trap {
    fn drop(&mut self) {
        // Remove the name first, so that no process connects to a trap that is being dropped.
        let _ = std::fs::remove_file(&self.socket);
    }
}
