//! Decodes msgpack as Nomad's agent writes it into typed values. Every error carries the path of the key it is about.
//! Null and the empty string both mean "not set"; unknown keys are ignored, because the schema and the plugin can be of
//! different versions. Types that the schema can't produce are rejected. This module does not interpret values.

use std::collections::BTreeMap;

use rmpv::Value;

use super::ConfigError;
use super::options::{Kind, Options};

/// Far deeper than any schema nests, and far too shallow to exhaust the stack.
const MAX_DEPTH: usize = 32;

/// Decodes the block in `bytes`; `at` is its name in errors. Zero bytes are an empty block.
pub(super) fn block<T: Options>(bytes: &[u8], at: &str) -> Result<T, ConfigError> {
    let unreadable = |reason: String| ConfigError::new(format!("{at}.*"), reason);
    if bytes.is_empty() {
        return T::read(&Fields::empty(at));
    }
    let mut rest = bytes;
    let value = rmpv::decode::read_value_with_max_depth(&mut rest, MAX_DEPTH)
        .map_err(|error| unreadable(format!("the block is not readable as msgpack: {error}")))?;
    if !rest.is_empty() {
        return Err(unreadable(format!(
            "{} bytes follow the end of the block",
            rest.len()
        )));
    }
    match &value {
        Value::Nil => T::read(&Fields::empty(at)),
        Value::Map(_) => T::read(&Fields::of(&value, at)?),
        other => Err(unreadable(format!("{} is not a block", kind(other)))),
    }
}

/// A type that an option can have.
pub(super) trait Decode: Sized {
    /// Its kind in the option table.
    const KIND: Kind;

    /// Decodes a value that is not null. `at` is its path.
    fn decode(value: &Value, at: &str) -> Result<Self, ConfigError>;

    /// Whether the value means "not set", as null does.
    fn is_unset(&self) -> bool {
        false
    }
}

/// The fields of one block.
#[derive(Debug)]
pub(super) struct Fields<'a> {
    at: &'a str,
    values: BTreeMap<&'a str, &'a Value>,
}

impl<'a> Fields<'a> {
    fn empty(at: &'a str) -> Self {
        Self {
            at,
            values: BTreeMap::new(),
        }
    }

    /// The fields of a map. A key that is not a string is treated as unknown.
    pub(super) fn of(value: &'a Value, at: &'a str) -> Result<Self, ConfigError> {
        let Value::Map(pairs) = value else {
            return Err(mismatch(value, "a block", at));
        };
        let values = pairs
            .iter()
            .filter_map(|(key, value)| Some((key.as_str()?, value)))
            .collect();
        Ok(Self { at, values })
    }

    /// The value of the field, if it is set.
    pub(super) fn optional<T: Decode>(&self, key: &str) -> Result<Option<T>, ConfigError> {
        match self.values.get(key) {
            None | Some(Value::Nil) => Ok(None),
            Some(value) => {
                let read = T::decode(value, &format!("{}.{key}", self.at))?;
                Ok((!read.is_unset()).then_some(read))
            }
        }
    }

    /// The value of the field, or `default` if it is not set.
    pub(super) fn or_default<T: Decode, D: Into<T>>(
        &self,
        key: &str,
        default: D,
    ) -> Result<T, ConfigError> {
        Ok(self.optional(key)?.unwrap_or_else(|| default.into()))
    }

    /// The value of the field; an error if it is not set.
    pub(super) fn required<T: Decode>(&self, key: &str) -> Result<T, ConfigError> {
        self.optional(key)?
            .ok_or_else(|| ConfigError::new(format!("{}.{key}", self.at), "is required"))
    }
}

/// A number of any size or precision, as decimal text: the wire format has four encodings for numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Number(pub(super) String);

impl Decode for bool {
    const KIND: Kind = Kind::Bool;

    fn decode(value: &Value, at: &str) -> Result<Self, ConfigError> {
        value
            .as_bool()
            .ok_or_else(|| mismatch(value, "true or false", at))
    }
}

impl Decode for String {
    const KIND: Kind = Kind::String;

    fn decode(value: &Value, at: &str) -> Result<Self, ConfigError> {
        let Value::String(text) = value else {
            return Err(mismatch(value, "a string", at));
        };
        let text = text
            .as_str()
            .ok_or_else(|| ConfigError::new(at, "the text is not UTF-8"))?;
        if text.contains('\0') {
            return Err(ConfigError::new(at, "a NUL character is not allowed"));
        }
        Ok(text.to_owned())
    }

    fn is_unset(&self) -> bool {
        self.is_empty()
    }
}

impl Number {
    /// The number for a message: its first digits, if there are many.
    pub(super) fn shown(&self) -> String {
        self.0.chars().take(40).collect()
    }
}

impl From<i32> for Number {
    fn from(number: i32) -> Self {
        Self(number.to_string())
    }
}

impl Decode for Number {
    const KIND: Kind = Kind::Number;

    fn decode(value: &Value, at: &str) -> Result<Self, ConfigError> {
        match value {
            Value::Integer(number) => Ok(Self(number.to_string())),
            Value::F32(number) => Ok(Self(number.to_string())),
            Value::F64(number) => Ok(Self(number.to_string())),
            Value::String(text) => match text.as_str() {
                Some(text) if text.parse::<f64>().is_ok() => Ok(Self(text.to_owned())),
                Some(text) => Err(ConfigError::new(
                    at,
                    format!("{} is not a number", quoted(text)),
                )),
                None => Err(ConfigError::new(at, "the text is not UTF-8")),
            },
            other => Err(mismatch(other, "a number", at)),
        }
    }
}

impl Decode for Vec<String> {
    const KIND: Kind = Kind::Strings;

    /// Null elements are skipped.
    fn decode(value: &Value, at: &str) -> Result<Self, ConfigError> {
        let Value::Array(elements) = value else {
            return Err(mismatch(value, "a list of strings", at));
        };
        elements
            .iter()
            .enumerate()
            .filter(|(_, element)| !element.is_nil())
            .map(|(index, element)| String::decode(element, &format!("{at}[{index}]")))
            .collect()
    }
}

impl<T: Options> Decode for Vec<T> {
    const KIND: Kind = Kind::Blocks(T::OPTIONS);

    /// Null elements are skipped. A single block may come without its list.
    fn decode(value: &Value, at: &str) -> Result<Self, ConfigError> {
        let blocks = match value {
            Value::Array(blocks) => blocks.as_slice(),
            block => std::slice::from_ref(block),
        };
        blocks
            .iter()
            .enumerate()
            .filter(|(_, block)| !block.is_nil())
            .map(|(index, block)| T::read(&Fields::of(block, &format!("{at}[{index}]"))?))
            .collect()
    }
}

impl Decode for BTreeMap<String, String> {
    const KIND: Kind = Kind::StringMap;

    fn decode(value: &Value, at: &str) -> Result<Self, ConfigError> {
        merged(value, at, String::decode)
    }
}

impl Decode for BTreeMap<String, Number> {
    const KIND: Kind = Kind::NumberMap;

    fn decode(value: &Value, at: &str) -> Result<Self, ConfigError> {
        merged(value, at, Number::decode)
    }
}

/// Decodes a map, or a list of maps in which later maps override earlier ones. Keys with a null value are skipped.
fn merged<T>(
    value: &Value,
    at: &str,
    element: fn(&Value, &str) -> Result<T, ConfigError>,
) -> Result<BTreeMap<String, T>, ConfigError> {
    let maps = match value {
        Value::Array(maps) => maps.as_slice(),
        map => std::slice::from_ref(map),
    };
    let mut all = BTreeMap::new();
    for map in maps.iter().filter(|map| !map.is_nil()) {
        let Value::Map(pairs) = map else {
            return Err(mismatch(map, "a map", at));
        };
        for (key, value) in pairs.iter().filter(|(_, value)| !value.is_nil()) {
            let key = String::decode(key, at)?;
            let value = element(value, &entry(at, &key))?;
            all.insert(key, value);
        }
    }
    Ok(all)
}

/// The path of one entry of a map.
pub(super) fn entry(at: &str, key: &str) -> String {
    format!("{at}[{}]", quoted(key))
}

/// Quotes a configuration value for a message: on one line, and truncated if it is long.
pub(super) fn quoted(text: &str) -> String {
    const MOST: usize = 200;
    match text.char_indices().nth(MOST) {
        None => format!("{text:?}"),
        Some((end, _)) => format!("{:?}…", &text[..end]),
    }
}

fn mismatch(value: &Value, wanted: &str, at: &str) -> ConfigError {
    ConfigError::new(at, format!("{} is not {wanted}", kind(value)))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Nil => "null",
        Value::Boolean(true) => "true",
        Value::Boolean(false) => "false",
        Value::Integer(_) | Value::F32(_) | Value::F64(_) => "a number",
        Value::String(_) => "a string",
        Value::Binary(_) => "binary data",
        Value::Array(_) => "a list",
        Value::Map(_) => "a map",
        Value::Ext(..) => "an extension value",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    /// Decodes the field `a` of a block from bytes that Nomad's own encoder produced.
    fn field<T: Decode>(hex: &str) -> Result<Option<T>, ConfigError> {
        let bytes: Vec<u8> = (0..hex.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hexadecimal"))
            .collect();
        let value = rmpv::decode::read_value(&mut bytes.as_slice()).expect("a golden row");
        Fields::of(&value, "config")?.optional("a")
    }

    #[test]
    fn scalars_and_lists() {
        assert_eq!(field::<String>("80"), Ok(None));
        assert_eq!(field::<String>("81a161c0"), Ok(None));
        assert_eq!(field::<String>("81a161a135"), Ok(Some("5".into())));
        let long = format!("81a161d928{}", "78".repeat(40));
        assert_eq!(field::<String>(&long), Ok(Some("x".repeat(40))));
        assert_eq!(field::<bool>("81a161c3"), Ok(Some(true)));
        assert_eq!(field::<bool>("81a161c2"), Ok(Some(false)));
        assert_eq!(field::<Vec<String>>("81a161c0"), Ok(None));
        assert_eq!(field::<Vec<String>>("81a16190"), Ok(Some(vec![])));
        assert_eq!(
            field::<Vec<String>>("81a16194a178a131a474727565c0"),
            Ok(Some(["x", "1", "true"].map(String::from).into()))
        );
    }

    #[rstest]
    #[case("2a", "42")]
    #[case("cc80", "128")]
    #[case("ce00010000", "65536")]
    #[case("d0df", "-33")]
    #[case("cf7fffffffffffffff", "9223372036854775807")]
    #[case("cb3ff8000000000000", "1.5")]
    #[case("a3302e31", "0.1")]
    fn numbers(#[case] hex: &str, #[case] text: &str) {
        let numbers: BTreeMap<_, _> = [("k".to_owned(), Number(text.to_owned()))].into();
        assert_eq!(field(&format!("81a1619181a16b{hex}")), Ok(Some(numbers)));
    }

    #[rstest]
    #[case("81a1619182a16ba176a16ea131", &[("k", "v"), ("n", "1")])]
    #[case("81a1619281a16ba17681a17aa177", &[("k", "v"), ("z", "w")])]
    #[case("81a16182a16ba176a16ea131", &[("k", "v"), ("n", "1")])]
    #[case("81a1619281a16ba17681a16ba177", &[("k", "w")])]
    fn maps(#[case] hex: &str, #[case] pairs: &[(&str, &str)]) {
        let pairs: BTreeMap<String, String> = pairs
            .iter()
            .map(|(key, value)| (key.to_string(), value.to_string()))
            .collect();
        assert_eq!(field(hex), Ok(Some(pairs)));
    }

    #[test]
    fn port_map_blocks_are_merged() {
        let expected: BTreeMap<_, _> = [("http", "8080"), ("s", "53")]
            .map(|(label, port)| (label.to_owned(), Number(port.to_owned())))
            .into();
        assert_eq!(
            field("81a1619182a468747470cd1f90a17335"),
            Ok(Some(expected))
        );
    }
}
