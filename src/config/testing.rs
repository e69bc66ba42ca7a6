//! Test support for this module: converts HCL as in a job file, by a schema, to the bytes that Nomad's agent sends.

use std::path::{Path, PathBuf};

use rmpv::Value;

use crate::proto::hclspec::{Spec, spec};

use super::{ConfigError, ImageSearchPath, PluginConfig, TaskContext};

/// The msgpack of the body of a `config` block.
pub(super) fn bytes(schema: &Spec, body: &str) -> Vec<u8> {
    let tree: hcl::Value = hcl::from_str(body).expect("the sample is HCL");
    encode(&object(schema, &tree).expect("the sample fits the schema"))
}

pub(super) fn encode(value: &Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    rmpv::encode::write_value(&mut bytes, value).expect("memory can be written");
    bytes
}

/// What Nomad's converter makes of a body, or why it rejects it.
pub(super) fn object(schema: &Spec, tree: &hcl::Value) -> Result<Value, String> {
    let Some(spec::Block::Object(object)) = &schema.block else {
        return Err("the schema is not an object".into());
    };
    let body = tree.as_object().ok_or("not a block")?;
    if let Some(extra) = body
        .keys()
        .find(|key| !object.attributes.contains_key(*key))
    {
        return Err(format!("no option is called {extra}"));
    }
    let mut names: Vec<_> = object.attributes.keys().collect();
    names.sort();
    names
        .into_iter()
        .map(|name| {
            let value = field(&object.attributes[name], body.get(name))?;
            Ok((Value::from(name.as_str()), value))
        })
        .collect::<Result<_, String>>()
        .map(Value::Map)
}

fn field(schema: &Spec, value: Option<&hcl::Value>) -> Result<Value, String> {
    let value = value.filter(|value| !value.is_null());
    match schema.block.as_ref().ok_or("an arm is not set")? {
        spec::Block::Attr(attr) => match value {
            None if attr.required => Err(format!("{} is missing", attr.name)),
            None => Ok(Value::Nil),
            Some(value) => convert(&attr.r#type, value),
        },
        spec::Block::Default(fallback) => {
            let primary = fallback.primary.as_ref().ok_or("no primary")?;
            match field(primary, value)? {
                Value::Nil => field(fallback.default.as_ref().ok_or("no default")?, None),
                set => Ok(set),
            }
        }
        spec::Block::Literal(literal) => {
            let line: hcl::Value =
                hcl::from_str(&format!("x = {}", literal.value)).map_err(|e| e.to_string())?;
            Ok(plain(
                line.as_object()
                    .and_then(|body| body.get("x"))
                    .ok_or("no value")?,
            ))
        }
        spec::Block::BlockValue(block) => match value {
            None => Ok(Value::Nil),
            Some(value) => object(block.nested.as_ref().ok_or("no nested")?, value),
        },
        spec::Block::BlockList(list) => {
            let nested = list.nested.as_ref().ok_or("no nested")?;
            let blocks = match value {
                None => &[],
                Some(hcl::Value::Array(blocks)) => blocks.as_slice(),
                Some(block) => std::slice::from_ref(block),
            };
            let blocks = blocks.iter().map(|block| object(nested, block));
            Ok(Value::Array(blocks.collect::<Result<_, _>>()?))
        }
        other => Err(format!("{other:?} is not used")),
    }
}

fn convert(kind: &str, value: &hcl::Value) -> Result<Value, String> {
    let element = |prefix| {
        kind.strip_prefix(prefix)
            .and_then(|rest| rest.strip_suffix(')'))
    };
    let refused = || Err(format!("{value:?} is not {kind}"));
    match value {
        hcl::Value::Object(map) => match (element("list(map("), element("map(")) {
            // A `{ … }` of a job file arrives in a list.
            (Some(_), _) => Ok(Value::Array(vec![convert(
                element("list(").unwrap_or_default(),
                value,
            )?])),
            (None, Some(inner)) => map
                .iter()
                .map(|(key, value)| Ok((Value::from(key.as_str()), convert(inner, value)?)))
                .collect::<Result<_, String>>()
                .map(Value::Map),
            (None, None) => refused(),
        },
        hcl::Value::Array(list) => match element("list(") {
            Some(inner) => list
                .iter()
                .map(|value| convert(inner, value))
                .collect::<Result<_, String>>()
                .map(Value::Array),
            None => refused(),
        },
        hcl::Value::Bool(_) if kind == "bool" => Ok(plain(value)),
        hcl::Value::Number(_) if kind == "number" => Ok(plain(value)),
        hcl::Value::String(_) if kind == "string" => Ok(plain(value)),
        hcl::Value::Number(number) if kind == "string" => Ok(number.to_string().into()),
        _ => refused(),
    }
}

fn plain(value: &hcl::Value) -> Value {
    match value {
        hcl::Value::Bool(flag) => Value::from(*flag),
        hcl::Value::Number(number) => match number.as_i64() {
            Some(whole) => Value::from(whole),
            None => number.as_f64().map_or(Value::Nil, Value::from),
        },
        hcl::Value::String(text) => Value::from(text.as_str()),
        _ => Value::Nil,
    }
}

/// A host with an allocation, images and everything else, in a temporary directory of its own.
pub(super) struct TestHost {
    directory: tempfile::TempDir,
    pub(super) context: TaskContext,
    pub(super) plugin_config: PluginConfig,
    pub(super) search_path: ImageSearchPath,
}

pub(super) const ALLOC: &str = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0";

impl TestHost {
    /// A host with the images `tree` (to run commands in) and `system` (to boot), the task `web` and a directory
    /// `data`.
    pub(super) fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory for the test");
        let top = directory.path().canonicalize().expect("it exists");
        let alloc = top.join("alloc").join(ALLOC);
        let host = Self {
            context: TaskContext {
                id: format!("{ALLOC}/web/00c0ffee"),
                task: "web".into(),
                alloc_id: ALLOC.into(),
                alloc_dir: alloc.clone(),
                ..TaskContext::default()
            },
            plugin_config: PluginConfig::decode(&[]).expect("no bytes are an empty block"),
            search_path: ImageSearchPath {
                plugin_dir: top.join("plugins"),
                machine_dirs: vec![top.join("machines")],
            },
            directory,
        };
        for directory in [
            "alloc",
            "web/local",
            "web/secrets",
            "web/private",
            "db/secrets",
            "db/local",
        ] {
            host.make(format!("{}/{directory}/.", alloc.display()));
        }
        for directory in [
            "plugins/tree/usr/.",
            "plugins/empty/.",
            "machines/.",
            "data/.",
        ] {
            host.make(directory);
        }
        host.make("plugins/system/usr/lib/os-release");
        host.make("plugins/system/usr/lib/systemd/systemd");
        host
    }

    pub(super) fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let top = self.directory.path().canonicalize().expect("it exists");
        top.join(path)
    }

    /// Makes a file, or a directory if the path ends in `/.`.
    pub(super) fn make(&self, path: impl AsRef<Path>) {
        let path = path.as_ref().to_string_lossy();
        match path.strip_suffix("/.") {
            Some(directory) => std::fs::create_dir_all(self.path(directory)).expect("made"),
            None => {
                let file = self.path(&*path);
                std::fs::create_dir_all(file.parent().expect("a directory")).expect("made");
                std::fs::write(file, "x").expect("written");
            }
        }
    }

    pub(super) fn link(&self, path: &str, target: &str) {
        std::os::unix::fs::symlink(target, self.path(path)).expect("linked");
    }

    pub(super) fn raw(&self, bytes: &[u8]) -> Result<super::Validated, ConfigError> {
        super::container(bytes, &self.context, &self.plugin_config, &self.search_path)
    }

    /// Validates the body, in which `TOP` stands for the directory of this host.
    pub(super) fn check(&self, body: &str) -> Result<super::Validated, ConfigError> {
        let top = self.path("");
        let top = top.to_string_lossy();
        let body = body.replace("TOP", top.trim_end_matches('/'));
        self.raw(&bytes(&super::task_schema(), &body))
    }

    /// The whole error message, with the varying paths replaced by `TOP` and `ALLOC`.
    pub(super) fn refusal(&self, body: &str) -> String {
        let top = self.path("");
        let message = match self.check(body) {
            Ok(validated) => panic!("{body} was accepted: {validated:?}"),
            Err(error) => error.to_string(),
        };
        message
            .replace(top.to_string_lossy().trim_end_matches('/'), "TOP")
            .replace(ALLOC, "ALLOC")
    }
}
