//! `nomad alloc exec`: a command in a running task, over the agent's websocket.

use std::net::TcpStream;
use std::time::Instant;

use data_encoding::BASE64;
use serde_json::{Value, json};
use tungstenite::protocol::Role;
use tungstenite::{Message as Frame, WebSocket};

use super::Allocation;
use crate::DEADLINE;

/// A command in a running task. Dropping it is a client that vanishes.
#[derive(Debug)]
pub struct Exec {
    socket: WebSocket<TcpStream>,
}

/// What the agent sends about a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Output.
    Stdout(Vec<u8>),
    /// Output, only without a terminal.
    Stderr(Vec<u8>),
    /// The command has ended with this exit code. The last message.
    Exited(i64),
    /// It could not be run, or its session has failed: the reason. The last message.
    Failed(String),
}

impl Allocation<'_> {
    /// Connects and starts a command in the task, which the agent rejects until it has seen the start.
    pub fn exec(&self, command: &[&str], tty: bool) -> Exec {
        let encoded: String = json!(command).to_string().bytes().map(escaped).collect();
        let url = format!(
            "ws://127.0.0.1:{}/v1/client/allocation/{}/exec?task={}&tty={tty}&command={encoded}",
            self.agent.api.port, self.id, self.task
        );
        let stream = TcpStream::connect(("127.0.0.1", self.agent.api.port)).expect("the agent");
        stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        stream.set_nodelay(true).expect("an option");
        let (socket, _) = tungstenite::client(url, stream).expect("a websocket");
        Exec { socket }
    }
}

/// Percent-encodes a byte of a URL.
fn escaped(byte: u8) -> String {
    match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => char::from(byte).to_string(),
        byte => format!("%{byte:02X}"),
    }
}

impl Exec {
    fn send(&mut self, message: &Value) {
        let frame = Frame::text(message.to_string());
        self.socket.send(frame).expect("the agent reads");
    }

    /// Types this, or writes it to the command's stdin.
    pub fn write(&mut self, data: &[u8]) {
        self.send(&json!({ "stdin": { "data": BASE64.encode(data) } }));
    }

    /// Ends the command's stdin.
    pub fn close_stdin(&mut self) {
        self.send(&json!({ "stdin": { "close": true } }));
    }

    /// Changes the size of the terminal.
    pub fn resize(&mut self, rows: u16, columns: u16) {
        self.send(&json!({ "tty_size": { "height": rows, "width": columns } }));
    }

    /// What the command-line client sends every ten seconds.
    pub fn heartbeat(&mut self) {
        self.send(&json!({}));
    }

    /// Another sender of the same connection, for input that is written while output is read.
    pub fn sender(&self) -> Self {
        let stream = self.socket.get_ref().try_clone().expect("a descriptor");
        let socket = WebSocket::from_raw_socket(stream, Role::Client, None);
        Self { socket }
    }

    /// The next message.
    pub fn receive(&mut self) -> Message {
        let begun = Instant::now();
        loop {
            assert!(begun.elapsed() < DEADLINE, "the command goes on and on");
            let text = match self.socket.read() {
                Ok(Frame::Text(text)) => text,
                Ok(Frame::Close(reason)) => {
                    let reason = reason.map(|frame| frame.reason.to_string());
                    return Message::Failed(reason.unwrap_or_default());
                }
                Ok(_) => continue,
                Err(error) => return Message::Failed(error.to_string()),
            };
            let message: Value = serde_json::from_str(text.as_str()).expect("a message");
            if message["exited"] == true {
                return Message::Exited(message["result"]["exit_code"].as_i64().unwrap_or(0));
            }
            for (stream, wrap) in [
                ("stdout", Message::Stdout as fn(Vec<u8>) -> Message),
                ("stderr", Message::Stderr),
            ] {
                if let Some(data) = message[stream]["data"].as_str() {
                    return wrap(BASE64.decode(data.as_bytes()).expect("base64"));
                }
            }
        }
    }

    /// Reads to the end: stdout, stderr, and the last message.
    pub fn finish(&mut self) -> (String, String, Message) {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match self.receive() {
                Message::Stdout(data) => stdout.extend(data),
                Message::Stderr(data) => stderr.extend(data),
                last => {
                    let text = |bytes| String::from_utf8(bytes).expect("text");
                    return (text(stdout), text(stderr), last);
                }
            }
        }
    }
}
