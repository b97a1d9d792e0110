//! Tests of the reported figures against what went over the wire, in virtual time.

#[path = "../common/mod.rs"]
mod common;

mod figures;
mod moves;
