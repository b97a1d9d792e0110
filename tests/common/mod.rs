//! What several integration tests share. Not every test uses all of it.
#![allow(dead_code)]

pub mod livekit;
