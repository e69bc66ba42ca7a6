# Files of the host inside, by the driver's own binds and by a volume of Nomad's, and a temporary file system. The volume has to stand in
# the client's configuration:
#
#   client { host_volume "records" { path = "/srv/records" } }
#
#   nomad job run examples/volume.nomad.hcl
job "volume" {
  type = "batch"

  group "volume" {
    volume "records" {
      type   = "host"
      source = "records"
    }

    task "volume" {
      driver = "nspawn"

      volume_mount {
        volume      = "records"
        destination = "/records"
      }

      config {
        image            = "/"
        volatile         = "yes"
        boot             = false
        user_namespacing = false

        # SOURCE = TARGET. A source below Nomad's directories needs no permission of the operator; others need `volumes = true`.
        bind           = { "${NOMAD_ALLOC_DIR}/data" = "/var/lib/job" }
        bind_read_only = { "/etc/hosts" = "/etc/hosts" }

        # In memory, and gone when the task ends.
        tmpfs = ["/var/cache/job:size=16m,mode=0700,nosuid,noexec"]

        # The same as a bind, with the options of the docker driver and more.
        mount {
          source   = "${NOMAD_TASK_DIR}"
          target   = "/srv/job"
          readonly = true
          noexec   = true
        }

        command = ["/bin/sh", "-c", <<-EOF
          cat /etc/hosts
          echo "kept for the other tasks of the group" > /var/lib/job/note
          date >> /records/runs
        EOF
        ]
      }

      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}
