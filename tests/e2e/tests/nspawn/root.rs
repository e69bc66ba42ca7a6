//! The root file system and its mounts.

use super::*;

/// Real only: mounts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_only_root_is_not_writable_and_the_allocation_is() {
    let stage = Stage::new();
    let text = "touch /x /etc/x 2>/dev/null && echo written; \
        for d in /local /alloc /secrets; do echo $d > $d/x && cat $d/x; done";
    let ended = stage.run(stage.shell(text).with("read_only", true)).await;
    assert_eq!(ended.said(), "/local\n/alloc\n/secrets\n");
    let written = ended.allocation.task_dir().join("local/x");
    assert_eq!(fs::read_to_string(written).unwrap(), "/local\n");
    for point in ["local", "alloc", "secrets", "x"] {
        assert!(
            !stage.join("tree").join(point).exists(),
            "{point} was made in the image"
        );
    }
    stage.leave();
}

/// Real only: systemd-nspawn creates and removes the copy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ephemeral_root_is_writable_and_discarded() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let text = "echo x > /etc/x && cat /etc/x";
    let ended = stage
        .run_on(&plugin, stage.shell(text).with("ephemeral", true))
        .await;
    assert_eq!(ended.said(), "x\n");
    assert!(!stage.join("tree/etc/x").exists());
    assert_eq!(stage.run_on(&plugin, stage.shell(text)).await.said(), "x\n");
    assert!(
        stage.join("tree/etc/x").exists(),
        "without it, the image is written"
    );
    end(plugin).await;
    stage.leave();
}

/// Real only: mounts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn volatile_changes_are_discarded() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let tree = merged_tree(&stage, "merged");
    fs::write(tree.join("var/old"), "").unwrap();
    let text = "for f in /etc/new /var/new /usr/new; do touch $f 2>/dev/null && echo $f; done; ls /var/old 2>/dev/null; \
        ls /etc/group 2>/dev/null; echo end";
    let wanted = [
        ("yes", "/etc/new\n/var/new\nend\n"),
        ("state", "/var/new\n/etc/group\nend\n"),
        (
            "overlay",
            "/etc/new\n/var/new\n/usr/new\n/var/old\n/etc/group\nend\n",
        ),
        (
            "no",
            "/etc/new\n/var/new\n/usr/new\n/var/old\n/etc/group\nend\n",
        ),
    ];
    for (volatile, want) in wanted {
        let task = stage
            .shell(text)
            .with("image", json!(tree))
            .with("volatile", volatile);
        assert_eq!(stage.run_on(&plugin, task).await.said(), want, "{volatile}");
        for new in ["etc/new", "var/new", "usr/new"] {
            assert_eq!(
                tree.join(new).exists(),
                volatile == "no",
                "{volatile} {new}"
            );
        }
    }
    let unmerged = stage
        .refused(&plugin, stage.shell("exit 0").with("volatile", "yes"))
        .await;
    assert!(unmerged.contains("config.volatile"), "{unmerged}");
    end(plugin).await;
    stage.leave();
}

/// Real only: the proof is a root that runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_is_found_where_the_documentation_says() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    for (tree, id) in [("plugins/rootfs", "relative"), ("machine", "machine")] {
        fs::write(stage.tree(tree).join("id"), id).unwrap();
    }
    let known = Path::new("/var/lib/machines").join(stage.name());
    fs::create_dir_all("/var/lib/machines").unwrap();
    fs::rename(stage.join("machine"), &known).unwrap();
    let cat = stage.words(&["/bin/cat", "/id"]);
    for (image, want) in [("rootfs", "relative"), (stage.name(), "machine")] {
        let task = cat.clone().with("image", image);
        assert_eq!(stage.run_on(&plugin, task).await.said(), want);
    }
    fs::remove_dir_all(known).unwrap();
    fs::remove_dir_all(stage.join("plugins/rootfs")).unwrap();

    let task = cat.clone().with("image", "${NOMAD_TASK_DIR}/rootfs");
    let allocation = stage.allocation(&task);
    let tree = allocation.task_dir().join("local/rootfs");
    fs::create_dir(&tree).unwrap();
    e2e::busybox_tree(&tree);
    fs::write(tree.join("id"), "allocation").unwrap();
    let running = stage.start_in(&plugin, &task, allocation).await.unwrap();
    assert_eq!(running.finish(&plugin).await.said(), "allocation");

    let missing = stage.refused(&plugin, cat.with("image", "nowhere")).await;
    for place in ["config.image", "plugins/nowhere", "/var/lib/machines"] {
        assert!(missing.contains(place), "{missing}");
    }
    end(plugin).await;
    stage.leave();
}

/// Up to version 257 systemd-nspawn asks udev about the loop device. If it can't run a disk image itself, the user sees its stderr. Real
/// only: loop devices and file systems.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_image_runs_where_systemd_nspawn_can() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let image = stage.image("disk.raw", &stage.join("tree"));
    let task = stage.shell("echo inside").with("image", json!(image));
    let allocation = stage.allocation(&task);
    let bare = bare(&["--image", image.to_str().unwrap(), "/bin/true"]);
    match stage.start_in(&plugin, &task, allocation).await {
        Ok(running) => {
            assert_eq!(running.finish(&plugin).await.said(), "inside\n");
            assert!(bare.status.success(), "{bare:?}");
        }
        Err(refused) => {
            assert!(
                !bare.status.success(),
                "systemd-nspawn itself can: {refused:?}"
            );
            let said = String::from_utf8_lossy(&bare.stderr);
            let reason = said.lines().last().unwrap();
            assert!(refused.error.to_string().contains(reason), "{refused:?}");
        }
    }
    end(plugin).await;
    stage.leave();
}

/// Real only: mounts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pivot_root_makes_a_directory_of_the_image_the_root() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let inner = stage.tree("tree/inner");
    fs::write(inner.join("id"), "inner\n").unwrap();
    fs::create_dir(inner.join("old")).unwrap();
    fs::write(stage.join("tree/outer"), "outer\n").unwrap();
    let task = stage
        .words(&["/bin/cat", "/id"])
        .with("pivot_root", "/inner");
    assert_eq!(stage.run_on(&plugin, task).await.said(), "inner\n");
    // Some kernels do not let systemd-nspawn move the old root.
    let tree = stage.join("tree");
    let directory = format!("--directory={}", tree.display());
    let bare = bare(&[&directory, "--pivot-root=/inner:/old", "/bin/true"]);
    let task = stage
        .words(&["/bin/cat", "/id", "/old/outer"])
        .with("pivot_root", "/inner:/old");
    let allocation = stage.allocation(&task);
    match stage.start_in(&plugin, &task, allocation).await {
        Ok(running) => assert_eq!(running.finish(&plugin).await.said(), "inner\nouter\n"),
        Err(refused) => {
            let said = String::from_utf8_lossy(&bare.stderr);
            assert!(
                !bare.status.success(),
                "systemd-nspawn itself can: {refused:?}"
            );
            assert!(said.contains("MS_MOVE"), "{said}");
            assert!(refused.error.to_string().contains("MS_MOVE"), "{refused:?}");
        }
    }
    end(plugin).await;
    stage.leave();
}

/// Real only: systemd-nspawn creates the file.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resolv_conf_follows_the_option() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let host = fs::read_to_string("/etc/resolv.conf").unwrap();
    let file = stage.join("tree/etc/resolv.conf");
    let text = "cat /etc/resolv.conf 2>/dev/null; true";
    for (word, inside, stays) in [
        ("off", "own\n", Some("own\n")),
        ("bind-host", &*host, Some("own\n")),
        ("replace-host", &*host, Some(&*host)),
        ("delete", "", None),
    ] {
        fs::write(&file, "own\n").unwrap();
        let task = stage.shell(text).with("resolv_conf", word);
        assert_eq!(stage.run_on(&plugin, task).await.said(), inside, "{word}");
        assert_eq!(fs::read_to_string(&file).ok().as_deref(), stays, "{word}");
    }
    end(plugin).await;
    stage.leave();
}

/// Real only: id-mapped mounts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn binds_mount_host_paths_with_and_without_user_namespaces() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    for (number, users) in [false, true].into_iter().enumerate() {
        // Each with its own tree: the first user namespace may change the owners of a tree.
        let tree = stage.tree(&format!("tree{number}"));
        let source = stage.join(format!("a:b c\\d{number}"));
        fs::create_dir(&source).unwrap();
        fs::write(source.join("given"), "given\n").unwrap();
        fs::set_permissions(source.join("given"), fs::Permissions::from_mode(0o600)).unwrap();
        let text = "cat /w:w/given /r/r/given; echo new > /w:w/new; \
            touch /r/r/new 2>/dev/null && echo written; stat -c %u /w:w/given /w:w/new";
        let task = stage
            .shell(text)
            .with("image", json!(tree))
            .with("user_namespacing", users)
            .with("bind", bind(&source, "/w:w"))
            .with("bind_read_only", bind(&source, "/r/r"));
        let ended = stage.run_on(&plugin, task).await;
        assert_eq!(
            ended.said(),
            "given\ngiven\n0\n0\n",
            "user_namespacing {users}"
        );
        assert_eq!(fs::read_to_string(source.join("new")).unwrap(), "new\n");
        assert_eq!(
            fs::metadata(source.join("new")).unwrap().uid(),
            0,
            "user_namespacing {users}"
        );
    }
    end(plugin).await;
    stage.leave();
}

/// Real only: mounts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_volumes_only_the_allocation_can_be_bound() {
    let stage = Stage::new();
    let plugin = stage.plugin_with(&json!({ "volumes": false })).await;
    let task = stage
        .shell("exit 0")
        .with("bind", bind(&stage.join("tree"), "/mnt"));
    let refused = stage.refused(&plugin, task).await;
    assert!(
        refused.contains("config.bind") && refused.contains("volumes"),
        "{refused}"
    );
    let task = stage
        .shell("cat /mnt/x")
        .with("bind", json!([{ "${NOMAD_TASK_DIR}": "/mnt" }]));
    let allocation = stage.allocation(&task);
    fs::write(allocation.task_dir().join("local/x"), "own\n").unwrap();
    let running = stage.start_in(&plugin, &task, allocation).await.unwrap();
    assert_eq!(running.finish(&plugin).await.said(), "own\n");
    end(plugin).await;
    stage.leave();
}

/// Real only: mounts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn temporary_file_systems_have_their_size_mode_and_restrictions() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    for (number, users) in [false, true].into_iter().enumerate() {
        let tree = stage.tree(&format!("tree{number}"));
        let text = "stat -c '%a %u' /srv/a:b /srv/c /srv/c/d; \
            df -k /srv/c | grep -o ' 64 ' | head -n 1; \
            touch /srv/c/new && echo written; touch /srv/c/d/new 2>/dev/null || echo read-only; \
            cp /bin/sh /srv/a:b/sh && /srv/a:b/sh -c 'echo run' 2>/dev/null || echo noexec";
        let block = json!([{
            "type": "tmpfs",
            "target": "/srv/a:b",
            "noexec": true,
            "tmpfs_options": { "mode": 0o700 },
        }]);
        let task = stage
            .shell(text)
            .with("image", json!(tree))
            .with("user_namespacing", users)
            .with("mount", block)
            .with("tmpfs", json!(["/srv/c:size=64k,mode=0750", "/srv/c/d:ro"]));
        assert_eq!(
            stage.run_on(&plugin, task).await.said(),
            "700 0\n750 0\n1777 0\n 64 \nwritten\nread-only\nnoexec\n",
            "user_namespacing {users}"
        );
    }
    end(plugin).await;
    stage.leave();
}
