//! Starts a further command in a container.

use super::NspawnBackend;
use crate::backend::BackendError;
use crate::container::Started;
use crate::exec::{ExecError, ExecRequest, Session};

impl NspawnBackend {
    pub(super) async fn start_session(
        &self,
        _started: &Started,
        _request: ExecRequest,
    ) -> Result<Session, BackendError> {
        Err(BackendError::Exec(ExecError::NotRunning))
    }
}
