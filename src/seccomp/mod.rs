//! The seccomp filters of systemd-nspawn, which takes most of its start to build them, although they are always the same for containers of one
//! kind. The supervisor reads them from the first container of a kind ([`capture()`]), and the container init installs them in later ones,
//! where systemd-nspawn builds none ([`Store`]). Anything unexpected means that systemd-nspawn builds them itself: a container never has
//! fewer filters than it would have without this module.

use std::io;

pub use nspawn_init::Filter;
use serde::{Deserialize, Serialize};

use crate::sys::process::ProcessHandle;
use crate::sys::trace::seccomp_filters;

mod capture;
mod kind;
mod store;

pub use capture::{capture, is_supported, verify};
pub use kind::Kind;
pub use store::{Captured, DIRECTORY, MAX_KINDS, Store};

/// Where the filters of a start come from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// systemd-nspawn builds them.
    #[default]
    Nspawn,
    /// systemd-nspawn builds them, and the supervisor keeps them for later starts of this kind.
    Capture(Box<Kind>),
    /// The container init installs filters that were captured; systemd-nspawn builds none.
    Captured {
        /// How many there are.
        count: u32,
        /// The capability bounding set of the container from which they come, which has to be that of this one.
        bounding: u64,
    },
}

impl Source {
    /// Whether nothing is captured.
    pub fn is_nspawn(&self) -> bool {
        *self == Self::Nspawn
    }
}

/// The filters of the main thread of a process, the oldest first. Interrupts it for a moment, and blocks for at most five seconds. Fails as
/// [`seccomp_filters`].
pub fn read(process: &ProcessHandle) -> io::Result<Vec<Filter>> {
    let instructions = |program: Vec<nix::libc::sock_filter>| {
        let each = program.into_iter();
        Filter(each.map(|one| (one.code, one.jt, one.jf, one.k)).collect())
    };
    let programs = seccomp_filters(process)?;
    Ok(programs.into_iter().map(instructions).collect())
}
