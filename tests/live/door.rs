//! Ways to a server that stands behind something else, or that refuses us. Each obstacle is named
//! for what it is. A run gets through wherever a browser does.

use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use throng::signal::rooms::RoomService;
use throng::signal::{ApiKey, Permissions};

use crate::common::program::{Finished, Report, Scratch, beside_one_other, run, throng};
use crate::common::server::{Options, Server};
use crate::front::{Nginx, PAGE, Verdict, answer, backend, forward, front, without};

/// One publisher and two subscribers for two seconds.
const SMALL: [&str; 6] = ["--publishers", "1", "--subscribers", "2", "--duration", "2"];

/// A run and what it wrote.
struct Visit {
    finished: Finished,
    /// `None` if the run did not start.
    report: Option<Report>,
}

impl Visit {
    fn to(url: &str, server: &Server, more: impl FnOnce(&mut Command)) -> Visit {
        let scratch = Scratch::new();
        let json = scratch.path("run.json");
        let mut command = throng();
        command
            .env("LIVEKIT_URL", url)
            .env("LIVEKIT_API_KEY", &server.key)
            .env("LIVEKIT_API_SECRET", &server.secret)
            .args(SMALL)
            .arg("--json")
            .arg(&json);
        more(&mut command);
        let finished = run(&mut command, &server.secret);
        let report = json.exists().then(|| Report::read(&json, &server.secret));
        Visit { finished, report }
    }

    /// Returns all that the run printed, on one line.
    fn said(&self) -> String {
        let Finished { stdout, stderr, .. } = &self.finished;
        let words = stdout.split_whitespace().chain(stderr.split_whitespace());
        words.collect::<Vec<_>>().join(" ")
    }

    #[track_caller]
    fn gets_in(&self) -> &Report {
        let report = self.report.as_ref();
        let report = report.unwrap_or_else(|| panic!("no report: {}", self.said()));
        assert_eq!(report.counter("session", "joins_ok"), 3, "{}", self.said());
        assert!(
            matches!(self.finished.code, Some(0 | 98)),
            "{}",
            self.said()
        );
        report
    }

    /// Asserts that the run was kept out, that it printed the words in `by`, and that it does not
    /// blame the server.
    #[track_caller]
    fn is_kept_out(&self, by: &[&str]) {
        assert_eq!(self.finished.code, Some(1), "{}", self.said());
        for words in by {
            assert!(self.said().contains(words), "{words}: {}", self.said());
        }
        for guess in ["does the room exist", "Error(", "is the server running"] {
            assert!(!self.said().contains(guess), "{guess}: {}", self.said());
        }
    }
}

fn nothing(_: &mut Command) {}

/// Sets tokens instead of a key, so that the first request is a WebSocket.
fn tokens(server: &Server) -> impl FnOnce(&mut Command) {
    let key = server.api_key();
    let tokens: Vec<String> = ["ann", "ben", "cleo"]
        .map(|who| {
            let permissions = if who == "ann" {
                Permissions::PUBLISHER
            } else {
                Permissions::SUBSCRIBER
            };
            let made = key.join_token("hall", who, who, permissions, Duration::from_secs(300));
            made.unwrap().expose().to_owned()
        })
        .into();
    move |command| {
        command
            .env_remove("LIVEKIT_API_KEY")
            .env_remove("LIVEKIT_API_SECRET");
        tokens.iter().for_each(|token| {
            command.args(["--token", token]);
        });
    }
}

#[tokio::main(flavor = "current_thread")]
async fn room_names(server: &Server) -> Vec<String> {
    let service = RoomService::new(server.endpoint(), server.api_key());
    let rooms = service.list_rooms().await.unwrap();
    rooms.into_iter().map(|room| room.name).collect()
}

#[test]
fn a_redirect_names_what_to_write() {
    let server = Server::embedded();
    let _turn = beside_one_other();
    for status in ["301 Moved Permanently", "308 Permanent Redirect"] {
        let elsewhere = move |head: &str| {
            let path = head.split(' ').nth(1).unwrap_or_default();
            answer(
                status,
                &format!("Location: https://sfu.example.com{path}\r\n"),
                "",
            )
        };
        let url = format!("ws://{}", front(&server, elsewhere));
        let words = ["write --url wss://sfu.example.com", &status[..3]];
        Visit::to(&url, &server, nothing).is_kept_out(&words);
        // With tokens, the WebSocket is the first request that meets the redirect.
        let visit = Visit::to(&url, &server, tokens(&server));
        visit.is_kept_out(&words);
        let report = visit.report.as_ref().expect("it was begun");
        assert_eq!(report.result(), "PARTIAL");
        assert!(
            report
                .reasons()
                .contains("could not run: nobody got as far as the server"),
            "{}",
            report.reasons()
        );
    }
}

#[test]
fn a_gateway_that_wants_a_password_is_not_taken_for_the_server_and_is_let_have_it() {
    let Some(server) = Server::livekit() else {
        return;
    };
    let _turn = beside_one_other();
    // The credentials are `me:secret`, in base64 and lower case.
    let gateway = |head: &str| {
        if head
            .to_lowercase()
            .contains("authorization: basic bwu6c2vjcmv0")
        {
            Verdict::Forward(without(head, "authorization:"))
        } else {
            answer(
                "401 Unauthorized",
                "WWW-Authenticate: Basic realm=\"staff\"\r\n",
                "no\n",
            )
        }
    };
    let url = format!("ws://{}", front(&server, gateway));
    let words = [
        "in front of",
        "it wants Basic realm=\"staff\"",
        "--header NAME:VALUE",
    ];
    Visit::to(&url, &server, nothing).is_kept_out(&words);
    Visit::to(&url, &server, tokens(&server)).is_kept_out(&words);
    let visit = Visit::to(&url, &server, |command| {
        command.args(["--header", "Authorization: Basic bWU6c2VjcmV0"]);
        command.args(["--token-in", "query"]);
    });
    visit.gets_in();
    assert!(!visit.said().contains("bWU6"), "{}", visit.said());
}

#[test]
fn where_the_authorization_header_is_taken_away_the_token_travels_in_the_query() {
    let Some(server) = Server::livekit() else {
        return;
    };
    let _turn = beside_one_other();
    let strips = |head: &str| Verdict::Forward(without(head, "authorization:"));
    let url = format!("ws://{}", front(&server, strips));
    Visit::to(&url, &server, nothing).is_kept_out(&["add --token-in query"]);
    let visit = Visit::to(&url, &server, |command| {
        command.args(["--token-in", "query"]);
    });
    visit.gets_in();
    // The run created and deleted its room through the same front.
    assert!(room_names(&server).is_empty(), "{}", visit.said());
}

#[test]
fn a_proxy_without_its_backend_is_not_the_servers_failure() {
    let server = Server::embedded();
    let _turn = beside_one_other();
    let away = |_: &str| {
        answer(
            "502 Bad Gateway",
            PAGE,
            "<html><head><title>502 Bad Gateway</title></head></html>",
        )
    };
    let url = format!("ws://{}", front(&server, away));
    let words = [
        "nginx at",
        "is a proxy, and what it stands for does not answer it",
    ];
    Visit::to(&url, &server, nothing).is_kept_out(&words);
    Visit::to(&url, &server, tokens(&server)).is_kept_out(&words);
}

#[test]
fn a_server_that_is_no_server_is_told_by_what_it_says() {
    let server = Server::embedded();
    let _turn = beside_one_other();
    for (answer, words) in [
        (
            "HTTP/1.0 404 Not Found\r\nServer: SimpleHTTP/0.6\r\n\r\nNo such file",
            "/rtc is not there (404: No such file)",
        ),
        ("HHHH", "no HTTP (it begins with 'HHHH')"),
        (
            "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>",
            "with a web page (200",
        ),
    ] {
        let says = move |_: &str| Verdict::Answer(answer.to_owned());
        let url = format!("ws://{}", front(&server, says));
        let visit = Visit::to(&url, &server, tokens(&server));
        visit.is_kept_out(&[words]);
        assert!(!visit.said().contains("speaks TLS:"), "{}", visit.said());
    }
}

#[test]
fn a_limit_is_waited_for_and_told_as_the_servers() {
    let Some(server) = Server::livekit() else {
        return;
    };
    let _turn = beside_one_other();
    let joins = AtomicUsize::new(0);
    let rooms = AtomicUsize::new(0);
    let limits = move |head: &str| {
        let is_new = |count: &AtomicUsize| count.fetch_add(1, Ordering::Relaxed) == 0;
        let is_join = head.starts_with("GET /rtc") && head.contains("pgrade: websocket");
        // The first WebSocket is the probe's, which asks for the server's version.
        let limited = if is_join {
            joins.fetch_add(1, Ordering::Relaxed) == 1
        } else {
            head.contains("/CreateRoom") && is_new(&rooms)
        };
        if limited {
            answer("429 Too Many Requests", "Retry-After: 1\r\n", "slow down")
        } else {
            forward(head)
        }
    };
    let url = format!("ws://{}", front(&server, limits));
    let visit = Visit::to(&url, &server, nothing);
    let report = visit.gets_in();
    let notes = report.notes();
    assert!(
        notes.contains("1 join was told to come back later, and did")
            && notes.contains("(429: slow down)")
            && notes.contains("its limit, not ours")
            && notes.contains("the room service was asked again once"),
        "{notes}"
    );
    assert_eq!(report.counter("session", "joins_failed"), 0);
    assert_eq!(report.counter("session", "joins_retried"), 0);
    // Joins are timed from when they were intended.
    let slowest = report
        .micros("session", "join", "max")
        .expect("they joined");
    assert!(slowest >= 1_000_000, "{slowest}");
}

#[test]
fn a_page_in_the_place_of_the_single_connection_is_none() {
    let Some(server) = Server::livekit() else {
        return;
    };
    let _turn = beside_one_other();
    let catch_all = |head: &str| {
        if head.starts_with("GET /rtc/v1") {
            answer("200 OK", PAGE, "<html><title>Welcome</title></html>")
        } else {
            forward(head)
        }
    };
    let url = format!("ws://{}", front(&server, catch_all));
    let visit = Visit::to(&url, &server, nothing);
    let report = visit.gets_in();
    assert_eq!(report.0["target"]["connection"], "dual");
    let reason = report.0["target"]["connection_reason"].as_str().unwrap();
    assert!(reason.contains("web page (200: Welcome)"), "{reason}");
}

#[test]
fn the_room_service_is_no_precondition() {
    let Some(server) = Server::livekit() else {
        return;
    };
    let _turn = beside_one_other();
    type Answer = fn(&str) -> Option<Verdict>;
    let cases: [(&str, Answer); 4] = [
        ("does not let us use CreateRoom", |head| {
            let denied = "{\"code\":\"permission_denied\",\"msg\":\"no roomCreate\"}";
            let json = "Content-Type: application/json\r\n";
            head.contains("/CreateRoom")
                .then(|| answer("403 Forbidden", json, denied))
        }),
        ("cannot be listed", |head| {
            let failed = "{\"code\":\"unavailable\",\"msg\":\"redis\"}";
            head.contains("/ListRooms")
                .then(|| answer("503 Service Unavailable", "", failed))
        }),
        ("nginx in front of", |head| {
            head.starts_with("POST /twirp")
                .then(|| answer("403 Forbidden", PAGE, "<html><title>403 Forbidden</title>"))
        }),
        ("so many rooms that their list is not read", |head| {
            let head = head.to_lowercase();
            let is_of_all = !head.contains("content-length: ") || head.contains("length: 0\r\n");
            (head.contains("/listrooms") && is_of_all)
                .then(|| answer("200 OK", "", &"\0".repeat(5 << 20)))
        }),
    ];
    for (note, rule) in cases {
        let url = format!(
            "ws://{}",
            front(&server, move |head| rule(head)
                .unwrap_or_else(|| forward(head)))
        );
        let visit = Visit::to(&url, &server, nothing);
        let notes = visit.gets_in().notes();
        assert!(notes.contains(note), "{note}: {notes}");
    }
}

#[test]
fn rooms_that_were_made_before_one_could_not_be_are_deleted_and_reported() {
    let Some(server) = Server::livekit() else {
        return;
    };
    let _turn = beside_one_other();
    let made = AtomicUsize::new(0);
    let fails = move |head: &str| {
        if head.contains("/CreateRoom") && made.fetch_add(1, Ordering::Relaxed) >= 3 {
            let failed = "{\"code\":\"unavailable\",\"msg\":\"no response from servers\"}";
            answer("503 Service Unavailable", "", failed)
        } else {
            forward(head)
        }
    };
    let url = format!("ws://{}", front(&server, fails));
    let visit = Visit::to(&url, &server, |command| {
        command.args(["--room-count", "6"]);
    });
    visit.is_kept_out(&[
        "3 of 6 rooms were made, and the next one was not",
        "unavailable: no response from servers",
        "The 3 were deleted again",
    ]);
    let report = visit.report.as_ref().expect("a report");
    assert_eq!(report.result(), "PARTIAL");
    assert!(room_names(&server).is_empty(), "{}", visit.said());
}

#[test]
fn this_host_is_never_reached_through_a_proxy() {
    let _turn = beside_one_other();
    for proxy in ["HTTP_PROXY", "http_proxy", "ALL_PROXY"] {
        let mut command = throng();
        command
            .env(proxy, "http://127.0.0.1:9")
            .args(SMALL)
            .arg("--quiet");
        let finished = run(&mut command, "no secret");
        assert!(
            matches!(finished.code, Some(0 | 98)),
            "{proxy}: {}{}",
            finished.stdout,
            finished.stderr
        );
    }
}

#[test]
fn elsewhere_everything_goes_through_the_proxy_and_it_is_said() {
    let Some(server) = Server::livekit() else {
        return;
    };
    let _turn = beside_one_other();
    // Only the proxy knows this name.
    let url = "ws://sfu.throng.test:7880";
    let seen = Arc::new(AtomicUsize::new(0));
    let counted = seen.clone();
    let proxy = front(&server, move |head| {
        if head.starts_with("CONNECT sfu.throng.test:7880 HTTP/1.1") {
            counted.fetch_add(1, Ordering::Relaxed);
            return Verdict::Tunnel("HTTP/1.1 200 Connected\r\n\r\n");
        }
        counted.fetch_add(1000, Ordering::Relaxed);
        Verdict::Forward(head.replacen("http://sfu.throng.test:7880", "", 1))
    });
    let visit = Visit::to(url, &server, |command| {
        command.env("HTTP_PROXY", format!("http://me:secret@{proxy}"));
    });
    let notes = visit.gets_in().notes();
    assert!(
        notes.contains(&format!(
            "went through the proxy http://{proxy} (HTTP_PROXY)"
        )) && !notes.contains("me:secret"),
        "{notes}"
    );
    let seen = seen.load(Ordering::Relaxed);
    assert!(seen % 1000 >= 3 && seen >= 4000, "{seen}");

    let refuses = front(&server, |_| answer("403 Forbidden", "", ""));
    Visit::to(url, &server, |command| {
        tokens(&server)(command);
        command.env("HTTP_PROXY", format!("http://{refuses}"));
    })
    .is_kept_out(&[
        "does not connect us to sfu.throng.test:7880 (403 Forbidden)",
        "NO_PROXY",
    ]);
    Visit::to(url, &server, |command| {
        command.env("HTTP_PROXY", "http://127.0.0.1:9");
    })
    .is_kept_out(&["the proxy http://127.0.0.1:9 (HTTP_PROXY) cannot be reached"]);
    Visit::to(url, &server, |command| {
        command.env("ALL_PROXY", "socks5://127.0.0.1:9");
    })
    .is_kept_out(&["ALL_PROXY names socks5://127.0.0.1:9"]);
    for no_proxy in ["throng.test", "*", "sfu.throng.test:7880"] {
        Visit::to(url, &server, |command| {
            command
                .env("HTTP_PROXY", format!("http://{proxy}"))
                .env("NO_PROXY", no_proxy);
        })
        .is_kept_out(&["'sfu.throng.test' cannot be resolved"]);
    }
    // The variable is named as it was spelt, and one that cannot be read is not left aside.
    Visit::to(url, &server, |command| {
        command.env("http_proxy", "http://127.0.0.1:9");
    })
    .is_kept_out(&["the proxy http://127.0.0.1:9 (http_proxy) cannot be reached"]);
    Visit::to(url, &server, |command| {
        command.env("HTTP_PROXY", "foo bar");
    })
    .is_kept_out(&["HTTP_PROXY is set, and its value is no address of a proxy"]);
}

/// Starts to listen, and never says anything to who connects. Returns the port.
fn silent() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        while let Ok((mut client, _)) = listener.accept() {
            std::thread::spawn(move || while matches!(client.read(&mut [0; 4096]), Ok(1..)) {});
        }
    });
    port
}

#[test]
fn who_is_silent_and_at_which_step_is_told() {
    let server = Server::embedded();
    let _turn = beside_one_other();
    let port = silent();
    let visit = Visit::to(&format!("wss://localhost:{port}"), &server, nothing);
    visit.is_kept_out(&[
        "took the connection (TCP was open), and did not answer the TLS handshake within 5 s",
    ]);
    assert!(!visit.said().contains("firewall"), "{}", visit.said());
    let proxy = format!("http://127.0.0.1:{port}");
    for scheme in ["ws", "wss"] {
        let url = format!("{scheme}://sfu.throng.test:7880");
        let visit = Visit::to(&url, &server, |command| {
            command.env("ALL_PROXY", &proxy);
        });
        visit.is_kept_out(&[
            &format!("the proxy {proxy} (ALL_PROXY) took the connection (TCP was open)"),
            "sfu.throng.test",
        ]);
        assert!(!visit.said().contains("firewall"), "{}", visit.said());
    }
}

#[test]
fn behind_nginx_the_server_is_known_by_its_words() {
    let Some(server) = Server::livekit() else {
        return;
    };
    let Some(nginx) = Nginx::before(&server, &["location / { PASS; }"]) else {
        return;
    };
    let _turn = beside_one_other();
    let visit = Visit::to(&nginx.url(0), &server, nothing);
    let report = visit.gets_in();
    assert_eq!(report.0["target"]["connection"], "single");
    assert_eq!(
        report.0["target"]["connection_reason"],
        "the server has /rtc/v1"
    );
    assert!(!visit.said().contains("--header"), "{}", visit.said());
    // Its own refusal stays its own, and ends the run before it begins.
    Visit::to(&nginx.url(0), &server, |command| {
        command.env(
            "LIVEKIT_API_SECRET",
            "another-secret-that-is-long-enough-too",
        );
    })
    .is_kept_out(&["the server refused our API key", "check API key and secret"]);
}

#[test]
fn whatever_answers_in_the_place_of_the_room_service_the_run_goes_on() {
    let Some(server) = Server::livekit() else {
        return;
    };
    let cases = [
        (
            "location / { default_type text/html; return 200 '<!doctype html><title>App</title>'; }",
            "with a web page (200: App)",
        ),
        (
            "location / { default_type text/plain; return 200 ok; }",
            "answered ListRooms with 200 (ok)",
        ),
        ("location / { return 302 /login; }", "is redirected (302)"),
        ("location / { return 401; }", "lets nobody through (401"),
        ("location / { return 405; }", "with a web page (405"),
        ("location / { return 413; }", "with a web page (413"),
        ("location / { return 444; }", "hung up without an answer"),
        ("location / { return 500 oops; }", "with 500 (oops)"),
        ("location / { return 502; }", "does not answer it (502"),
        (
            "location / { return 503; }",
            "takes no such request for now (503",
        ),
    ];
    let sites = cases.map(|(rest, _)| format!("location /rtc {{ PASS; }} {rest}"));
    let mut sites: Vec<&str> = sites.iter().map(String::as_str).collect();
    // Only the WebSocket itself gets through.
    sites.push("location = /rtc { PASS; } location / { return 404; }");
    let words = cases.iter().map(|(_, words)| *words);
    let Some(nginx) = Nginx::before(&server, &sites) else {
        return;
    };
    let _turn = beside_one_other();
    for (site, words) in words.chain(["with a web page (404"]).enumerate() {
        let visit = Visit::to(&nginx.url(site), &server, nothing);
        let notes = visit.gets_in().notes();
        assert!(
            notes.contains("the room service cannot be used") && notes.contains(words),
            "{words}: {notes}"
        );
    }
}

#[test]
fn what_nginx_refuses_in_json_is_not_livekits_refusal() {
    let Some(server) = Server::livekit() else {
        return;
    };
    let refuses = "location /twirp { PASS; } location / { default_type application/json; \
                   return 403 '{\"error\":\"ip not allowed\"}'; }";
    let Some(nginx) = Nginx::before(&server, &[refuses]) else {
        return;
    };
    let _turn = beside_one_other();
    let visit = Visit::to(&nginx.url(0), &server, nothing);
    visit.is_kept_out(&["in front of", "(403: {\"error\":\"ip not allowed\"})"]);
    for guess in ["(401", "API key and secret", "the server has /rtc/v1"] {
        assert!(!visit.said().contains(guess), "{guess}: {}", visit.said());
    }
}

#[test]
fn where_nginx_takes_the_upgrade_header_away_its_three_lines_are_named() {
    let Some(server) = Server::livekit() else {
        return;
    };
    let Some(nginx) = Nginx::before(&server, &["location / { proxy_pass http://BACKEND; }"]) else {
        return;
    };
    let _turn = beside_one_other();
    for connection in ["auto", "dual"] {
        let visit = Visit::to(&nginx.url(0), &server, |command| {
            command.args(["--connection", connection]);
        });
        visit.is_kept_out(&[
            "nginx",
            "proxy_http_version 1.1; proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection \"upgrade\";",
        ]);
        let said = visit.said();
        assert!(!said.contains("is this a LiveKit server"), "{said}");
    }
}

#[test]
fn a_limit_of_nginx_and_its_maintenance_are_no_backend_that_is_away() {
    let Some(server) = Server::livekit() else {
        return;
    };
    let sites = [
        "limit_conn all 2; location / { PASS; }",
        "location / { add_header Retry-After 100000 always; return 503; }",
    ];
    let Some(nginx) = Nginx::before(&server, &sites) else {
        return;
    };
    let _turn = beside_one_other();
    let visit = Visit::to(&nginx.url(0), &server, nothing);
    let said = visit.said();
    assert_eq!(visit.finished.code, Some(99), "{said}");
    assert!(
        said.contains("a limit of its own (limit_conn, limit_req)")
            && !said.contains("is the server behind it running"),
        "{said}"
    );
    let visit = Visit::to(&nginx.url(1), &server, nothing);
    visit.is_kept_out(&["come back in 100000 s", "maintenance"]);
    assert!(
        !visit.said().contains("join more slowly"),
        "{}",
        visit.said()
    );
}

#[test]
fn what_ends_a_run_before_it_begins_is_told_once() {
    let server = Server::embedded();
    let _turn = beside_one_other();
    let held = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("ws://{}", held.local_addr().unwrap());
    drop(held);
    let visit = Visit::to(&url, &server, nothing);
    assert_eq!(visit.finished.code, Some(1), "{}", visit.said());
    let times = visit.said().matches("refused the connection").count();
    assert_eq!(times, 1, "{}", visit.said());
}

/// A LiveKit server that is set up otherwise than usual.
fn strict(options: Options) -> Option<Server> {
    Server::livekit_with(&options)
}

#[test]
fn livekits_refusals_get_the_advice_that_fits_its_words() {
    let usual = Options::default;
    let rooms_by_hand = Options {
        auto_create: false,
        ..usual()
    };
    let Some(server) = strict(rooms_by_hand) else {
        return;
    };
    let _turn = beside_one_other();
    let is_told = |visit: &Visit, words: &[&str]| {
        visit.is_kept_out(words);
        let said = visit.said();
        assert!(!said.contains("is this a LiveKit server"), "{said}");
    };
    let visit = Visit::to(&server.url, &server, tokens(&server));
    is_told(
        &visit,
        &["requested room does not exist", "room.auto_create"],
    );

    let short_names = Options {
        name_length: 8,
        ..usual()
    };
    let server = strict(short_names).expect("it is there");
    let visit = Visit::to(&server.url, &server, nothing);
    is_told(
        &visit,
        &["room name length exceeds limits", "write a shorter --room"],
    );
    let visit = Visit::to(&server.url, &server, |command| {
        command.args(["--room", "abc"]);
    });
    is_told(
        &visit,
        &[
            "participant identity length exceeds limits: max length 8",
            "write a shorter --identity-prefix",
        ],
    );

    let small_rooms = Options {
        seats: 2,
        ..usual()
    };
    let server = strict(small_rooms).expect("it is there");
    let visit = Visit::to(&server.url, &server, nothing);
    let said = visit.said();
    assert_eq!(visit.finished.code, Some(99), "{said}");
    assert!(
        said.contains("rooms take 2 participants each, and this run has 3 for a room")
            && said.contains("as it does where room.max_participants is reached"),
        "{said}"
    );
}

#[test]
fn tokens_that_do_not_let_in_are_told_by_what_is_wrong_with_them() {
    let Some(livekit) = Server::livekit() else {
        return;
    };
    let _turn = beside_one_other();
    for server in [livekit, Server::embedded()] {
        let given = |keys: [&ApiKey; 3], secs: u64| {
            let made = ["ann", "ben", "cleo"]
                .into_iter()
                .zip(keys)
                .map(|(who, key)| {
                    let lifetime = Duration::from_secs(secs);
                    let token = key.join_token("hall", who, who, Permissions::BOTH, lifetime);
                    token.unwrap().expose().to_owned()
                });
            let made: Vec<String> = made.collect();
            move |command: &mut Command| {
                command
                    .env_remove("LIVEKIT_API_KEY")
                    .env_remove("LIVEKIT_API_SECRET");
                made.iter().for_each(|token| {
                    command.args(["--token", token]);
                });
            }
        };
        let foreign = ApiKey::new("APIother", &server.secret);
        let forger = ApiKey::new(&server.key, "another-secret-that-is-long-enough-too");
        for (key, words) in [
            (&foreign, "a key that this server does not have"),
            (&forger, "with another secret than this server's"),
        ] {
            let visit = Visit::to(&server.url, &server, given([key; 3], 300));
            visit.is_kept_out(&["the server refused the token (401: ", words]);
            let said = visit.said();
            assert!(!said.contains("API key and secret"), "{said}");
        }
    }
}

#[test]
fn a_token_that_has_expired_is_told_before_the_load_with_its_place() {
    let server = Server::embedded();
    let _turn = beside_one_other();
    let scratch = Scratch::new();
    let file = scratch.path("tokens");
    // Made with `exp` an hour after 1970, and with `nbf` in 2096.
    let claims = |more: &str| {
        let claims =
            format!("{{\"sub\":\"ann\",\"video\":{{\"roomJoin\":true,\"room\":\"hall\"}},{more}}}");
        format!("e30.{}.sig", base64_of(&claims))
    };
    for (token, words) in [
        (claims("\"exp\":3600"), "line 2, expired "),
        (claims("\"nbf\":4000000000"), "line 2, is valid in "),
    ] {
        fs::write(&file, format!("# of mine\n{token}\n")).unwrap();
        let visit = Visit::to(&server.url, &server, |command| {
            command
                .env_remove("LIVEKIT_API_KEY")
                .env_remove("LIVEKIT_API_SECRET")
                .args(["--token", &format!("@{}", file.display())]);
        });
        assert_eq!(visit.finished.code, Some(2), "{}", visit.said());
        assert!(visit.said().contains(words), "{}", visit.said());
    }
}

fn base64_of(text: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(text)
}

#[test]
fn names_that_livekit_takes_are_taken_and_come_through_every_output() {
    let Some(livekit) = Server::livekit() else {
        return;
    };
    let _turn = beside_one_other();
    for server in [livekit, Server::embedded()] {
        for (room, prefix) in [
            (
                "a b/../ü😀?x=y#z%20\"'".to_owned(),
                "j d <b> ü😀".to_owned(),
            ),
            ("x".repeat(256), "y".repeat(233)),
        ] {
            let scratch = Scratch::new();
            let (people, recorded) = (scratch.path("who.ndjson"), scratch.path("recorded"));
            let visit = Visit::to(&server.url, &server, |command| {
                command
                    .args(["--room", &room, "--identity-prefix", &prefix])
                    .arg("--participants")
                    .arg(&people)
                    .arg("--record")
                    .arg(&recorded);
            });
            let report = visit.gets_in();
            assert!(report.notes().contains("recorded "), "{}", report.notes());
            assert!(!report.notes().contains("cannot"), "{}", report.notes());
            assert_eq!(fs::read_dir(&recorded).unwrap().count(), 1);
            let people = fs::read_to_string(people).unwrap();
            for line in people.lines() {
                let who: serde_json::Value = serde_json::from_str(line).unwrap();
                let who = who.to_string();
                let quoted = serde_json::Value::from(room.as_str()).to_string();
                assert!(who.contains(&quoted), "{who}");
            }
            assert!(room_names(&server).is_empty(), "{}", visit.said());
        }
    }
}

#[test]
fn what_is_no_livekit_behind_a_websocket_is_told_by_its_first_message() {
    use futures_util::{SinkExt, StreamExt};
    use tokio_tungstenite::tungstenite::Message;
    let server = Server::embedded();
    let _turn = beside_one_other();
    for (message, words) in [
        (
            Message::Text("{\"hello\":1}".into()),
            "the text '{\"hello\":1}'",
        ),
        (
            Message::Binary(Vec::new().into()),
            "its first message is empty",
        ),
        (
            Message::Binary(vec![0xff; 7].into()),
            "7 bytes that cannot be read",
        ),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let url = format!("ws://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                while let Ok((client, _)) = listener.accept().await {
                    let message = message.clone();
                    tokio::spawn(async move {
                        let mut socket = tokio_tungstenite::accept_async(client).await.ok()?;
                        socket.send(message).await.ok()?;
                        while socket.next().await?.is_ok() {}
                        Some(())
                    });
                }
            });
        });
        let visit = Visit::to(&url, &server, |command| {
            tokens(&server)(command);
            command.args(["--connection", "dual"]);
        });
        visit.is_kept_out(&["what answers there is no LiveKit server", words]);
        let said = visit.said();
        assert!(!said.contains("was silent for"), "{said}");
    }
}

/// Certificates on disk, and the servers that use them.
struct Certificates(Scratch);

impl Certificates {
    /// Returns the parameters of the usual certificate, which is both an authority and a server.
    fn usual() -> CertificateParams {
        let mut params = CertificateParams::new(["localhost".to_owned()]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
    }

    fn write(&self, name: &str, params: &CertificateParams) -> PathBuf {
        let key = KeyPair::generate().unwrap();
        let made = params.self_signed(&key).unwrap();
        let path = self.0.path(name);
        fs::write(&path, made.pem() + &key.serialize_pem()).unwrap();
        path
    }

    /// Writes a certificate whose issuer is certified by a root, and that root's. Returns both
    /// paths; the issuer's own certificate is nowhere.
    fn write_without_issuer(&self, leaf: &CertificateParams) -> (PathBuf, PathBuf) {
        let authority = |name: &str| {
            let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.distinguished_name.push(DnType::CommonName, name);
            params
        };
        let key = || KeyPair::generate().unwrap();
        let root = CertifiedIssuer::self_signed(authority("root"), key()).unwrap();
        let middle = CertifiedIssuer::signed_by(authority("middle"), key(), &root).unwrap();
        let leaf_key = key();
        let leaf = leaf.signed_by(&leaf_key, &middle).unwrap();
        let paths = (self.0.path("chain_leaf.pem"), self.0.path("chain_root.pem"));
        fs::write(&paths.0, leaf.pem() + &leaf_key.serialize_pem()).unwrap();
        fs::write(&paths.1, root.pem()).unwrap();
        paths
    }

    /// Starts a server that speaks TLS with this certificate and stands before `server`. Returns
    /// its port.
    fn serve(pem: &PathBuf, server: &Server, wants_client: bool) -> u16 {
        let chain = vec![CertificateDer::from_pem_file(pem).unwrap()];
        let key = PrivateKeyDer::from_pem_file(pem).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let key = provider.key_provider.load_private_key(key).unwrap();
        let config = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap();
        let config = if wants_client {
            let mut roots = rustls::RootCertStore::empty();
            roots.add(chain[0].clone()).unwrap();
            let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(
                Arc::new(roots),
                provider,
            );
            config.with_client_cert_verifier(verifier.build().unwrap())
        } else {
            config.with_no_client_auth()
        };
        // A resolver hands the certificate out unread. Where rustls reads it, version 1 would be
        // refused.
        let config = config.with_cert_resolver(Arc::new(SingleCertAndKey::from(
            CertifiedKey::new(chain, key),
        )));
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let backend = backend(server);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                while let Ok((client, _)) = listener.accept().await {
                    let acceptor = acceptor.clone();
                    tokio::spawn(async move {
                        let mut client = acceptor.accept(client).await?;
                        let mut server = tokio::net::TcpStream::connect(backend).await?;
                        tokio::io::copy_bidirectional(&mut client, &mut server).await
                    });
                }
            });
        });
        port
    }
}

#[test]
fn the_usual_self_signed_certificate_works_where_it_is_named() {
    let Some(server) = Server::livekit() else {
        return;
    };
    let _turn = beside_one_other();
    let made = Certificates(Scratch::new());
    let pem = made.write("usual.pem", &Certificates::usual());
    let url = format!(
        "wss://localhost:{}",
        Certificates::serve(&pem, &server, false)
    );
    Visit::to(&url, &server, |command| {
        command.arg("--ca-cert").arg(&pem);
    })
    .gets_in();
    Visit::to(&url, &server, |command| {
        command.env("SSL_CERT_FILE", &pem);
    })
    .gets_in();
    // The name is checked even for a certificate that `--ca-cert` names.
    let other = url.replace("localhost", "127.0.0.1");
    Visit::to(&other, &server, |command| {
        command.arg("--ca-cert").arg(&pem);
    })
    .is_kept_out(&["certificate is for localhost, and not for 127.0.0.1"]);
    let visit = Visit::to(&other, &server, |command| {
        command.arg("--insecure");
    });
    let notes = visit.gets_in().notes();
    assert!(
        notes.contains("certificates were not checked (--insecure)"),
        "{notes}"
    );
}

#[test]
fn each_fault_of_a_certificate_has_its_own_sentence() {
    let server = Server::embedded();
    let _turn = beside_one_other();
    let made = Certificates(Scratch::new());
    let leaf = CertificateParams::new(["localhost".to_owned()]).unwrap();
    let mut expired = leaf.clone();
    (expired.not_before, expired.not_after) =
        (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1));
    let mut early = leaf.clone();
    (early.not_before, early.not_after) = (date_time_ymd(2090, 1, 1), date_time_ymd(2091, 1, 1));
    let nameless = CertificateParams::new(Vec::<String>::new()).unwrap();
    let elsewhere = CertificateParams::new(["sfu.example.com".to_owned()]).unwrap();
    let old = PathBuf::from(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/fixtures/tls/version_1.pem"
    ));
    let cases = [
        (
            made.write("a", &Certificates::usual()),
            false,
            "one of an authority (CA:TRUE)",
        ),
        (
            made.write("b", &leaf),
            false,
            "of an authority that nobody here trusts",
        ),
        (
            made.write("c", &expired),
            true,
            "has expired (Fri, 01 Jan 2021",
        ),
        (
            made.write("d", &early),
            true,
            "not valid yet (Sun, 01 Jan 2090",
        ),
        (
            made.write("e", &nameless),
            true,
            "names no host at all (no subjectAltName",
        ),
        (
            made.write("f", &elsewhere),
            true,
            "is for sfu.example.com, and not for localhost",
        ),
        (old, false, "of X.509 version 1"),
    ];
    for (pem, is_named, words) in cases {
        let url = format!(
            "wss://localhost:{}",
            Certificates::serve(&pem, &server, false)
        );
        let visit = Visit::to(&url, &server, |command| {
            if is_named {
                command.arg("--ca-cert").arg(&pem);
            }
        });
        visit.is_kept_out(&["TLS with wss://localhost", words]);
    }
    // The server sends its own certificate and not its issuer's, and the root above that is named.
    let (pem, root) = made.write_without_issuer(&leaf);
    let url = format!(
        "wss://localhost:{}",
        Certificates::serve(&pem, &server, false)
    );
    Visit::to(&url, &server, |command| {
        command.arg("--ca-cert").arg(&root);
    })
    .is_kept_out(&["issued by 'middle', whose certificate the server does not send"]);
    let pem = made.write("g", &Certificates::usual());
    let url = format!(
        "wss://localhost:{}",
        Certificates::serve(&pem, &server, true)
    );
    Visit::to(&url, &server, |command| {
        command.arg("--ca-cert").arg(&pem);
    })
    .is_kept_out(&["wants a client certificate"]);
    let visit = Visit::to(&url, &server, |command| {
        tokens(&server)(command);
        command.arg("--ca-cert").arg(&pem);
    });
    visit.is_kept_out(&["wants a client certificate", "could not run"]);
}

#[test]
fn certificates_that_cannot_be_read_are_an_error_that_names_them() {
    let server = Server::embedded();
    let _turn = beside_one_other();
    let scratch = Scratch::new();
    let (missing, empty) = (scratch.path("missing.pem"), scratch.path("empty.pem"));
    fs::write(&empty, "nothing\n").unwrap();
    for (path, words) in [
        (&missing, "which cannot be read (No such file or directory)"),
        (&empty, "which holds no certificate"),
    ] {
        let path_text = path.display().to_string();
        Visit::to(&server.url, &server, |command| {
            command.arg("--ca-cert").arg(path);
        })
        .is_kept_out(&["--ca-cert names", &path_text, words]);
        Visit::to("wss://127.0.0.1:9", &server, |command| {
            command.env("SSL_CERT_FILE", path);
        })
        .is_kept_out(&["SSL_CERT_FILE names", &path_text, words]);
    }
}

#[test]
fn secrets_from_files_and_with_a_newline_let_in() {
    let server = Server::embedded();
    let _turn = beside_one_other();
    let scratch = Scratch::new();
    let file = scratch.path("secret");
    fs::write(&file, format!("{}\n", server.secret)).unwrap();
    Visit::to(&server.url, &server, |command| {
        command
            .env_remove("LIVEKIT_API_SECRET")
            .arg("--api-secret-file")
            .arg(&file);
    })
    .gets_in();
    Visit::to(&server.url, &server, |command| {
        command.env("LIVEKIT_API_SECRET", format!("{}\n", server.secret));
    })
    .gets_in();
    // As an editor on Windows, or a line of a `.env` file, has them.
    fs::write(&file, format!("\u{feff}\"{}\"\r\n", server.secret)).unwrap();
    Visit::to(&server.url, &server, |command| {
        command
            .env("LIVEKIT_API_KEY", format!("'{}'", server.key))
            .env_remove("LIVEKIT_API_SECRET")
            .arg("--api-secret-file")
            .arg(&file);
    })
    .gets_in();
    let tokens = ["ann", "ben", "cleo"].map(|who| {
        let key = server.api_key();
        let lifetime = Duration::from_secs(300);
        let token = key.join_token("hall", who, who, Permissions::BOTH, lifetime);
        token.unwrap().expose().to_owned()
    });
    let [ann, ben, cleo] = tokens;
    fs::write(&file, format!("\u{feff}{ann}\r\n\"{ben}\"\n'{cleo}'\n")).unwrap();
    Visit::to(&server.url, &server, |command| {
        command
            .env_remove("LIVEKIT_API_KEY")
            .env_remove("LIVEKIT_API_SECRET")
            .args(["--token", &format!("@{}", file.display())]);
    })
    .gets_in();
}

#[test]
fn of_several_addresses_those_that_are_there_are_used_and_told() {
    let Some(server) = Server::livekit() else {
        return;
    };
    let _turn = beside_one_other();
    let scratch = Scratch::new();
    let hosts = scratch.path("hosts");
    fs::write(
        &hosts,
        "127.0.0.3 sfu.throng.test\n127.0.0.1 sfu.throng.test\n",
    )
    .unwrap();
    let json = scratch.path("run.json");
    // The name is known only in this mount namespace.
    let script = "mount --bind \"$HOSTS\" /etc/hosts && exec \"$THRONG\" \"$@\"";
    let mut command = Command::new("unshare");
    command
        .args(["-Urm", "sh", "-c", script, "sh"])
        .args(SMALL)
        .arg("--json")
        .arg(&json)
        .env("THRONG", env!("CARGO_BIN_EXE_throng"))
        .env("HOSTS", &hosts)
        .env(
            "LIVEKIT_URL",
            server.url.replace("127.0.0.1", "sfu.throng.test"),
        )
        .env("LIVEKIT_API_KEY", &server.key)
        .env("LIVEKIT_API_SECRET", &server.secret);
    let finished = run(&mut command, &server.secret);
    assert!(
        matches!(finished.code, Some(0 | 98)),
        "{}{}",
        finished.stdout,
        finished.stderr
    );
    let report = Report::read(&json, &server.secret);
    assert_eq!(report.counter("session", "joins_ok"), 3);
    let port = backend(&server).port();
    let notes = report.notes();
    assert!(
        notes.contains(&format!(
            "127.0.0.3:{port} was not there (Connection refused; 0 connections)"
        )) && notes.contains(&format!("127.0.0.1:{port} took ")),
        "{notes}"
    );
    let addresses = report.0["target"]["addresses"].as_array().unwrap();
    assert_eq!(addresses.len(), 2);
    assert!(
        report.micros("session", "join", "max").unwrap() < 5_000_000,
        "a dead address costs nothing of note"
    );
}
