//! The hermetic tests: no root, no systemd, no network.

mod fake;
