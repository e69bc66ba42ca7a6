//! Signal numbers and the names people write for them. Rejects what can't be sent, naming it in the error; sends nothing itself.

use std::fmt;
use std::str::FromStr;

/// The first real-time signal as the C library and systemd count: the C library reserves the kernel's first two.
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// The two signals that the C library reserves and does not allow anyone to send.
const KEPT: std::ops::RangeInclusive<i32> = 32..=33;

/// A signal by its number: 0 (only checks, sends nothing) to 64, without 32 and 33.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Signal(i32);

impl Signal {
    /// Signal 0: sends nothing.
    pub const NULL: Self = Self(0);
    /// Interrupt, Nomad's default for a stop.
    pub const INT: Self = Self(2);
    /// SIGKILL; can't be caught or ignored.
    pub const KILL: Self = Self(9);
    /// SIGTERM, the request to terminate.
    pub const TERM: Self = Self(15);
    /// SIGCONT; continues a stopped process.
    pub const CONT: Self = Self(18);
    /// SIGSTOP; stops a process, can't be caught or ignored.
    pub const STOP: Self = Self(19);
    /// SIGRTMIN+4; makes systemd as PID 1 power off.
    pub const POWER_OFF: Self = Self(RTMIN + 4);

    /// The signal with this number, if it exists and can be sent.
    pub fn from_number(number: i32) -> Option<Self> {
        let known = (0..=RTMAX).contains(&number) && !KEPT.contains(&number);
        known.then_some(Self(number))
    }

    /// The signal number.
    pub fn number(self) -> i32 {
        self.0
    }
}

/// A text that does not name a signal that can be sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the message describes it")]
pub enum UnknownSignal {
    #[error(
        "{0:?} is not a signal: use a name such as SIGHUP, SIGRTMIN+3, or a number from 0 to 64"
    )]
    None(String),
    #[error(
        "{0:?} can't be sent: the C library reserves 32 and 33; real-time signals begin with SIGRTMIN, which is 34"
    )]
    Kept(String),
}

/// Signal names and numbers on Linux for x86_64 and aarch64, which agree. The first name of a number is the one that is
/// displayed.
const NAMES: &[(&str, i32)] = &[
    ("NULL", 0),
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
];

impl FromStr for Signal {
    type Err = UnknownSignal;

    /// Accepts upper or lower case, with or without `SIG`, a number, or `SIGRTMIN+n` and `SIGRTMAX-n`.
    fn from_str(text: &str) -> Result<Self, UnknownSignal> {
        let unknown = || UnknownSignal::None(text.to_owned());
        let upper = text.trim().to_ascii_uppercase();
        if let Ok(number) = upper.parse() {
            if KEPT.contains(&number) {
                return Err(UnknownSignal::Kept(text.to_owned()));
            }
            return Self::from_number(number).ok_or_else(unknown);
        }
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        if let Some((_, number)) = NAMES.iter().find(|(known, _)| *known == name) {
            return Ok(Self(*number));
        }
        let offset = |rest: &str, sign: char| match rest.strip_prefix(sign) {
            Some(digits) => digits.parse::<u8>().ok().map(i32::from),
            None => rest.is_empty().then_some(0),
        };
        let number = if let Some(rest) = name.strip_prefix("RTMIN") {
            offset(rest, '+').map(|n| RTMIN + n)
        } else if let Some(rest) = name.strip_prefix("RTMAX") {
            offset(rest, '-').map(|n| RTMAX - n)
        } else {
            None
        };
        number
            .filter(|n| (RTMIN..=RTMAX).contains(n))
            .map(Self)
            .ok_or_else(unknown)
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.iter().find(|(_, number)| *number == self.0) {
            Some((name, _)) => write!(f, "SIG{name}"),
            None if self.0 >= RTMIN => write!(f, "SIGRTMIN+{}", self.0 - RTMIN),
            None => write!(f, "signal {}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    #[rstest]
    #[case("SIGHUP", 1)]
    #[case("hup", 1)]
    #[case("SIGKILL", 9)]
    #[case("9", 9)]
    #[case("SIGIOT", 6)]
    #[case("SIGNULL", 0)]
    #[case("SIGRTMIN", 34)]
    #[case("SIGRTMIN+4", 38)]
    #[case("sigrtmax-1", 63)]
    fn names_become_numbers(#[case] text: &str, #[case] number: i32) {
        assert_eq!(text.parse::<Signal>().map(Signal::number), Ok(number));
    }

    #[rstest]
    #[case("")]
    #[case("SIGNOPE")]
    #[case("65")]
    #[case("-1")]
    #[case("SIGRTMIN+31")]
    #[case("SIGRTMIN-1")]
    #[case("32")]
    #[case("33")]
    fn an_invalid_signal_is_refused_by_name(#[case] text: &str) {
        let error = text.parse::<Signal>().unwrap_err().to_string();
        assert!(error.contains(&format!("{text:?}")), "{error}");
    }

    #[test]
    fn reserved_signals_are_refused() {
        for number in [-1, 32, 33, 65] {
            assert_eq!(Signal::from_number(number), None);
        }
        let error = "33".parse::<Signal>().unwrap_err();
        assert!(error.to_string().contains("can't be sent"), "{error}");
    }

    proptest! {
        #[test]
        fn a_displayed_signal_is_read_back(number in 0..=64i32) {
            prop_assume!(!KEPT.contains(&number));
            let signal = Signal::from_number(number).unwrap();
            prop_assert_eq!(signal.to_string().parse(), Ok(signal));
        }
    }
}
