//! The base service: plugin info, configuration schema, SetConfig. Nomad also calls it in short-lived processes that run beside
//! others with tasks, so nothing here touches the host.

use tonic::{Request, Response, Status};

use super::stats::Compute;
use super::status::CallError;
use super::{Driver, NAME};
use crate::config::{self, PluginConfig};
use crate::proto::base as proto;
use crate::proto::base::base_plugin_server::BasePlugin;

/// The version of Nomad's plugin interface; this is the only one.
const API_VERSION: &str = "v0.1.0";

#[tonic::async_trait]
impl BasePlugin for Driver {
    async fn plugin_info(
        &self,
        _: Request<proto::PluginInfoRequest>,
    ) -> Result<Response<proto::PluginInfoResponse>, Status> {
        Ok(Response::new(info(env!("CARGO_PKG_VERSION"))))
    }

    async fn config_schema(
        &self,
        _: Request<proto::ConfigSchemaRequest>,
    ) -> Result<Response<proto::ConfigSchemaResponse>, Status> {
        let spec = Some(config::plugin_schema());
        Ok(Response::new(proto::ConfigSchemaResponse { spec }))
    }

    async fn set_config(
        &self,
        request: Request<proto::SetConfigRequest>,
    ) -> Result<Response<proto::SetConfigResponse>, Status> {
        let request = request.into_inner();
        let plugin_config =
            PluginConfig::decode(&request.msgpack_config).map_err(CallError::from)?;
        let topology = request
            .nomad_config
            .and_then(|nomad| nomad.driver?.topology);
        self.configure(plugin_config, topology.as_ref().and_then(Compute::of));
        Ok(Response::new(proto::SetConfigResponse {}))
    }
}

fn info(version: &str) -> proto::PluginInfoResponse {
    proto::PluginInfoResponse {
        r#type: proto::PluginType::Driver.into(),
        plugin_api_versions: vec![API_VERSION.to_owned()],
        plugin_version: version.to_owned(),
        name: NAME.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::tests::hex;
    use prost::Message as _;

    #[test]
    fn the_response_has_the_golden_bytes() {
        let golden = "0802120676302e312e301a05302e312e3022066e737061776e";
        assert_eq!(hex(&info("0.1.0").encode_to_vec()), golden);
    }
}
