# A template becomes a credential of a command that does not run as root. When it changes, the task is restarted.
variable "image" {}

job "credentials" {
  type = "service"

  group "credentials" {
    restart {
      delay = "0s"
    }

    task "credentials" {
      driver = "nspawn"
      user   = "bob"

      config {
        image   = var.image
        boot    = false
        command = ["/bin/sh", "-c", "trap 'exit 0' TERM; id -un; cat $CREDENTIALS_DIRECTORY/db-word; while :; do sleep 0.05; done"]
        credentials {
          db-word = "secrets/word"
        }
      }

      template {
        data        = "{{ with nomadVar \"nomad/jobs\" }}{{ .word }}{{ end }}\n"
        destination = "secrets/word"
        change_mode = "restart"
        splay       = "0s"
        perms       = "600"
      }

      resources {
        cpu    = 50
        memory = 32
      }
    }
  }
}
