// Package cloudinit writes what a virtual machine reads when it first boots:
// its name, keys, addresses and user data, in the form of cloud-init's NoCloud
// data source (cloud-init, reference/datasources/nocloud). It makes documents
// and the disk that holds them; it knows no machine and no hypervisor.
//
// What the owner of an instance gives as user data is passed on as it is. What
// the host wants is vendor data, which user data overrides.
package cloudinit

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
)

// Seed is what a machine is told.
type Seed struct {
	InstanceID string // first-boot steps run once for each value
	Hostname   string
	Keys       []string // lines of authorized_keys
	UserData   string   // of any form that cloud-init reads; "" is none
	CACert     []byte   // certificates in PEM that the machine shall trust; nil is none
	Interfaces []Interface

	// Services are addresses that the first interface's gateway answers for
	// itself, such as that of the metadata service: they have a route of their
	// own, which stays when the machine's owner changes the default one.
	Services []netip.Addr
}

// Interface is the static configuration of a network card.
type Interface struct {
	MAC         string
	Address     netip.Prefix // the machine's address with the subnet's length
	Gateway     netip.Addr   // of the default route; invalid means none
	Nameservers []netip.Addr
}

// maxUserData bounds user data, in bytes. It is far above what the API takes;
// it keeps the seed small whatever the API becomes.
const maxUserData = 1 << 20

// Document is one file of the seed.
type Document struct {
	Name    string
	Content []byte
}

// Documents returns the seed's files.
func (s Seed) Documents() ([]Document, error) {
	if s.InstanceID == "" || s.Hostname == "" {
		return nil, errors.New("the seed has no instance id or no host name")
	}
	if len(s.UserData) > maxUserData {
		return nil, fmt.Errorf("the user data of %d bytes is larger than %d", len(s.UserData), maxUserData)
	}
	keys, err := s.keys()
	if err != nil {
		return nil, err
	}
	network, err := s.network()
	if err != nil {
		return nil, err
	}
	meta := map[string]any{
		"instance-id":    s.InstanceID,
		"local-hostname": s.Hostname,
	}
	vendor := map[string]any{
		"hostname":     s.Hostname,
		"ssh_pwauth":   false,
		"disable_root": false, // images of VPCs are entered as root
	}
	if len(keys) > 0 {
		meta["public-keys"] = keys
		vendor["ssh_authorized_keys"] = keys
	}
	if len(s.CACert) > 0 {
		vendor["ca_certs"] = map[string]any{"trusted": []string{string(s.CACert)}}
	}
	user := []byte(s.UserData)
	if len(user) == 0 {
		user = []byte(header + "{}\n")
	}
	out := []Document{{Name: "user-data", Content: user}}
	for _, d := range []struct {
		name, header string
		content      map[string]any
	}{
		{"meta-data", "", meta},
		{"network-config", "", network},
		{"vendor-data", header, vendor},
	} {
		text, err := yaml.MarshalWithOptions(d.content, yaml.UseLiteralStyleIfMultiline(true))
		if err != nil {
			return nil, fmt.Errorf("writing %s: %w", d.name, err)
		}
		out = append(out, Document{d.name, append([]byte(d.header), text...)})
	}
	return out, nil
}

// header tells cloud-init what a document is.
const header = "#cloud-config\n"

func (s Seed) keys() ([]string, error) {
	var keys []string
	for _, k := range s.Keys {
		k = strings.TrimSpace(k)
		if strings.ContainsAny(k, "\r\n\x00") {
			return nil, errors.New("an SSH key has several lines")
		}
		if k != "" && !slices.Contains(keys, k) {
			keys = append(keys, k)
		}
	}
	return keys, nil
}

// network is the network configuration, version 2 (cloud-init,
// reference/network-config-format-v2).
func (s Seed) network() (map[string]any, error) {
	ethernets := map[string]any{}
	for n, nic := range s.Interfaces {
		mac, err := net.ParseMAC(nic.MAC)
		if err != nil {
			return nil, fmt.Errorf("interface %d: %w", n, err)
		}
		if !nic.Address.IsValid() {
			return nil, fmt.Errorf("interface %d has no address", n)
		}
		if n == 0 && len(s.Services) > 0 && !nic.Gateway.IsValid() {
			return nil, errors.New("the first interface has no gateway that answers for services")
		}
		name := fmt.Sprintf("eth%d", n)
		e := map[string]any{
			"match":     map[string]any{"macaddress": mac.String()},
			"set-name":  name,
			"addresses": []string{nic.Address.String()},
			"dhcp4":     false,
			"dhcp6":     false,
			"accept-ra": false,
		}
		var routes []map[string]any
		if nic.Gateway.IsValid() {
			everything := "0.0.0.0/0"
			if nic.Gateway.Is6() {
				everything = "::/0"
			}
			routes = append(routes, route(everything, nic.Gateway))
		}
		if n == 0 {
			for _, a := range s.Services {
				routes = append(routes, route(netip.PrefixFrom(a, a.BitLen()).String(), nic.Gateway))
			}
		}
		if len(routes) > 0 {
			e["routes"] = routes
		}
		if len(nic.Nameservers) > 0 {
			var addresses []string
			for _, a := range nic.Nameservers {
				addresses = append(addresses, a.String())
			}
			e["nameservers"] = map[string]any{"addresses": addresses}
		}
		ethernets[name] = e
	}
	return map[string]any{"version": 2, "ethernets": ethernets}, nil
}

// route always names a gateway: cloud-init writes no interfaces(5) file for a
// route without one (cloudinit/net/eni.py).
func route(to string, via netip.Addr) map[string]any {
	return map[string]any{"to": to, "via": via.String(), "on-link": true}
}

// WriteTo writes the seed as a disk: an ISO 9660 image with the label that
// cloud-init looks for.
func (s Seed) WriteTo(w io.Writer) (int64, error) {
	documents, err := s.Documents()
	if err != nil {
		return 0, err
	}
	image, err := iso("cidata", documents)
	if err != nil {
		return 0, err
	}
	return io.Copy(w, bytes.NewReader(image))
}
