//! The table of owners in docs/volumes.md, measured: who owns a file of user 1000 in each kind of mount, and whether root can write there.

use dev_agent::Plugin;
use nomad_driver_nspawn::proto::driver::{Mount as Volume, TaskConfig};

use super::*;

const COLUMNS: [&str; 4] = [
    "mount",
    "without a user namespace",
    "in a user namespace",
    "in one, on a file system that can't map ids",
];

/// A kind of mount: its name in the table, and the option that mounts `HERE` at `/v`.
const KINDS: [(&str, &str, &str); 12] = [
    ("Nomad's own directories", "", ""),
    ("`volume_mount`", "volume", ""),
    ("`bind`", "bind", r#"[{"HERE": "/v"}]"#),
    ("`bind_read_only`", "bind_read_only", r#"[{"HERE": "/v"}]"#),
    (
        "`mount`",
        "mount",
        r#"[{"source": "HERE", "target": "/v"}]"#,
    ),
    (
        "`mount` with `idmap = false`",
        "mount",
        r#"[{"source": "HERE", "target": "/v", "idmap": false}]"#,
    ),
    (
        "`overlay`",
        "overlay",
        r#"[{"lower": ["HERE", "OTHER"], "target": "/v"}]"#,
    ),
    (
        "`overlay` with `upper`",
        "overlay",
        r#"[{"lower": ["HERE", "OTHER"], "target": "/v", "upper": "KEPT", "create": true}]"#,
    ),
    (
        "`overlay` with `readonly = true`",
        "overlay",
        r#"[{"lower": ["HERE", "OTHER"], "target": "/v", "readonly": true}]"#,
    ),
    (
        "`overlay` with `idmap = false`",
        "overlay",
        r#"[{"lower": ["HERE", "OTHER"], "target": "/v", "idmap": false}]"#,
    ),
    ("`tmpfs`", "tmpfs", r#"["/v"]"#),
    (
        "`mount` of the type `tmpfs`",
        "mount",
        r#"[{"type": "tmpfs", "target": "/v"}]"#,
    ),
];

/// Tells the owner of the file, or of the directory if that is empty, and tries to write.
const SCRIPT: &str = "cd DIRECTORY; if test -e file; then stat -c %u file; else stat -c %u .; fi
    touch made 2> /dev/null && echo writable || echo not writable";

/// The value of an option, with the paths of these directories.
fn value_of(text: &str, top: &Path) -> Value {
    let words = [("HERE", "here"), ("OTHER", "other"), ("KEPT", "kept")];
    let text = words.iter().fold(text.to_owned(), |text, (word, name)| {
        text.replace(word, top.join(name).to_str().unwrap())
    });
    serde_json::from_str(&text).unwrap()
}

/// What a task with this mount says, or that it was refused.
async fn observe(
    (stage, plugin): (&Stage, &Plugin),
    (option, text): (&str, &str),
    (user_namespace, mappable): (bool, bool),
) -> String {
    let top = stage.join(e2e::unique());
    fs::create_dir_all(top.join("other")).unwrap();
    let directory = if option.is_empty() { "/local" } else { "/v" };
    let task = stage.shell(&SCRIPT.replace("DIRECTORY", directory));
    let task = task.with("user_namespacing", user_namespace);
    let task = match text {
        "" => task,
        text => task.with(option, value_of(text, &top)),
    };
    let allocation = stage.allocation(&task);
    let here = match option {
        "" => allocation.task_dir().join("local"),
        _ => top.join("here"),
    };
    let overlay = (!mappable).then(|| Mounted::overlay_of(&top, here.clone()));
    fs::create_dir_all(&here).unwrap();
    fs::write(here.join("file"), "").unwrap();
    chown(here.join("file"), Some(1000), Some(1000)).unwrap();
    let volume = |config: &mut TaskConfig| {
        if option == "volume" {
            config.mounts.push(Volume {
                host_path: here.to_str().unwrap().to_owned(),
                task_path: directory.to_owned(),
                ..Volume::default()
            });
        }
    };
    let seen = match stage.start_edited(plugin, allocation, volume).await {
        Err(refused) => {
            let error = refused.error.to_string();
            assert!(error.contains("can't be mapped"), "{error}");
            "refused".to_owned()
        }
        Ok(running) => described(running.finish(plugin).await.said()),
    };
    drop(overlay);
    seen
}

fn described(said: &str) -> String {
    let (user, writable) = said.trim().split_once('\n').unwrap();
    let owner = match user {
        "1000" => "as on the host",
        "65534" => "nobody",
        "0" => "the container's root",
        other => panic!("{other}: {said}"),
    };
    format!("{owner}, {writable}")
}

/// Real only: mounts and user namespaces.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_table_of_owners_is_what_happens() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let mut table = format!("| {} |\n|{}\n", COLUMNS.join(" | "), "---|".repeat(4));
    for (name, option, text) in KINDS {
        let mut row = format!("| {name} |");
        for how in [(false, true), (true, true), (true, false)] {
            let seen = observe((&stage, &plugin), (option, text), how).await;
            row += &format!(" {seen} |");
        }
        table += &(row + "\n");
    }
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/volumes.md");
    let docs = fs::read_to_string(docs).unwrap();
    assert!(docs.contains(&table), "not in docs/volumes.md:\n{table}");
    end(plugin).await;
    stage.leave();
}
