//! The paths of the host that an operator lets jobs mount: a list of glob patterns. Looks at no path on the host.

use std::path::{Component, Path};

use glob::{MatchOptions, Pattern};

use super::ConfigError;
use super::decode::quoted;
use super::paths::validate_path_text;

/// `*` and `?` stand for parts of one name, and a name that begins with a dot is like others.
const MATCHING: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: false,
};

/// Patterns of absolute paths. Without any, every path is allowed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AllowedPaths(Vec<Pattern>);

impl AllowedPaths {
    /// Checks the patterns of this option.
    pub(super) fn of(option: &str, texts: &[String]) -> Result<Self, ConfigError> {
        let texts = texts.iter().enumerate();
        let patterns = texts.map(|(index, text)| pattern(&format!("{option}[{index}]"), text));
        patterns.collect::<Result<_, _>>().map(Self)
    }

    /// Whether a pattern matches the path, which has no links, or a directory above it.
    pub(super) fn allows(&self, path: &Path) -> bool {
        let matches = |pattern: &Pattern| {
            let mut upward = path.ancestors();
            upward.any(|path| pattern.matches_path_with(path, MATCHING))
        };
        self.0.is_empty() || self.0.iter().any(matches)
    }

    /// The patterns for a message.
    pub(super) fn shown(&self) -> String {
        let patterns = self.0.iter().map(|pattern| quoted(pattern.as_str()));
        patterns.collect::<Vec<_>>().join(", ")
    }
}

fn pattern(option: &str, text: &str) -> Result<Pattern, ConfigError> {
    validate_path_text(option, text)?;
    let refused = |fault: &str| {
        let reason = format!("{} {fault}", quoted(text));
        Err(ConfigError::new(option, reason))
    };
    let path = Path::new(text);
    if !path.is_absolute() {
        return refused("is not a pattern of absolute paths, such as /srv/*");
    }
    if path.components().any(|part| part == Component::ParentDir) {
        return refused("contains .., which no path has once it is looked up");
    }
    // Without doubled slashes and one at the end, which no path has either.
    let text: String = path
        .components()
        .collect::<std::path::PathBuf>()
        .to_string_lossy()
        .into();
    Pattern::new(&text).or_else(|error| refused(&format!("is not a pattern: {}", error.msg)))
}
