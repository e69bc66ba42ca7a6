//! Parses the JSON that `nomad job run -output` prints, or the bare job in it, into the same tree as HCL. The names are
//! those of Nomad's API; unset values (null, empty, zero, false) are left out, because the API writes every field.

use serde_json::{Map, Value};

use super::tree::{Entry, JobError, Thing};

/// API names that are not simply the HCL name in another case.
const NAMES: [(&str, &str); 25] = [
    ("Affinities", "affinity"),
    ("Actions", "action"),
    ("Artifacts", "artifact"),
    ("CSIPluginConfig", "csi_plugin"),
    ("Constraints", "constraint"),
    ("Devices", "device"),
    ("DiskMB", "disk"),
    ("IOPS", "iops"),
    ("Identities", "identity"),
    ("LogConfig", "logs"),
    ("MemoryMB", "memory"),
    ("MemoryMaxMB", "memory_max"),
    ("NUMA", "numa"),
    ("Networks", "network"),
    ("ParameterizedJob", "parameterized"),
    ("ReschedulePolicy", "reschedule"),
    ("RestartPolicy", "restart"),
    ("ScalingPolicies", "scaling"),
    ("Secrets", "secret"),
    ("Services", "service"),
    ("Spreads", "spread"),
    ("TaskGroups", "group"),
    ("Templates", "template"),
    ("VolumeMounts", "volume_mount"),
    ("Volumes", "volume"),
];

/// Parses a file into one `job` entry.
pub(super) fn read(source: &str) -> Result<Vec<Entry>, JobError> {
    let value: Value = serde_json::from_str(source)
        .map_err(|error| JobError::new(Some(error.line()), format!("not JSON: {error}")))?;
    let Value::Object(mut file) = value else {
        return Err(JobError::new(
            None,
            "not a job: the file contains no JSON object",
        ));
    };
    let job = match file.remove("Job").or_else(|| file.remove("job")) {
        Some(Value::Object(job)) => job,
        Some(_) => return Err(JobError::new(None, "not a job: Job is not an object")),
        None => file,
    };
    if !job.contains_key("TaskGroups") {
        return Err(JobError::new(None, "not a job: there are no TaskGroups"));
    }
    let label = job.get("ID").or_else(|| job.get("Name"));
    let label = label.and_then(Value::as_str).unwrap_or_default().to_owned();
    Ok(vec![block("job", label, &job)?])
}

fn block(name: &str, label: String, object: &Map<String, Value>) -> Result<Entry, JobError> {
    let mut body = Vec::new();
    for (key, value) in object {
        let nested = match (name, key.as_str()) {
            ("job", "TaskGroups") => Some("group"),
            ("group", "Tasks") => Some("task"),
            _ => None,
        };
        let Some(nested) = nested else {
            if !unset(value) {
                body.push(Entry {
                    name: hcl_name(key),
                    line: None,
                    thing: Thing::Value {
                        value: value.clone(),
                        literal: false,
                    },
                });
            }
            continue;
        };
        for item in value.as_array().into_iter().flatten() {
            let object = item.as_object();
            let object = object.ok_or_else(|| {
                JobError::new(
                    None,
                    format!("{key} contains a value that is not an object"),
                )
            })?;
            let label = object
                .get("Name")
                .and_then(Value::as_str)
                .unwrap_or_default();
            body.push(block(nested, label.to_owned(), object)?);
        }
    }
    Ok(Entry {
        name: name.to_owned(),
        line: None,
        thing: Thing::Block {
            labels: vec![label],
            body,
        },
    })
}

fn unset(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(object) => object.is_empty(),
    }
}

/// Converts an API name to the HCL name: `KillTimeout` is `kill_timeout`, and so on.
pub(super) fn hcl_name(key: &str) -> String {
    if let Some((_, name)) = NAMES.iter().find(|(api, _)| *api == key) {
        return (*name).to_owned();
    }
    let mut out = String::new();
    let mut upper_before = true;
    for c in key.chars() {
        if c.is_ascii_uppercase() && !upper_before {
            out.push('_');
        }
        upper_before = c.is_ascii_uppercase();
        out.push(c.to_ascii_lowercase());
    }
    out
}
