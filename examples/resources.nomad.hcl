# What a task may use of the machine: memory, processor time, processes, open files, a device, kernel settings. The command prints what it
# finds.
#
#   nomad-driver-nspawn run examples/resources.nomad.hcl
#
# Under Nomad the same file works with `nomad job run`.
job "resources" {
  type = "batch"

  group "resources" {
    task "resources" {
      driver = "nspawn"

      config {
        image            = "/"
        volatile         = "yes"
        boot             = false
        user_namespacing = false

        command = ["/bin/sh", "-c", <<-EOF
          echo "memory: $(cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null | head -n 1) bytes"
          echo "open files: $(ulimit -Sn), at most $(ulimit -Hn)"
          echo "largest System V message: $(cat /proc/sys/kernel/msgmax) bytes"
          df -h /tmp /dev/shm
          ls -l /dev/hwrng
        EOF
        ]

        # `cpu` below is also a limit, not only a weight.
        cpu_hard_limit = true

        # 64 MiB of swap beyond the memory: this is the sum.
        memory_swap = "320m"

        pids_limit    = 100
        oom_score_adj = 500

        ulimit {
          nofile = "1024:2048"
          core   = "0"
        }

        # Only settings of the container's own namespaces.
        sysctl = {
          "kernel.msgmax" = "65536"
        }

        # For a program that reads random numbers only from there.
        devices = [
          { host_path = "/dev/urandom", container_path = "/dev/hwrng", cgroup_permissions = "r" },
        ]

        # Without these, half of the memory each.
        tmp_size = "32m"
        shm_size = "16m"
      }

      resources {
        cpu = 200

        # `memory` is what the scheduler counts on and what is reclaimed last; `memory_max` is the limit.
        memory     = 128
        memory_max = 256
      }
    }
  }
}
