//! Whether a start can use captured seccomp filters, or else whether they are captured from it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use nspawn_init::Filter;

use super::Settings;
use crate::container::ContainerSpec;
use crate::seccomp::{self, Kind, Source, Store};

/// What is known about captured filters on this host.
#[derive(Debug, Default)]
pub(super) struct CapturedFilters {
    /// Whether the kernel shows filters, or why not; found out once.
    readable: OnceLock<Result<(), String>>,
    /// Set when a start with captured filters has failed.
    failed: AtomicBool,
}

impl CapturedFilters {
    /// Whether captured filters are used, or why not. Blocks for some milliseconds, the first time.
    pub(super) fn usable(
        &self,
        settings: &Settings,
        program: impl FnOnce() -> io::Result<OwnedFd>,
    ) -> Result<(), String> {
        if !settings.seccomp_cache {
            return Err("seccomp_cache is false".to_owned());
        }
        if self.failed.load(Ordering::Relaxed) {
            return Err("a start with captured filters has failed".to_owned());
        }
        if !nix::unistd::geteuid().is_root() {
            return Err("reading filters needs root".to_owned());
        }
        let supported = || program().and_then(|program| seccomp::is_supported(&program));
        let readable = self.readable.get_or_init(|| {
            supported()
                .map_err(|error| format!("the kernel does not show seccomp filters: {error}"))
        });
        readable.clone()
    }

    /// Where the filters of a start come from.
    pub(super) fn of_start(
        &self,
        spec: &ContainerSpec,
        nspawn: &Path,
        settings: &Settings,
        program: impl FnOnce() -> io::Result<OwnedFd>,
    ) -> StartFilters {
        let Ok(Some(kind)) = Kind::of(spec, nspawn) else {
            return StartFilters::default();
        };
        if self.usable(settings, program).is_err() {
            return StartFilters::default();
        }
        let Some(captured) = Store::of(&settings.state_dir).load(&kind) else {
            return StartFilters {
                source: Source::Capture(Box::new(kind)),
                ..StartFilters::default()
            };
        };
        match (u32::try_from(captured.filters.len()), hold_logs(spec)) {
            (Ok(count), Ok(logs)) => StartFilters {
                source: Source::Captured {
                    count,
                    bounding: captured.bounding,
                },
                filters: captured.filters,
                logs,
            },
            _ => StartFilters::default(),
        }
    }

    /// Uses none any more, because a start with captured filters has failed, and removes those that are there.
    pub(super) fn give_up(&self, settings: &Settings, reason: &str) {
        self.failed.store(true, Ordering::Relaxed);
        let cleared = Store::of(&settings.state_dir).clear().err();
        tracing::warn!(
            reason,
            not_removed = cleared.map(|error| error.to_string()),
            "captured seccomp filters can't be installed: from now on systemd-nspawn builds those of every start"
        );
    }
}

/// The filters of a start.
#[derive(Debug, Default)]
pub(super) struct StartFilters {
    pub(super) source: Source,
    /// Those that are captured.
    pub(super) filters: Vec<Filter>,
    /// The log pipes of the task, open for writing as long as the start may have to be begun again: the log collector stops reading when
    /// nobody has them open any more.
    pub(super) logs: Vec<File>,
}

/// Opens the log pipes. Fails if one has no reader yet.
fn hold_logs(spec: &ContainerSpec) -> io::Result<Vec<File>> {
    let flags = nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY;
    let paths = [&spec.payload.stdout, &spec.payload.stderr];
    let mut held = Vec::new();
    for path in paths.into_iter().flatten() {
        match File::options().append(true).custom_flags(flags).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            log => held.push(log?),
        }
    }
    Ok(held)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::nspawn::Timeouts;

    fn settings(seccomp_cache: bool) -> Settings {
        Settings {
            state_dir: "/none".into(),
            nspawn: None,
            search: std::ffi::OsString::new(),
            binary: "/none".into(),
            exec_unfiltered: false,
            seccomp_cache,
            timeouts: Timeouts::default(),
        }
    }

    fn no_program() -> io::Result<OwnedFd> {
        Err(io::Error::other("not asked for"))
    }

    #[test]
    fn an_operator_can_turn_it_off() {
        let filters = CapturedFilters::default();
        let spec = ContainerSpec::for_test("task", "/tree");
        let off = settings(false);
        assert_eq!(
            filters.usable(&off, no_program),
            Err("seccomp_cache is false".to_owned())
        );
        let filters = filters.of_start(&spec, Path::new("/bin/sh"), &off, no_program);
        assert_eq!(
            (filters.source, filters.filters),
            (Source::Nspawn, Vec::new())
        );
    }

    #[test]
    fn after_a_failure_none_are_used() {
        let filters = CapturedFilters::default();
        filters.give_up(&settings(true), "a test");
        let text = "a start with captured filters has failed".to_owned();
        assert_eq!(filters.usable(&settings(true), no_program), Err(text));
    }

    #[test]
    fn a_host_that_does_not_show_filters_has_none() {
        let filters = CapturedFilters::default();
        let reason = filters.usable(&settings(true), no_program).unwrap_err();
        match nix::unistd::geteuid().is_root() {
            true => assert!(reason.ends_with(": not asked for"), "{reason}"),
            false => assert_eq!(reason, "reading filters needs root"),
        }
    }
}
