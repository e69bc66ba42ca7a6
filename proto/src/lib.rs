//! The protocol between a Nomad agent and a task driver: the generated protobuf types under short names. The only file that names
//! generated code; it adds no behaviour.
//!
//! The module tree below follows the proto packages, because the generated code refers to other packages by relative paths.
#![expect(
    missing_docs,
    unreachable_pub,
    reason = "the messages are documented in the .proto files"
)]
#![expect(clippy::allow_attributes, reason = "generated code contains its own")]

mod codec;

mod generated {
    pub mod hashicorp {
        pub mod nomad {
            pub mod plugins {
                pub mod base {
                    pub mod proto {
                        tonic::include_proto!("hashicorp.nomad.plugins.base.proto");
                    }
                }
                pub mod drivers {
                    pub mod proto {
                        tonic::include_proto!("hashicorp.nomad.plugins.drivers.proto");
                    }
                }
                pub mod shared {
                    pub mod hclspec {
                        tonic::include_proto!("hashicorp.nomad.plugins.shared.hclspec");
                    }
                    pub mod structs {
                        tonic::include_proto!("hashicorp.nomad.plugins.shared.structs");
                    }
                }
            }
        }
    }
    pub mod plugin {
        tonic::include_proto!("plugin");
    }
    pub mod google {
        pub mod rpc {
            tonic::include_proto!("google.rpc");
        }
    }
}

/// The rich error (`google.rpc.Status`) of a gRPC trailer.
pub use generated::google::rpc;
/// The base service, implemented by every Nomad plugin.
pub use generated::hashicorp::nomad::plugins::base::proto as base;
/// The task driver service.
pub use generated::hashicorp::nomad::plugins::drivers::proto as driver;
/// The language of configuration schemas.
pub use generated::hashicorp::nomad::plugins::shared::hclspec;
/// Attribute values and the `RecoverableError` detail.
pub use generated::hashicorp::nomad::plugins::shared::structs;
/// go-plugin's own services.
pub use generated::plugin;
