//! Compiles `proto/` to Rust with protox, so that the machine needs no `protoc`.

fn main() -> anyhow::Result<()> {
    println!("cargo::rerun-if-changed=proto");
    let files = [
        "base.proto",
        "driver.proto",
        "go_plugin.proto",
        "rpc_status.proto",
    ];
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure()
        .build_transport(false)
        .compile_fds(descriptors)?;
    Ok(())
}
