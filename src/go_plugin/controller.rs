//! What the plugin framework asks of every plugin: to end when told, and to hold two streams open that Nomad never uses.
//! Ends no task.

use std::pin::Pin;

use tokio_stream::{Stream, StreamExt as _};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::proto::plugin::grpc_broker_server::GrpcBroker;
use crate::proto::plugin::grpc_controller_server::GrpcController;
use crate::proto::plugin::grpc_stdio_server::GrpcStdio;
use crate::proto::plugin::{ConnInfo, Empty, StdioData};

/// Ends the process on request by cancelling the root of the token tree.
#[derive(Debug, Clone)]
pub(super) struct Controller {
    pub(super) root: CancellationToken,
}

#[tonic::async_trait]
impl GrpcController for Controller {
    async fn shutdown(&self, _: Request<Empty>) -> Result<Response<Empty>, Status> {
        tracing::debug!("asked to shut down; tasks keep running");
        self.root.cancel();
        Ok(Response::new(Empty {}))
    }
}

/// A stream of what the process prints: nothing, ever.
#[derive(Debug, Clone, Copy)]
pub(super) struct NoopStdio;

#[tonic::async_trait]
impl GrpcStdio for NoopStdio {
    type StreamStdioStream = tokio_stream::Pending<Result<StdioData, Status>>;

    async fn stream_stdio(
        &self,
        _: Request<()>,
    ) -> Result<Response<Self::StreamStdioStream>, Status> {
        Ok(Response::new(tokio_stream::pending()))
    }
}

/// The broker of further connections: it reads and forgets, until the peer closes its side.
#[derive(Debug, Clone, Copy)]
pub(super) struct NoopBroker;

#[tonic::async_trait]
impl GrpcBroker for NoopBroker {
    type StartStreamStream = Pin<Box<dyn Stream<Item = Result<ConnInfo, Status>> + Send>>;

    async fn start_stream(
        &self,
        request: Request<Streaming<ConnInfo>>,
    ) -> Result<Response<Self::StartStreamStream>, Status> {
        let silence = request.into_inner().filter_map(|_| None);
        Ok(Response::new(Box::pin(silence)))
    }
}
