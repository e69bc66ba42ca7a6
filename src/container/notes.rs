//! What the users of tasks should know while their containers start and run.

use std::fmt;
use std::sync::Arc;

type Receiver = dyn Fn(&str, String) + Send + Sync;

/// Receives notes, one sentence each. Clones share one receiver.
#[derive(Clone)]
pub struct Notes(Arc<Receiver>);

impl Notes {
    /// Calls this with the id of the start and the note. It must not wait.
    pub fn new(receiver: impl Fn(&str, String) + Send + Sync + 'static) -> Self {
        Self(Arc::new(receiver))
    }

    /// The notes about the start with this id.
    pub fn about(&self, id: &str) -> StartNotes {
        StartNotes {
            all: self.clone(),
            id: id.to_owned(),
        }
    }
}

/// Discards them.
impl Default for Notes {
    fn default() -> Self {
        Self::new(|_, _| {})
    }
}

impl fmt::Debug for Notes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Notes")
    }
}

/// Receives the notes about one start. The default discards them.
#[derive(Debug, Default)]
pub struct StartNotes {
    all: Notes,
    id: String,
}

impl StartNotes {
    /// Adds a note.
    pub fn add(&self, note: String) {
        (self.all.0)(&self.id, note);
    }
}
