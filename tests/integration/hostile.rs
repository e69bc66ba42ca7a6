//! Replays the corpus of the fuzz targets: inputs that once broke something, or that cover weak spots.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

#[path = "../../fuzz/checks.rs"]
mod checks;

fn fuzz(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz")
        .join(path)
}

/// The file names in a directory, without extension.
fn names(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect()
}

#[test]
fn the_corpus_passes_every_check() {
    for (name, check) in checks::ALL {
        let seeds: Vec<_> = fs::read_dir(fuzz("corpus").join(name)).unwrap().collect();
        assert!(seeds.len() >= 10, "{name} has {} seeds", seeds.len());
        for seed in seeds {
            let path = seed.unwrap().path();
            let bytes = fs::read(&path).unwrap();
            let held = std::panic::catch_unwind(|| check(&bytes));
            assert!(held.is_ok(), "{}", path.display());
        }
    }
}

#[test]
fn every_check_has_a_target_and_a_corpus() {
    let checks: BTreeSet<_> = checks::ALL
        .iter()
        .map(|(name, _)| (*name).to_owned())
        .collect();
    assert_eq!(names(&fuzz("targets")), checks);
    assert_eq!(names(&fuzz("corpus")), checks);
    let manifest = fs::read_to_string(fuzz("Cargo.toml")).unwrap();
    for name in &checks {
        assert!(
            manifest.contains(&format!("path = \"targets/{name}.rs\"")),
            "{name}"
        );
        let target = fs::read_to_string(fuzz("targets").join(name).with_extension("rs")).unwrap();
        assert!(target.contains(&format!("checks::{name}(bytes)")), "{name}");
    }
}

/// The corpus reaches the code behind the decoders: the checks would pass with garbage only, too.
#[test]
fn every_corpus_has_something_that_is_accepted() {
    use nomad_driver_nspawn::config::PluginConfig;
    use nomad_driver_nspawn::container::Exit;
    use nomad_driver_nspawn::state::task_dir::{self, LaunchSpec, Running};
    use nomad_driver_nspawn::supervisor::protocol::{self, IncomingEvent, IncomingRequest};
    use nomad_driver_nspawn::task::handle;
    let any = |name: &str, accepted: &dyn Fn(&[u8]) -> bool| {
        let mut seeds = fs::read_dir(fuzz("corpus").join(name)).unwrap();
        assert!(
            seeds.any(|seed| accepted(&fs::read(seed.unwrap().path()).unwrap())),
            "{name}"
        );
    };
    any("order", &|bytes| {
        task_dir::decode::<LaunchSpec>(bytes).is_ok()
    });
    any("records", &|bytes| {
        task_dir::decode::<Running>(bytes).is_ok()
    });
    any("records", &|bytes| task_dir::decode::<Exit>(bytes).is_ok());
    any("requests", &|bytes| {
        let first = protocol::decode_next::<IncomingRequest>(&mut bytes.to_vec());
        matches!(first, Some(Ok(IncomingRequest::Known(_))))
    });
    any("news", &|bytes| {
        let first = protocol::decode_next::<IncomingEvent>(&mut bytes.to_vec());
        matches!(first, Some(Ok(IncomingEvent::Known(_))))
    });
    any("task_config", &checks::is_container);
    any("task_config", &|bytes| PluginConfig::decode(bytes).is_ok());
    any("handle", &|bytes| {
        bytes.first() == Some(&2) && handle::decode(2, &bytes[1..], "a/t/1").is_ok()
    });
    any("init_order", &|bytes| {
        nspawn_init::parse_spec::<nspawn_init::InitSpec>(bytes).is_ok()
    });
    any("init_packets", &|bytes| {
        packets::decode::<nspawn_init::Request>(bytes).is_ok()
    });
    any("init_packets", &|bytes| {
        packets::decode::<nspawn_init::session_spec::SessionEvent>(bytes).is_ok()
    });
}
