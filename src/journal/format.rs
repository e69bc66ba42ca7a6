//! Entries as lines of a log, in the formats of journalctl that the option `journal_format` names.

use std::fmt::Write as _;

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::entry::Entry;
use crate::container::JournalFormat;

/// The most of a program's or host's name that is shown.
const MAX_WORD_BYTES: usize = 64;
/// A message of many short lines ends here: each is indented as far as the first.
const MAX_LINE_BYTES: usize = 4 * 1024 * 1024;
/// A longer value that is no text is `null`, as for journalctl.
const MAX_BINARY_BYTES: usize = 4096;

/// The entry as one or more lines, each with its end. `None` for an entry without a message, which only `json` can show.
pub fn line(entry: &Entry, format: JournalFormat) -> Option<Vec<u8>> {
    match format {
        JournalFormat::Short => short(entry),
        JournalFormat::Cat => {
            let mut line = entry.get("MESSAGE")?.to_vec();
            line.push(b'\n');
            Some(line)
        }
        JournalFormat::Json => Some(json(entry)),
    }
}

/// Time, host name, program and process of the message, and the message. Lines after the first one are indented as far.
fn short(entry: &Entry) -> Option<Vec<u8>> {
    let message = entry.get("MESSAGE")?;
    let mut prefix = match time(entry.realtime) {
        Some(time) => time.strftime("%b %d %H:%M:%S").to_string(),
        None => "??? ?? ??:??:??".to_owned(),
    };
    let program = entry
        .text("SYSLOG_IDENTIFIER")
        .or_else(|| entry.text("_COMM"));
    let process = entry.text("_PID").or_else(|| entry.text("SYSLOG_PID"));
    let words = [entry.text("_HOSTNAME"), Some(program.unwrap_or("unknown"))];
    for word in words.into_iter().flatten() {
        let _ = write!(prefix, " {}", shortened(word).escape_debug());
    }
    if let Some(process) = process {
        let _ = write!(prefix, "[{}]", shortened(process).escape_debug());
    }
    prefix.push_str(": ");
    let mut line = prefix.clone().into_bytes();
    for (index, part) in message.split(|byte| *byte == b'\n').enumerate() {
        if line.len() > MAX_LINE_BYTES {
            line.extend_from_slice("\n…".as_bytes());
            break;
        }
        if index > 0 {
            line.push(b'\n');
            line.resize(line.len() + prefix.chars().count(), b' ');
        }
        line.extend_from_slice(part);
    }
    line.push(b'\n');
    Some(line)
}

/// The beginning of a word that the container has chosen.
fn shortened(word: &str) -> &str {
    &word[..word.floor_char_boundary(MAX_WORD_BYTES)]
}

fn time(microseconds: u64) -> Option<Timestamp> {
    Timestamp::from_microsecond(i64::try_from(microseconds).ok()?).ok()
}

/// One object with all fields. What is not UTF-8 or contains control characters is an array of numbers, and a field that occurs more than
/// once an array of its values.
fn json(entry: &Entry) -> Vec<u8> {
    let mut object = Map::new();
    let own = [
        ("__REALTIME_TIMESTAMP", entry.realtime.to_string()),
        ("__MONOTONIC_TIMESTAMP", entry.monotonic.to_string()),
        ("_BOOT_ID", hex(entry.boot)),
    ];
    object.extend(own.map(|(name, value)| (name.to_owned(), Value::from(value))));
    for (name, _) in entry.fields() {
        if object.contains_key(name) {
            continue;
        }
        let values = entry.fields().iter().filter(|(key, _)| key == name);
        let mut values: Vec<Value> = values.map(|(_, value)| json_value(value)).collect();
        let value = match values.len() {
            1 => values.remove(0),
            _ => Value::from(values),
        };
        object.insert(name.clone(), value);
    }
    let mut line = Value::from(object).to_string().into_bytes();
    line.push(b'\n');
    line
}

fn json_value(value: &[u8]) -> Value {
    let is_control = |byte: &u8| *byte < b' ' && ![b'\n', b'\t'].contains(byte);
    match std::str::from_utf8(value) {
        Ok(text) if !value.iter().any(is_control) => json!(text),
        _ if value.len() > MAX_BINARY_BYTES => Value::Null,
        _ => json!(value),
    }
}

fn hex(id: [u8; 16]) -> String {
    id.iter().fold(String::with_capacity(32), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::super::entry::Head;
    use super::*;

    fn entry(fields: &[&[u8]]) -> Entry {
        let mut entry = Entry::of(&Head {
            offset: 0,
            size: 0,
            seqnum: 1,
            realtime: 1_700_000_000_123_456,
            monotonic: 42,
            boot: [0xab; 16],
        });
        fields.iter().for_each(|field| entry.add(field));
        entry
    }

    fn text(entry: &Entry, format: JournalFormat) -> String {
        String::from_utf8(line(entry, format).unwrap()).unwrap()
    }

    #[rstest]
    #[case(&["MESSAGE=hello", "_HOSTNAME=web", "SYSLOG_IDENTIFIER=echo", "_PID=7"], "Nov 14 22:13:20 web echo[7]: hello\n")]
    #[case(&["MESSAGE=hello", "_COMM=sh"], "Nov 14 22:13:20 sh: hello\n")]
    #[case(&["MESSAGE=a\nb"], "Nov 14 22:13:20 unknown: a\n                         b\n")]
    #[case(&["MESSAGE=", "SYSLOG_IDENTIFIER=a\nb"], "Nov 14 22:13:20 a\\nb: \n")]
    fn a_short_line_is_that_of_journalctl(#[case] fields: &[&str], #[case] expected: &str) {
        let fields: Vec<&[u8]> = fields.iter().map(|field| field.as_bytes()).collect();
        assert_eq!(text(&entry(&fields), JournalFormat::Short), expected);
    }

    #[test]
    fn a_message_is_written_as_it_is() {
        let line = line(&entry(&[b"MESSAGE=\x1b[1m\xff"]), JournalFormat::Cat);
        assert_eq!(line.unwrap(), b"\x1b[1m\xff\n");
    }

    #[rstest]
    #[case(JournalFormat::Short)]
    #[case(JournalFormat::Cat)]
    fn an_entry_without_a_message_is_no_line(#[case] format: JournalFormat) {
        assert_eq!(line(&entry(&[b"A=1"]), format), None);
    }

    #[test]
    fn what_the_container_writes_does_not_grow() {
        let identifier = format!("SYSLOG_IDENTIFIER={}", "i".repeat(60_000));
        let message = format!("MESSAGE={}", "\n".repeat(1_000_000));
        let entry = entry(&[identifier.as_bytes(), message.as_bytes()]);
        let line = line(&entry, JournalFormat::Short).unwrap();
        assert!(line.len() < MAX_LINE_BYTES + 1000, "{}", line.len());
        let binary = [b"BIN=".to_vec(), vec![1; 10_000]].concat();
        let value: Value =
            serde_json::from_str(&text(&self::entry(&[&binary]), JournalFormat::Json)).unwrap();
        assert_eq!(value["BIN"], Value::Null);
    }

    #[test]
    fn an_object_has_all_fields() {
        let fields: [&[u8]; 5] = [b"MESSAGE=a\"b", b"A=1", b"A=2", b"BIN=\x01", b"_BOOT_ID=x"];
        let line = text(&entry(&fields), JournalFormat::Json);
        let value: Value = serde_json::from_str(&line).unwrap();
        let expected = json!({
            "__REALTIME_TIMESTAMP": "1700000000123456", "__MONOTONIC_TIMESTAMP": "42",
            "_BOOT_ID": "abababababababababababababababab",
            "MESSAGE": "a\"b", "A": ["1", "2"], "BIN": [1],
        });
        assert_eq!(value, expected);
        assert_eq!(line.matches('\n').count(), 1);
    }
}
