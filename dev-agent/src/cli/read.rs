//! Reads the values of single entries of a job file, in either notation.

use std::collections::BTreeMap;
use std::time::Duration;

use job_values::duration;
use serde_json::Value;

use super::json;
use super::tree::{Entry, JobError, Thing, stored};

/// The entries of a block, or of an object in JSON.
pub(super) fn nested(entry: &Entry) -> Result<Vec<Entry>, JobError> {
    match &entry.thing {
        Thing::Block { body, .. } => Ok(body.clone()),
        Thing::Value {
            value: Value::Object(object),
            ..
        } => Ok(object
            .iter()
            .filter(|(_, value)| !matches!(value, Value::Null))
            .map(|(key, value)| Entry {
                name: json::hcl_name(key),
                line: entry.line,
                thing: Thing::Value {
                    value: value.clone(),
                    literal: false,
                },
            })
            .collect()),
        Thing::Value { .. } => Err(JobError::new(
            entry.line,
            format!("{} is not a block", entry.name),
        )),
    }
}

/// The tree that Nomad stores for `config`.
pub(super) fn config(thing: &Thing) -> Option<Value> {
    match thing {
        Thing::Block { body, .. } => Some(stored(body)),
        Thing::Value {
            value: value @ Value::Object(_),
            ..
        } => Some(value.clone()),
        Thing::Value { .. } => None,
    }
}

/// The only label of a block.
pub(super) fn label(entry: &Entry, labels: &[String]) -> Result<String, JobError> {
    match labels {
        [one] if !one.is_empty() => Ok(one.clone()),
        _ => Err(JobError::new(
            entry.line,
            format!("{} has one label, its name", entry.name),
        )),
    }
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
        _ => None,
    }
}

/// A string; null is the empty one.
pub(super) fn string(entry: &Entry) -> Result<String, JobError> {
    let text = match &entry.thing {
        Thing::Value {
            value: Value::Null, ..
        } => Some(String::new()),
        Thing::Value { value, .. } => scalar(value),
        Thing::Block { .. } => None,
    };
    text.ok_or_else(|| JobError::new(entry.line, format!("{} is not a string", entry.name)))
}

/// A whole number, also as a string.
pub(super) fn integer(entry: &Entry) -> Result<i64, JobError> {
    let number = match &entry.thing {
        Thing::Value {
            value: Value::String(text),
            ..
        } => text.parse().ok(),
        Thing::Value { value, .. } => value.as_i64(),
        Thing::Block { .. } => None,
    };
    number.ok_or_else(|| JobError::new(entry.line, format!("{} is not a whole number", entry.name)))
}

/// A duration: Go's notation in HCL, nanoseconds in JSON.
pub(super) fn time(entry: &Entry) -> Result<Duration, JobError> {
    if let Thing::Value { value, .. } = &entry.thing
        && let Some(nanoseconds) = value.as_u64()
    {
        return Ok(Duration::from_nanos(nanoseconds));
    }
    let text = string(entry)?;
    duration::parse(&text)
        .map_err(|error| JobError::new(entry.line, format!("{}: {error}", entry.name)))
}

/// A block or object whose values are strings.
pub(super) fn strings(entry: &Entry) -> Result<BTreeMap<String, String>, JobError> {
    let pairs: Vec<(String, Option<usize>, Option<String>)> = match &entry.thing {
        Thing::Block { body, .. } => body
            .iter()
            .map(|entry| (entry.name.clone(), entry.line, string(entry).ok()))
            .collect(),
        Thing::Value {
            value: Value::Object(object),
            ..
        } => object
            .iter()
            .map(|(key, value)| (key.clone(), entry.line, scalar(value)))
            .collect(),
        Thing::Value { .. } => {
            return Err(JobError::new(
                entry.line,
                format!("{} is not a block", entry.name),
            ));
        }
    };
    pairs
        .into_iter()
        .map(|(key, line, value)| {
            let reason = || JobError::new(line, format!("{}.{key} is not a string", entry.name));
            Ok((key.clone(), value.ok_or_else(reason)?))
        })
        .collect()
}
