//! Users and capabilities.

use super::*;

/// Real only: user namespaces.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_namespace_hides_root_and_keeps_the_allocation_usable() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let text = "cat /proc/self/uid_map; id -u; cat /secrets/token; \
        for d in /local /alloc /alloc/data /secrets; do echo x > $d/new || echo no $d; done; echo x > /etc/new";
    let task = stage.shell(text).with("user_namespacing", true);
    let allocation = stage.allocation(&task);
    let token = allocation.task_dir().join("secrets/token");
    fs::write(&token, "token\n").unwrap();
    fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).unwrap();
    let running = stage.start_in(&plugin, &task, allocation).await.unwrap();
    let ended = running.finish(&plugin).await;
    let (map, rest) = ended.said().split_once('\n').unwrap();
    let map: Vec<u32> = map
        .split_whitespace()
        .map(|id| id.parse().unwrap())
        .collect();
    assert!(map[0] == 0 && map[1] >= 65536 && map[2] == 65536, "{map:?}");
    assert_eq!(rest, "0\ntoken\n", "{ended:?}");
    end(plugin).await;
    stage.leave();
}

/// Real only: user namespaces, and ownership changes by systemd-nspawn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn private_users_and_ownership_follow_the_options() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let task = |tree: &Path, range: &str| {
        stage
            .shell("tr -s ' ' < /proc/self/uid_map; stat -c %u /etc/group")
            .with("image", json!(tree))
            .with("user_namespacing", true)
            .with("private_users", range)
    };
    let tree = stage.tree("identity");
    let ended = task(&tree, "identity");
    let ended = stage.run_on(&plugin, ended).await;
    assert_eq!(ended.said(), " 0 0 65536\n0\n");
    let ended = task(&tree, "no");
    let ended = stage.run_on(&plugin, ended).await;
    assert_eq!(ended.said(), " 0 0 4294967295\n0\n");
    for (ownership, inside, outside) in [("map", 0, 0), ("off", 65534, 0), ("chown", 0, 1_048_576)]
    {
        let tree = stage.tree(ownership);
        let task = task(&tree, "1048576:65536").with("private_users_ownership", ownership);
        let ended = stage.run_on(&plugin, task).await;
        assert_eq!(
            ended.said(),
            format!(" 0 1048576 65536\n{inside}\n"),
            "{ownership}"
        );
        let owner = fs::metadata(tree.join("etc/group")).unwrap().uid();
        assert_eq!(owner, outside, "{ownership}");
    }
    end(plugin).await;
    stage.leave();
}

/// Real only: the fake drops no capabilities.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn capabilities_are_added() {
    let stage = Stage::new();
    let plugin = stage.plugin().await;
    let task = || stage.shell("grep CapBnd /proc/self/status | cut -f 2");
    let mut sets = Vec::new();
    for capability in [
        json!([]),
        json!(["CAP_NET_ADMIN", "cap_sys_time"]),
        json!(["all"]),
    ] {
        let ended = stage
            .run_on(&plugin, task().with("capability", capability))
            .await;
        sets.push(u64::from_str_radix(ended.said().trim(), 16).unwrap());
    }
    let asked = 1 << 12 | 1 << 25;
    assert_eq!(sets[0] & asked, 0, "{sets:x?}");
    assert_eq!(sets[1], sets[0] | asked, "{sets:x?}");
    // Capabilities that this process does not have itself can't be given.
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let own = status
        .lines()
        .find_map(|line| line.strip_prefix("CapBnd:\t"));
    let own = u64::from_str_radix(own.unwrap(), 16).unwrap();
    assert_eq!(sets[2], own, "{sets:x?}");
    end(plugin).await;
    stage.leave();
}
