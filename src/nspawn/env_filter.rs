//! Filter for variables of a payload that may be put into systemd-nspawn's own environment. A value there is visible to
//! root only, where an argument is visible to everyone; but systemd-nspawn, its libraries and the loader read variables
//! too, and a job must not influence a root process through them. Decides by name only; values are not inspected.

/// Prefixes of names that the loader, the C library, systemd and the libraries of systemd-nspawn read.
const READ_BY_PREFIX: &[&str] = &[
    "BLKID_",
    "CREDENTIALS_",
    "CRYPTSETUP_",
    "DBUS_",
    "GCONV_",
    "GCRYPT_",
    "GLIBC_",
    "GNUTLS_",
    "INVOCATION_",
    "JOURNAL_",
    "LC_",
    "LD_",
    "LIBBLKID_",
    "LIBMOUNT_",
    "LISTEN_",
    "MALLOC_",
    "MEMORY_PRESSURE_",
    "NOTIFY_",
    "OPENSSL_",
    "P11_",
    "PKCS11_",
    "RESOLV_",
    "SSL_",
    "SYSTEMD_",
    "TPM2TOOLS_",
    "TSS2_",
    "WATCHDOG_",
    "XDG_",
];

/// Complete names that they read.
const READ_BY_NAME: &[&str] = &[
    "BASH_ENV",
    "COLORTERM",
    "CONTAINER",
    "ENV",
    "FAKEROOTKEY",
    "GETCONF_DIR",
    "HOME",
    "HOSTALIASES",
    "IFS",
    "LANG",
    "LANGUAGE",
    "LOCALDOMAIN",
    "LOCPATH",
    "LOGNAME",
    "NIS_PATH",
    "NLSPATH",
    "NO_COLOR",
    "OS_CLOEXEC",
    "PATH",
    "RES_OPTIONS",
    "SHELL",
    "TEMP",
    "TERM",
    "TERMINFO",
    "TMP",
    "TMPDIR",
    "TZ",
    "TZDIR",
    "USER",
    "container",
];

/// Whether this variable may be in the environment of systemd-nspawn itself.
pub fn safe_for_nspawn_env(name: &str) -> bool {
    !READ_BY_NAME.contains(&name) && !READ_BY_PREFIX.iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("DB_PASSWORD")]
    #[case("NOMAD_TOKEN")]
    #[case("VAULT_TOKEN")]
    #[case("PASSWORD")]
    fn secrets_are_passed_in_the_environment(#[case] name: &str) {
        assert!(safe_for_nspawn_env(name));
    }

    #[rstest]
    #[case("LD_PRELOAD")]
    #[case("SYSTEMD_SECCOMP")]
    #[case("NOTIFY_SOCKET")]
    #[case("GLIBC_TUNABLES")]
    #[case("OPENSSL_CONF")]
    #[case("PATH")]
    #[case("LISTEN_FDS")]
    fn a_job_cannot_control_systemd_nspawn_by_its_environment(#[case] name: &str) {
        assert!(!safe_for_nspawn_env(name));
    }
}
