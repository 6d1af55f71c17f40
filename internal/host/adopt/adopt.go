// Package adopt is the driver of machines that somebody else made and runs: it
// gives each a metadata service of its own and changes nothing else of it. A
// machine is known by its network card's end on the host, a tap or a veth in the
// host's own namespace, most often a port of a bridge that libvirt made.
//
//	host's namespace                          tabard-<state>-x-…
//	┌──────────────────────────────────┐      ┌────────────────────────────┐
//	│ virbr0                           │      │ md0  169.254.169.254       │
//	│  ├ vnet0 ── machine A            │      │  └ metadata listener of A  │
//	│  │   └ to 169.254.169.254 ─▶ tx1a2b3c… ─┤                            │
//	│  │   ◀────────── answers ─── tx1a2b3c… ─┤                            │
//	│  └ vnet1 ── machine B            │      └────────────────────────────┘
//	│      └ to 169.254.169.254 ─▶ tx4d5e6f… ── the same for B
//	└──────────────────────────────────┘
//
// # Which machine is calling
//
// A listener cannot be bound to a bridge's port: the socket layer sees the
// bridge (reference/instance-metadata-and-vpc.md section 6.4). So frames are
// taken at the port, before the bridge sees them: a traffic control filter at
// the ingress of the machine's device moves what is for 169.254.169.254, and ARP
// requests for it, into a namespace that has nothing else in it. What a machine
// sends comes in by its own device and so ends in its own namespace, whatever
// addresses it writes into its frames, and even where two machines on two
// bridges have the same ones. There a firewall drops what does not come from the
// machine's own MAC and address, and what is not for the one open port, without
// an answer; the listener is bound to the link's device and closes connections
// from any other address. Answers go back by the machine's device alone.
//
// The machine's frames to anybody else are not looked at, nor are those with an
// 802.1Q tag. A machine needs a route to 169.254.169.254, by its default gateway
// or on its link; the gateway is never asked.
//
// # Other people's rules
//
// The filters stand at two priorities of their own in the device's clsact (or
// ingress) qdisc. One that is there is used; one that is not is made, and
// removed with the machine if nobody else put anything into it. Where another
// installation, or another machine of this one, has such filters at a device,
// the machine is refused rather than taken away.
//
// # Devices come and go
//
// A machine that shuts down takes its device with it. The driver notices, closes
// the listener and waits; it hooks the device up again when it comes back, under
// whatever name where a libvirt domain is known for it. It looks at the devices
// whenever one changes and every few seconds, so that filters somebody flushed
// are put back. Until that is done, requests go wherever the machine's network
// takes them.
//
// A device without a domain is known by its name only. When another machine gets
// a device of that name, MAC and address keep it out, unless it has the same of
// those too; give domains where libvirt runs.
//
// # What this does not do
//
// No address is given, no packet between machines is judged, and security
// groups and floating addresses do nothing: the machine's network is its
// owner's. The server is reached, or not, by that network. There is no IPv6. A
// macvtap, a card that is passed through and vhost-user have no device whose
// frames the kernel shows, and are refused.
//
// A filter and its namespace outlive the process: with [Config.Keep] they are
// left when the driver closes, so that nobody else on the network can answer in
// the meantime, and taken up by the next one.
package adopt

import (
	"log/slog"
)

// Domains tells where the machines of libvirt are. It is asked often and answers
// from memory.
type Domains interface {
	// Device returns the name of the device of a domain's network card, empty
	// when the domain does not run or has no such card. It is not known while
	// libvirt could not be asked.
	Device(uuid, mac string) (name string, known bool)

	// Changed is signalled when an answer may have become another.
	Changed() <-chan struct{}
}

// Config are the driver's identity and collaborators.
type Config struct {
	// State tells this installation's namespaces and links from those of others
	// on this host: 8 hexadecimal digits. One driver with one State may exist at
	// a time.
	State string

	// Domains, when not nil, says which device a domain has now. Without it
	// machines are found by the names of their devices.
	Domains Domains

	// Keep leaves the filters when the driver is closed.
	Keep bool

	// Host names the namespace, in ip-netns(8)'s directory, that the devices are
	// in. Empty is that of this process.
	Host string

	Log *slog.Logger // nil discards
}
