# Secrets in every way that Nomad has: a variable, a template's file and its variables, a token in both forms.
variable "image" {}
variable "secret" {}

job "secrets" {
  type = "service"

  group "secrets" {
    restart {
      attempts = 0
      mode     = "fail"
    }
    reschedule {
      attempts  = 0
      unlimited = false
    }

    task "secrets" {
      driver       = "nspawn"
      kill_timeout = "5s"

      config {
        image   = var.image
        boot    = false
        command = ["/bin/sh", "-c", "trap 'exit 0' TERM; test -s /secrets/nomad_token && echo up; sleep 1000 & wait"]
      }

      env {
        DB_PASSWORD = "value-${var.secret}"
      }

      template {
        data        = "FROM_TEMPLATE=template-${var.secret}\n"
        destination = "secrets/file.env"
        env         = true
      }

      identity {
        env  = true
        file = true
      }

      resources {
        cpu    = 50
        memory = 32
      }
    }
  }
}
