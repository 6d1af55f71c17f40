package libvirt

import (
	"fmt"
	"reflect"
	"strings"
	"testing"

	"tabard.dev/tabard/internal/host/link"
)

const running = `<domain type='kvm' id='7'>
  <name>Web-01</name>
  <uuid>5A3F7F0E-6a36-4d7e-9f54-3c1d0a6f0001</uuid>
  <title>The shop's front</title>
  <metadata>
    <other:thing xmlns:other="https://example.com/"><other:tag key="env" value="theirs"/></other:thing>
    <tabard:instance xmlns:tabard="https://tabard.dev/xmlns/libvirt/1">
      <tabard:tag key="env" value="prod"/>
      <tabard:tag key="team" value="shop"/>
      <tabard:tag key="env" value="test"/>
    </tabard:instance>
  </metadata>
  <devices>
    <interface type='network'>
      <mac address='52:54:00:AA:00:05'/>
      <source network='default' portid='1' bridge='virbr0'/>
      <target dev='vnet3'/>
    </interface>
    <interface type='direct'><mac address='52:54:00:aa:00:06'/><source dev='eth0' mode='bridge'/><target dev='macvtap0'/></interface>
    <interface type='user'><mac address='52:54:00:aa:00:07'/></interface>
    <interface type='bridge'><mac address='52:54:00:aa:00:08'/><source bridge='br0'/><target dev='vnet4'/></interface>
  </devices>
</domain>`

func TestADomainIsFoundByItsCardsThatHaveATap(t *testing.T) {
	got, err := parse(running)
	if err != nil {
		t.Fatal(err)
	}
	tags := map[string]string{"env": "prod", "team": "shop", "title": "The shop's front"}
	const uuid = "5a3f7f0e-6a36-4d7e-9f54-3c1d0a6f0001"
	want := []link.Machine{
		{Name: "Web-01", Device: "vnet3", Domain: uuid, MAC: "52:54:00:aa:00:05", Bridge: "virbr0", Tags: tags},
		{Name: "Web-01", Device: "vnet4", Domain: uuid, MAC: "52:54:00:aa:00:08", Bridge: "br0", Tags: tags},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v", got)
	}
}

func TestWhatADomainSaysOfItselfIsBounded(t *testing.T) {
	with := func(tags string) string {
		return `<domain><name>a</name><uuid>b</uuid><metadata><instance xmlns="https://tabard.dev/xmlns/libvirt/1">` + tags +
			`</instance></metadata><devices><interface type="bridge"><mac address="52:54:00:00:00:01"/><target dev="vnet0"/></interface></devices></domain>`
	}
	var many strings.Builder
	for n := range 1000 {
		fmt.Fprintf(&many, `<tag key="k%d" value="v"/>`, n)
	}
	for name, each := range map[string]struct {
		xml  string
		tags int
	}{
		"many tags":    {with(many.String()), maxTags},
		"a long value": {with(`<tag key="a" value="` + strings.Repeat("x", maxValue+1) + `"/><tag key="b" value="c"/>`), 1},
		"a long key":   {with(`<tag key="` + strings.Repeat("x", maxKey+1) + `" value="v"/>`), 0},
	} {
		got, err := parse(each.xml)
		if err != nil || len(got) != 1 || len(got[0].Tags) != each.tags {
			t.Errorf("%s: %v %+v", name, err, got)
		}
	}
	for name, description := range map[string]string{
		"too long": with(strings.Repeat(" ", maxXML)),
		"too deep": with(strings.Repeat("<a>", maxDepth) + strings.Repeat("</a>", maxDepth)),
		"no name":  strings.Replace(running, "<name>Web-01</name>", "", 1),
		"no XML":   "domain",
	} {
		if got, err := parse(description); err == nil {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(running)
	f.Add(`<domain><name>a</name><uuid>b</uuid><devices><interface type="bridge"><mac address="52:54:00:00:00:01"/><target dev="vnet0"/></interface></devices></domain>`)
	f.Fuzz(func(t *testing.T, description string) {
		machines, err := parse(description)
		if err != nil && machines != nil {
			t.Error("an error comes with machines")
		}
		for _, m := range machines {
			if m.Name == "" || m.Domain == "" || len(m.Device) == 0 || len(m.Device) > 15 || len(m.MAC) != 17 || len(m.Tags) > maxTags {
				t.Errorf("%+v", m)
			}
			for k, v := range m.Tags {
				if k == "" || v == "" || len(k) > maxKey || len(v) > maxValue {
					t.Errorf("the tag %q is %q", k, v)
				}
			}
		}
	})
}
