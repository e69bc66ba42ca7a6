# A database whose files outlive its allocation, on a volume of the client. The database runs as its own user, in a user namespace: on the volume
# its files belong to the same id as in the image, whichever ids of the host the task has this time.
#
#   debootstrap --variant=minbase --include=redis-server bookworm /var/lib/machines/debian
#   install -d /srv/database
#   chown --reference=/var/lib/machines/debian/var/lib/redis /srv/database
#
#   client { host_volume "database" { path = "/srv/database" } }
#
#   nomad job run examples/database.nomad.hcl
#   nomad alloc exec ALLOCATION redis-cli -s /alloc/data/redis.sock set greeting hello
job "database" {
  group "database" {
    volume "database" {
      type   = "host"
      source = "database"
    }

    task "redis" {
      driver = "nspawn"
      user   = "redis"

      volume_mount {
        volume      = "database"
        destination = "/data"
      }

      config {
        image     = "debian"
        boot      = false
        read_only = true

        # No port: the tasks of the group reach the database by the socket.
        command = [
          "/usr/bin/redis-server",
          "--dir", "/data",
          "--appendonly", "yes",
          "--port", "0",
          "--unixsocket", "/alloc/data/redis.sock",
          "--unixsocketperm", "777",
        ]
      }

      # Long enough to write what is in memory.
      kill_timeout = "30s"

      resources {
        cpu    = 200
        memory = 128
      }
    }
  }
}
