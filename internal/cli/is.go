package cli

import (
	"errors"
	"net/http"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Ids of the VPC API begin with a region's or a zone's prefix
// (reference/instance-metadata-and-vpc.md section 3.2).
var (
	regional = prefixed(`r[0-9]{3}-`)
	zonal    = prefixed(`[0-9a-z]{4}[-_]`)
)

var regions = &kind{
	noun: "region", plural: "regions", listed: "is regions", path: "/v1/regions", array: "regions", id: "name", vpc: true,
	columns: columns("Name", "name", "Endpoint", "endpoint", "Status", "status"),
}

var vpcs = &kind{
	noun: "VPC", plural: "VPCs", listed: "is vpcs", path: "/v1/vpcs", array: "vpcs", id: "id", form: regional, vpc: true,
	columns: columns("ID", "id", "Name", "name", "Status", "status", "Classic access", "classic_access", "Default network ACL", "default_network_acl.name",
		"Default security group", "default_security_group.name", "Resource group", "resource_group.name"),
	details: columns("ID", "id", "Name", "name", "CRN", "crn", "Status", "status", "Default network ACL", "default_network_acl.name",
		"Default security group", "default_security_group.name", "Resource group", "resource_group.name", "Created", "created_at"),
}

var subnets = &kind{
	noun: "subnet", plural: "subnets", listed: "is subnets", path: "/v1/subnets", array: "subnets", id: "id", form: zonal, vpc: true,
	columns: columns("ID", "id", "Name", "name", "Status", "status", "Subnet CIDR", "ipv4_cidr_block", "Addresses", "available_ipv4_address_count",
		"VPC", "vpc.name", "Zone", "zone.name", "Resource group", "resource_group.name"),
	details: columns("ID", "id", "Name", "name", "CRN", "crn", "Status", "status", "Subnet CIDR", "ipv4_cidr_block",
		"Addresses available", "available_ipv4_address_count", "Addresses total", "total_ipv4_address_count",
		"VPC", "vpc.name", "Zone", "zone.name", "Resource group", "resource_group.name", "Created", "created_at"),
}

var keys = &kind{
	noun: "key", plural: "keys", listed: "is keys", path: "/v1/keys", array: "keys", id: "id", form: regional, vpc: true,
	columns: columns("ID", "id", "Name", "name", "Type", "type", "Length", "length", "FingerPrint", "fingerprint", "Resource group", "resource_group.name"),
	details: columns("ID", "id", "Name", "name", "CRN", "crn", "Type", "type", "Length", "length", "FingerPrint", "fingerprint",
		"Key", "public_key", "Resource group", "resource_group.name", "Created", "created_at"),
}

var instanceProfiles = &kind{
	noun: "instance profile", plural: "instance profiles", listed: "is instance-profiles", path: "/v1/instance/profiles", array: "profiles", id: "name", vpc: true,
	columns: columns("Name", "name", "Architecture", "vcpu_architecture.value", "Family", "family", "vCPUs", "vcpu_count.value",
		"Memory(GiB)", "memory.value", "Bandwidth(Mbps)", "bandwidth.value"),
	details: columns("Name", "name", "Architecture", "vcpu_architecture.value", "Family", "family", "vCPUs", "vcpu_count.value",
		"Memory(GiB)", "memory.value", "Bandwidth(Mbps)", "bandwidth.value", "Network interfaces", "network_interface_count.max", "Status", "status"),
}

var floatingIPs = &kind{
	noun: "floating IP", plural: "floating IPs", listed: "is floating-ips", path: "/v1/floating_ips", array: "floating_ips", id: "id", form: regional, vpc: true,
	columns: columns("ID", "id", "Address", "address", "Name", "name", "Status", "status", "Zone", "zone.name",
		"Target", "target.name", "Target address", "target.primary_ip.address", "Resource group", "resource_group.name"),
	details: columns("ID", "id", "Address", "address", "Name", "name", "CRN", "crn", "Status", "status", "Zone", "zone.name",
		"Target ID", "target.id", "Target type", "target.resource_type", "Target", "target.name", "Resource group", "resource_group.name", "Created", "created_at"),
}

func isCommands() *cobra.Command {
	c := group("is", "Manage virtual servers and their networks",
		"VPCs, subnets, security groups, keys, images, virtual servers with their interfaces and volumes, and floating IPs.\n"+
			"Names and IDs are interchangeable.",
		"tabard is instances",
		regionsCommand("tabard is regions"), zonesCommand(),
		listCommand(vpcs, "vpcs", "tabard is vpcs", inGroup...),
		getCommand(vpcs, "vpc VPC", "tabard is vpc my-vpc"),
		vpcCreateCommand(),
		place{kind: vpcs, family: "is", word: "vpc", args: "VPC", sample: "my-vpc"}.update(change{method: http.MethodPatch, options: newName, example: "--name my-other-vpc"}),
		addressPrefixesCommand(),
		deleteCommand(vpcs, "vpc-delete VPC...", "delete", "tabard is vpc-delete my-vpc -f", nil, nil),
		listCommand(subnets, "subnets", "tabard is subnets --vpc my-vpc", append([]filter{
			{"vpc", "", "vpc.id", "only in this VPC: name or ID", vpcs}, {"zone", "", "zone.name", "only in this zone", nil},
		}, inGroup...)...),
		getCommand(subnets, "subnet SUBNET", "tabard is subnet my-subnet"),
		subnetCreateCommand(),
		place{kind: subnets, family: "is", word: "subnet", args: "SUBNET", sample: "my-subnet"}.update(change{method: http.MethodPatch, options: newName, example: "--name my-other-subnet"}),
		deleteCommand(subnets, "subnet-delete SUBNET...", "delete", "tabard is subnet-delete my-subnet -f", nil, nil),
		listCommand(keys, "keys", "tabard is keys", inGroup...),
		getCommand(keys, "key KEY", "tabard is key my-key"),
		keyCreateCommand(),
		place{kind: keys, family: "is", word: "key", args: "KEY", sample: "my-key"}.update(change{method: http.MethodPatch, options: newName, example: "--name my-other-key"}),
		deleteCommand(keys, "key-delete KEY...", "delete", "tabard is key-delete my-key -f", nil, nil),
		listCommand(instanceProfiles, "instance-profiles", "tabard is instance-profiles"),
		getCommand(instanceProfiles, "instance-profile PROFILE_NAME", "tabard is instance-profile bx2-2x8"),
	)
	c.AddCommand(securityGroupCommands()...)
	c.AddCommand(imageCommands()...)
	c.AddCommand(instanceCommands()...)
	c.AddCommand(attachedCommands()...)
	c.AddCommand(floatingIPCommands()...)
	return c
}

// inGroup narrows a list down to a resource group.
var inGroup = []filter{
	{"resource-group-id", "", "resource_group.id", "only in this resource group, by ID", nil},
	{"resource-group-name", "", "resource_group.id", "only in this resource group, by name", groups},
}

// groupFlags name the resource group of a new object.
type groupFlags struct{ id, name string }

func (g *groupFlags) add(f *pflag.FlagSet) {
	f.StringVar(&g.id, "resource-group-id", "", "resource group, by ID")
	f.StringVar(&g.name, "resource-group-name", "", "resource group, by name")
}

// set puts the resource group into a body: the named one, else the targeted
// one, else the server chooses.
func (g *groupFlags) set(s *session, body map[string]any) error {
	id := g.id
	if g.name != "" {
		found, err := groups.find(s, g.name)
		if err != nil {
			return err
		}
		id = found
	}
	if id == "" {
		id = s.ResourceGroupID
	}
	if id != "" {
		body["resource_group"] = map[string]string{"id": id}
	}
	return nil
}

func byID(id string) map[string]string     { return map[string]string{"id": id} }
func byName(name string) map[string]string { return map[string]string{"name": name} }

func regionsCommand(example string) *cobra.Command {
	c := listCommand(regions, "regions", example)
	c.Short, c.Long = "List the regions", "List the regions of the server."
	return c
}

func zonesCommand() *cobra.Command {
	return spec{
		use: "zones", short: "List the zones of the region", example: "tabard is zones",
		more: "The region is the targeted one; without one the zones of all regions are listed.",
	}.listing("zones", "name", columns("Name", "name", "Region", "region.name", "Status", "status"), func(s *session, _ []string) ([]object, error) {
		names := []string{s.Region}
		if s.Region == "" {
			found, err := regions.list(s)
			if err != nil {
				return nil, err
			}
			names = names[:0]
			for _, r := range found {
				names = append(names, r.text("name"))
			}
		}
		zones := []object{}
		for _, name := range names {
			found, err := s.client.list(s.ctx(), regions.at(name, "zones"), vpcQuery(), "zones", 0)
			if err != nil {
				return nil, err
			}
			zones = append(zones, found...)
		}
		return zones, nil
	})
}

func addressPrefixesCommand() *cobra.Command {
	return spec{
		use: "vpc-address-prefixes VPC", short: "List the address prefixes of a VPC", args: cobra.ExactArgs(1),
		more: "Subnets are parts of them, one prefix for each zone.", example: "tabard is vpc-address-prefixes my-vpc",
	}.listing("address prefixes", "id", columns("ID", "id", "Name", "name", "CIDR block", "cidr", "Zone", "zone.name", "Has subnets", "has_subnets"),
		func(s *session, args []string) ([]object, error) {
			id, err := vpcs.find(s, args[0])
			if err != nil {
				return nil, err
			}
			return s.client.list(s.ctx(), vpcs.at(id, "address_prefixes"), vpcs.one(), "address_prefixes", 0)
		})
}

// create posts a body and shows the object that came of it.
func (k *kind) create(s *session, name string, body map[string]any) error {
	o, err := s.send(request{method: http.MethodPost, path: k.path, query: k.one(), body: body})
	if err != nil {
		return err
	}
	return s.made(k, o, "The %s %s was created.", k.noun, name)
}

func vpcCreateCommand() *cobra.Command {
	var g groupFlags
	var prefixes string
	return spec{
		use: "vpc-create VPC_NAME", short: "Create a VPC", example: "tabard is vpc-create my-vpc",
		more: "A VPC is an isolated network. By default it has an address prefix in each zone for subnets to come from.",
		args: cobra.ExactArgs(1),
		flags: func(f *pflag.FlagSet) {
			g.add(f)
			choice(f, &prefixes, "address-prefix-management", "auto", "address prefixes", "auto", "manual")
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			s.announce("Creating VPC %s", args[0])
			body := map[string]any{"name": args[0], "address_prefix_management": prefixes}
			if err := g.set(s, body); err != nil {
				return err
			}
			return vpcs.create(s, args[0], body)
		},
	}.command()
}

func subnetCreateCommand() *cobra.Command {
	var g groupFlags
	var zone, block string
	var count int
	c := spec{
		use: "subnet-create SUBNET_NAME VPC", short: "Create a subnet of a VPC",
		more:    "The server picks a free range of the asked size in the zone, or the range is given.",
		example: "tabard is subnet-create my-subnet my-vpc --zone us-south-3 --ipv4-address-count 256", args: cobra.ExactArgs(2),
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&zone, "zone", "", "`ZONE` of the subnet")
			f.IntVar(&count, "ipv4-address-count", 0, "number of addresses, a power of two")
			f.StringVar(&block, "ipv4-cidr-block", "", "address range, such as 10.240.0.0/24")
			g.add(f)
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			if block == "" && (zone == "" || count == 0) {
				return Usage("give --zone and --ipv4-address-count, or --ipv4-cidr-block")
			}
			s.announce("Creating subnet %s", args[0])
			vpc, err := vpcs.find(s, args[1])
			if err != nil {
				return err
			}
			body := map[string]any{"name": args[0], "vpc": byID(vpc), "ip_version": "ipv4"}
			if block != "" {
				body["ipv4_cidr_block"] = block
			} else {
				body["total_ipv4_address_count"] = count
			}
			if zone != "" {
				body["zone"] = byName(zone)
			}
			if err := g.set(s, body); err != nil {
				return err
			}
			return subnets.create(s, args[0], body)
		},
	}.command()
	c.MarkFlagsMutuallyExclusive("ipv4-address-count", "ipv4-cidr-block")
	return c
}

func keyCreateCommand() *cobra.Command {
	var g groupFlags
	var keyType string
	return spec{
		use: "key-create KEY_NAME (KEY|@KEY_FILE)", short: "Create a key", example: "tabard is key-create my-key @id_ed25519.pub",
		more: "The key is the public half of an SSH key, as in the .pub file.", args: cobra.ExactArgs(2),
		flags: func(f *pflag.FlagSet) {
			choice(f, &keyType, "key-type", "", "type of the key; by default what the key says", "rsa", "ed25519")
			g.add(f)
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			text, err := fileOrText(s.cmd, args[1])
			if err != nil {
				return during(err, "read the key")
			}
			text = strings.TrimSpace(text)
			if strings.Contains(text, "PRIVATE KEY") {
				return errors.New("this is a private key, which stays where it is: give the public one, from the .pub file")
			}
			if keyType == "" {
				keyType = "rsa"
				if strings.HasPrefix(text, "ssh-ed25519 ") {
					keyType = "ed25519"
				}
			}
			s.announce("Creating key %s", args[0])
			body := map[string]any{"name": args[0], "public_key": text, "type": keyType}
			if err := g.set(s, body); err != nil {
				return err
			}
			return keys.create(s, args[0], body)
		},
	}.command()
}

func floatingIPCommands() []*cobra.Command {
	return []*cobra.Command{
		listCommand(floatingIPs, "floating-ips", "tabard is floating-ips", inGroup...),
		getCommand(floatingIPs, "floating-ip FLOATING_IP", "tabard is floating-ip my-fip1"),
		floatingIPReserveCommand(),
		floatingIPUpdateCommand(),
		deleteCommand(floatingIPs, "floating-ip-release FLOATING_IP...", "release", "tabard is floating-ip-release my-fip1 -f", nil, nil),
	}
}

// nicFlags name a network interface, or a virtual one.
type nicFlags struct{ nic, instance, vni string }

func (n *nicFlags) add(f *pflag.FlagSet) {
	f.StringVar(&n.nic, "nic", "", "network interface to bind to: name or ID")
	f.StringVar(&n.instance, "in", "", "instance of the network interface: name or ID")
	f.StringVar(&n.vni, "vni", "", "virtual network interface to bind to: name or ID")
}

func (n *nicFlags) find(s *session) (map[string]string, error) {
	if n.vni != "" {
		id, err := virtualInterfaces.find(s, n.vni)
		return byID(id), err
	}
	if n.instance == "" {
		if id, ok := interfaces.asID(n.nic); ok {
			return byID(id), nil
		}
		return nil, Usage("--nic by name needs --in, the instance")
	}
	_, nic, err := findInterface(s, n.instance, n.nic)
	return byID(nic), err
}

func floatingIPReserveCommand() *cobra.Command {
	var g groupFlags
	var n nicFlags
	var zone string
	c := spec{
		use: "floating-ip-reserve FLOATING_IP_NAME", short: "Reserve a floating IP", example: "tabard is floating-ip-reserve my-fip1 --zone us-south-3",
		more: "It is reserved in a zone, or bound to a network interface at once.", args: cobra.ExactArgs(1),
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&zone, "zone", "", "`ZONE` to reserve it in")
			n.add(f)
			g.add(f)
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			s.announce("Creating floating IP %s", args[0])
			body := map[string]any{"name": args[0]}
			if zone != "" {
				body["zone"] = byName(zone)
			} else {
				target, err := n.find(s)
				if err != nil {
					return err
				}
				body["target"] = target
			}
			if err := g.set(s, body); err != nil {
				return err
			}
			return floatingIPs.create(s, args[0], body)
		},
	}.command()
	c.MarkFlagsMutuallyExclusive("zone", "nic", "vni")
	c.MarkFlagsOneRequired("zone", "nic", "vni")
	return c
}

func floatingIPUpdateCommand() *cobra.Command {
	var n nicFlags
	var name string
	var reset bool
	c := spec{
		use: "floating-ip-update FLOATING_IP", short: "Rename, bind or unbind a floating IP", example: "tabard is floating-ip-update my-fip1 --nic primary-nic --in my-instance",
		more: "With --reset-target it is not bound to anything any more.", args: cobra.ExactArgs(1),
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&name, "name", "", "new name")
			n.add(f)
			f.BoolVar(&reset, "reset-target", false, "unbind it")
		},
		run: func(s *session, args []string) error {
			s.announce("Updating floating IP %s", args[0])
			body := map[string]any{}
			if name != "" {
				body["name"] = name
			}
			switch {
			case reset:
				body["target"] = nil
			case n.nic != "" || n.vni != "":
				target, err := n.find(s)
				if err != nil {
					return err
				}
				body["target"] = target
			}
			id, err := floatingIPs.find(s, args[0])
			if err != nil {
				return err
			}
			o, err := s.send(request{method: http.MethodPatch, path: floatingIPs.at(id), query: floatingIPs.one(), body: body, header: mergePatch})
			if err != nil {
				return err
			}
			return s.made(floatingIPs, o, "The floating IP %s was updated.", args[0])
		},
	}.command()
	c.MarkFlagsMutuallyExclusive("nic", "vni", "reset-target")
	c.MarkFlagsOneRequired("name", "nic", "vni", "reset-target")
	return c
}

var mergePatch = map[string]string{"Content-Type": "application/merge-patch+json"}
