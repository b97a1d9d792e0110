//! Whole runs against a real LiveKit server and the embedded SFU on loopback. Tests that measure
//! take turns (`common::program::alone`).

#[path = "../common/mod.rs"]
mod common;

mod bad_input;
mod calibrate;
mod clients;
mod door;
mod foreign;
mod front;
mod go_sdk;
mod layers;
mod log;
mod oldest;
mod page;
mod presence;
mod ramp;
mod reconnect;
mod room_service;
mod rooms;
mod sfu_run;
mod sfu_signal;
mod sfu_worker;
mod signal;
