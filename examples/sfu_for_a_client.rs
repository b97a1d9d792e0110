//! The embedded SFU as the server in a test of another LiveKit client. It starts in the test's own
//! process, at a free port, and reports afterwards what it saw. In this example a few lines with a
//! WebSocket take the place of that client.
//!
//! `cargo run --example sfu_for_a_client`

use std::time::Duration;

use futures_util::StreamExt;
use livekit_protocol::{SignalResponse, signal_response};
use prost::Message;
use throng::sfu::server::{DEV_KEY, DEV_SECRET, ServerConfig, SfuServer};
use throng::signal::{ApiKey, Permissions};
use tokio::net::TcpStream;
use tokio_tungstenite::client_async;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let server = SfuServer::start(ServerConfig::loopback(1))?;
    println!("the SFU listens at {}", server.url());

    let token = ApiKey::new(DEV_KEY, DEV_SECRET).join_token(
        "hall",
        "somebody",
        "Somebody",
        Permissions::BOTH,
        Duration::from_secs(60),
    )?;
    let url = format!("{}/rtc?access_token={}", server.url(), token.expose());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let response = runtime.block_on(async {
        let stream = TcpStream::connect(server.address()).await?;
        let (mut client, _) = client_async(url, stream).await?;
        let message = client.next().await.ok_or("the SFU said nothing")??;
        let response = SignalResponse::decode(message.into_data())?;
        let joined = server.statistics().lobby;
        println!(
            "{} participant is in {} room",
            joined.participants, joined.rooms
        );
        Ok::<_, Box<dyn std::error::Error>>(response)
    })?;

    let Some(signal_response::Message::Join(join)) = response.message else {
        return Err("the first message is a Join".into());
    };
    let room = join.room.ok_or("a Join names its room")?;
    println!("the client joined room {:?}", room.name);
    let lobby = server.stop().lobby;
    println!("{} join since the start", lobby.since_start.joins);
    Ok(())
}
