//! Requests to a participant that is in the room, in their order. A request to leave is noticed at
//! any time.

use std::collections::VecDeque;
use std::future::pending;

use tokio::sync::mpsc;

use super::Request;

pub(super) struct RequestQueue {
    receiver: mpsc::UnboundedReceiver<Request>,
    /// Requests that arrived while only [`Request::Leave`] was waited for.
    kept: VecDeque<Request>,
}

impl RequestQueue {
    pub(super) fn new(receiver: mpsc::UnboundedReceiver<Request>) -> RequestQueue {
        RequestQueue {
            receiver,
            kept: VecDeque::new(),
        }
    }

    /// Returns the next request; waits forever if nobody can send any. Cancel-safe.
    pub(super) async fn next(&mut self) -> Request {
        match self.kept.pop_front() {
            Some(request) => request,
            None => self.receive().await,
        }
    }

    /// Completes when the participant is asked to leave; other requests are kept. Cancel-safe.
    pub(super) async fn leave(&mut self) {
        while !self.kept.contains(&Request::Leave) {
            let request = self.receive().await;
            self.kept.push_back(request);
        }
    }

    async fn receive(&mut self) -> Request {
        match self.receiver.recv().await {
            Some(request) => request,
            None => pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::Kind;

    #[tokio::test]
    async fn who_listens_for_the_end_alone_does_the_rest_afterwards() {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut requests = RequestQueue::new(receiver);
        let mute = Request::SetMuted {
            kind: Kind::Audio,
            muted: true,
        };
        sender.send(mute).unwrap();
        sender.send(Request::Leave).unwrap();
        requests.leave().await;
        requests.leave().await;
        assert_eq!(
            [requests.next().await, requests.next().await],
            [mute, Request::Leave]
        );
    }
}
