//! What must hold of any bytes: no panic, what is accepted comes back as it was when it is written and read again, and
//! everything else is an error with words of one line. The fuzz targets run these, and so does `cargo test` over the corpus.

use std::path::PathBuf;

use nomad_driver_nspawn::config::{self, ImageSearchPath, PluginConfig, TaskContext};
use nomad_driver_nspawn::container::Exit;
use nomad_driver_nspawn::state::task_dir::{self, LaunchSpec, Running};
use nomad_driver_nspawn::supervisor::protocol::{self, IncomingEvent, IncomingRequest};
use nomad_driver_nspawn::task::handle;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// What reads some bytes, and must not fall over them.
type Check = fn(&[u8]);

/// Every check, named like its target and like the directory of its corpus.
pub(crate) const ALL: &[(&str, Check)] = &[
    ("order", order),
    ("records", records),
    ("handle", handle),
    ("requests", requests),
    ("news", news),
    ("init_order", init_order),
    ("init_packets", init_packets),
    ("task_config", task_config),
];

fn is_one_line(error: &dyn std::fmt::Display) {
    let text = error.to_string();
    assert!(!text.is_empty() && !text.contains('\n'), "{text:?}");
}

fn is_kept<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    match task_dir::decode::<T>(bytes) {
        Ok(read) => {
            let written = task_dir::encode(&read).expect("what was read can be written");
            assert_eq!(
                task_dir::decode::<T>(&written).expect("and read again"),
                read
            );
        }
        Err(error) => is_one_line(&error),
    }
}

pub(crate) fn order(bytes: &[u8]) {
    is_kept::<LaunchSpec>(bytes);
}

pub(crate) fn records(bytes: &[u8]) {
    is_kept::<Running>(bytes);
    is_kept::<Exit>(bytes);
}

/// The first byte is the handle's version.
pub(crate) fn handle(bytes: &[u8]) {
    let Some((version, state)) = bytes.split_first() else {
        return;
    };
    match handle::decode(i32::from(*version), state, "a/t/1") {
        Ok(started) => {
            assert_eq!(
                (i32::from(*version), &*started.id),
                (handle::VERSION, "a/t/1")
            );
            let described = handle::decode_description(state);
            let written =
                handle::encode(&started, described.as_ref()).expect("what was read can be written");
            let again = handle::decode(handle::VERSION, &written, "a/t/1");
            assert_eq!(again.expect("and read again"), started);
        }
        Err(error) => is_one_line(&error),
    }
}

/// Reads every line, as one end of a control stream does until the first that is garbage.
fn lines<T: DeserializeOwned>(bytes: &[u8], mut each: impl FnMut(T)) {
    let mut received = bytes.to_vec();
    loop {
        let before = received.len();
        match protocol::decode_next::<T>(&mut received) {
            None => break assert!(received.len() <= protocol::MAX_LINE_BYTES),
            Some(Err(garbage)) => break is_one_line(&garbage),
            Some(Ok(message)) => {
                assert!(received.len() < before);
                each(message);
            }
        }
    }
}

/// What is accepted on a stream is accepted as a packet of its own, if it is not too long for one, and comes back the same.
fn is_kept_message<T: DeserializeOwned + PartialEq + std::fmt::Debug>(line: &[u8], message: T) {
    let again = protocol::decode_next::<T>(&mut line.to_vec());
    assert_eq!(again.as_ref(), Some(&Ok(message)));
    if line.len() <= packets::MAX_PACKET_BYTES {
        assert_eq!(packets::decode::<T>(line).ok(), again.and_then(Result::ok));
    }
}

pub(crate) fn requests(bytes: &[u8]) {
    lines(bytes, |question: IncomingRequest| {
        if let IncomingRequest::Known(request) = question {
            is_kept_message(&protocol::encode(&request), question);
        }
    });
}

pub(crate) fn news(bytes: &[u8]) {
    lines(bytes, |reported: IncomingEvent| {
        if let IncomingEvent::Known(news) = &reported {
            is_kept_message(&protocol::encode(news), reported);
        }
    });
}

pub(crate) fn init_order(bytes: &[u8]) {
    match nspawn_init::parse_spec::<nspawn_init::InitSpec>(bytes) {
        Ok(order) => {
            let again = nspawn_init::parse_spec::<nspawn_init::InitSpec>(&packets::encode(&order));
            assert_eq!(again.expect("what was written is read"), order);
        }
        Err(error) => is_one_line(&error),
    }
}

pub(crate) fn init_packets(bytes: &[u8]) {
    fn is_kept<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
        match packets::decode::<T>(bytes) {
            Ok(message) => {
                assert!(bytes.len() <= packets::MAX_PACKET_BYTES);
                let packet = packets::encode(&message);
                // What is escaped grows on its way back, and then it is too long and says so.
                if packet.len() <= packets::MAX_PACKET_BYTES {
                    let again = packets::decode::<T>(&packet);
                    assert_eq!(again.expect("what was written is read"), message);
                }
            }
            Err(error) => is_one_line(&error),
        }
    }
    is_kept::<nspawn_init::InitEvent>(bytes);
    is_kept::<nspawn_init::Request>(bytes);
    is_kept::<nspawn_init::session_spec::SessionEvent>(bytes);
}

/// The bytes as the job's `config` block and as the operator's `plugin` block.
pub(crate) fn task_config(bytes: &[u8]) {
    is_container(bytes);
}

/// An allocation's directories, which have to be there. Nothing is written in them. The manifest is the fuzzer's or the driver's.
fn allocation() -> PathBuf {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let search_path = ["allocation", "fuzz/allocation"].map(|place| here.join(place));
    search_path
        .into_iter()
        .find(|place| place.is_dir())
        .expect("fuzz/allocation")
}

/// The same, and whether they are a container.
pub(crate) fn is_container(bytes: &[u8]) -> bool {
    let nowhere = PathBuf::from("/nowhere");
    let plugin_config = match PluginConfig::decode(bytes) {
        Ok(config) => config,
        Err(error) => {
            is_one_line(&error);
            PluginConfig::decode(&[]).expect("no block at all is the default")
        }
    };
    let context = TaskContext {
        id: "a/t/1".to_owned(),
        alloc_id: "a".to_owned(),
        task: "t".to_owned(),
        alloc_dir: allocation(),
        ..TaskContext::default()
    };
    let search_path = ImageSearchPath {
        plugin_dir: nowhere,
        machine_dirs: Vec::new(),
    };
    match config::container(bytes, &context, &plugin_config, &search_path) {
        Ok(validated) => {
            assert_eq!(validated.spec.identity.id, "a/t/1");
            true
        }
        Err(error) => {
            is_one_line(&error);
            false
        }
    }
}
