//! nspawn
