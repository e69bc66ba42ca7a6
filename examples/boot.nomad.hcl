# A whole system: the image's own init is started and stopped, services and all. The image is the tree
# /var/lib/machines/debian, which this makes on Debian:
#
#   debootstrap --include=systemd,dbus stable /var/lib/machines/debian
#   nomad job run examples/boot.nomad.hcl
job "boot" {
  group "system" {
    task "system" {
      driver = "nspawn"

      # The init is asked to power off; services need time to end.
      kill_timeout = "60s"

      config {
        image = "debian"

        # Every start begins with the tree as it was. `boot = true` and a user namespace of its own are the defaults.
        ephemeral   = true
        resolv_conf = "copy-host"

        environment = {
          GREETING = "for the init; services see what their unit files name"
        }
      }

      resources {
        cpu    = 500
        memory = 256
      }
    }
  }
}
