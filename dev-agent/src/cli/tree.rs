//! The content of a job file before it is interpreted: names, values and blocks, each with its line. Both notations,
//! HCL and JSON, are parsed into this.

use serde_json::{Map, Value};

/// One attribute or block.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    /// Its name, as HCL spells it.
    pub(super) name: String,
    /// The line it starts on; JSON has none.
    pub(super) line: Option<usize>,
    /// Its value or block.
    pub(super) thing: Thing,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Thing {
    /// An attribute. `literal` is true if the right side in the file is an object literal.
    Value { value: Value, literal: bool },
    /// A block.
    Block {
        labels: Vec<String>,
        body: Vec<Entry>,
    },
}

/// What is wrong with a job file, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{reason}", place(*.line))]
pub struct JobError {
    /// The line, counted from 1, if it is known.
    pub line: Option<usize>,
    /// What is wrong.
    pub reason: String,
}

impl JobError {
    pub(super) fn new(line: Option<usize>, reason: impl Into<String>) -> Self {
        Self {
            line,
            reason: reason.into(),
        }
    }
}

fn place(line: Option<usize>) -> String {
    line.map(|line| format!("line {line}: "))
        .unwrap_or_default()
}

/// The tree that Nomad stores for a `config` body: every block and every object literal is wrapped in a list, labels
/// become nested objects.
pub(super) fn stored(body: &[Entry]) -> Value {
    let mut out = Map::new();
    for entry in body {
        match &entry.thing {
            Thing::Value { value, literal } if *literal => {
                out.insert(entry.name.clone(), Value::Array(vec![value.clone()]));
            }
            Thing::Value { value, .. } => {
                out.insert(entry.name.clone(), value.clone());
            }
            Thing::Block { labels, body } => {
                let mut value = stored(body);
                for label in labels.iter().rev() {
                    value = Value::Object(
                        [(label.clone(), Value::Array(vec![value]))]
                            .into_iter()
                            .collect(),
                    );
                }
                match out
                    .entry(entry.name.clone())
                    .or_insert_with(|| Value::Array(Vec::new()))
                {
                    Value::Array(list) => list.push(value),
                    // An attribute and a block with the same name: the schema rejects the result.
                    other => *other = Value::Array(vec![other.take(), value]),
                }
            }
        }
    }
    Value::Object(out)
}
