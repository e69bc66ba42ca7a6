//! Compiles the `.proto` files of this directory to Rust with protox, so that the build machine needs no `protoc`.

fn main() -> anyhow::Result<()> {
    let files = [
        "base.proto",
        "driver.proto",
        "go_plugin.proto",
        "rpc_status.proto",
    ];
    for read in files.iter().chain(&["hclspec.proto", "structs.proto"]) {
        println!("cargo::rerun-if-changed={read}");
    }
    let descriptors = protox::compile(files, ["."])?;
    tonic_prost_build::configure()
        .build_transport(false)
        .codec_path("crate::codec::SmallBuffers")
        .compile_fds(descriptors)?;
    Ok(())
}
