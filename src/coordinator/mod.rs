//! One test on many hosts. A coordinator hands out the parts, keeps the hosts in step and merges
//! what they measured.

pub mod access;
#[cfg(test)]
pub(crate) mod canned;
pub mod clock;
pub mod desk;
pub mod document;
pub mod journal;
pub mod lead;
mod log;
pub mod page;
pub mod place;
pub mod protocol;
pub mod result;
pub mod seconds;
pub mod server;
mod spec;
pub mod state;
pub mod story;
pub mod text;
pub mod tokens;

pub use result::Merged;
pub use spec::Coordinate;
