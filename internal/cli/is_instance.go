package cli

import (
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

var instances = &kind{
	noun: "instance", plural: "instances", listed: "is instances", path: "/v1/instances", array: "instances", id: "id", form: zonal, vpc: true, byName: nameFilter,
	columns: columns("ID", "id", "Name", "name", "Status", "status", "Reserved IP", "primary_network_interface.primary_ip.address",
		"Profile", "profile.name", "Image", "image.name", "VPC", "vpc.name", "Zone", "zone.name", "Resource group", "resource_group.name"),
	details: columns("ID", "id", "Name", "name", "CRN", "crn", "Status", "status", "Status reasons", "status_reasons.message", "Startable", "startable",
		"Profile", "profile.name", "Architecture", "vcpu.architecture", "vCPUs", "vcpu.count", "Memory(GiB)", "memory",
		"Metadata service enabled", "metadata_service.enabled", "Metadata protocol", "metadata_service.protocol",
		"Metadata response hop limit", "metadata_service.response_hop_limit",
		"Image", "image.name", "VPC", "vpc.name", "Zone", "zone.name", "Resource group", "resource_group.name",
		"Network interfaces", "network_interfaces.name", "Reserved IPs", "network_interfaces.primary_ip.address", "Created", "created_at"),
}

// interfaces are the network interfaces of an instance; their path is inside it.
var interfaces = &kind{
	noun: "network interface", plural: "network interfaces", listed: "is instance-network-interfaces INSTANCE", array: "network_interfaces", id: "id", form: zonal, vpc: true,
	columns: columns("ID", "id", "Name", "name", "Type", "type", "Reserved IP", "primary_ip.address", "Subnet", "subnet.name",
		"Floating IPs", "floating_ips.address", "Status", "status"),
}

// interfacesOf returns the kind of the interfaces of one instance.
func interfacesOf(s *session, instance string) (*kind, error) {
	id, err := instances.find(s, instance)
	if err != nil {
		return nil, err
	}
	k := *interfaces
	k.path = instances.at(id, "network_interfaces")
	k.details = k.columns
	return &k, nil
}

// findInterface returns where an instance's interfaces are, and the id of one.
func findInterface(s *session, instance, nic string) (*kind, string, error) {
	k, err := interfacesOf(s, instance)
	if err != nil {
		return nil, "", err
	}
	id, err := k.find(s, nic)
	return k, id, err
}

func instanceCommands() []*cobra.Command {
	return []*cobra.Command{
		listCommand(instances, "instances", "tabard is instances", append([]filter{
			{"vpc", "", "vpc.id", "only in this VPC: name or ID", vpcs},
		}, inGroup...)...),
		getCommand(instances, "instance INSTANCE", "tabard is instance my-instance"),
		instanceCreateCommand(),
		instanceUpdateCommand(),
		instanceActionCommand("start", "Start a stopped instance", false),
		instanceActionCommand("stop", "Stop a running instance", true),
		instanceActionCommand("reboot", "Reboot a running instance", true),
		deleteCommand(instances, "instance-delete INSTANCE...", "delete", "tabard is instance-delete my-instance -f", nil, nil),
		instanceInitializationCommand(),
		interfacesCommand(), interfaceCommand(), boundCommand(), bindCommand(), unbindCommand(),
		instanceExecCommand(),
	}
}

// instanceOptions are the flags of instance-create.
type instanceOptions struct {
	groupFlags
	image, keys, primary, userData             string
	profile, autoLink, groups                  string
	metadata, metadataProtocol, metadataHopMax string

	// Of the primary network attachment; any of them makes one.
	attachment, virtual, address, addressName, virtualGroups string
	more                                                     string
}

func instanceCreateCommand() *cobra.Command {
	var o instanceOptions
	return spec{
		use: "instance-create INSTANCE_NAME VPC ZONE_NAME PROFILE_NAME SUBNET", short: "Create and start a virtual server",
		more: "VPC, subnet, image, keys and trusted profile are named by name or ID. --primary-network-interface is the JSON of\n" +
			"the API, or @FILE; the subnet in it, by name or ID, goes before the SUBNET argument. With one of the --pnac flags the\n" +
			"server is made with network attachments instead. With a default trusted profile the server is linked to it, and gets\n" +
			"its tokens from the metadata service without naming it.",
		example: "tabard is instance-create my-instance my-vpc us-south-3 bx2-2x8 my-subnet --image IMAGE --keys my-key --metadata-service true --default-trusted-profile my-trusted-profile",
		args:    cobra.ExactArgs(5),
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&o.image, "image", "", "image: name or ID")
			f.StringVar(&o.keys, "keys", "", "keys, comma-separated: names or IDs")
			f.StringVar(&o.primary, "primary-network-interface", "", "primary network interface, as `JSON` or @FILE")
			f.StringVar(&o.userData, "user-data", "", "data for the server's first start, as `TEXT` or @FILE")
			f.StringVar(&o.profile, "default-trusted-profile", "", "trusted profile that the server puts on: name, ID or CRN")
			choice(f, &o.autoLink, "default-trusted-profile-auto-link", "true", "link the server to the trusted profile", "true", "false")
			f.StringVar(&o.groups, "sgs", "", "security groups of the primary network interface, comma-separated: names or IDs")
			f.StringVar(&o.attachment, "pnac-name", "", "name of the primary network attachment")
			f.StringVar(&o.virtual, "pnac-vni-name", "", "name of its virtual network interface")
			f.StringVar(&o.address, "pnac-vni-rip-address", "", "address of the virtual network interface")
			f.StringVar(&o.addressName, "pnac-vni-rip-name", "", "name of that address")
			f.StringVar(&o.virtualGroups, "pnac-vni-sgs", "", "security groups of the virtual network interface, comma-separated: names or IDs")
			f.StringVar(&o.more, "network-attachments", "", "further network attachments, as `JSON` or @FILE")
			choice(f, &o.metadata, "metadata-service", "", "give the server its metadata service", "true", "false")
			choice(f, &o.metadataProtocol, "metadata-service-protocol", "", "protocol of the metadata service", "http", "https")
			f.StringVar(&o.metadataHopMax, "metadata-service-response-hop-limit", "", "how many hops answers of the metadata service live, 1 to 64")
			alias(f, "metadata-service", "ms")
			alias(f, "metadata-service-protocol", "msp")
			alias(f, "metadata-service-response-hop-limit", "msrhl")
			alias(f, "image", "image-id")
			alias(f, "keys", "key-ids")
			o.add(f)
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			s.announce("Creating instance %s", args[0])
			body, err := o.body(s, args)
			if err != nil {
				return err
			}
			return instances.create(s, args[0], body)
		},
	}.command()
}

func (o *instanceOptions) body(s *session, args []string) (map[string]any, error) {
	body := map[string]any{"name": args[0], "zone": byName(args[2]), "profile": byName(args[3])}
	vpc, err := vpcs.find(s, args[1])
	if err != nil {
		return nil, err
	}
	body["vpc"] = byID(vpc)
	if o.attached() {
		err = o.attachments(s, vpc, args[4], body)
	} else {
		body["primary_network_interface"], err = o.interfaceBody(s, vpc, args[4])
	}
	if err != nil {
		return nil, err
	}
	if o.image != "" {
		id, err := images.find(s, o.image)
		if err != nil {
			return nil, err
		}
		body["image"] = byID(id)
	}
	if o.keys != "" {
		var ids []map[string]string
		for ref := range strings.SplitSeq(o.keys, ",") {
			id, err := keys.find(s, strings.TrimSpace(ref))
			if err != nil {
				return nil, err
			}
			ids = append(ids, byID(id))
		}
		body["keys"] = ids
	}
	if o.profile != "" {
		id, err := profiles.find(s, o.profile)
		if err != nil {
			return nil, err
		}
		body["default_trusted_profile"] = map[string]any{"auto_link": o.autoLink == "true", "target": byID(id)}
	}
	metadata, err := o.metadataBody()
	if err != nil {
		return nil, err
	}
	if len(metadata) > 0 {
		body["metadata_service"] = metadata
	}
	if o.userData != "" {
		if body["user_data"], err = fileOrText(s.cmd, o.userData); err != nil {
			return nil, during(err, "read the user data")
		}
	}
	return body, o.set(s, body)
}

// attached reports whether the instance is to have network attachments.
func (o *instanceOptions) attached() bool {
	return o.attachment+o.virtual+o.address+o.addressName+o.virtualGroups+o.more != ""
}

// attachments puts the network attachments into the body of an instance.
func (o *instanceOptions) attachments(s *session, vpc, subnet string, body map[string]any) error {
	if o.primary+o.groups != "" {
		return Usage("give either flags of network attachments or --primary-network-interface and --sgs")
	}
	id, err := findSubnet(s, vpc, subnet)
	if err != nil {
		return err
	}
	virtual := map[string]any{"subnet": byID(id)}
	if o.virtual != "" {
		virtual["name"] = o.virtual
	}
	if o.address+o.addressName != "" {
		ip := map[string]any{}
		for name, value := range map[string]string{"address": o.address, "name": o.addressName} {
			if value != "" {
				ip[name] = value
			}
		}
		virtual["primary_ip"] = ip
	}
	if o.virtualGroups != "" {
		if virtual["security_groups"], err = findGroups(s, vpc, o.virtualGroups); err != nil {
			return err
		}
	}
	attachment := map[string]any{"virtual_network_interface": virtual}
	if o.attachment != "" {
		attachment["name"] = o.attachment
	}
	body["primary_network_attachment"] = attachment
	if o.more == "" {
		return nil
	}
	text, err := fileOrText(s.cmd, o.more)
	if err != nil {
		return during(err, "read the network attachments")
	}
	var more []any
	if err := json.Unmarshal([]byte(text), &more); err != nil {
		return Usage("--network-attachments is not a JSON array")
	}
	body["network_attachments"] = more
	return nil
}

// findGroups returns references to the security groups of a VPC that are named,
// comma-separated.
func findGroups(s *session, vpc, names string) ([]any, error) {
	refs := []any{}
	for _, name := range splitList(names) {
		id, err := securityGroups.find(s, name, "vpc.id", vpc)
		if err != nil {
			return nil, err
		}
		refs = append(refs, byID(id))
	}
	return refs, nil
}

// findSubnet returns the id of a subnet of a VPC. Names of subnets are only
// unique in a VPC.
func findSubnet(s *session, vpc, ref string) (string, error) {
	if id, ok := subnets.asID(ref); ok {
		return id, nil
	}
	items, err := subnets.list(s, "vpc.id", vpc)
	if err != nil {
		return "", err
	}
	items = slices.DeleteFunc(items, func(o object) bool { return o.text("vpc.id") != vpc })
	return subnets.pick(s, items, ref)
}

func instanceUpdateCommand() *cobra.Command {
	var o instanceOptions
	var name, profile string
	return spec{
		use: "instance-update INSTANCE", short: "Change an instance", args: cobra.ExactArgs(1),
		more: "What no flag names keeps its value. The metadata service follows at once; the hardware profile can be changed while the\n" +
			"instance is stopped.",
		example: "tabard is instance-update my-instance --metadata-service true --metadata-service-protocol https",
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&name, "name", "", "new name")
			f.StringVar(&profile, "profile", "", "hardware profile")
			choice(f, &o.metadata, "metadata-service", "", "give the server its metadata service", "true", "false")
			choice(f, &o.metadataProtocol, "metadata-service-protocol", "", "protocol of the metadata service", "http", "https")
			f.StringVar(&o.metadataHopMax, "metadata-service-response-hop-limit", "", "how many hops answers of the metadata service live, 1 to 64")
			alias(f, "metadata-service", "ms")
			alias(f, "metadata-service-protocol", "msp")
			alias(f, "metadata-service-response-hop-limit", "msrhl")
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			body := map[string]any{}
			if name != "" {
				body["name"] = name
			}
			if profile != "" {
				body["profile"] = byName(profile)
			}
			metadata, err := o.metadataBody()
			if err != nil {
				return err
			}
			if len(metadata) > 0 {
				body["metadata_service"] = metadata
			}
			if len(body) == 0 {
				return Usage("nothing to change: give --name, --profile or a flag of the metadata service")
			}
			s.announce("Updating instance %s", args[0])
			id, err := instances.find(s, args[0])
			if err != nil {
				return err
			}
			changed, err := s.send(request{method: http.MethodPatch, path: instances.at(id), query: instances.one(), body: body, header: mergePatch})
			if err != nil {
				return err
			}
			return s.made(instances, changed, "The instance %s was updated.", args[0])
		},
	}.command()
}

func (o *instanceOptions) metadataBody() (map[string]any, error) {
	m := map[string]any{}
	if o.metadata != "" {
		m["enabled"] = o.metadata == "true"
	}
	if o.metadataProtocol != "" {
		m["protocol"] = o.metadataProtocol
	}
	if o.metadataHopMax != "" {
		n, err := strconv.Atoi(o.metadataHopMax)
		if err != nil || n < 1 || n > 64 {
			return nil, Usage("--metadata-service-response-hop-limit must be a number from 1 to 64")
		}
		m["response_hop_limit"] = n
	}
	return m, nil
}

// interfaceKeys are what the API knows of a new network interface
// (reference/instance-metadata-and-vpc.md section 3).
var interfaceKeys = []string{"name", "subnet", "primary_ip", "primary_ipv4_address", "security_groups", "allow_ip_spoofing"}

// interfaceBody is the primary network interface: the JSON with what it names
// by name looked up, else only the subnet argument. The argument is not looked
// at when the JSON has a subnet, because then it may name one that does not
// exist (reference/instance-metadata-and-vpc.md section 4.6).
func (o *instanceOptions) interfaceBody(s *session, vpc, subnet string) (map[string]any, error) {
	nic := map[string]any{}
	if o.primary != "" {
		text, err := fileOrText(s.cmd, o.primary)
		if err != nil {
			return nil, during(err, "read the primary network interface")
		}
		if err := json.Unmarshal([]byte(text), &nic); err != nil || nic == nil {
			return nil, Usage("--primary-network-interface is not a JSON object")
		}
		for _, key := range slices.Sorted(maps.Keys(nic)) {
			if !slices.Contains(interfaceKeys, key) {
				return nil, Usage("--primary-network-interface has an unknown key %q; the keys are %s", key, strings.Join(interfaceKeys, ", "))
			}
		}
	}
	given, ok := nic["subnet"].(map[string]any)
	if !ok && nic["subnet"] != nil {
		return nil, Usage(`subnet in --primary-network-interface must be an object, such as {"name":"my-subnet"}`)
	}
	if ok {
		name, byName := given["name"].(string)
		if !byName {
			return nic, o.securityGroups(s, vpc, nic)
		}
		subnet = name
	}
	id, err := findSubnet(s, vpc, subnet)
	if err != nil {
		return nil, err
	}
	nic["subnet"] = byID(id)
	return nic, o.securityGroups(s, vpc, nic)
}

// securityGroups replaces the names of security groups in an interface by their
// ids. Those of --sgs go before them.
func (o *instanceOptions) securityGroups(s *session, vpc string, nic map[string]any) error {
	if o.groups != "" {
		refs, err := findGroups(s, vpc, o.groups)
		if err != nil {
			return err
		}
		nic["security_groups"] = refs
	}
	list, ok := nic["security_groups"].([]any)
	if !ok {
		return nil
	}
	for i, g := range list {
		fields, ok := g.(map[string]any)
		name, byName := fields["name"].(string)
		if !ok || !byName {
			continue
		}
		id, err := securityGroups.find(s, name, "vpc.id", vpc)
		if err != nil {
			return err
		}
		list[i] = byID(id)
	}
	return nil
}

func instanceActionCommand(action, short string, disruptive bool) *cobra.Command {
	var force, noWait bool
	reached, noWaitUsage := "running", "do not wait for the instance to be running"
	if action == "stop" {
		reached = "stopped"
	}
	more := "Waits up to a minute until the instance is " + reached + "; with --no-wait it does not."
	if disruptive {
		more += " Asks first when there is a\nterminal to ask on, unless -f. --no-wait also means, as it does in ibmcloud, that the server acts at once and\ndrops the actions that wait."
		noWaitUsage = "act at once, before actions that wait, and do not wait for the instance to be " + reached
	}
	return spec{
		use: "instance-" + action + " INSTANCE", short: short, example: "tabard is instance-" + action + " my-instance", more: more,
		args: cobra.ExactArgs(1),
		flags: func(f *pflag.FlagSet) {
			if disruptive {
				forceFlag(f, &force)
			}
			f.BoolVar(&noWait, "no-wait", false, noWaitUsage)
		},
		run: func(s *session, args []string) error {
			if disruptive && !force && terminal(s.cmd.InOrStdin()) {
				if err := s.ask(action + " instance " + args[0]); err != nil {
					return err
				}
			}
			s.announce("Creating action %s for instance %s", action, args[0])
			id, err := instances.find(s, args[0])
			if err != nil {
				return err
			}
			body := map[string]any{"type": action}
			if noWait && disruptive {
				body["force"] = true
			}
			o, err := s.send(request{method: http.MethodPost, path: instances.at(id, "actions"), query: instances.one(), body: body})
			if err != nil {
				return err
			}
			if noWait {
				s.ok("")
				return s.show(o, "id", columns("ID", "id", "Type", "type", "Status", "status", "Created", "created_at"))
			}
			err = s.await(id, args[0], reached)
			var refused *apiError
			switch {
			case errors.As(err, &refused) && refused.Status == http.StatusForbidden:
				// Who may act on an instance need not be allowed to see it.
				s.warn("the action was accepted, but you may not see how far instance %s is", args[0])
				s.ok("")
			case err != nil:
				return during(err, "wait for the "+action+" that was accepted")
			default:
				s.ok("The instance %s is %s.", args[0], reached)
			}
			return s.show(o, "id", columns("ID", "id", "Type", "type", "Created", "created_at"))
		},
	}.command()
}

func instanceInitializationCommand() *cobra.Command {
	return spec{
		use: "instance-initialization-values INSTANCE", short: "Show what an instance was created with", args: cobra.ExactArgs(1),
		more: "Its keys and its default trusted profile.", example: "tabard is instance-initialization-values my-instance",
		run: func(s *session, args []string) error {
			s.announce("Getting initialization values of instance %s", args[0])
			id, err := instances.find(s, args[0])
			if err != nil {
				return err
			}
			o, _, err := s.get(instances.at(id, "initialization"), instances.one())
			if err != nil {
				return err
			}
			s.ok("")
			return s.show(o, "", columns("Keys", "keys.name", "Key fingerprints", "keys.fingerprint",
				"Default trusted profile", "default_trusted_profile.target.id", "Auto link", "default_trusted_profile.auto_link"))
		},
	}.command()
}

func interfacesCommand() *cobra.Command {
	return spec{
		use: "instance-network-interfaces INSTANCE", short: "List the network interfaces of an instance", args: cobra.ExactArgs(1),
		more: "The primary one comes first.", example: "tabard is instance-network-interfaces my-instance",
	}.listing(interfaces.plural, interfaces.id, interfaces.columns, func(s *session, args []string) ([]object, error) {
		k, err := interfacesOf(s, args[0])
		if err != nil {
			return nil, err
		}
		return k.list(s)
	})
}

func interfaceCommand() *cobra.Command {
	return spec{
		use: "instance-network-interface INSTANCE NIC", short: "Show one network interface of an instance", args: cobra.ExactArgs(2),
		more: "It is named by its name or ID.", example: "tabard is instance-network-interface my-instance primary-nic", flags: idFlag,
		run: func(s *session, args []string) error {
			s.announce("Getting network interface %s of instance %s", args[1], args[0])
			k, err := interfacesOf(s, args[0])
			if err != nil {
				return err
			}
			o, _, err := k.load(s, args[1])
			if err != nil {
				return err
			}
			s.ok("")
			return s.show(o, k.id, k.details)
		},
	}.command()
}

func boundCommand() *cobra.Command {
	return spec{
		use: "instance-network-interface-floating-ips INSTANCE NIC", short: "List the floating IPs bound to a network interface",
		more: "There is at most one.", example: "tabard is instance-network-interface-floating-ips my-instance primary-nic", args: cobra.ExactArgs(2),
	}.listing(floatingIPs.plural, floatingIPs.id, floatingIPs.columns, func(s *session, args []string) ([]object, error) {
		k, nic, err := findInterface(s, args[0], args[1])
		if err != nil {
			return nil, err
		}
		return s.client.list(s.ctx(), k.at(nic, "floating_ips"), k.one(), "floating_ips", 0)
	})
}

func bindCommand() *cobra.Command {
	return spec{
		use: "instance-network-interface-floating-ip-add INSTANCE NIC FLOATING_IP", short: "Bind a floating IP to a network interface",
		more: "It replaces one that is bound already. Both must be in the same zone.", args: cobra.ExactArgs(3),
		example: "tabard is instance-network-interface-floating-ip-add my-instance primary-nic my-fip1",
		run: func(s *session, args []string) error {
			s.announce("Creating floating IP %s for network interface %s of instance %s", args[2], args[1], args[0])
			k, nic, err := findInterface(s, args[0], args[1])
			if err != nil {
				return err
			}
			fip, err := floatingIPs.find(s, args[2])
			if err != nil {
				return err
			}
			o, err := s.send(request{method: http.MethodPut, path: k.at(nic, "floating_ips", fip), query: k.one()})
			if err != nil {
				return err
			}
			return s.made(floatingIPs, o, "The floating IP %s is bound to %s.", args[2], args[1])
		},
	}.command()
}

func unbindCommand() *cobra.Command {
	var force bool
	return spec{
		use: "instance-network-interface-floating-ip-remove INSTANCE NIC FLOATING_IP", short: "Unbind a floating IP from a network interface",
		more: "It stays reserved. Asks first; without a terminal to ask on it needs -f.", args: cobra.ExactArgs(3),
		example: "tabard is instance-network-interface-floating-ip-remove my-instance primary-nic my-fip1 -f",
		flags:   func(f *pflag.FlagSet) { forceFlag(f, &force) },
		run: func(s *session, args []string) error {
			if err := s.confirm(force, "unbind floating IP %s from %s of instance %s", args[2], args[1], args[0]); err != nil {
				return err
			}
			k, nic, err := findInterface(s, args[0], args[1])
			if err != nil {
				return err
			}
			fip, err := floatingIPs.find(s, args[2])
			if err != nil {
				return err
			}
			return s.remove(floatingIPs.noun, args[2:], []string{fip}, "remove", func(id string) request {
				return request{method: http.MethodDelete, path: k.at(nic, "floating_ips", id), query: k.one()}
			})
		},
	}.command()
}
