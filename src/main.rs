//! The door: which of this binary's lives is asked for.

fn main() {}
