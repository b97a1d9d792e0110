//! A coordinator for tests. It answers as a script says, and keeps a log of the requests.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use serde_json::Value;

/// Returns the status and body of the answer to each request. A body that is a JSON string is sent
/// as plain text.
type Script = Box<dyn FnMut(&Asked) -> (u16, Value) + Send>;

#[derive(Clone, Debug)]
pub struct Asked {
    /// Method and path, such as `POST /beat/7`.
    pub what: String,
    pub token: Option<String>,
    pub body: Value,
    /// Number of earlier requests with the same method and path.
    pub before: usize,
}

#[derive(Clone)]
pub struct Scripted {
    log: Arc<Mutex<Vec<Asked>>>,
    script: Arc<Mutex<Script>>,
}

impl Scripted {
    /// Starts to listen on a free port, within a runtime. Returns the coordinator and its URL.
    pub async fn start(
        script: impl FnMut(&Asked) -> (u16, Value) + Send + 'static,
    ) -> (Scripted, String) {
        let scripted = Scripted {
            log: Arc::default(),
            script: Arc::new(Mutex::new(Box::new(script))),
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let app = axum::Router::new()
            .fallback(answer)
            .with_state(scripted.clone());
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        (scripted, url)
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.log.lock().unwrap().clone()
    }

    /// Number of requests by method and path.
    pub fn counts(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        self.asked()
            .into_iter()
            .for_each(|asked| *counts.entry(asked.what).or_default() += 1);
        counts
    }
}

async fn answer(
    State(scripted): State<Scripted>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> (StatusCode, String) {
    let what = format!("{method} {}", uri.path());
    let asked = {
        let mut log = scripted.log.lock().unwrap();
        let asked = Asked {
            before: log.iter().filter(|asked| asked.what == what).count(),
            what,
            token: headers
                .get(header::AUTHORIZATION)
                .map(|value| value.to_str().unwrap().to_owned()),
            body: serde_json::from_slice(&body).unwrap_or_default(),
        };
        log.push(asked.clone());
        asked
    };
    let (status, body) = (scripted.script.lock().unwrap())(&asked);
    let text = body
        .as_str()
        .map_or_else(|| body.to_string(), str::to_owned);
    (StatusCode::from_u16(status).unwrap(), text)
}
