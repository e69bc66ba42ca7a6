# A whole system, with the default of every option: it boots, and is shut down in order.
variable "image" {}

job "boot" {
  type = "service"

  group "boot" {
    task "boot" {
      driver       = "nspawn"
      kill_timeout = "20s"

      config {
        image = var.image
      }

      resources {
        cpu    = 100
        memory = 256
      }
    }
  }
}
