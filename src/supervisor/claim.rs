//! Whose a start is, while several plugins may work in one state directory. A plugin that starts or finds a start takes a shared
//! lock on its directory and keeps it; who wants to clear away what nobody claims takes the exclusive one first, and waits for a
//! moment at most. The kernel drops the locks of a process that dies, so a claim can't be left behind. Decides nothing else.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use nix::fcntl::OFlag;

use super::record::Records;

/// How often a new directory may be taken away by another process before it has been claimed.
const ATTEMPTS: usize = 100;

/// A lock on the directory of one start. Dropping it, or the death of the process, gives it up.
#[derive(Debug)]
pub struct Claim {
    _locked: File,
}

/// What came of taking a start that nobody claims.
#[derive(Debug)]
pub enum Seized {
    /// It is taken.
    Taken(Claim),
    /// Somebody claims it.
    Claimed,
    /// It is not there, or not any more.
    Gone,
}

impl Claim {
    /// Makes the directory, which must not exist yet, and claims it.
    pub fn create(records: &Records) -> io::Result<Self> {
        for _ in 0..ATTEMPTS {
            records.create()?;
            // Until it is claimed, it looks like a start that was never finished.
            if let Some(claim) = Self::take(records)? {
                return Ok(claim);
            }
        }
        Err(io::ErrorKind::ResourceBusy.into())
    }

    /// Claims a start beside others that may claim it too. Waits while somebody clears it away; `None` if it is not there or not
    /// any more.
    pub fn take(records: &Records) -> io::Result<Option<Self>> {
        let Some(directory) = open(records)? else {
            return Ok(None);
        };
        loop {
            match directory.lock_shared() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                locked => break locked?,
            }
        }
        Self::of(directory, records)
    }

    /// Takes a start that nobody claims, so that nobody can as long as this is held. Never waits. A claim may be that of a
    /// process that is just being started: it holds what its starter had open until its own program runs.
    pub fn seize(records: &Records) -> io::Result<Seized> {
        let Some(directory) = open(records)? else {
            return Ok(Seized::Gone);
        };
        match directory.try_lock() {
            Ok(()) => Ok(Self::of(directory, records)?.map_or(Seized::Gone, Seized::Taken)),
            Err(TryLockError::WouldBlock) => Ok(Seized::Claimed),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// What was locked is worth something only if it still lies in its place.
    fn of(directory: File, records: &Records) -> io::Result<Option<Self>> {
        let locked = directory.metadata()?;
        match records.path().symlink_metadata() {
            Ok(there) if (there.dev(), there.ino()) == (locked.dev(), locked.ino()) => {
                Ok(Some(Self { _locked: directory }))
            }
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn open(records: &Records) -> io::Result<Option<File>> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits())
        .open(records.path());
    match opened {
        Ok(directory) => Ok(Some(directory)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records() -> (tempfile::TempDir, Records) {
        let temp = tempfile::tempdir().unwrap();
        let records = Records::at(temp.path().join("t.0123456789abcdef"));
        (temp, records)
    }

    /// Other tests start processes, which for a moment hold a claim that was dropped.
    fn seized(records: &Records) -> Claim {
        loop {
            match Claim::seize(records).unwrap() {
                Seized::Taken(claim) => return claim,
                Seized::Claimed => std::thread::yield_now(),
                Seized::Gone => panic!("it is gone"),
            }
        }
    }

    fn is_claimed(records: &Records) -> bool {
        matches!(Claim::seize(records).unwrap(), Seized::Claimed)
    }

    #[test]
    fn what_is_claimed_can_not_be_seized_until_it_is_given_up() {
        let (_temp, records) = records();
        let first = Claim::create(&records).unwrap();
        let second = Claim::take(&records).unwrap().unwrap();
        assert!(is_claimed(&records));
        drop(first);
        assert!(is_claimed(&records));
        drop(second);
        seized(&records);
    }

    #[test]
    fn a_claim_waits_for_whoever_clears_away_and_then_finds_nothing() {
        let (_temp, records) = records();
        records.create().unwrap();
        let seized = seized(&records);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| Claim::take(&records).unwrap());
            records.remove().unwrap();
            drop(seized);
            assert!(waiting.join().unwrap().is_none());
        });
    }

    #[test]
    fn what_is_not_there_or_is_a_link_is_not_claimed() {
        let (temp, records) = records();
        assert!(Claim::take(&records).unwrap().is_none());
        assert!(matches!(Claim::seize(&records).unwrap(), Seized::Gone));
        std::os::unix::fs::symlink(temp.path(), records.path()).unwrap();
        Claim::take(&records).unwrap_err();
        Claim::seize(&records).unwrap_err();
        Claim::create(&records).unwrap_err();
    }

    #[test]
    fn a_successor_in_the_same_place_is_another_one() {
        let (_temp, records) = records();
        let old = Claim::create(&records).unwrap();
        records.remove().unwrap();
        let new = Claim::create(&records).unwrap();
        drop(old);
        assert!(is_claimed(&records));
        drop(new);
    }
}
