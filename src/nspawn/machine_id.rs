//! The machine id of a container. It follows from allocation and task, so that no two tasks of one image share it, and a task keeps it when
//! it is restarted.

use sha2::{Digest as _, Sha256};

/// The machine id of this owner (`<allocation id>/<task name>`), in the form of `/etc/machine-id` without the end of the line. It is a
/// random UUID by its form, as systemd requires it of a machine id.
pub fn of(owner: &str) -> String {
    let hash = Sha256::digest(format!("machine-id {owner}"));
    let bytes = hash.iter().take(16).enumerate();
    let bytes = bytes.map(|(index, byte)| match index {
        6 => byte & 0x0f | 0x40,
        8 => byte & 0x3f | 0x80,
        _ => *byte,
    });
    bytes.map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_follows_from_the_owner_and_is_a_random_uuid() {
        let id = of("0f1e/web");
        assert_eq!(id.len(), 32);
        assert_eq!(id.get(12..13), Some("4"));
        assert!(id.get(16..17).is_some_and(|digit| "89ab".contains(digit)));
        assert_eq!(id, of("0f1e/web"));
        assert_ne!(id, of("0f1e/web2"));
    }
}
