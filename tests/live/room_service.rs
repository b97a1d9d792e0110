//! Servers whose room service is hidden or out of date, and runs with tokens instead of a key.
//! Participants get in, and nothing that belongs to others is deleted.

use std::sync::Arc;
use std::time::Duration;

use throng::signal::rooms::RoomService;
use throng::signal::{ApiKey, Permissions};
use tokio::task::JoinSet;

use crate::common::program::{Finished, Report, Scratch, beside_one_other, run, throng};
use crate::common::server::Server;
use crate::front::{answer, forward, front};

/// Requests to the room service that are under way at a time.
const MAKERS: usize = 16;

/// Action that a front takes on requests to the room service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Front {
    /// Answers them with this status, as a proxy that lets only signalling through.
    Hides(u16),
    /// Answers the list of rooms with an empty list, as if the service lagged behind.
    Lags,
}

/// Starts a front before the server, and returns its address as a URL (see [`front`]).
fn stand_before(server: &Server, kind: Front) -> String {
    let rule = move |head: &str| match kind {
        Front::Hides(status) if head.starts_with("POST /twirp/") => answer(
            &format!("{status} No"),
            "Content-Type: text/html\r\n",
            "<html>no</html",
        ),
        Front::Lags if head.starts_with("POST /twirp/livekit.RoomService/ListRooms") => {
            answer("200 OK", "", "")
        }
        _ => forward(head),
    };
    format!("ws://{}", front(server, rule))
}

/// Runs one publisher and two subscribers for two seconds.
fn small_run(
    url: &str,
    key: Option<&Server>,
    secret: &str,
    more: &[&str],
) -> (Finished, Report, String) {
    let scratch = Scratch::new();
    let json = scratch.path("run.json");
    let people = scratch.path("who.ndjson");
    let mut command = throng();
    if let Some(server) = key {
        command
            .env("LIVEKIT_API_KEY", &server.key)
            .env("LIVEKIT_API_SECRET", &server.secret);
    }
    command
        .env("LIVEKIT_URL", url)
        .args(["--publishers", "1", "--subscribers", "2", "--duration", "2"])
        .arg("--json")
        .arg(&json)
        .arg("--participants")
        .arg(&people)
        .args(more);
    let finished = run(&mut command, secret);
    let report = Report::read(&json, secret);
    let people = std::fs::read_to_string(people).unwrap();
    (finished, report, people)
}

/// Returns what the run printed, on one line.
fn unwrapped(finished: &Finished) -> String {
    let words = finished.stdout.split_whitespace();
    words.collect::<Vec<_>>().join(" ")
}

#[tokio::main(flavor = "current_thread")]
async fn room_names(server: &Server) -> Vec<String> {
    let service = RoomService::new(server.endpoint(), server.api_key());
    let rooms = service.list_rooms().await.unwrap();
    rooms.into_iter().map(|room| room.name).collect()
}

#[tokio::main(flavor = "current_thread")]
async fn make_room(server: &Server, name: &str) {
    let service = RoomService::new(server.endpoint(), server.api_key());
    service
        .create_room(name, Duration::from_secs(60))
        .await
        .unwrap();
}

#[test]
fn a_hidden_room_service_is_a_note_and_the_run_goes_on() {
    let Some(server) = Server::livekit() else {
        return;
    };
    let _turn = beside_one_other();
    for status in [403, 404] {
        let url = stand_before(&server, Front::Hides(status));
        let (finished, report, _) = small_run(&url, Some(&server), &server.secret, &[]);
        assert_eq!(
            report.counter("session", "joins_ok"),
            3,
            "{status}: {}\n{}",
            finished.stdout,
            finished.stderr
        );
        let said = unwrapped(&finished);
        assert!(
            said.contains("the room service cannot be used")
                && said.contains(&status.to_string())
                && !said.contains("API key"),
            "{said}"
        );
    }
}

#[test]
fn a_room_that_somebody_else_has_just_made_stays_though_the_list_lags() {
    let Some(livekit) = Server::livekit() else {
        return;
    };
    let _turn = beside_one_other();
    for server in [livekit, Server::embedded()] {
        let url = stand_before(&server, Front::Lags);
        make_room(&server, "theirs");
        std::thread::sleep(Duration::from_secs(3));
        let (finished, report, _) =
            small_run(&url, Some(&server), &server.secret, &["--room", "theirs"]);
        assert_eq!(report.counter("session", "joins_ok"), 3);
        assert_eq!(room_names(&server), ["theirs"], "{}", finished.stdout);
        assert!(
            unwrapped(&finished).contains("room 'theirs' existed already and stays"),
            "{}",
            finished.stdout
        );
        // A room that the run makes itself is deleted.
        let (finished, _, _) = small_run(&url, Some(&server), &server.secret, &["--room", "ours"]);
        assert_eq!(room_names(&server), ["theirs"], "{}", finished.stdout);
    }
}

/// Makes rooms of others, some at a time.
#[tokio::main(flavor = "current_thread")]
async fn make_crowd(server: &Server, count: usize) {
    let mut makers = JoinSet::new();
    let service = Arc::new(RoomService::new(server.endpoint(), server.api_key()));
    for first in 0..MAKERS {
        let service = service.clone();
        makers.spawn(async move {
            for number in (first..count).step_by(MAKERS) {
                let name = format!("a room of somebody else, number {number}");
                let made = service.create_room(&name, Duration::from_secs(3_600));
                made.await.expect("a room");
            }
        });
    }
    while let Some(made) = makers.join_next().await {
        made.expect("no panic");
    }
}

#[tokio::main(flavor = "current_thread")]
async fn is_there(server: &Server, name: &str) -> bool {
    let service = RoomService::new(server.endpoint(), server.api_key());
    !service.list_rooms_named(name).await.unwrap().is_empty()
}

/// A run beside so many rooms of others says that they are there, and leaves them alone.
fn run_beside_a_crowd(server: &Server, count: usize) {
    let _turn = beside_one_other();
    make_crowd(server, count);
    let room = ["--room", "ours"];
    let (finished, report, _) = small_run(&server.url, Some(server), &server.secret, &room);
    let said = unwrapped(&finished);
    assert_eq!(report.counter("session", "joins_ok"), 3, "{said}");
    assert!(matches!(finished.code, Some(0 | 98)), "{said}");
    let notes = report.notes();
    let carried = format!("the server carries {count} rooms that are not ours");
    assert!(
        notes.contains("so many rooms that their list is not read") || notes.contains(&carried),
        "{notes}"
    );
    assert!(!is_there(server, "ours"), "{said}");
    let last = format!("a room of somebody else, number {}", count - 1);
    assert!(is_there(server, &last), "{said}");
}

#[test]
fn forty_thousand_rooms_of_others_do_no_harm() {
    run_beside_a_crowd(&Server::embedded(), 40_000);
}

/// LiveKit itself takes minutes to make more of them.
#[test]
fn ten_thousand_rooms_of_others_on_livekit_do_no_harm() {
    if let Some(server) = Server::livekit() {
        run_beside_a_crowd(&server, 10_000);
    }
}

#[test]
fn tokens_alone_let_participants_in_and_say_who_they_are() {
    let Some(livekit) = Server::livekit() else {
        return;
    };
    let _turn = beside_one_other();
    for server in [livekit, Server::embedded()] {
        let key = ApiKey::new(&server.key, &server.secret);
        let token = |identity, permissions| {
            key.join_token(
                "hall",
                identity,
                identity,
                permissions,
                Duration::from_secs(300),
            )
            .unwrap()
        };
        let scratch = Scratch::new();
        let file = scratch.path("tokens");
        let [ben, cleo] = ["ben", "cleo"].map(|who| token(who, Permissions::SUBSCRIBER));
        let text = format!("# who listens\n{}\n\n{}\n", ben.expose(), cleo.expose());
        std::fs::write(&file, text).unwrap();
        let ann = token("ann", Permissions::PUBLISHER);
        let at_file = format!("@{}", file.display());
        let (finished, report, people) = small_run(
            &server.url,
            None,
            ann.expose(),
            &["--token", &at_file, "--token", ann.expose()],
        );
        assert_eq!(
            report.counter("session", "joins_ok"),
            3,
            "{}\n{}",
            finished.stdout,
            finished.stderr
        );
        assert!(report.counter("audio", "frames_delivered") > 100);
        for who in ["ann", "ben", "cleo"] {
            let told = people
                .lines()
                .any(|line| line.contains(&format!("\"{who}\"")) && line.contains("\"hall\""));
            assert!(told, "{who}: {people}");
        }
        assert!(
            unwrapped(&finished).contains("without an API key rooms are made by joining"),
            "{}",
            finished.stdout
        );
        // With fewer tokens than participants, nobody joins.
        let mut command = throng();
        command
            .env("LIVEKIT_URL", &server.url)
            .args(["--publishers", "1", "--subscribers", "2", "--token"])
            .arg(ann.expose());
        let refused = run(&mut command, ann.expose());
        assert_eq!(refused.code, Some(2), "{}", refused.stderr);
        assert!(
            refused
                .stderr
                .contains("3 participants, and 1 of them have a token"),
            "{}",
            refused.stderr
        );
    }
}
