//! Parses the lines that a plugin writes to stderr as Nomad's agent does: hclog's JSON, or raw text. Prints nothing.

use std::fmt;

use serde_json::{Map, Value};

/// The severity of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the levels of the format")]
pub enum Level {
    Trace,
    Debug,
    Info,
    Warn,
    Error,
}

/// One line of a plugin's log.
#[derive(Debug, Clone, PartialEq)]
pub struct LogLine {
    /// The severity. A line that is not hclog's JSON counts as debug unless it starts with a level in brackets.
    pub level: Level,
    /// The text, or the whole raw line.
    pub message: String,
    /// The other key-value pairs, without the time and the keys that start with `@`.
    pub pairs: Map<String, Value>,
    /// Whether the line was hclog's JSON.
    pub structured: bool,
}

impl LogLine {
    /// Parses one line without its line break.
    pub fn parse(line: &str) -> Self {
        let structured = || {
            let Ok(Value::Object(mut pairs)) = serde_json::from_str(line) else {
                return None;
            };
            let level = level(pairs.get("@level")?.as_str()?)?;
            let message = pairs.get("@message")?.as_str()?.to_owned();
            pairs.retain(|key, _| !key.starts_with('@'));
            Some(Self {
                level,
                message,
                pairs,
                structured: true,
            })
        };
        structured().unwrap_or_else(|| Self {
            level: bracketed(line).unwrap_or(Level::Debug),
            message: line.to_owned(),
            pairs: Map::new(),
            structured: false,
        })
    }
}

impl fmt::Display for LogLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        for (key, value) in &self.pairs {
            match value {
                Value::String(text) => write!(f, " {key}={text:?}")?,
                other => write!(f, " {key}={other}")?,
            }
        }
        Ok(())
    }
}

fn level(word: &str) -> Option<Level> {
    Some(match word.to_ascii_lowercase().as_str() {
        "trace" => Level::Trace,
        "debug" => Level::Debug,
        "info" => Level::Info,
        "warn" => Level::Warn,
        "error" => Level::Error,
        _ => return None,
    })
}

fn bracketed(line: &str) -> Option<Level> {
    if line.starts_with("panic: ") || line.starts_with("fatal error: ") {
        return Some(Level::Error);
    }
    let (word, _) = line.strip_prefix('[')?.split_once(']')?;
    level(word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case(
        r#"{"@level":"warn","@message":"m","@timestamp":"t","a":1}"#,
        Level::Warn,
        "m a=1"
    )]
    #[case(r#"{"@level":"WARN","@message":"m"}"#, Level::Warn, "m")]
    #[case(
        r#"{"@level":"off","@message":"m"}"#,
        Level::Debug,
        r#"{"@level":"off","@message":"m"}"#
    )]
    #[case("[ERROR] x", Level::Error, "[ERROR] x")]
    #[case("panic: x", Level::Error, "panic: x")]
    #[case("x", Level::Debug, "x")]
    fn lines_are_read_as_the_agent_does(
        #[case] line: &str,
        #[case] level: Level,
        #[case] text: &str,
    ) {
        let read = LogLine::parse(line);
        assert_eq!((read.level, read.to_string().as_str()), (level, text));
    }
}
