// Package netns runs machines as network namespaces of a Linux host. Nothing
// is put into the host's own namespace.
//
//	tabard-<tag>-i-…            tabard-<tag>-r-…
//	┌─ instance A ────┐        ┌─ router of one VPC ──────────────┐
//	│ eth0 10.0.0.4/24├────────┤ t1a2b3c4  10.0.0.1  169.254.169.254
//	│ lo   server     │        │    └ metadata listener of A      │
//	└─────────────────┘        │                                  │
//	┌─ instance B ────┐        │                                  │
//	│ eth0 10.0.0.5/24├────────┤ t5d6e7f8  10.0.0.1  169.254.169.254
//	└─────────────────┘        │    └ metadata listener of B      │
//	                           └──────────────────────────────────┘
//
// Each VPC has a router namespace, so equal addresses in two VPCs never meet.
// Each instance has a namespace of its own and one veth to the router. The
// router answers ARP for all of the VPC and routes: instances of one VPC reach
// each other, and nothing else does.
//
// # Which machine is calling
//
// The metadata service has one listener an instance, bound to that instance's
// veth with SO_BINDTODEVICE, so the socket that accepted a connection is the
// identity (reference/instance-metadata-and-vpc.md section 6.3). Behind that
// stand three more walls, each enough by itself against a forged source: a
// firewall at the veth that passes only frames with the machine's own MAC and
// address (ARP included), strict reverse-path filtering, and a listener that
// closes connections from any other address. Where the metadata service is off
// the firewall drops what is sent to it, so the machine sees no answer at all.
// Answers carry the machine's hop limit as their IP TTL.
//
// The server is not routed to. Its addresses are listened on inside each
// instance's namespace, and what is accepted there is handed to the server's
// handler with the machine's address as the peer: a connection from a machine
// must not pass for one from the host's own loopback.
//
// # What this does not do
//
// The boundary is the network. A process that runs in an instance's namespace
// with the host's root privileges can leave it; run untrusted software under
// the qemu driver. There is no route out of a VPC, no resolver and no IPv6
// between instances. Stop takes a machine's network away; processes that an
// administrator started inside it keep running without one.
//
// The driver needs root (CAP_NET_ADMIN, CAP_SYS_ADMIN) and nftables in the
// kernel. New says so when they are missing.
package netns

import "log/slog"

// Config are the driver's identity and collaborators.
type Config struct {
	// State tells this installation's namespaces from those of others: 8
	// hexadecimal digits. One driver with one State may exist at a time,
	// because New removes what an earlier one has left behind.
	State string
	Log   *slog.Logger // nil discards
}
