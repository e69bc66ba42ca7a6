//! Starts a further command in a container.

use std::sync::Arc;

use super::start::init_binary;
use super::{NspawnBackend, io_error};
use crate::backend::BackendError;
use crate::blocking;
use crate::container::Started;
use crate::exec::{self, ExecRequest, Session};

impl NspawnBackend {
    pub(super) async fn start_session(
        &self,
        started: &Started,
        request: ExecRequest,
    ) -> Result<Session, BackendError> {
        let (init, settings) = (Arc::clone(&self.init), Arc::clone(&self.settings));
        let program = blocking::run(move || {
            init_binary(&init, &settings.state_dir).map_err(|source| {
                io_error(
                    "making the program for exec in",
                    &settings.state_dir,
                    source,
                )
            })
        });
        let host = exec::Host {
            program: program.await?,
            filters: Arc::clone(&self.filters),
            unfiltered: self.settings.exec_unfiltered,
        };
        exec::start(host, started, request)
            .await
            .map_err(BackendError::Exec)
    }
}
