//! What the driver does for a system that the image boots: its console and its journal.

use std::time::Duration;

use job_values::duration;

use crate::container::{Console, Journal, Mode, Readiness};

use super::ConfigError;
use super::decode::quoted;
use super::options::TaskOptions;
use super::values::{self, one_of};

/// Types of systemd's units, as they end a name.
const UNIT_TYPES: [&str; 11] = [
    "service",
    "socket",
    "device",
    "mount",
    "automount",
    "swap",
    "target",
    "path",
    "timer",
    "slice",
    "scope",
];
/// How long a task may take to be ready, unless the job says otherwise: as long as systemd gives a service.
const READY_TIMEOUT: Duration = Duration::from_secs(90);
const MAX_READY_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
/// systemd's own limit for the name of a unit.
const UNIT_NAME_MAX: usize = 255;

/// The options that are about the system.
#[derive(Debug)]
pub(super) struct System {
    pub(super) console: Console,
    pub(super) journal: Option<Journal>,
    pub(super) readiness: Readiness,
}

impl System {
    /// `has_logs`: whether anything that the task prints is kept.
    pub(super) fn of(
        options: &TaskOptions,
        mode: Mode,
        has_logs: bool,
    ) -> Result<Self, ConfigError> {
        let console = options.console.as_deref();
        let console = console.map(|word| one_of("config.console", word, values::CONSOLE));
        let journal = journal(options, mode)?;
        let unset = match mode {
            Mode::Boot if has_logs => Console::Relayed,
            _ => Console::Pipe,
        };
        Ok(Self {
            console: console.transpose()?.unwrap_or(unset),
            journal: journal.filter(|_| has_logs),
            readiness: readiness(options)?,
        })
    }
}

/// When the task counts as started.
fn readiness(options: &TaskOptions) -> Result<Readiness, ConfigError> {
    const OPTION: &str = "config.ready_timeout";
    let notifies = one_of("config.ready", &options.ready, values::READY)?;
    let Some(text) = &options.ready_timeout else {
        return Ok(match notifies {
            true => Readiness::Notify(READY_TIMEOUT),
            false => Readiness::Started,
        });
    };
    let limit =
        duration::parse(text).map_err(|error| ConfigError::new(OPTION, error.to_string()))?;
    let fault = if limit.is_zero() || limit > MAX_READY_TIMEOUT {
        "is not more than 0 and at most 24h"
    } else if !notifies {
        "has no effect without config.ready = \"notify\": add it, or remove the option"
    } else {
        return Ok(Readiness::Notify(limit));
    };
    Err(ConfigError::new(
        OPTION,
        format!("{} {fault}", quoted(text)),
    ))
}

/// The journal, unless it is switched off or there is none.
fn journal(options: &TaskOptions, mode: Mode) -> Result<Option<Journal>, ConfigError> {
    let word = &options.journal_format;
    let format = one_of("config.journal_format", word, values::JOURNAL_FORMAT)?;
    let given = options.journal_units.as_deref().unwrap_or_default();
    let units = given
        .iter()
        .enumerate()
        .map(|(index, name)| unit(index, name));
    let units = units.collect::<Result<Vec<_>, _>>()?;
    let is_off = mode != Mode::Boot || options.journal == Some(false);
    let without_boot = "needs an image that boots: set config.boot = true, or remove the option";
    match (mode, options.journal) {
        (Mode::Boot, Some(false)) if !units.is_empty() => Err(ConfigError::new(
            "config.journal_units",
            "has no effect with config.journal = false: remove one of the two",
        )),
        (Mode::ProcessTwo | Mode::Plain, Some(true)) => Err(ConfigError::new(
            "config.journal",
            format!("true {without_boot}"),
        )),
        (Mode::ProcessTwo | Mode::Plain, _) if !units.is_empty() => {
            Err(ConfigError::new("config.journal_units", without_boot))
        }
        _ => Ok((!is_off).then_some(Journal { format, units })),
    }
}

/// The full name of a unit: without a type it is a service.
fn unit(index: usize, name: &str) -> Result<String, ConfigError> {
    let has_type = name
        .rsplit_once('.')
        .is_some_and(|(_, kind)| UNIT_TYPES.contains(&kind));
    let full = match has_type {
        true => name.to_owned(),
        false => format!("{name}.service"),
    };
    let is_allowed = |letter: char| letter.is_ascii_alphanumeric() || ":_.\\@-".contains(letter);
    let fault = if name.is_empty() || name.starts_with('.') || !name.chars().all(is_allowed) {
        "is not the name of a unit, such as nginx.service"
    } else if full.len() > UNIT_NAME_MAX {
        "is longer than 255 bytes"
    } else {
        return Ok(full);
    };
    Err(ConfigError::new(
        format!("config.journal_units[{index}]"),
        format!("{} {fault}", quoted(name)),
    ))
}
