package libvirt

import (
	"encoding/xml"
	"errors"
	"fmt"
	"net"
	"strings"

	"tabard.dev/tabard/internal/host/link"
)

// Bounds on what a domain may say of itself. What is beyond is left out whole:
// half a tag would be another tag.
const (
	maxXML   = 1 << 20 // bytes
	maxTags  = 64
	maxKey   = 64  // bytes
	maxValue = 256 // bytes
	maxCards = 32
	maxDepth = 64
)

// domain is as much of libvirt's domain XML as is read
// (https://libvirt.org/formatdomain.html).
type domain struct {
	XMLName     xml.Name `xml:"domain"`
	Name        string   `xml:"name"`
	UUID        string   `xml:"uuid"`
	Title       string   `xml:"title"`
	Description string   `xml:"description"`
	Metadata    struct {
		Instances []struct {
			Tags []struct {
				Key   string `xml:"key,attr"`
				Value string `xml:"value,attr"`
			} `xml:"https://tabard.dev/xmlns/libvirt/1 tag"`
		} `xml:"https://tabard.dev/xmlns/libvirt/1 instance"`
	} `xml:"metadata"`
	Cards []struct {
		Type string `xml:"type,attr"`
		MAC  struct {
			Address string `xml:"address,attr"`
		} `xml:"mac"`
		Source struct {
			Bridge string `xml:"bridge,attr"`
		} `xml:"source"`
		Target struct {
			Device string `xml:"dev,attr"`
		} `xml:"target"`
	} `xml:"devices>interface"`
}

// parse returns a domain's network cards whose frames the host can see: those
// with a tap, most often on a bridge.
func parse(description string) ([]link.Machine, error) {
	if len(description) > maxXML {
		return nil, fmt.Errorf("it is longer than %d bytes", maxXML)
	}
	if err := shallow(description); err != nil {
		return nil, err
	}
	var d domain
	if err := xml.Unmarshal([]byte(description), &d); err != nil {
		return nil, err
	}
	if d.Name == "" || d.UUID == "" || len(d.Name) > maxValue || len(d.UUID) > maxKey {
		return nil, errors.New("it has no name or no UUID")
	}
	var out []link.Machine
	for _, c := range d.Cards[:min(len(d.Cards), maxCards)] {
		mac, err := net.ParseMAC(c.MAC.Address)
		if err != nil || len(mac) != 6 {
			continue
		}
		switch c.Type {
		case "network", "bridge", "ethernet":
		default:
			continue
		}
		if c.Target.Device == "" || len(c.Target.Device) > 15 || len(c.Source.Bridge) > 15 {
			continue
		}
		out = append(out, link.Machine{
			Name: d.Name, Device: c.Target.Device, Domain: strings.ToLower(d.UUID), MAC: mac.String(), Bridge: c.Source.Bridge, Tags: d.tags(),
		})
	}
	return out, nil
}

// tags are the domain's, nil when it has none.
func (d *domain) tags() map[string]string {
	tags := map[string]string{}
	put := func(key, value string) {
		if _, taken := tags[key]; taken || key == "" || value == "" || len(key) > maxKey || len(value) > maxValue || len(tags) >= maxTags {
			return
		}
		tags[key] = value
	}
	for _, i := range d.Metadata.Instances {
		for _, t := range i.Tags {
			put(t.Key, t.Value)
		}
	}
	put("title", strings.TrimSpace(d.Title))
	put("description", strings.TrimSpace(d.Description))
	if len(tags) == 0 {
		return nil
	}
	return tags
}

// shallow refuses descriptions that are nested deeper than any domain's.
func shallow(description string) error {
	r := xml.NewDecoder(strings.NewReader(description))
	depth := 0
	for {
		t, err := r.RawToken()
		if err != nil {
			return nil // the end, or what the second reading complains of
		}
		switch t.(type) {
		case xml.StartElement:
			if depth++; depth > maxDepth {
				return fmt.Errorf("it is nested more than %d deep", maxDepth)
			}
		case xml.EndElement:
			depth--
		}
	}
}
