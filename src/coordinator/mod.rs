//! Many hosts, one test: a coordinator that gives out the parts, keeps the hosts in step and merges what they measured.

pub mod protocol;
