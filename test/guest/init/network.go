//go:build linux

package main

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"go.yaml.in/yaml/v2"
)

// network is a network-config document, version 2.
type network struct {
	Version   int                 `yaml:"version"`
	Ethernets map[string]ethernet `yaml:"ethernets"`
	Others    map[string]any      `yaml:",inline"`
}

type ethernet struct {
	Match struct {
		MAC    string         `yaml:"macaddress"`
		Name   string         `yaml:"name"`
		Others map[string]any `yaml:",inline"`
	} `yaml:"match"`
	SetName     string   `yaml:"set-name"`
	Addresses   []string `yaml:"addresses"`
	Gateway     string   `yaml:"gateway4"`
	Routes      []route  `yaml:"routes"`
	MTU         int      `yaml:"mtu"`
	Nameservers struct {
		Addresses []string `yaml:"addresses"`
		Search    []string `yaml:"search"`
	} `yaml:"nameservers"`
	Others map[string]any `yaml:",inline"`
}

type route struct {
	To     string         `yaml:"to"`
	Via    string         `yaml:"via"`
	OnLink bool           `yaml:"on-link"`
	Scope  string         `yaml:"scope"`
	Metric int            `yaml:"metric"`
	Others map[string]any `yaml:",inline"`
}

// card is a network card that the kernel found.
type card struct {
	Name string
	MAC  string
}

func parseNetwork(b []byte) (network, error) {
	var wrapped struct {
		Network *network       `yaml:"network"`
		Others  map[string]any `yaml:",inline"`
	}
	if err := yaml.Unmarshal(b, &wrapped); err != nil {
		return network{}, err
	}
	var n network
	if wrapped.Network != nil {
		n = *wrapped.Network
	} else if err := yaml.Unmarshal(b, &n); err != nil {
		return network{}, err
	}
	if n.Version != 2 {
		return network{}, fmt.Errorf("version %d is not understood, only 2", n.Version)
	}
	return n, nil
}

// ignored names the settings that plan does not follow.
func (n network) ignored() []string {
	var names []string
	add := func(others map[string]any) {
		for name := range others {
			names = append(names, "network "+name)
		}
	}
	add(n.Others)
	for _, e := range n.Ethernets {
		add(e.Others)
		add(e.Match.Others)
		for _, r := range e.Routes {
			add(r.Others)
		}
	}
	slices.Sort(names)
	return names
}

// plan is the list of arguments to ip(8) that set the cards up, and the text of
// resolv.conf. A document that no card matches is an error: the guest would be
// out of reach without a word.
func (n network) plan(cards []card) (commands [][]string, resolv string, err error) {
	do := func(line string) { commands = append(commands, strings.Fields(line)) }
	do("link set dev lo up")
	var ids []string
	for id := range n.Ethernets {
		ids = append(ids, id)
	}
	slices.Sort(ids)

	names := make(map[string]string) // by id
	var renames []string
	for _, id := range ids {
		e := n.Ethernets[id]
		i := slices.IndexFunc(cards, func(c card) bool {
			switch {
			case e.Match.MAC != "":
				return strings.EqualFold(c.MAC, e.Match.MAC)
			case e.Match.Name != "":
				return c.Name == e.Match.Name
			default:
				return c.Name == id
			}
		})
		if i < 0 {
			return nil, "", fmt.Errorf("no network card matches %s (%+v)", id, e.Match)
		}
		names[id] = cards[i].Name
		if e.SetName != "" && e.SetName != cards[i].Name {
			// Two cards may trade their names.
			do("link set dev " + cards[i].Name + " name was-" + cards[i].Name)
			renames = append(renames, "link set dev was-"+cards[i].Name+" name "+e.SetName)
			names[id] = e.SetName
		}
	}
	for _, r := range renames {
		do(r)
	}

	var servers, search []string
	for _, id := range ids {
		e, dev := n.Ethernets[id], names[id]
		if e.MTU > 0 {
			do(fmt.Sprintf("link set dev %s mtu %d", dev, e.MTU))
		}
		do("link set dev " + dev + " up")
		for _, a := range e.Addresses {
			if _, err := netip.ParsePrefix(a); err != nil {
				return nil, "", err
			}
			do("addr add " + a + " dev " + dev)
		}
		if e.Gateway != "" {
			e.Routes = append(e.Routes, route{To: "default", Via: e.Gateway})
		}
		// Without a gateway first: another route may need it to reach its own.
		slices.SortStableFunc(e.Routes, func(a, b route) int {
			return strings.Compare(a.Via[:min(len(a.Via), 1)], b.Via[:min(len(b.Via), 1)])
		})
		for _, r := range e.Routes {
			line, err := r.line(dev)
			if err != nil {
				return nil, "", err
			}
			do(line)
		}
		servers = append(servers, e.Nameservers.Addresses...)
		search = append(search, e.Nameservers.Search...)
	}
	if len(search) > 0 {
		resolv = "search " + strings.Join(search, " ") + "\n"
	}
	for _, s := range slices.Compact(servers) {
		resolv += "nameserver " + s + "\n"
	}
	return commands, resolv, nil
}

func (r route) line(dev string) (string, error) {
	to := r.To
	switch to {
	case "":
		return "", errors.New("a route goes nowhere: it has no to")
	case "0.0.0.0/0", "0/0":
		to = "default"
	}
	line := "route add " + to
	if r.Via != "" {
		line += " via " + r.Via
	}
	line += " dev " + dev
	if r.OnLink {
		line += " onlink"
	}
	if r.Scope != "" {
		line += " scope " + r.Scope
	}
	if r.Metric > 0 {
		line += fmt.Sprintf(" metric %d", r.Metric)
	}
	return line, nil
}
