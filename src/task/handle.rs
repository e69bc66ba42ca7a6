//! The driver state that Nomad stores in the task handle between plugin processes. It is written once, read by this and later
//! versions, and not trusted: it names a start, and the backend checks that what it finds is that start. Rejects every version
//! and schema it does not know.
//!
//! To change the format: add a schema number, keep reading the old ones, and consider what an older driver does with the new one.

use serde::{Deserialize, Serialize};

use crate::container::{Description, Started};

/// The version of our handles. Version 1 is the Go driver's.
pub const VERSION: i32 = 2;
/// The schema of the state within this version.
const SCHEMA: u32 = 1;

/// Why a handle can't be used.
#[derive(Debug, thiserror::Error)]
pub enum HandleError {
    /// A handle of the Go driver.
    #[error(
        "the task was started by the Go driver for systemd-nspawn (handle version 1) and can't be recovered; Nomad starts it again"
    )]
    GoDriver,
    /// A version that no released driver wrote, or a later one.
    #[error("handle version {0} is not supported: this driver reads version {VERSION}")]
    Version(i32),
    /// A later schema of the state.
    #[error("state schema {0} is newer than schema {SCHEMA} of this driver")]
    Schema(u32),
    /// The state can't be parsed. Reports the position but not the content, which may be anything.
    #[error("the stored state can't be parsed (line {line} column {column})")]
    Damaged {
        /// From 1; 0 if unknown.
        line: usize,
        /// In bytes.
        column: usize,
    },
    /// The state belongs to another start.
    #[error("the stored state belongs to {state:?}, not to {handle:?}")]
    Mismatch {
        /// The id in the state.
        state: String,
        /// The id in the handle's configuration.
        handle: String,
    },
    /// The state can't be serialized.
    #[error("the state can't be encoded")]
    Unwritable(#[source] serde_json::Error),
}

#[derive(Serialize)]
struct Written<'a> {
    schema: u32,
    started: &'a Started,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<&'a Description>,
}

#[derive(Deserialize)]
struct Schema {
    schema: u32,
}

#[derive(Deserialize)]
struct Read {
    started: Started,
}

#[derive(Deserialize)]
struct Described {
    description: Description,
}

/// Serializes the state that Nomad stores.
pub fn encode(
    started: &Started,
    description: Option<&Description>,
) -> Result<Vec<u8>, HandleError> {
    let written = Written {
        schema: SCHEMA,
        started,
        description,
    };
    serde_json::to_vec(&written).map_err(HandleError::Unwritable)
}

/// Parses the state that Nomad stored in a handle of this `version` for the start `id`.
pub fn decode(version: i32, state: &[u8], id: &str) -> Result<Started, HandleError> {
    match version {
        VERSION => {}
        1 => return Err(HandleError::GoDriver),
        other => return Err(HandleError::Version(other)),
    }
    let Schema { schema } = serde_json::from_slice(state).map_err(damaged)?;
    if schema != SCHEMA {
        return Err(HandleError::Schema(schema));
    }
    let Read { started } = serde_json::from_slice(state).map_err(damaged)?;
    if started.id != id {
        return Err(HandleError::Mismatch {
            state: started.id,
            handle: id.to_owned(),
        });
    }
    Ok(started)
}

/// The description in a state that [`decode`] accepts. `None` if an earlier driver wrote it.
pub fn decode_description(state: &[u8]) -> Option<Description> {
    let described: Option<Described> = serde_json::from_slice(state).ok();
    described.map(|described| described.description)
}

fn damaged(error: serde_json::Error) -> HandleError {
    HandleError::Damaged {
        line: error.line(),
        column: error.column(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::{Mode, Process};
    use crate::task::tests::started;
    use proptest::prelude::*;
    use std::path::PathBuf;
    use std::time::{Duration, SystemTime};

    #[test]
    fn a_handle_is_read_back() {
        let started = started("a/t/1");
        let bytes = encode(&started, None).unwrap();
        assert_eq!(decode(VERSION, &bytes, "a/t/1").unwrap(), started);
    }

    /// State as written by released drivers. Never change a line; add one when the format changes.
    const RELEASED: &[&str] = &[
        r#"{"schema":1,"started":{"id":"a/t/1","machine":"t-a","state":"/run/nomad-driver-nspawn/x","boot":"11111111-2222-3333-4444-555555555555","supervisor":{"pid":10,"start":100},"leader":{"pid":11,"start":101},"mode":"Plain","cgroup":"/sys/fs/cgroup/x","started_at":{"secs_since_epoch":1700000000,"nanos_since_epoch":123000000},"notes":["a note"]}}"#,
    ];

    #[test]
    fn every_released_format_is_read_and_the_latest_is_written() {
        for state in RELEASED {
            let read = decode(VERSION, state.as_bytes(), "a/t/1").unwrap();
            assert_eq!(read, started("a/t/1"));
        }
        let written = String::from_utf8(encode(&started("a/t/1"), None).unwrap()).unwrap();
        assert_eq!(Some(written.as_str()), RELEASED.last().copied());
    }

    #[test]
    fn a_description_is_kept_beside_the_start() {
        let description = Description {
            image: "/srv/web".to_owned(),
            command: "web".to_owned(),
            network: "host".to_owned(),
        };
        let bytes = encode(&started("i"), Some(&description)).unwrap();
        assert_eq!(decode(VERSION, &bytes, "i").unwrap(), started("i"));
        assert_eq!(decode_description(&bytes), Some(description));
        for state in [RELEASED[0].as_bytes(), b"", b"{\"description\":7}"] {
            assert_eq!(decode_description(state), None);
        }
    }

    #[test]
    fn a_field_of_a_later_driver_is_ignored() {
        let mut value: serde_json::Value =
            serde_json::from_slice(&encode(&started("i"), None).unwrap()).unwrap();
        value["later"] = 1.into();
        value["started"]["later"] = 1.into();
        assert!(decode(VERSION, value.to_string().as_bytes(), "i").is_ok());
    }

    #[test]
    fn a_foreign_handle_is_refused_by_name() {
        let bytes = encode(&started("a/t/1"), None).unwrap();
        assert!(matches!(
            decode(1, &bytes, "a/t/1"),
            Err(HandleError::GoDriver)
        ));
        for version in [0, 3, -1, i32::MAX] {
            assert!(
                matches!(decode(version, &bytes, "a/t/1"), Err(HandleError::Version(v)) if v == version)
            );
        }
        assert!(matches!(
            decode(VERSION, &bytes, "b/t/1"),
            Err(HandleError::Mismatch { .. })
        ));
        assert!(matches!(
            decode(VERSION, br#"{"schema":2}"#, "i"),
            Err(HandleError::Schema(2))
        ));
        assert!(matches!(
            decode(VERSION, b"", "i"),
            Err(HandleError::Damaged { .. })
        ));
    }

    fn any_started() -> impl Strategy<Value = Started> {
        let process =
            || (any::<i32>(), any::<u64>()).prop_map(|(pid, start)| Process { pid, start });
        let names: [_; 4] = std::array::from_fn(|_| any::<String>());
        let modes = proptest::sample::select(vec![Mode::Plain, Mode::ProcessTwo, Mode::Boot]);
        let moment = (0..1u64 << 40, 0..1_000_000_000u32);
        let filters = any::<Option<u32>>();
        let rest = (
            any::<Option<String>>(),
            filters,
            moment,
            any::<Vec<String>>(),
        );
        (names, process(), process(), modes, rest).prop_map(
            |([id, machine, state, boot], supervisor, leader, mode, rest)| {
                let (cgroup, filters, (seconds, nanos), notes) = rest;
                Started {
                    id,
                    machine,
                    state: PathBuf::from(state),
                    boot,
                    supervisor,
                    leader,
                    mode,
                    cgroup: cgroup.map(PathBuf::from),
                    controllers: std::collections::BTreeMap::new(),
                    filters,
                    network: None,
                    started_at: SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos),
                    notes,
                }
            },
        )
    }

    proptest! {
        #[test]
        fn every_handle_is_read_back(started in any_started()) {
            let bytes = encode(&started, None).unwrap();
            let id = started.id.clone();
            prop_assert_eq!(decode(VERSION, &bytes, &id).unwrap(), started);
        }

        #[test]
        fn no_bytes_panic(version in 0..4i32, bytes: Vec<u8>, cut in 0..300usize) {
            let _ = decode(version, &bytes, "i");
            let whole = encode(&started("i"), None).unwrap();
            let cut = cut % whole.len();
            prop_assert!(decode(VERSION, &whole[..cut], "i").is_err());
        }

        #[test]
        fn a_changed_byte_is_no_panic_and_no_other_task(at: prop::sample::Index, byte: u8) {
            let mut state = encode(&started("a/t/1"), None).unwrap();
            let at = at.index(state.len());
            state[at] = byte;
            match decode(VERSION, &state, "a/t/1") {
                Ok(read) => prop_assert_eq!(read.id, "a/t/1"),
                Err(error) => prop_assert!(!error.to_string().contains('\n'), "{}", error),
            }
        }
    }
}
