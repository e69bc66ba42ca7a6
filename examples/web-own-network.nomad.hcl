# A web server in a network of its own, and a port of the host that leads to it. Whoever asks the host on the port that Nomad has chosen
# gets the page. Needs a static busybox on the host (Debian: busybox-static).
#
#   nomad job run examples/web-own-network.nomad.hcl
job "web-own-network" {
  group "web" {
    network {
      # The server listens on 80, whatever Nomad has chosen.
      port "http" {
        to = 80
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

        # The container gets an address of the driver's pool, and this port is forwarded to it.
        ports = ["http"]

        # Nothing has to be configured inside. A DHCP client, with which the command of many an image begins, is answered with the address
        # that the container has.
        command = ["/bin/sh", "-c", <<-EOF
          busybox udhcpc -i host0 -n -q -s /bin/true || exit 1
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
