# Prints its resolv.conf in the host's network.
variable "image" {}

job "dns" {
  type = "batch"

  group "dns" {
    restart {
      attempts = 0
      mode     = "fail"
    }
    reschedule {
      attempts  = 0
      unlimited = false
    }

    network {
      dns {
        servers  = ["192.0.2.53"]
        searches = ["trial.example"]
        options  = ["ndots:3"]
      }
    }

    task "dns" {
      driver = "nspawn"

      config {
        image   = var.image
        boot    = false
        command = ["/bin/cat", "/etc/resolv.conf"]
      }

      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
