//! What the user of the task should know. Kept until a plugin is connected: the supervisor works on without one.

use std::collections::VecDeque;

use super::Supervisor;
use crate::supervisor::protocol::Event;

/// How many notes are kept.
const MAX_NOTES: usize = 8;
/// How long a note is at most: it is sent in one packet.
const MAX_NOTE_BYTES: usize = 2048;

/// Notes that no plugin has been sent.
#[derive(Debug, Default)]
pub(super) struct Notes(VecDeque<String>);

impl Notes {
    /// Adds one sentence. If there are too many, the oldest is dropped.
    pub(super) fn add(&mut self, mut note: String) {
        note.truncate(note.floor_char_boundary(MAX_NOTE_BYTES));
        if self.0.len() == MAX_NOTES {
            self.0.pop_front();
        }
        self.0.push_back(note);
    }
}

impl Supervisor {
    /// Sends the notes, if there is a client.
    pub(super) fn send_notes(&mut self) {
        while let Some(note) = self.notes.0.pop_front() {
            if !self.clients.broadcast(&Event::Note(note.clone())) {
                return self.notes.0.push_front(note);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_short_notes_are_kept() {
        let mut notes = Notes::default();
        for number in 0..=MAX_NOTES {
            notes.add(format!("{number}{}", "\u{fc}".repeat(4000)));
        }
        assert_eq!(notes.0.len(), MAX_NOTES);
        let mut first = notes.0.iter().map(|note| note.chars().next().unwrap());
        assert_eq!(first.next(), Some('1'));
        assert!(notes.0.iter().all(|note| note.len() <= MAX_NOTE_BYTES));
    }
}
