//! Builds `init/`, the program that runs inside containers, so that it can be embedded and the driver ships as one file.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use anyhow::{Context, ensure};

fn main() -> anyhow::Result<()> {
    init().context("building init/, the program that runs inside containers")
}

/// The size limit in bytes. A larger binary means that something has been linked in that does not belong there.
const LARGEST_INIT: usize = 1536 * 1024;

/// Builds the program as `nspawn-init` in `OUT_DIR`. It needs a target directory of its own: the main one is locked by the cargo
/// that waits for this script.
#[expect(
    clippy::disallowed_methods,
    reason = "a build script, not a module of the driver"
)]
fn init() -> anyhow::Result<()> {
    for input in [
        "init/src",
        "init/Cargo.toml",
        "packets/src",
        "packets/Cargo.toml",
        "Cargo.toml",
        "Cargo.lock",
        "rust-toolchain.toml",
    ] {
        println!("cargo::rerun-if-changed={input}");
    }
    let out = PathBuf::from(variable("OUT_DIR")?);
    let target = variable("TARGET")?;
    let directory = out.join("init");
    let mut cargo = Command::new(variable("CARGO")?);
    cargo
        .current_dir(variable("CARGO_MANIFEST_DIR")?)
        .args(["build", "--package", "nspawn-init", "--bin", "nspawn-init"])
        .args(["--profile", "init", "--locked", "--target", &target])
        .arg("--target-dir")
        .arg(&directory)
        // Linked statically, to run in any image, which may have no C library or another one; not relocatable, to need no
        // relocation at start.
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            "-Ctarget-feature=+crt-static\x1f-Crelocation-model=static",
        );
    // The settings of the outer cargo (clippy, coverage, a check) must not apply to this build.
    for outer in ["RUSTC_WORKSPACE_WRAPPER", "RUSTC_WRAPPER", "RUSTFLAGS"] {
        cargo.env_remove(outer);
    }
    let status = cargo.status().context("starting cargo")?;
    ensure!(status.success(), "cargo ended with {status}");
    let built = directory.join(&target).join("init/nspawn-init");
    take(&built, &out.join("nspawn-init")).with_context(|| built.display().to_string())
}

/// Checks the program and copies it to where the sources embed it.
fn take(built: &Path, to: &Path) -> anyhow::Result<()> {
    let bytes = fs::read(built)?;
    ensure!(
        bytes.len() <= LARGEST_INIT,
        "{} bytes, and {LARGEST_INIT} are allowed",
        bytes.len()
    );
    ensure!(
        is_static(&bytes).context("not a 64-bit little-endian ELF file")?,
        "it needs a dynamic loader: the C library was not linked statically"
    );
    Ok(fs::write(to, bytes)?)
}

/// Whether no program header of an ELF file requests a loader. `None` if the file is not a 64-bit little-endian ELF file.
fn is_static(bytes: &[u8]) -> Option<bool> {
    const PT_INTERP: u64 = 3;
    let number = |at: usize, length: usize| -> Option<u64> {
        let field = bytes.get(at..at.checked_add(length)?)?;
        Some(
            field
                .iter()
                .rev()
                .fold(0, |sum, byte| sum << 8 | u64::from(*byte)),
        )
    };
    if !bytes.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    for index in 0..count {
        let at = table.checked_add(index.checked_mul(size)?)?;
        if number(usize::try_from(at).ok()?, 4)? == PT_INTERP {
            return Some(false);
        }
    }
    Some(count > 0)
}

#[expect(
    clippy::disallowed_methods,
    reason = "cargo passes its settings to build scripts in the environment"
)]
fn variable(name: &str) -> anyhow::Result<String> {
    env::var(name).with_context(|| format!("cargo sets no {name}"))
}
