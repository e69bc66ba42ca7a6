# A service that fails is started again, in a new container, until its restarts are used up.
variable "image" {}

job "restart" {
  type = "service"

  group "restart" {
    restart {
      attempts = 2
      interval = "10m"
      delay    = "0s"
      mode     = "fail"
    }
    reschedule {
      attempts  = 0
      unlimited = false
    }

    task "restart" {
      driver = "nspawn"

      config {
        image   = var.image
        boot    = false
        command = ["/bin/sh", "-c", "echo run >> /local/runs; exit $((10 + $(wc -l < /local/runs)))"]
      }

      resources {
        cpu    = 50
        memory = 32
      }
    }
  }
}
