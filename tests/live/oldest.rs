//! Runs against an old LiveKit server. `THRONG_OLD_LIVEKIT_SERVER` names its binary; the oldest that
//! the Go module proxy has is 1.5.3.

use std::path::PathBuf;

use crate::common::program::{Finished, Report, Running, Scratch, against, alone, throng};
use crate::common::server::{Options, Server};

fn old_server() -> Server {
    let binary = std::env::var_os("THRONG_OLD_LIVEKIT_SERVER");
    let binary = binary.expect("THRONG_OLD_LIVEKIT_SERVER names the binary of an old LiveKit");
    Server::livekit_of(&PathBuf::from(binary), &Options::default())
}

fn visit(server: &Server, more: &[&str]) -> (Finished, Report) {
    let scratch = Scratch::new();
    let json = scratch.path("run.json");
    let mut command = throng();
    against(server, &mut command)
        .args(["--publishers", "2", "--video-publishers", "1"])
        .args(["--subscribers", "3", "--duration", "5"])
        .args(more)
        .arg("--json")
        .arg(&json);
    let finished = Running::start(&mut command, &server.secret).finish();
    let report = Report::read(&json, &server.secret);
    (finished, report)
}

#[test]
#[ignore = "needs the binary of an old server in THRONG_OLD_LIVEKIT_SERVER"]
fn all_of_a_run_works_at_an_old_server() {
    let server = old_server();
    let _turn = alone();
    let audio_red = ["--audio-red"];
    let over_tcp = ["--transport", "tcp"];
    let meeting = ["--meeting"];
    for more in [&[][..], &audio_red, &over_tcp, &meeting] {
        let (finished, report) = visit(&server, more);
        let said = &finished.stdout;
        assert!(matches!(finished.code, Some(0 | 98)), "{more:?}: {said}");
        assert_eq!(report.0["target"]["connection"], "dual", "{more:?}");
        for kind in ["audio", "video"] {
            let count = |name| report.counter(kind, name);
            assert!(count("frames_delivered") > 100, "{more:?}: {said}");
            assert_eq!(
                count("frames_delivered"),
                count("frames_expected"),
                "{more:?}: {said}"
            );
        }
    }
}

#[test]
#[ignore = "needs the binary of an old server in THRONG_OLD_LIVEKIT_SERVER"]
fn a_single_connection_that_an_old_server_lacks_is_named() {
    let server = old_server();
    let _turn = alone();
    let (finished, _) = visit(&server, &["--connection", "single"]);
    let words: Vec<_> = finished.stdout.split_whitespace().collect();
    let said = words.join(" ");
    assert!(said.contains("/rtc/v1 is not there"), "{said}");
    assert!(said.contains("--connection auto or dual"), "{said}");
}
