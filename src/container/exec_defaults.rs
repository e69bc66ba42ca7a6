//! What a further command in a container has in common with the task's own.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Credential, Mode, Payload};

/// What a further command in a container gets where its request says nothing else. The supervisor keeps it, because the first process can
/// overwrite its own environment.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecDefaults {
    /// The user, from the container's own user database; `None` is root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Absolute directory inside the container; `None` leaves it to the session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
    /// The variables of the task, and of its credentials; systemd-nspawn adds others. Values are secrets.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
}

impl ExecDefaults {
    /// Those of a container with this payload. An init runs as root and in no directory of the job's.
    pub fn of(payload: &Payload) -> Self {
        let has_command = payload.mode != Mode::Boot;
        let directory = &payload.working_directory;
        let mut environment = payload.environment.clone();
        if !payload.credentials.is_empty() {
            let variable = environment.entry(Credential::VARIABLE.to_owned());
            variable.or_insert_with(|| Credential::DIRECTORY.to_owned());
        }
        Self {
            user: payload.user.clone().filter(|_| has_command),
            directory: directory.clone().filter(|_| has_command),
            environment,
        }
    }
}

/// Leaves out the values of variables.
impl std::fmt::Debug for ExecDefaults {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&String> = self.environment.keys().collect();
        f.debug_struct("ExecDefaults")
            .field("user", &self.user)
            .field("directory", &self.directory)
            .field("environment", &names)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::ContainerSpec;

    #[test]
    fn the_directory_of_the_credentials_is_that_of_the_command() {
        let mut payload = ContainerSpec::for_test("t", "/root").payload;
        let variable = |payload: &Payload| {
            let environment = ExecDefaults::of(payload).environment;
            environment.get("CREDENTIALS_DIRECTORY").cloned()
        };
        assert_eq!(variable(&payload), None);
        payload.credentials = vec![Credential {
            name: "token".to_owned(),
            source: "/srv/token".into(),
            option: String::new(),
        }];
        for mode in [Mode::Plain, Mode::ProcessTwo, Mode::Boot] {
            payload.mode = mode;
            assert_eq!(variable(&payload).as_deref(), Some("/run/host/credentials"));
        }
        let own = ("CREDENTIALS_DIRECTORY".to_owned(), "/srv".to_owned());
        payload.environment = [own].into();
        assert_eq!(variable(&payload).as_deref(), Some("/srv"));
    }

    #[test]
    fn an_init_has_neither_user_nor_directory() {
        let mut payload = ContainerSpec::for_test("t", "/root").payload;
        payload.user = Some("web".to_owned());
        payload.working_directory = Some("/srv".to_owned());
        payload.environment = [("TOKEN".to_owned(), "s3cret".to_owned())].into();
        for (mode, user, directory) in [
            (Mode::Plain, Some("web"), Some("/srv")),
            (Mode::ProcessTwo, Some("web"), Some("/srv")),
            (Mode::Boot, None, None),
        ] {
            payload.mode = mode;
            let defaults = ExecDefaults::of(&payload);
            assert_eq!(defaults.user.as_deref(), user, "{mode:?}");
            assert_eq!(defaults.directory.as_deref(), directory, "{mode:?}");
            assert_eq!(defaults.environment, payload.environment);
            let text = format!("{defaults:?}");
            assert!(text.contains("TOKEN") && !text.contains("s3cret"), "{text}");
        }
    }
}
