# When the template changes, the command gets a signal.
variable "image" {}

job "reload" {
  type = "service"

  group "reload" {
    task "reload" {
      driver = "nspawn"

      config {
        image   = var.image
        boot    = false
        command = ["/bin/sh", "-c", "trap 'cat /local/word' HUP; trap 'exit 0' TERM; echo up; while :; do sleep 0.05; done"]
      }

      template {
        data          = "{{ with nomadVar \"nomad/jobs\" }}{{ .word }}{{ end }}\n"
        destination   = "local/word"
        change_mode   = "signal"
        change_signal = "SIGHUP"
        splay         = "0s"
      }

      resources {
        cpu    = 50
        memory = 32
      }
    }
  }
}
