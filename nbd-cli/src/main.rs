//! The `nbd-cli` program.
fn main() {}
