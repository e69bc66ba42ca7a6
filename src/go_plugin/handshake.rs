//! The go-plugin handshake: reads what the host passes in the environment and prints the one line that answers it. Reads nothing
//! but the environment and writes nothing but that line. Rejects anything that would otherwise cause a failure later.

use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use super::listen::LONGEST_DIR;

/// The variable by which a go-plugin host identifies itself. It protects nothing; it only distinguishes a start by the host from
/// a start by hand.
const COOKIE: &str = "NOMAD_PLUGIN_MAGIC_COOKIE";
const COOKIE_VALUE: &str = "e4327c2e01eabfd75a8a67adb114fb34a757d57eee7728d857a8cec6e91a7255";
/// The version of go-plugin's own protocol.
const CORE_VERSION: u32 = 1;
/// The version of Nomad's protocol on top of it; this is the only one.
const APP_VERSION: u32 = 2;

/// Why a process started by a host can't serve it. The message appears in the agent's log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// No cookie or a different one: the program was started by hand.
    #[error("the plugin cookie is missing: this program is started by a Nomad client, not by hand")]
    NotAHost,
    /// The host asks for TLS.
    #[error("PLUGIN_CLIENT_CERT is set: automatic TLS is not supported (Nomad never asks for it)")]
    ClientCertificate,
    /// The host supports other versions only.
    #[error(
        "PLUGIN_PROTOCOL_VERSIONS: {0:?} does not contain {APP_VERSION}, the only version that is supported"
    )]
    Versions(String),
    /// The handshake line can't contain the socket directory.
    #[error("PLUGIN_UNIX_SOCKET_DIR: {0:?} must be text without line breaks and without '|'")]
    SocketDirectory(PathBuf),
    /// The socket directory is too long for a unix socket path.
    #[error(
        "PLUGIN_UNIX_SOCKET_DIR: {0:?} is longer than {LONGEST_DIR} bytes: the paths of sockets in it would be too long"
    )]
    LongDirectory(PathBuf),
}

/// What a host asks for in the environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandshakeEnv {
    /// The absolute directory for the socket: `PLUGIN_UNIX_SOCKET_DIR`, else `TMPDIR` unless that is too long, else `/tmp`.
    pub socket_dir: PathBuf,
    /// The group (name or number) that may connect; `None` allows this user only.
    pub socket_group: Option<String>,
    /// Whether the host asked about broker multiplexing and therefore reads a seventh field.
    pub multiplex_asked: bool,
    /// The number of worker threads, from tokio's own variable; `None` if it is not set or not a number above zero.
    pub workers: Option<usize>,
}

impl HandshakeEnv {
    /// Reads the handshake from this process's environment.
    #[expect(
        clippy::disallowed_methods,
        reason = "a go-plugin host passes its handshake in the environment"
    )]
    pub fn from_environment() -> Result<Self, HandshakeError> {
        Self::read(|name| std::env::var_os(name))
    }

    /// Reads the handshake through `variable`. An empty variable counts as not set.
    pub fn read(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, HandshakeError> {
        let get = |name: &str| variable(name).filter(|value| !value.is_empty());
        if get(COOKIE).is_none_or(|value| value != COOKIE_VALUE) {
            return Err(HandshakeError::NotAHost);
        }
        if get("PLUGIN_CLIENT_CERT").is_some() {
            return Err(HandshakeError::ClientCertificate);
        }
        if let Some(versions) = get("PLUGIN_PROTOCOL_VERSIONS") {
            let versions = versions.to_string_lossy().into_owned();
            let known = |text: &str| text.trim().parse() == Ok(APP_VERSION);
            if !versions.split(',').any(known) {
                return Err(HandshakeError::Versions(versions));
            }
        }
        let absolute = |dir: OsString| std::path::absolute(&dir).unwrap_or_else(|_| dir.into());
        let fits = |dir: &PathBuf| dir.as_os_str().len() <= LONGEST_DIR;
        let dir = match get("PLUGIN_UNIX_SOCKET_DIR").map(absolute) {
            Some(dir) if !fits(&dir) => return Err(HandshakeError::LongDirectory(dir)),
            Some(dir) => dir,
            // TMPDIR is not the host's choice for sockets, and the host takes the path from the handshake line, so another
            // directory works too.
            None => get("TMPDIR")
                .map(absolute)
                .filter(fits)
                .unwrap_or_else(|| PathBuf::from("/tmp")),
        };
        if dir
            .to_str()
            .is_none_or(|text| text.contains(['|', '\n', '\r']))
        {
            return Err(HandshakeError::SocketDirectory(dir));
        }
        Ok(Self {
            socket_dir: dir,
            socket_group: get("PLUGIN_UNIX_SOCKET_GROUP")
                .map(|group| group.to_string_lossy().into_owned()),
            multiplex_asked: get("PLUGIN_MULTIPLEX_GRPC").is_some(),
            workers: get("TOKIO_WORKER_THREADS")
                .and_then(|workers| workers.to_str()?.parse().ok())
                .filter(|workers| *workers > 0),
        })
    }

    /// The handshake line with the address of the socket. The sixth field, a certificate, stays empty: any content there
    /// terminates the agent.
    pub fn line(&self, socket: &Path) -> String {
        let multiplex = if self.multiplex_asked { "|false" } else { "" };
        format!(
            "{CORE_VERSION}|{APP_VERSION}|unix|{}|grpc|{multiplex}\n",
            socket.display()
        )
    }

    /// Writes [`line`](Self::line) to stdout, complete and flushed. Nothing else in the plugin process writes to stdout.
    pub fn print_handshake(&self, socket: &Path) -> std::io::Result<()> {
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(self.line(socket).as_bytes())?;
        stdout.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn read(pairs: &[(&str, &str)]) -> Result<HandshakeEnv, HandshakeError> {
        HandshakeEnv::read(|name| {
            pairs
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| OsString::from(value))
        })
    }

    fn with_cookie(more: &[(&str, &str)]) -> Result<HandshakeEnv, HandshakeError> {
        read(&[&[(COOKIE, COOKIE_VALUE)], more].concat())
    }

    #[rstest]
    #[case::none(&[])]
    #[case::empty(&[(COOKIE, "")])]
    #[case::wrong(&[(COOKIE, "e4327c2e")])]
    fn without_the_cookie_nothing_is_served(#[case] pairs: &[(&str, &str)]) {
        assert_eq!(read(pairs), Err(HandshakeError::NotAHost));
    }

    #[test]
    fn the_line_has_six_fields_and_the_last_is_empty() {
        let line = with_cookie(&[]).unwrap().line(Path::new("/tmp/plugin-x"));
        assert_eq!(line, "1|2|unix|/tmp/plugin-x|grpc|\n");
    }

    #[test]
    fn the_seventh_field_is_sent_only_on_request() {
        let asked = with_cookie(&[("PLUGIN_MULTIPLEX_GRPC", "true")]).unwrap();
        assert_eq!(asked.line(Path::new("/s")), "1|2|unix|/s|grpc||false\n");
        let not = with_cookie(&[("PLUGIN_MULTIPLEX_GRPC", "")]).unwrap();
        assert_eq!(not.line(Path::new("/s")), "1|2|unix|/s|grpc|\n");
    }

    #[rstest]
    #[case("2", true)]
    #[case("1,2,3", true)]
    #[case(" 1, 2 ", true)]
    #[case("", true)]
    #[case("3", false)]
    #[case("22,x", false)]
    fn the_version_must_be_offered(#[case] offered: &str, #[case] served: bool) {
        let result = with_cookie(&[("PLUGIN_PROTOCOL_VERSIONS", offered)]);
        assert_eq!(result.is_ok(), served, "{result:?}");
    }

    #[test]
    fn a_certificate_is_refused_by_name() {
        let error = with_cookie(&[("PLUGIN_CLIENT_CERT", "-----BEGIN")]).unwrap_err();
        assert!(error.to_string().starts_with("PLUGIN_CLIENT_CERT"));
    }

    #[rstest]
    #[case(&[], "/tmp")]
    #[case(&[("TMPDIR", "/var/tmp")], "/var/tmp")]
    #[case(&[("TMPDIR", "/var/tmp"), ("PLUGIN_UNIX_SOCKET_DIR", "/run/x")], "/run/x")]
    fn the_socket_is_in_the_directory_of_the_host(
        #[case] pairs: &[(&str, &str)],
        #[case] dir: &str,
    ) {
        assert_eq!(with_cookie(pairs).unwrap().socket_dir, Path::new(dir));
    }

    #[rstest]
    #[case("1", Some(1))]
    #[case("0", None)]
    #[case("many", None)]
    #[case("", None)]
    fn tokio_worker_threads_sets_the_number_of_workers(
        #[case] text: &str,
        #[case] workers: Option<usize>,
    ) {
        let handshake_env = with_cookie(&[("TOKIO_WORKER_THREADS", text)]).unwrap();
        assert_eq!(handshake_env.workers, workers);
    }

    #[test]
    fn a_directory_that_is_too_long_for_sockets_is_refused_or_replaced() {
        let fits = format!("/{}", "d".repeat(LONGEST_DIR - 1));
        let long = format!("{fits}d");
        for name in ["TMPDIR", "PLUGIN_UNIX_SOCKET_DIR"] {
            assert_eq!(
                with_cookie(&[(name, &fits)]).unwrap().socket_dir,
                Path::new(&fits)
            );
        }
        assert_eq!(
            with_cookie(&[("TMPDIR", &long)]).unwrap().socket_dir,
            Path::new("/tmp")
        );
        let error = with_cookie(&[("PLUGIN_UNIX_SOCKET_DIR", &long)]).unwrap_err();
        assert_eq!(error, HandshakeError::LongDirectory(long.into()));
    }

    #[test]
    fn a_directory_that_breaks_the_handshake_line_is_refused() {
        let error = with_cookie(&[("PLUGIN_UNIX_SOCKET_DIR", "/run/a|b")]).unwrap_err();
        assert_eq!(error, HandshakeError::SocketDirectory("/run/a|b".into()));
    }
}
