package cli

import (
	"net/http"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

var securityGroups = &kind{
	noun: "security group", plural: "security groups", listed: "is security-groups", path: "/v1/security_groups", array: "security_groups", id: "id", form: regional, vpc: true,
	columns: []column{
		{"ID", "id", nil}, {"Name", "name", nil}, {"Rules", "", countOf("rules")}, {"Targets", "", countOf("targets")},
		{"VPC", "vpc.name", nil}, {"Resource group", "resource_group.name", nil},
	},
	details: []column{
		{"ID", "id", nil}, {"Name", "name", nil}, {"CRN", "crn", nil}, {"Rules", "", countOf("rules")}, {"Targets", "targets.name", nil},
		{"VPC", "vpc.name", nil}, {"Resource group", "resource_group.name", nil}, {"Created", "created_at", nil},
	},
}

// countOf shows how many objects are in an array.
func countOf(array string) func(object) string {
	return func(o object) string { return strconv.Itoa(len(o.objects(array))) }
}

// securityRules are the rules of a security group; their path is inside it.
var securityRules = &kind{
	noun: "rule", plural: "rules", listed: "is security-group-rules GROUP", array: "rules", id: "id", form: regional, vpc: true,
	columns: ruleColumns, details: ruleColumns,
}

var ruleColumns = []column{
	{"ID", "id", nil}, {"Name", "name", nil}, {"Direction", "direction", nil}, {"Protocol", "protocol", nil}, {"Ports or type", "", rulePorts},
	{"Remote", "remote.name|remote.address|remote.cidr_block|remote.id", nil},
}

// rulePorts shows which ports, or which ICMP type and code, a rule lets through.
func rulePorts(o object) string {
	first, last, kind, code := o.text("port_min"), o.text("port_max"), o.text("type"), o.text("code")
	switch {
	case first != "" && first != last:
		return first + "-" + last
	case first != "":
		return first
	case code != "":
		return kind + "/" + code
	}
	return kind
}

// securityTargets are the members of a security group; their path is inside it.
var securityTargets = &kind{
	noun: "target", plural: "targets", listed: "is security-group-targets GROUP", array: "targets", id: "id", form: zonal, vpc: true,
	columns: columns("ID", "id", "Name", "name", "Type", "resource_type", "Reserved IP", "primary_ip.address"),
	details: columns("ID", "id", "Name", "name", "Type", "resource_type", "Reserved IP", "primary_ip.address"),
}

// inGroupOf returns a kind as it is in a security group.
func inGroupOf(s *session, k *kind, group, part string) (*kind, error) {
	id, err := securityGroups.find(s, group)
	if err != nil {
		return nil, err
	}
	inside := *k
	inside.path = securityGroups.at(id, part)
	return &inside, nil
}

// rulePlace is where the rules of a security group are.
var rulePlace = place{
	kind: securityRules, family: "is", word: "security-group-rule", args: "GROUP RULE", sample: "my-group my-rule", nth: 1, outer: securityGroups,
	within: func(s *session, args []string) (*kind, []string, error) {
		k, err := inGroupOf(s, securityRules, args[0], "rules")
		return k, nil, err
	},
}

func securityGroupCommands() []*cobra.Command {
	groupPlace := place{kind: securityGroups, family: "is", word: "security-group", args: "GROUP", sample: "my-group"}
	return []*cobra.Command{
		listCommand(securityGroups, "security-groups", "tabard is security-groups --vpc my-vpc", append([]filter{
			{"vpc", "", "vpc.id", "only in this VPC: name or ID", vpcs},
		}, inGroup...)...),
		getCommand(securityGroups, "security-group GROUP", "tabard is security-group my-group"),
		securityGroupCreateCommand(),
		groupPlace.update(change{method: http.MethodPatch, options: newName, example: "--name my-other-group"}),
		deleteCommand(securityGroups, "security-group-delete GROUP...", "delete", "tabard is security-group-delete my-group -f", nil, nil),

		groupListCommand(securityRules, "security-group-rules GROUP", "rules", "List the rules of a security group",
			"What no rule of any group of an interface lets through is dropped."),
		rulePlace.get(),
		ruleAddCommand(),
		rulePlace.update(change{
			method: http.MethodPatch, options: ruleOptions("new name"), example: "--port-min 443 --port-max 443", finish: finishRule,
			more: "The protocol cannot be changed.",
		}),
		rulePlace.delete("It takes effect at once."),

		groupListCommand(securityTargets, "security-group-targets GROUP", "targets", "List the network interfaces in a security group",
			"An interface made with network attachments is shown as its virtual network interface."),
		memberCommand("add", http.MethodPut, "An interface can be in several groups; each lets more through."),
		memberCommand("remove", http.MethodDelete, "An interface cannot leave its last group."),
	}
}

// newName is the flag of commands that only rename.
var newName = text(field{"name", "", "name", "new name"})

func securityGroupCreateCommand() *cobra.Command {
	var g groupFlags
	return spec{
		use: "security-group-create GROUP_NAME VPC", short: "Create a security group of a VPC", args: cobra.ExactArgs(2),
		more:    "It has no rules: nothing passes until some are added. Interfaces are put into it when their instance is created,\nor with security-group-target-add.",
		example: "tabard is security-group-create my-group my-vpc",
		flags:   func(f *pflag.FlagSet) { g.add(f); idFlag(f) },
		run: func(s *session, args []string) error {
			s.announce("Creating security group %s", args[0])
			vpc, err := vpcs.find(s, args[1])
			if err != nil {
				return err
			}
			body := map[string]any{"name": args[0], "vpc": byID(vpc)}
			if err := g.set(s, body); err != nil {
				return err
			}
			return securityGroups.create(s, args[0], body)
		},
	}.command()
}

// groupListCommand lists a part of a security group.
func groupListCommand(k *kind, use, part, short, more string) *cobra.Command {
	name, _, _ := strings.Cut(use, " ")
	return spec{use: use, short: short, more: more, example: "tabard is " + name + " my-group", args: cobra.ExactArgs(1)}.
		listing(k.plural, k.id, k.columns, func(s *session, args []string) ([]object, error) {
			inside, err := inGroupOf(s, k, args[0], part)
			if err != nil {
				return nil, err
			}
			return inside.list(s)
		})
}

// number returns an option that is a whole number; null takes it away.
func number(flag, name, usage string) option {
	return option{field: field{flag, "", name, usage}, as: func(_ *session, text string) (any, error) {
		if text == "null" {
			return nil, nil
		}
		n, err := strconv.Atoi(text)
		if err != nil {
			return nil, Usage("--%s must be a number", flag)
		}
		return n, nil
	}}
}

// ruleOptions are the flags of a rule that can be given when it is made and
// later.
func ruleOptions(nameUsage string) options {
	return append(text(field{"name", "", "name", nameUsage}, field{"remote", "", "remote", "other end: address, range in CIDR form, or security group by name or ID"}),
		number("port-min", "port_min", "first destination port, of tcp and udp"), number("port-max", "port_max", "last destination port, of tcp and udp"),
		number("icmp-type", "type", "ICMP type"), number("icmp-code", "code", "ICMP code"))
}

// finishRule turns the text of --remote into what the API wants.
func finishRule(s *session, _ object, body map[string]any) error {
	remote, ok := body["remote"].(string)
	if !ok {
		return nil
	}
	address := strings.IndexFunc(remote, func(r rune) bool { return !strings.ContainsRune("0123456789./", r) }) < 0
	switch {
	case address && strings.Contains(remote, "/"):
		body["remote"] = map[string]string{"cidr_block": remote}
	case address:
		body["remote"] = map[string]string{"address": remote}
	default:
		id, err := securityGroups.find(s, remote)
		if err != nil {
			return err
		}
		body["remote"] = byID(id)
	}
	return nil
}

func ruleAddCommand() *cobra.Command {
	var given reader
	return spec{
		use: "security-group-rule-add GROUP DIRECTION PROTOCOL", short: "Add a rule to a security group", args: cobra.ExactArgs(3),
		more: "DIRECTION is inbound or outbound; PROTOCOL is any, icmp_tcp_udp, icmp, tcp or udp. Without --remote the rule is about\n" +
			"everybody, without ports about all ports. One of --port-min and --port-max stands for both.",
		example: "tabard is security-group-rule-add my-group inbound tcp --port-min 22 --port-max 22 --remote 192.0.2.0/24",
		flags:   func(f *pflag.FlagSet) { given = ruleOptions("name of the rule").add(f); idFlag(f) },
		run: func(s *session, args []string) error {
			s.announce("Creating rule for security group %s", args[0])
			body, err := given(s)
			if err != nil {
				return err
			}
			body["direction"], body["protocol"] = strings.ToLower(args[1]), strings.ToLower(args[2])
			for _, ports := range [][2]string{{"port_min", "port_max"}, {"port_max", "port_min"}} {
				if has(body, ports[0]) && !has(body, ports[1]) {
					body[ports[1]] = body[ports[0]]
				}
			}
			if err := finishRule(s, object{}, body); err != nil {
				return err
			}
			k, err := inGroupOf(s, securityRules, args[0], "rules")
			if err != nil {
				return err
			}
			o, err := s.send(request{method: http.MethodPost, path: k.path, query: k.one(), body: body})
			if err != nil {
				return err
			}
			return s.made(k, o, "A rule was added to the security group %s.", args[0])
		},
	}.command()
}

// memberCommand puts an interface into a security group or takes it out.
func memberCommand(verb, method, more string) *cobra.Command {
	var force bool
	var instance string
	preposition := map[string]string{"add": "to", "remove": "from"}[verb]
	return spec{
		use: "security-group-target-" + verb + " GROUP TARGET", short: capital(verb) + " a network interface " + preposition + " a security group", args: cobra.ExactArgs(2),
		more:    more + " TARGET is the ID of a network interface or virtual network interface;\nwith --in it is the name or ID of an interface of that instance.",
		example: "tabard is security-group-target-" + verb + " my-group primary-nic --in my-instance",
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&instance, "in", "", "instance of the network interface: name or ID")
			forceFlag(f, &force)
		},
		run: func(s *session, args []string) error {
			if verb == "remove" {
				if err := s.confirm(force, "remove %s from security group %s", args[1], args[0]); err != nil {
					return err
				}
			}
			s.announce("Updating security group %s", args[0])
			k, err := inGroupOf(s, securityTargets, args[0], "targets")
			if err != nil {
				return err
			}
			target := args[1]
			switch id, ok := securityTargets.asID(target); {
			case instance != "":
				if _, target, err = findInterface(s, instance, target); err != nil {
					return err
				}
			case ok:
				target = id
			case verb == "remove":
				if target, err = k.find(s, target); err != nil {
					return err
				}
			default:
				return Usage("a network interface by name needs --in, the instance")
			}
			o, err := s.send(request{method: method, path: k.at(target), query: k.one()})
			if err != nil {
				return err
			}
			if verb == "remove" {
				s.ok("%s was removed from the security group %s.", args[1], args[0])
				return nil
			}
			return s.made(k, o, "%s is in the security group %s.", args[1], args[0])
		},
	}.command()
}
