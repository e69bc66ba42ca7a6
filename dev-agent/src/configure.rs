//! Encodes configuration values to the msgpack that a plugin expects, by the schema that the plugin itself returns:
//! defaults, conversions, nulls for absent values, blocks as objects or lists, `${…}` in strings. Supports the part of
//! Nomad's schema language that task drivers use; every other part is rejected by name. Unlike Nomad it does not
//! normalise Unicode.

use std::collections::BTreeMap;

use hcl::edit::expr::{Expression, UnaryOperator};
use hcl::edit::parser::parse_expr;
use rmpv::Value as Packed;
use serde_json::{Map, Value};

use super::variables::Variables;
use nomad_proto::hclspec::{self, spec::Block as Arm};

/// Why a configuration does not fit its schema.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{option}: {reason}")]
pub struct ConfigureError {
    /// The option with its path.
    pub option: String,
    /// The value and what is allowed.
    pub reason: String,
}

/// Encodes `body`, an object, by the schema `spec`. `root` is the name of the block in messages: `config` or `plugin`.
/// Without a schema only an empty body is valid, and it is encoded as zero bytes.
pub fn encode(
    spec: Option<&hclspec::Spec>,
    body: &Value,
    variables: &Variables,
    root: &str,
) -> Result<Vec<u8>, ConfigureError> {
    let empty = Map::new();
    let body = match body {
        Value::Null => &empty,
        Value::Object(body) => body,
        other => return Err(error(root, format!("{other} is not a block"))),
    };
    let Some(spec) = spec else {
        return match body.keys().next() {
            None => Ok(Vec::new()),
            Some(key) => Err(error(
                root,
                format!("{key:?} is set, but no option is accepted"),
            )),
        };
    };
    let encoder = Encoder { variables };
    let value = encoder.body(spec, body, root)?;
    let mut bytes = Vec::new();
    match rmpv::encode::write_value(&mut bytes, &value) {
        Ok(()) => Ok(bytes),
        Err(source) => Err(error(root, source.to_string())),
    }
}

#[derive(Debug)]
struct Encoder<'a> {
    variables: &'a Variables,
}

type Encoded = Result<Packed, ConfigureError>;

impl Encoder<'_> {
    /// Encodes a whole body; everything that the spec does not consume is rejected.
    fn body(&self, spec: &hclspec::Spec, body: &Map<String, Value>, path: &str) -> Encoded {
        let known = inputs(spec, path)?;
        if let Some(key) = body.keys().find(|key| !known.contains(&key.as_str())) {
            let known = known.join(", ");
            return Err(error(
                path,
                format!("unknown option {key:?}; known options are {known}"),
            ));
        }
        self.part(spec, "", body, path)
    }

    /// Encodes what one spec takes from a body. `key` is the name of an attribute whose spec has no name.
    fn part(
        &self,
        spec: &hclspec::Spec,
        key: &str,
        body: &Map<String, Value>,
        path: &str,
    ) -> Encoded {
        match arm(spec, path)? {
            Arm::Object(object) => {
                let attributes: BTreeMap<_, _> = object.attributes.iter().collect();
                let mut out = Vec::with_capacity(attributes.len());
                for (key, spec) in attributes {
                    out.push((key.as_str().into(), self.part(spec, key, body, path)?));
                }
                Ok(Packed::Map(out))
            }
            Arm::Attr(attr) => self.attribute(attr, key, body, path),
            Arm::BlockValue(block) => {
                let name = named(&block.name, key);
                let path = format!("{path}.{name}");
                match blocks(body.get(name), &path)?.as_slice() {
                    [] if block.required => Err(error(&path, "is required".to_owned())),
                    [] => Ok(Packed::Nil),
                    [one] => self.body(nested(block.nested.as_deref(), &path)?, one, &path),
                    _ => Err(error(&path, "is set more than once".to_owned())),
                }
            }
            Arm::BlockList(list) => {
                let name = named(&list.name, key);
                let path = format!("{path}.{name}");
                let given = blocks(body.get(name), &path)?;
                let count = given.len() as u64;
                if count < list.min_items || (list.max_items > 0 && count > list.max_items) {
                    let (min, max) = (list.min_items, list.max_items);
                    return Err(error(
                        &path,
                        format!("occurs {count} times; between {min} and {max} are allowed"),
                    ));
                }
                let spec = nested(list.nested.as_deref(), &path)?;
                let each = given.iter().enumerate();
                let items = each.map(|(i, body)| self.body(spec, body, &format!("{path}[{i}]")));
                Ok(Packed::Array(items.collect::<Result<_, _>>()?))
            }
            Arm::BlockAttrs(attrs) => {
                let name = named(&attrs.name, key);
                let path = format!("{path}.{name}");
                let kind = Type::parse(&attrs.r#type).map_err(|reason| error(&path, reason))?;
                match blocks(body.get(name), &path)?.as_slice() {
                    [] if attrs.required => Err(error(&path, "is required".to_owned())),
                    [] => Ok(Packed::Nil),
                    [one] => self.map(one, &kind, &path),
                    _ => Err(error(&path, "is set more than once".to_owned())),
                }
            }
            Arm::Default(choice) => {
                let primary = nested(choice.primary.as_deref(), path)?;
                match self.part(primary, key, body, path)? {
                    Packed::Nil => {
                        self.part(nested(choice.default.as_deref(), path)?, key, body, path)
                    }
                    given => Ok(given),
                }
            }
            Arm::Literal(literal) => {
                literal_value(&literal.value).map_err(|reason| error(path, reason))
            }
            other => Err(unsupported(other, path)),
        }
    }

    fn attribute(
        &self,
        attr: &hclspec::Attr,
        key: &str,
        body: &Map<String, Value>,
        path: &str,
    ) -> Encoded {
        let name = named(&attr.name, key);
        let path = format!("{path}.{name}");
        let kind = Type::parse(&attr.r#type).map_err(|reason| error(&path, reason))?;
        match body.get(name) {
            // An explicit null satisfies "required" in Nomad, too.
            None if attr.required => Err(error(&path, "is required".to_owned())),
            None => Ok(Packed::Nil),
            Some(value) => self.convert(value, &kind, &path),
        }
    }

    fn convert(&self, value: &Value, kind: &Type, path: &str) -> Encoded {
        let refuse = |shown: String| Err(error(path, format!("{shown} is not a {kind}")));
        // Every string is evaluated as a template first; the result may then be converted to a number or a bool.
        let evaluated;
        let value = match value {
            Value::String(text) => {
                let text = self.variables.evaluate(text);
                evaluated = Value::String(text.map_err(|e| error(path, e.to_string()))?);
                &evaluated
            }
            other => other,
        };
        match (kind, value) {
            (_, Value::Null) => Ok(Packed::Nil),
            (Type::String, Value::String(text)) => Ok(text.as_str().into()),
            (Type::String, Value::Bool(flag)) => Ok(flag.to_string().into()),
            (Type::String, Value::Number(number)) => Ok(decimal(number).into()),
            (Type::Bool, Value::Bool(flag)) => Ok(Packed::Boolean(*flag)),
            (Type::Bool, Value::String(text)) => match text.as_str() {
                "true" | "1" => Ok(Packed::Boolean(true)),
                "false" | "0" => Ok(Packed::Boolean(false)),
                _ => refuse(value.to_string()),
            },
            (Type::Number, Value::Number(found)) => Ok(number(found)),
            (Type::Number, Value::String(text)) => match parse_number(text) {
                Some(found) => Ok(number(&found)),
                None => refuse(value.to_string()),
            },
            (Type::List(kind), Value::Array(items)) => {
                let each = items.iter().enumerate();
                let items = each.map(|(i, item)| self.convert(item, kind, &format!("{path}[{i}]")));
                Ok(Packed::Array(items.collect::<Result<_, _>>()?))
            }
            (Type::Map(kind), Value::Object(pairs)) => self.map(pairs, kind, path),
            _ => refuse(value.to_string()),
        }
    }

    fn map(&self, pairs: &Map<String, Value>, kind: &Type, path: &str) -> Encoded {
        let mut out = BTreeMap::new();
        for (key, value) in pairs {
            let path = format!("{path}[{key:?}]");
            let key = self.variables.evaluate(key);
            let key = key.map_err(|e| error(&path, e.to_string()))?;
            out.insert(key, self.convert(value, kind, &path)?);
        }
        let pairs = out.into_iter().map(|(key, value)| (key.into(), value));
        Ok(Packed::Map(pairs.collect()))
    }
}

/// A type expression, limited to what schemas for job files can use.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Type {
    String,
    Number,
    Bool,
    List(Box<Type>),
    Map(Box<Type>),
}

impl Type {
    fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let inside = |name: &str| {
            text.strip_prefix(name)?
                .trim()
                .strip_prefix('(')?
                .strip_suffix(')')
        };
        match text {
            "string" => Ok(Self::String),
            "number" => Ok(Self::Number),
            "bool" => Ok(Self::Bool),
            _ => {
                if let Some(kind) = inside("list") {
                    Ok(Self::List(Box::new(Self::parse(kind)?)))
                } else if let Some(kind) = inside("map") {
                    Ok(Self::Map(Box::new(Self::parse(kind)?)))
                } else {
                    Err(format!(
                        "the schema's type {text:?} is not supported by this host"
                    ))
                }
            }
        }
    }
}

impl std::fmt::Display for Type {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::String => f.write_str("string"),
            Self::Number => f.write_str("number"),
            Self::Bool => f.write_str("bool"),
            Self::List(kind) => write!(f, "list({kind})"),
            Self::Map(kind) => write!(f, "map({kind})"),
        }
    }
}

fn error(option: &str, reason: String) -> ConfigureError {
    ConfigureError {
        option: option.to_owned(),
        reason,
    }
}

fn unsupported(arm: &Arm, path: &str) -> ConfigureError {
    let name = match arm {
        Arm::Array(_) => "array",
        Arm::BlockSet(_) => "block_set",
        Arm::BlockMap(_) => "block_map",
        _ => "arm",
    };
    error(
        path,
        format!("the schema's {name} is not supported by this host"),
    )
}

fn arm<'a>(spec: &'a hclspec::Spec, path: &str) -> Result<&'a Arm, ConfigureError> {
    spec.block
        .as_ref()
        .ok_or_else(|| error(path, "the schema is empty here".to_owned()))
}

fn nested<'a>(
    spec: Option<&'a hclspec::Spec>,
    path: &str,
) -> Result<&'a hclspec::Spec, ConfigureError> {
    spec.ok_or_else(|| error(path, "the schema has no nested block here".to_owned()))
}

fn named<'a>(name: &'a str, key: &'a str) -> &'a str {
    if name.is_empty() { key } else { name }
}

/// The names that a spec takes from its body.
fn inputs<'a>(spec: &'a hclspec::Spec, path: &str) -> Result<Vec<&'a str>, ConfigureError> {
    fn collect<'a>(
        spec: &'a hclspec::Spec,
        key: &'a str,
        path: &str,
        out: &mut Vec<&'a str>,
    ) -> Result<(), ConfigureError> {
        match arm(spec, path)? {
            Arm::Object(object) => {
                for (key, spec) in &object.attributes {
                    collect(spec, key, path, out)?;
                }
            }
            Arm::Attr(attr) => out.push(named(&attr.name, key)),
            Arm::BlockValue(block) => out.push(named(&block.name, key)),
            Arm::BlockAttrs(block) => out.push(named(&block.name, key)),
            Arm::BlockList(block) => out.push(named(&block.name, key)),
            Arm::Default(choice) => {
                collect(nested(choice.primary.as_deref(), path)?, key, path, out)?
            }
            Arm::Literal(_) => {}
            other => return Err(unsupported(other, path)),
        }
        Ok(())
    }
    let mut out = Vec::new();
    collect(spec, "", path, &mut out)?;
    out.sort_unstable();
    Ok(out)
}

/// The blocks with one name: an object, a list of objects, or none.
fn blocks<'a>(
    value: Option<&'a Value>,
    path: &str,
) -> Result<Vec<&'a Map<String, Value>>, ConfigureError> {
    let not = |value: &Value| error(path, format!("{value} is not a block"));
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Object(one)) => Ok(vec![one]),
        Some(Value::Array(list)) => list
            .iter()
            .map(|item| item.as_object().ok_or_else(|| not(item)))
            .collect(),
        Some(other) => Err(not(other)),
    }
}

fn number(value: &serde_json::Number) -> Packed {
    if let Some(integer) = value.as_i64() {
        return integer.into();
    }
    let Some(float) = value.as_f64().filter(|_| value.is_f64()) else {
        return value.to_string().into();
    };
    let text = float.to_string();
    if let Ok(integer) = text.parse::<i64>() {
        return integer.into();
    }
    // The shortest text of a float is its exact value only if the float can represent the number that was written.
    let exact = format!("{float:.1074}");
    if exact.trim_end_matches('0').trim_end_matches('.') == text {
        Packed::F64(float)
    } else {
        text.into()
    }
}

fn decimal(value: &serde_json::Number) -> String {
    match value.as_f64().filter(|_| value.is_f64()) {
        Some(float) => float.to_string(),
        None => value.to_string(),
    }
}

fn parse_number(text: &str) -> Option<serde_json::Number> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    if !digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    if let Ok(integer) = text.parse::<i64>() {
        return Some(integer.into());
    }
    if !digits.contains(|c: char| c.is_ascii_digit()) {
        return None;
    }
    serde_json::Number::from_f64(text.parse().ok()?)
}

/// A default in the schema: the HCL source text of a plain value.
fn literal_value(text: &str) -> Result<Packed, String> {
    let refuse = || format!("the schema's default {text:?} is not supported by this host");
    let expression = parse_expr(text).map_err(|_| refuse())?;
    plain(&expression).ok_or_else(refuse)
}

fn plain(expression: &Expression) -> Option<Packed> {
    Some(match expression {
        Expression::Null(_) => Packed::Nil,
        Expression::Bool(flag) => Packed::Boolean(*flag.value()),
        Expression::String(text) => text.as_str().into(),
        Expression::Number(found) => number(
            &serde_json::to_value(found.value())
                .ok()?
                .as_number()?
                .clone(),
        ),
        Expression::UnaryOp(op) if *op.operator.value() == UnaryOperator::Neg => {
            let found = serde_json::to_value(op.expr.as_number()?).ok()?;
            let negative = parse_number(&format!("-{found}"))?;
            number(&negative)
        }
        Expression::Array(items) => Packed::Array(items.iter().map(plain).collect::<Option<_>>()?),
        Expression::Object(object) => {
            let mut pairs = BTreeMap::new();
            for (key, value) in object {
                let key = match key {
                    hcl::edit::expr::ObjectKey::Ident(name) => name.as_str().to_owned(),
                    hcl::edit::expr::ObjectKey::Expression(key) => key.as_str()?.to_owned(),
                };
                pairs.insert(key, plain(value.expr())?);
            }
            let pairs = pairs.into_iter().map(|(key, value)| (key.into(), value));
            Packed::Map(pairs.collect())
        }
        _ => return None,
    })
}

#[cfg(test)]
#[path = "configure_tests.rs"]
mod tests;
