//! What several integration tests share. Not every test uses all of it.
#![allow(dead_code)]

pub mod server;

/// Each of these tests twice: against a real LiveKit server, and against the embedded SFU.
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
