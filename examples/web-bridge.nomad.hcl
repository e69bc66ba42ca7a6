# A web server in the network of its group, and a port of the host that leads to it. Nomad makes the network and forwards the port, with the
# CNI plugins on the client (Debian: containernetworking-plugins and iptables; then cni_path = "/usr/lib/cni" in the agent's client block).
# Needs a static busybox on the host (Debian: busybox-static).
#
#   nomad job run examples/web-bridge.nomad.hcl
job "web-bridge" {
  group "web" {
    network {
      # All tasks of the group are in this network.
      mode = "bridge"

      # The server listens on 8080, whatever port of the host Nomad has chosen.
      port "http" {
        to = 8080
      }
    }

    task "web" {
      driver = "nspawn"

      config {
        image            = "/"
        volatile         = "yes"
        boot             = false
        process_two      = true
        user_namespacing = false

        # No port is named here: those of the group are forwarded by Nomad.
        command = ["/bin/sh", "-c", <<-EOF
          echo "a page of allocation $NOMAD_SHORT_ALLOC_ID" > "$NOMAD_TASK_DIR/index.html"
          echo "http://$NOMAD_HOST_ADDR_http/"
          exec busybox httpd -f -p "$NOMAD_PORT_http" -h "$NOMAD_TASK_DIR"
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
