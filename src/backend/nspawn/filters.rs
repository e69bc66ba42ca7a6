//! Whether a start can use captured seccomp filters, or else whether they are captured from it.

use std::io;
use std::os::fd::OwnedFd;
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

    /// Where the filters of a start come from, and those that are captured.
    pub(super) fn source(
        &self,
        spec: &ContainerSpec,
        nspawn: &Path,
        settings: &Settings,
        program: impl FnOnce() -> io::Result<OwnedFd>,
    ) -> (Source, Vec<Filter>) {
        let by_nspawn = (Source::Nspawn, Vec::new());
        let Ok(Some(kind)) = Kind::of(spec, nspawn) else {
            return by_nspawn;
        };
        if self.usable(settings, program).is_err() {
            return by_nspawn;
        }
        match Store::of(&settings.state_dir).load(&kind) {
            None => (Source::Capture(Box::new(kind)), Vec::new()),
            Some(captured) => match u32::try_from(captured.filters.len()) {
                Ok(count) => {
                    let bounding = captured.bounding;
                    (Source::Captured { count, bounding }, captured.filters)
                }
                Err(_) => by_nspawn,
            },
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
        let (source, captured) = filters.source(&spec, Path::new("/bin/sh"), &off, no_program);
        assert_eq!((source, captured.len()), (Source::Nspawn, 0));
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
