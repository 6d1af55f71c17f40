package cli

import (
	"net/http"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// virtualInterfaces are the network interfaces of instances that were made with
// network attachments.
var virtualInterfaces = &kind{
	noun: "virtual network interface", plural: "virtual network interfaces", listed: "is virtual-network-interfaces", path: "/v1/virtual_network_interfaces",
	array: "virtual_network_interfaces", id: "id", form: zonal, vpc: true,
	columns: columns("ID", "id", "Name", "name", "Status", "lifecycle_state", "Reserved IP", "primary_ip.address", "Subnet", "subnet.name",
		"Security groups", "security_groups.name", "Target", "target.name", "VPC", "vpc.name", "Zone", "zone.name", "Resource group", "resource_group.name"),
	details: columns("ID", "id", "Name", "name", "CRN", "crn", "Status", "lifecycle_state", "MAC address", "mac_address", "Reserved IP", "primary_ip.address",
		"Subnet", "subnet.name", "Security groups", "security_groups.name", "Target", "target.name", "VPC", "vpc.name", "Zone", "zone.name",
		"Resource group", "resource_group.name", "Created", "created_at"),
}

// attachments are the network attachments of an instance; their path is inside
// it.
var attachments = &kind{
	noun: "network attachment", plural: "network attachments", listed: "is instance-network-attachments INSTANCE", array: "network_attachments", id: "id", form: zonal, vpc: true,
	columns: columns("ID", "id", "Name", "name", "Type", "type", "Reserved IP", "primary_ip.address", "Subnet", "subnet.name",
		"Virtual network interface", "virtual_network_interface.name", "Status", "lifecycle_state"),
	details: columns("ID", "id", "Name", "name", "Type", "type", "Reserved IP", "primary_ip.address", "Subnet", "subnet.name",
		"Virtual network interface", "virtual_network_interface.name", "Virtual network interface ID", "virtual_network_interface.id",
		"Status", "lifecycle_state", "Created", "created_at"),
}

var volumes = &kind{
	noun: "volume", plural: "volumes", listed: "is volumes", path: "/v1/volumes", array: "volumes", id: "id", form: regional, vpc: true, byName: nameFilter,
	columns: columns("ID", "id", "Name", "name", "Status", "status", "Capacity(GB)", "capacity", "IOPS", "iops", "Profile", "profile.name",
		"Attachment state", "attachment_state", "Instance", "volume_attachments.instance.name", "Zone", "zone.name", "Resource group", "resource_group.name"),
	details: columns("ID", "id", "Name", "name", "CRN", "crn", "Status", "status", "Capacity(GB)", "capacity", "IOPS", "iops", "Profile", "profile.name",
		"Source image", "source_image.name", "Instance", "volume_attachments.instance.name", "Zone", "zone.name", "Resource group", "resource_group.name", "Created", "created_at"),
}

// attachmentPlace is where the network attachments of an instance are.
var attachmentPlace = place{
	kind: attachments, family: "is", word: "instance-network-attachment", args: "INSTANCE ATTACHMENT", sample: "my-instance primary-nac", nth: 1, outer: instances,
	within: func(s *session, args []string) (*kind, []string, error) {
		id, err := instances.find(s, args[0])
		if err != nil {
			return nil, nil, err
		}
		k := *attachments
		k.path = instances.at(id, "network_attachments")
		return &k, nil, nil
	},
}

func attachedCommands() []*cobra.Command {
	volumePlace := place{kind: volumes, family: "is", word: "volume", args: "VOLUME", sample: "my-volume"}
	virtualPlace := place{kind: virtualInterfaces, family: "is", word: "virtual-network-interface", args: "VIRTUAL_NETWORK_INTERFACE", sample: "my-vni"}
	return []*cobra.Command{
		spec{
			use: "instance-network-attachments INSTANCE", short: "List the network attachments of an instance", args: cobra.ExactArgs(1),
			more: "Instances made with network interfaces have none.", example: "tabard is instance-network-attachments my-instance",
		}.listing(attachments.plural, attachments.id, attachments.columns, func(s *session, args []string) ([]object, error) {
			k, _, err := attachmentPlace.within(s, args)
			if err != nil {
				return nil, err
			}
			return k.list(s)
		}),
		attachmentPlace.get(),

		listCommand(virtualInterfaces, "virtual-network-interfaces", "tabard is virtual-network-interfaces", inGroup...),
		getCommand(virtualInterfaces, "virtual-network-interface VIRTUAL_NETWORK_INTERFACE", "tabard is virtual-network-interface my-vni"),
		virtualPlace.update(change{method: http.MethodPatch, options: newName, example: "--name my-other-vni"}),
		virtualBoundCommand(),
		virtualBindCommand("add", http.MethodPut, "Bind a floating IP to a virtual network interface", "Neither may be bound already, and both must be in the same zone."),
		virtualBindCommand("remove", http.MethodDelete, "Unbind a floating IP from a virtual network interface", "It stays reserved. Asks first; without a terminal to ask on it needs -f."),

		listCommand(volumes, "volumes", "tabard is volumes", filter{"zone", "", "zone.name", "only in this zone", nil}),
		getCommand(volumes, "volume VOLUME", "tabard is volume my-volume"),
		volumePlace.update(change{method: http.MethodPatch, options: newName, example: "--name my-other-volume"}),
	}
}

func virtualBoundCommand() *cobra.Command {
	return spec{
		use: "virtual-network-interface-floating-ips VIRTUAL_NETWORK_INTERFACE", short: "List the floating IPs bound to a virtual network interface",
		more: "There is at most one.", example: "tabard is virtual-network-interface-floating-ips my-vni", args: cobra.ExactArgs(1),
	}.listing(floatingIPs.plural, floatingIPs.id, columns("ID", "id", "Address", "address", "Name", "name"), func(s *session, args []string) ([]object, error) {
		id, err := virtualInterfaces.find(s, args[0])
		if err != nil {
			return nil, err
		}
		return s.client.list(s.ctx(), virtualInterfaces.at(id, "floating_ips"), virtualInterfaces.one(), "floating_ips", 0)
	})
}

// virtualBindCommand binds a floating IP to a virtual network interface or
// unbinds it.
func virtualBindCommand(verb, method, short, more string) *cobra.Command {
	var force bool
	return spec{
		use: "virtual-network-interface-floating-ip-" + verb + " VIRTUAL_NETWORK_INTERFACE FLOATING_IP", short: short, more: more, args: cobra.ExactArgs(2),
		example: "tabard is virtual-network-interface-floating-ip-" + verb + " my-vni my-fip1",
		flags: func(f *pflag.FlagSet) {
			if verb == "remove" {
				forceFlag(f, &force)
			}
		},
		run: func(s *session, args []string) error {
			if verb == "remove" {
				if err := s.confirm(force, "unbind floating IP %s from %s", args[1], args[0]); err != nil {
					return err
				}
			} else {
				s.announce("Creating floating IP %s for virtual network interface %s", args[1], args[0])
			}
			vni, err := virtualInterfaces.find(s, args[0])
			if err != nil {
				return err
			}
			fip, err := floatingIPs.find(s, args[1])
			if err != nil {
				return err
			}
			at := func(id string) request {
				return request{method: method, path: virtualInterfaces.at(vni, "floating_ips", id), query: virtualInterfaces.one()}
			}
			if verb == "remove" {
				return s.remove(floatingIPs.noun, args[1:], []string{fip}, verb, at)
			}
			o, err := s.send(at(fip))
			if err != nil {
				return err
			}
			s.ok("The floating IP %s is bound to %s.", args[1], args[0])
			return s.show(o, "id", columns("ID", "id", "Address", "address", "Name", "name", "CRN", "crn"))
		},
	}.command()
}
