# Runs on, with Nomad's own driver, to compare with.
variable "image" {
  default = ""
}

job "raw-exec" {
  type = "service"

  group "raw-exec" {
    task "raw-exec" {
      driver = "raw_exec"

      config {
        command = "/bin/sh"
        args    = ["-c", "echo up; exec sleep 1000000"]
      }

      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
