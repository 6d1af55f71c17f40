// Package netns runs machines as network namespaces of a Linux host.
//
//	tabard-<state>-i-…            tabard-<state>-r-…
//	┌─ instance A ────┐          ┌─ router of its VPC ──┐
//	│ eth0 10.0.0.4/24├──────────┤ see package network  │
//	│ lo   server     │          └──────────────────────┘
//	└─────────────────┘
//
// The namespace's cards, addresses, routes and all that guards them are the
// network's: see package network for who can reach whom, and for why the
// metadata service knows which machine is calling.
//
// Where the IAM server runs in this process, its addresses are listened on
// inside each instance's namespace too, so that the server's URL works there
// without a route to it. What is accepted there is handed to the server's
// handler with the machine's address as the peer: a connection from a machine
// must not pass for one from the host's own loopback.
//
// /etc/netns/<namespace>/resolv.conf names the network's resolver, and "ip netns
// exec" puts it in place of /etc/resolv.conf.
//
// # What outlives the process
//
// Without Config.Keep, nothing: Close removes all, and New what a process that
// was killed has left. With it, namespaces go on with the processes in them.
// A record of each in Config.Dir lets a later process find the machine (Found),
// take it up or remove it.
//
// # What this does not do
//
// The boundary is the network. A process that runs in an instance's namespace
// with the host's root privileges can leave it; run untrusted software under
// the qemu driver. Stop takes a machine's network away; processes that an
// administrator started inside it keep running without one.
package netns

import (
	"log/slog"

	"tabard.dev/tabard/internal/host/network"
)

// Config are the driver's collaborators.
type Config struct {
	// Network joins the machines. Whoever made it closes it, after the driver.
	Network *network.Network

	// Keep leaves machines running when the driver is closed.
	Keep bool

	// Dir holds the records of machines that are kept; it is made when missing.
	// It is used only, and must be set, with Keep.
	Dir string

	Log *slog.Logger // nil discards
}
