package cli

import (
	"cmp"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

var hosts = &kind{
	noun: "host", plural: "hosts", listed: "host list", path: "/v1/hosts", array: "hosts", id: "id",
	form: prefixed("Host-"),
	columns: columns("Name", "name", "ID", "id", "Status", "status", "Since", "since", "Zone", "zone", "Drivers", "drivers",
		"vCPUs", "vcpus", "Memory (MiB)", "memory_mib", "Instances", "instances", "Version", "version"),
	details: columns("Name", "name", "ID", "id", "CRN", "crn", "Status", "status", "Since", "since", "Zone", "zone", "Drivers", "drivers",
		"vCPUs", "vcpus", "Memory (MiB)", "memory_mib", "Disk (MiB)", "disk_mib", "Instances", "instances", "Placed", "placed.name", "Keys", "keys", "Version", "version", "Joined", "created_at"),
}

var machineColumns = columns("Name", "name", "Device", "device", "MAC", "mac", "Address", "address", "Bridge", "bridge",
	"State", "state", "Domain", "domain", "Instance", "instance")

func hostCommands() *cobra.Command {
	return group("host", "Manage the hypervisor hosts that run instances",
		"A host runs tabard agent. It joins once, with a token that is good for an hour at most and works once; from then on\n"+
			"it proves itself with a key that never leaves it. Hosts belong to the operator's account.",
		"tabard host create-join-token rack1-node3 --file join-token\ntabard host list",
		joinTokenCommand(),
		listCommand(hosts, "list", "tabard host list"),
		getCommand(hosts, "get (NAME|ID)", "tabard host get rack1-node3"),
		hostRevokeCommand(),
		deleteCommand(hosts, "delete (NAME|ID)...", "delete", "tabard host delete rack1-node3 -f", nil, nil),
		spec{
			use: "machines (NAME|ID)", short: "List the machines on a host that something else runs", args: cobra.ExactArgs(1),
			more:    "Shows what the host has found: the domains of its libvirt, and other taps and veths. Adopt one to give it a CRN and a\nmetadata service.",
			example: "tabard host machines rack1-node3",
			flags:   func(*pflag.FlagSet) {},
		}.listing("machines", "name", machineColumns, func(s *session, args []string) ([]object, error) {
			id, err := hosts.find(s, args[0])
			if err != nil {
				return nil, err
			}
			return s.client.list(s.ctx(), hosts.at(id, "machines"), nil, "machines", 0)
		}),
		hostAdoptCommand(),
	)
}

func joinTokenCommand() *cobra.Command {
	var zone, again, file, life string
	return spec{
		use: "create-join-token (NAME | --host HOST)", short: "Let a host join", args: cobra.MaximumNArgs(1),
		more: "Makes a token with which one host joins, once and soon, under this name. Bring it to the host and start the agent:\n" +
			"tabard agent --server URL --join-token-file FILE. With --host a host that is known joins again: its old key is worth\n" +
			"nothing from then on, and its instances stay.",
		example: "tabard host create-join-token rack1-node3 --zone us-south-1 --file join-token\n" +
			"tabard host create-join-token --host rack1-node3 --file join-token",
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&zone, "zone", "", "`ZONE` whose instances it runs (default: those of all zones)")
			f.StringVar(&again, "host", "", "`HOST` that joins again, with a new key: name or ID")
			f.StringVar(&file, "file", "", "write the token to this `FILE` instead of showing it")
			f.StringVar(&life, "expires-in", "", "`TIME` in which the host has to join, such as 10m; at most 1h (default 15m)")
		},
		run: func(s *session, args []string) error {
			if (len(args) == 0) == (again == "") {
				return Usage("give either the NAME of a new host, or --host with one that is to join again")
			}
			body := map[string]any{}
			for k, v := range filled("zone", zone, "host", again) {
				body[k] = v
			}
			if len(args) == 1 {
				body["name"] = args[0]
			}
			if life != "" {
				d, err := time.ParseDuration(life)
				if err != nil || d < time.Second {
					return Usage("--expires-in %q is not a time such as 10m or 1h", life)
				}
				body["expires_in"] = int(d / time.Second)
			}
			if err := fileCanBe(file); err != nil {
				return err
			}
			s.announce("Creating a join token for host %s", cmp.Or(again, strings.Join(args, "")))
			o, err := s.send(request{method: http.MethodPost, path: hosts.path + "/join_tokens", body: body})
			if err != nil {
				return err
			}
			where := file
			if where == "" {
				where = "FILE"
			} else if err := writeSecret(file, []byte(o.text("join_token")+"\n")); err != nil {
				return during(err, "write the join token")
			}
			if s.json {
				if file != "" {
					o = without(o, "join_token")
				}
				return s.printJSON(o)
			}
			s.ok("The token is good until %s, for one host.", clock(o.text("expires_at")))
			if file == "" {
				fmt.Fprintf(s.out, "\n%s\n", plain(o.text("join_token")))
			}
			fmt.Fprintf(s.out, "\nOn the host: tabard agent --server %s --join-token-file %s\n", plain(o.text("url")), plain(where))
			return nil
		},
	}.command()
}

func hostRevokeCommand() *cobra.Command {
	var force bool
	return spec{
		use: "revoke (NAME|ID)...", short: "End all that a host can do", args: cobra.MinimumNArgs(1),
		more: "Its instances get no token any more from now on, and have failed; what its key signs proves nothing. Machines that\n" +
			"run on it go on running: switch them off there. Asks first; without a terminal to ask on it needs -f.",
		example: "tabard host revoke rack1-node3 -f",
		flags:   func(f *pflag.FlagSet) { forceFlag(f, &force) },
		run: func(s *session, args []string) error {
			if err := s.confirm(force, "revoke the host %s", args[0]); err != nil {
				return err
			}
			var failed []error
			for _, ref := range args {
				s.announce("Revoking host %s", ref)
				id, err := hosts.find(s, ref)
				var o object
				if err == nil {
					o, err = s.send(request{method: http.MethodPost, path: hosts.at(id, "revoke")})
				}
				if err != nil {
					failed = append(failed, fmt.Errorf("revoke host %s: %w", ref, err))
					continue
				}
				if s.json {
					if err := s.printJSON(o); err != nil {
						return err
					}
					continue
				}
				s.ok("The host %s is revoked. To let it in again: tabard host create-join-token --host %s", ref, ref)
			}
			return oneOrAll(failed)
		},
	}.command()
}

func hostAdoptCommand() *cobra.Command {
	var name, device, mac, address, cidr, profile, autoLink, protocol string
	var hopLimit int
	return spec{
		use: "adopt HOST [MACHINE]", short: "Give a machine that something else runs a CRN and a metadata service", args: cobra.RangeArgs(1, 2),
		more: "MACHINE is one that the host has found, by the name, UUID or device that tabard host machines shows; or say which device\n" +
			"it is with --device, --mac, --address and --name. Nothing of the machine is changed, and deleting the instance later\n" +
			"only takes this away again. The address must be the machine's own: packets with another one are not answered.",
		example: "tabard host adopt rack1-node3 legacy-db --address 192.168.122.15 --default-trusted-profile db-backup\n" +
			"tabard host adopt rack1-node3 --device vnet3 --mac 52:54:00:12:34:56 --address 10.1.2.3 --name legacy-db",
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&name, "name", "", "`NAME` of the instance (default: the machine's)")
			f.StringVar(&device, "device", "", "the machine's tap or veth on the host")
			f.StringVar(&mac, "mac", "", "address of the machine's network card")
			f.StringVar(&address, "address", "", "the machine's IPv4 address (default: what the host has found)")
			f.StringVar(&cidr, "cidr", "", "the network that it is in (default: the /24 of the address)")
			f.StringVar(&profile, "default-trusted-profile", "", "trusted profile that it takes on when it names none: name or ID")
			choice(f, &autoLink, "default-trusted-profile-auto-link", "true", "whether to link the profile to it", "true", "false")
			choice(f, &protocol, "metadata-service-protocol", "http", "what its metadata service speaks", "http", "https")
			f.IntVar(&hopLimit, "metadata-service-response-hop-limit", 1, "how many hops its answers go, 1 to 64")
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			if len(args) == 1 && device == "" {
				return Usage("say which machine: one of tabard host machines %s, or --device", args[0])
			}
			body := map[string]any{"metadata_service": map[string]any{"protocol": protocol, "response_hop_limit": hopLimit}}
			for k, v := range filled("name", name, "device", device, "mac", mac, "address", address, "cidr", cidr) {
				body[k] = v
			}
			what := device
			if len(args) == 2 {
				body["machine"], what = args[1], args[1]
			}
			s.announce("Adopting machine %s of host %s", what, args[0])
			id, err := hosts.find(s, args[0])
			if err != nil {
				return err
			}
			if profile != "" {
				p, err := profiles.find(s, profile)
				if err != nil {
					return err
				}
				body["default_trusted_profile"] = map[string]any{"id": p, "auto_link": autoLink == "true"}
			}
			o, err := s.send(request{method: http.MethodPost, path: hosts.at(id, "machines"), body: body})
			if err != nil {
				return err
			}
			s.ok("The machine is the instance %s now.", o.text("name"))
			return s.show(o, "id", columns("Name", "name", "ID", "id", "CRN", "crn", "Host", "host", "Device", "device", "MAC", "mac",
				"Address", "address", "VPC", "vpc", "Subnet", "subnet", "Status", "status"))
		},
	}.command()
}
