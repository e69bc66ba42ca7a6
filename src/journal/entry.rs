//! An entry of a journal: when it was written and its fields. Any program of the container chooses names and values of fields; only those
//! that begin with `_` are journald's own.

/// Where an entry is and what its object says about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) offset: u64,
    /// The size of its object, in bytes.
    pub(super) size: u64,
    pub(super) seqnum: u64,
    /// Microseconds since 1970.
    pub(super) realtime: u64,
    /// Microseconds since the boot of the host.
    pub(super) monotonic: u64,
    pub(super) boot: [u8; 16],
}

/// An entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Microseconds since 1970.
    pub realtime: u64,
    /// Microseconds since the boot of the host.
    pub monotonic: u64,
    /// The boot that has written it.
    pub boot: [u8; 16],
    fields: Vec<(String, Vec<u8>)>,
}

/// What systemd reports about a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnitChange {
    /// It has failed.
    Failed,
    /// It was asked to stop.
    Stopping,
    /// It has stopped.
    Stopped,
}

impl Entry {
    pub(super) fn of(head: &Head) -> Self {
        Self {
            realtime: head.realtime,
            monotonic: head.monotonic,
            boot: head.boot,
            fields: Vec::new(),
        }
    }

    /// Adds a field, `NAME=value`. One without a valid name is left out.
    pub(super) fn add(&mut self, field: &[u8]) {
        let mut parts = field.splitn(2, |byte| *byte == b'=');
        let (Some(name), Some(value)) = (parts.next(), parts.next()) else {
            return;
        };
        let is_valid =
            |byte: &u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || *byte == b'_';
        if name.is_empty() || name.len() > 64 || !name.iter().all(is_valid) {
            return;
        }
        let name = String::from_utf8_lossy(name).into_owned();
        self.fields.push((name, value.to_vec()));
    }

    /// All fields, in no particular order. A name can occur more than once.
    pub fn fields(&self) -> &[(String, Vec<u8>)] {
        &self.fields
    }

    /// The first value of a field.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        let found = self.fields.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| &**value)
    }

    /// The same as text; one that is not UTF-8 counts as missing.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.get(name)
            .and_then(|value| std::str::from_utf8(value).ok())
    }

    /// The priority, 0 (emergency) to 7 (debug). One without is 6 (information), as for journald.
    pub fn priority(&self) -> u8 {
        let number = self.text("PRIORITY").and_then(|text| text.parse().ok());
        number.filter(|number| *number <= 7).unwrap_or(6)
    }

    /// Whether the container's PID 1 has written it.
    pub fn is_of_pid1(&self) -> bool {
        self.text("_PID") == Some("1")
    }

    /// Whether it belongs to one of these units: written by one of its processes, or by PID 1 about it.
    pub fn is_of_unit(&self, units: &[String]) -> bool {
        let is_one = |name: &str| {
            self.text(name)
                .is_some_and(|unit| units.iter().any(|wanted| wanted == unit))
        };
        is_one("_SYSTEMD_UNIT")
            || (self.is_of_pid1() && (is_one("UNIT") || is_one("OBJECT_SYSTEMD_UNIT")))
    }

    /// Whether PID 1 reports with this entry that the system is up.
    pub fn is_startup_finished(&self) -> bool {
        /// systemd's `SD_MESSAGE_STARTUP_FINISHED` and, which it writes in a container, `SD_MESSAGE_USER_STARTUP_FINISHED`.
        const STARTUP_FINISHED: [&str; 2] = [
            "b07a249cd024414a82dd00cd181378ff",
            "eed00a68ffd84e31882105fd973abdd1",
        ];
        let id = self.text("MESSAGE_ID");
        self.is_of_pid1() && id.is_some_and(|id| STARTUP_FINISHED.contains(&id))
    }

    /// What PID 1 reports with this entry about a unit, and the unit's name.
    pub fn unit_change(&self) -> Option<(UnitChange, &str)> {
        let change = match self.text("MESSAGE_ID").filter(|_| self.is_of_pid1())? {
            // systemd's `SD_MESSAGE_UNIT_FAILURE_RESULT`, `SD_MESSAGE_UNIT_STOPPING`, `SD_MESSAGE_UNIT_STOPPED`.
            "d9b373ed55a64feb8242e02dbe79a49c" => UnitChange::Failed,
            "de5b426a63be47a7b6ac3eaac82e2f6f" => UnitChange::Stopping,
            "9d1aaa27d60140bd96365438aad20286" => UnitChange::Stopped,
            _ => return None,
        };
        let is_allowed =
            |letter: char| letter.is_ascii_alphanumeric() || ":_.\\@-".contains(letter);
        let is_name = |unit: &&str| unit.len() < 256 && unit.chars().all(is_allowed);
        Some((change, self.text("UNIT").filter(is_name)?))
    }

    /// What PID 1 says with this entry about its own end.
    pub fn emergency(&self) -> Option<&str> {
        let is_emergency = self.is_of_pid1() && self.priority() == 0;
        self.text("MESSAGE").filter(|_| is_emergency)
    }
}
