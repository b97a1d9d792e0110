//! Helpers that the test binaries share. Each binary includes all of it once.

// No binary uses all of it, and the compiler sees one binary at a time.
#![allow(dead_code)]

pub mod coturn;
pub mod counting;
pub mod hand;
pub mod led;
pub mod link;
pub mod loopback;
pub mod namespace;
pub mod network;
pub mod pair;
pub mod path;
pub mod people;
pub mod program;
pub mod recorded;
pub mod relay;
pub mod rtc;
pub mod scripted;
pub mod server;
pub mod switcher;
pub mod tapped;

/// Returns the full name that `cargo test` gives a test of a module, because `--exact` needs the
/// full name.
pub fn test_name(module: &str, test: &str) -> String {
    let (_binary, module) = module.split_once("::").expect("a module of a binary");
    format!("{module}::{test}")
}

/// Runs a test again in its own process and asserts here that it passed. Returns `true` in that
/// process, where the test does its work. For tests that look at their whole process: other tests
/// in it would change what they see.
pub fn in_a_process_of_its_own(module: &str, test: &str) -> bool {
    const CHILD: &str = "THRONG_TEST_OWN_PROCESS";
    let name = test_name(module, test);
    if std::env::var_os(CHILD).is_some_and(|child| child.to_str() == Some(&name)) {
        return true;
    }
    let output = std::process::Command::new(std::env::current_exe().expect("our own path"))
        .args(["--exact", &name, "--nocapture"])
        .env(CHILD, &name)
        .output()
        .expect("it ran a moment ago");
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}"
    );
    eprintln!("{said}");
    false
}

/// Runs each of these tests twice: against a real LiveKit server, and against the embedded SFU.
#[allow(unused_macros)]
macro_rules! on_both_servers {
    ($($test:ident),+ $(,)?) => {
        mod livekit {
            $(#[test]
            fn $test() {
                if let Some(server) = $crate::common::server::Server::livekit() {
                    super::$test(&server);
                }
            })+
        }

        mod embedded {
            $(#[test]
            fn $test() {
                super::$test(&$crate::common::server::Server::embedded());
            })+
        }
    };
}
#[allow(unused_imports)]
pub(crate) use on_both_servers;
