//! The services that go-plugin expects of every plugin: shutdown on request, and two streams that Nomad opens and never uses.
//! Ends no task.

use std::pin::Pin;

use tokio_stream::{Stream, StreamExt as _};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::proto::plugin::grpc_broker_server::GrpcBroker;
use crate::proto::plugin::grpc_controller_server::GrpcController;
use crate::proto::plugin::grpc_stdio_server::GrpcStdio;
use crate::proto::plugin::{ConnInfo, Empty, StdioData};

/// Shuts the process down on request by cancelling the root of the token tree.
#[derive(Debug, Clone)]
pub(super) struct Controller {
    pub(super) root: CancellationToken,
}

#[tonic::async_trait]
impl GrpcController for Controller {
    async fn shutdown(&self, _: Request<Empty>) -> Result<Response<Empty>, Status> {
        tracing::debug!("shutdown requested; tasks keep running");
        self.root.cancel();
        Ok(Response::new(Empty {}))
    }
}

/// The stream of the process's output; it never sends anything.
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

/// The connection broker: reads and discards messages until the peer closes its side.
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
