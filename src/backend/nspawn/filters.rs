//! Whether a start can use captured seccomp filters, or else whether they are captured from it.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::Settings;
use crate::container::ContainerSpec;
use crate::seccomp::{self, Captured, Kind, MAX_KINDS, Source, Store};
use crate::supervisor::logs;

/// What is known about captured filters on this host.
#[derive(Debug, Default)]
pub(super) struct CapturedFilters {
    /// Whether the kernel shows filters, or why not; found out once.
    readable: OnceLock<Result<(), String>>,
    /// Those that starts have used, so that not every start reads them.
    known: Mutex<HashMap<Kind, Known>>,
}

#[derive(Debug)]
enum Known {
    Usable(Arc<Captured>),
    /// A start with them has failed.
    Failed,
}

impl CapturedFilters {
    /// Whether captured filters are used, or why not. Blocks for some milliseconds, the first time.
    pub(super) fn usable(
        &self,
        settings: &Settings,
        init: impl FnOnce() -> io::Result<OwnedFd>,
    ) -> Result<(), String> {
        if !settings.seccomp_cache {
            return Err("seccomp_cache is false".to_owned());
        }
        if !nix::unistd::geteuid().is_root() {
            return Err("reading filters needs root".to_owned());
        }
        let supported = || init().and_then(|init| seccomp::is_supported(&init));
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
        init: impl FnOnce() -> io::Result<OwnedFd>,
    ) -> StartFilters {
        let Ok(Some(kind)) = Kind::of(spec, nspawn) else {
            return StartFilters::Built;
        };
        if self.usable(settings, init).is_err() || self.has_failed(&kind) {
            return StartFilters::Built;
        }
        let Some(captured) = self.captured(&kind, settings) else {
            return StartFilters::Capture(kind);
        };
        match hold_logs(spec) {
            Ok(logs) => StartFilters::Captured { captured, logs },
            Err(_) => StartFilters::Built,
        }
    }

    fn has_failed(&self, kind: &Kind) -> bool {
        matches!(self.known().get(kind), Some(Known::Failed))
    }

    /// The filters of this kind, if there are some that can be used.
    fn captured(&self, kind: &Kind, settings: &Settings) -> Option<Arc<Captured>> {
        if let Some(Known::Usable(captured)) = self.known().get(kind)
            && captured.holds()
        {
            return Some(Arc::clone(captured));
        }
        let captured = Arc::new(Store::of(&settings.state_dir).load(kind)?);
        self.keep(kind.clone(), Known::Usable(Arc::clone(&captured)));
        Some(captured)
    }

    /// Uses no captured filters any more for this kind of container, because a start with them has failed, and removes them.
    pub(super) fn give_up(&self, kind: &Kind, settings: &Settings, reason: &str) {
        self.keep(kind.clone(), Known::Failed);
        let removed = Store::of(&settings.state_dir).remove(kind).err();
        tracing::warn!(
            reason,
            not_removed = removed.map(|error| error.to_string()),
            "captured seccomp filters can't be installed: from now on systemd-nspawn builds those of every container of this kind"
        );
    }

    fn keep(&self, kind: Kind, known: Known) {
        let mut all = self.known();
        if all.len() >= MAX_KINDS {
            all.clear();
        }
        all.insert(kind, known);
    }

    fn known(&self) -> MutexGuard<'_, HashMap<Kind, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The filters of a start.
#[derive(Debug)]
pub(super) enum StartFilters {
    /// systemd-nspawn builds them.
    Built,
    /// systemd-nspawn builds them, and they are kept for later starts of this kind.
    Capture(Kind),
    /// These are installed.
    Captured {
        captured: Arc<Captured>,
        /// The log pipes of the task, open for writing as long as the start may have to be begun again: the log collector stops reading
        /// when nobody has them open any more.
        #[expect(dead_code, reason = "held open, and closed with this")]
        logs: Vec<File>,
    },
}

impl StartFilters {
    /// What the launch spec says about them.
    pub(super) fn source(&self) -> Source {
        match self {
            Self::Built => Source::Nspawn,
            Self::Capture(kind) => Source::Capture(Box::new(kind.clone())),
            Self::Captured { captured, .. } => Source::Captured {
                count: captured.count(),
                bounding: captured.bounding,
            },
        }
    }

    /// Those that are captured.
    pub(super) fn captured(&self) -> Option<&Captured> {
        match self {
            Self::Captured { captured, .. } => Some(captured),
            Self::Built | Self::Capture(_) => None,
        }
    }
}

/// Opens the log pipes. Fails if one has no reader yet.
fn hold_logs(spec: &ContainerSpec) -> io::Result<Vec<File>> {
    let paths = [&spec.payload.stdout, &spec.payload.stderr];
    let mut held = Vec::new();
    for path in paths.into_iter().flatten() {
        match logs::open_now(path) {
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
    use crate::container::{Link, NetworkNamespace};
    use crate::network::pool::Pool;

    fn settings(seccomp_cache: bool) -> Settings {
        Settings {
            state_dir: "/none".into(),
            nspawn: None,
            search: std::ffi::OsString::new(),
            binary: "/none".into(),
            exec_unfiltered: false,
            seccomp_cache,
            network_pool: Pool::default(),
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
        assert!(matches!(filters, StartFilters::Built));
    }

    #[test]
    fn after_a_failure_none_of_that_kind_are_used() {
        let filters = CapturedFilters::default();
        let kind = |private| {
            let spec = ContainerSpec::for_test("task", "/tree").with(|spec| {
                if private {
                    spec.network.namespace = NetworkNamespace::Private {
                        link: Link::None,
                        ports: Vec::new(),
                        interfaces: Vec::new(),
                    };
                }
            });
            Kind::of(&spec, Path::new("/bin/sh")).unwrap().unwrap()
        };
        filters.give_up(&kind(false), &settings(true), "a test");
        assert!(filters.has_failed(&kind(false)));
        assert!(!filters.has_failed(&kind(true)));
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
