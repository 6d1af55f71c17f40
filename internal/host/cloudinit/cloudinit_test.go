package cloudinit

import (
	"bytes"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/google/go-cmp/cmp"
)

const certificate = `-----BEGIN CERTIFICATE-----
MIIBejCCAR+gAwIBAgIQBpn4dNzLzL1mIjF1a2cnYjAKBggqhkjOPQQDAjAAMB4X
-----END CERTIFICATE-----
`

func seed() Seed {
	gateway := netip.MustParseAddr("10.240.0.1")
	return Seed{
		InstanceID: "0737_5c1f9b3e-0000-4000-8000-000000000001",
		Hostname:   "web-1",
		Keys:       []string{"ssh-ed25519 AAAAC3Nza me@laptop\n"},
		UserData:   "#!/bin/sh\necho hello\n",
		CACert:     []byte(certificate),
		Interfaces: []Interface{
			{MAC: "02:00:07:00:00:01", Address: netip.MustParsePrefix("10.240.0.4/24"), Gateway: gateway, Nameservers: []netip.Addr{gateway}},
			{MAC: "02:00:07:00:00:02", Address: netip.MustParsePrefix("10.240.1.4/24")},
		},
		Services: []netip.Addr{netip.MustParseAddr("169.254.169.254")},
	}
}

func documents(t *testing.T, s Seed) map[string]string {
	t.Helper()
	list, err := s.Documents()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, d := range list {
		out[d.Name] = string(d.Content)
	}
	return out
}

func read(t *testing.T, text string) map[string]any {
	t.Helper()
	out := map[string]any{}
	if err := yaml.Unmarshal([]byte(text), &out); err != nil {
		t.Fatalf("%v in:\n%s", err, text)
	}
	return out
}

func TestAMachineIsToldItsNameAndKeys(t *testing.T) {
	d := documents(t, seed())
	want := map[string]any{
		"instance-id":    "0737_5c1f9b3e-0000-4000-8000-000000000001",
		"local-hostname": "web-1",
		"public-keys":    []any{"ssh-ed25519 AAAAC3Nza me@laptop"},
	}
	if diff := cmp.Diff(want, read(t, d["meta-data"])); diff != "" {
		t.Error(diff)
	}
	vendor := read(t, d["vendor-data"])
	if !strings.HasPrefix(d["vendor-data"], "#cloud-config\n") || vendor["hostname"] != "web-1" {
		t.Errorf("vendor data:\n%s", d["vendor-data"])
	}
	if diff := cmp.Diff(map[string]any{"trusted": []any{certificate}}, vendor["ca_certs"]); diff != "" {
		t.Error(diff)
	}
}

func TestUserDataIsPassedOnAsItIs(t *testing.T) {
	for _, text := range []string{"#!/bin/sh\nexit 3", "#cloud-config\nhostname: 'x'\n", "\x00\xffnot text", "Content-Type: multipart/mixed\r\n\r\n"} {
		s := seed()
		s.UserData = text
		if got := documents(t, s)["user-data"]; got != text {
			t.Errorf("%q became %q", text, got)
		}
	}
	s := seed()
	s.UserData = ""
	if got := documents(t, s)["user-data"]; !strings.HasPrefix(got, "#cloud-config\n") {
		t.Errorf("without user data the document is %q", got)
	}
}

func TestTheFirstInterfaceHasTheRoutes(t *testing.T) {
	got := read(t, documents(t, seed())["network-config"])
	want := read(t, `
version: 2
ethernets:
  eth0:
    match: {macaddress: "02:00:07:00:00:01"}
    set-name: eth0
    addresses: [10.240.0.4/24]
    dhcp4: false
    dhcp6: false
    accept-ra: false
    routes:
      - {to: 0.0.0.0/0, via: 10.240.0.1, on-link: true}
      - {to: 169.254.169.254/32, via: 10.240.0.1, on-link: true}
    nameservers: {addresses: [10.240.0.1]}
  eth1:
    match: {macaddress: "02:00:07:00:00:02"}
    set-name: eth1
    addresses: [10.240.1.4/24]
    dhcp4: false
    dhcp6: false
    accept-ra: false
`)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestWhatIsGivenCannotBecomeOtherYAML(t *testing.T) {
	s := seed()
	s.Hostname = "x\nruncmd: [reboot]"
	s.Keys = []string{`ssh-ed25519 AAAA ": {evil: [1` + "\t# &x *y !!z"}
	d := documents(t, s)
	if got := read(t, d["vendor-data"]); got["runcmd"] != nil || got["hostname"] != s.Hostname {
		t.Errorf("read as %v", got)
	}
	if diff := cmp.Diff([]any{s.Keys[0]}, read(t, d["meta-data"])["public-keys"]); diff != "" {
		t.Error(diff)
	}
}

func TestASeedThatMakesNoSenseIsRefused(t *testing.T) {
	for name, spoil := range map[string]func(*Seed){
		"no id":              func(s *Seed) { s.InstanceID = "" },
		"no name":            func(s *Seed) { s.Hostname = "" },
		"a key of two lines": func(s *Seed) { s.Keys = []string{"ssh-rsa A\nssh-rsa B"} },
		"no MAC":             func(s *Seed) { s.Interfaces[0].MAC = "x" },
		"no address":         func(s *Seed) { s.Interfaces[1].Address = netip.Prefix{} },
		"no gateway":         func(s *Seed) { s.Interfaces[0].Gateway = netip.Addr{} },
		"too much user data": func(s *Seed) { s.UserData = strings.Repeat("x", maxUserData+1) },
	} {
		s := seed()
		spoil(&s)
		if _, err := s.WriteTo(&bytes.Buffer{}); err == nil {
			t.Errorf("%s: written", name)
		}
	}
}

// written returns the path of the seed as a disk.
func written(t *testing.T, s Seed) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "seed.iso")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.WriteTo(f); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLinuxReadsTheDisk(t *testing.T) {
	if runtime.GOOS != "linux" || os.Geteuid() != 0 {
		t.Skip("mounting needs Linux and root")
	}
	s := seed()
	s.UserData = strings.Repeat("0123456789abcde\n", 1000) // several sectors
	path := written(t, s)
	for name, options := range map[string]string{"Rock Ridge": "loop,ro", "Joliet": "loop,ro,norock"} {
		t.Run(name, func(t *testing.T) {
			at := t.TempDir()
			if out, err := exec.Command("mount", "-t", "iso9660", "-o", options, path, at).CombinedOutput(); err != nil {
				t.Skipf("this machine mounts no disk images: %v: %s", err, out)
			}
			defer exec.Command("umount", at).Run()
			got := map[string]string{}
			entries, err := os.ReadDir(at)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range entries {
				b, err := os.ReadFile(filepath.Join(at, e.Name()))
				if err != nil {
					t.Fatal(err)
				}
				got[e.Name()] = string(b)
			}
			if diff := cmp.Diff(documents(t, s), got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestTheDiskHasTheLabelThatIsLookedFor(t *testing.T) {
	blkid, err := exec.LookPath("blkid")
	if err != nil {
		t.Skip("blkid is not installed (util-linux)")
	}
	out, err := exec.Command(blkid, "-p", "-o", "export", written(t, seed())).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if !strings.Contains(strings.ToLower(string(out)), "label=cidata\n") || !strings.Contains(string(out), "TYPE=iso9660") {
		t.Errorf("blkid sees:\n%s", out)
	}
}

func TestAnotherImplementationReadsTheDisk(t *testing.T) {
	isoinfo, err := exec.LookPath("isoinfo")
	if err != nil {
		t.Skip("isoinfo is not installed (genisoimage)")
	}
	path := written(t, seed())
	for _, extension := range []string{"-R", "-J"} {
		for name, content := range documents(t, seed()) {
			out, err := exec.Command(isoinfo, extension, "-i", path, "-x", "/"+name).Output()
			if err != nil || string(out) != content {
				t.Errorf("%s %s: %v, %q", extension, name, err, out)
			}
		}
	}
}

func TestCloudInitUnderstandsTheDocuments(t *testing.T) {
	tool, err := exec.LookPath("cloud-init")
	if err != nil {
		t.Skip("cloud-init is not installed")
	}
	d := documents(t, seed())
	dir := t.TempDir()
	for name, text := range d {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command(tool, "schema", "--config-file", filepath.Join(dir, "vendor-data")).CombinedOutput(); err != nil {
		t.Errorf("schema: %v: %s", err, out)
	}
	for _, kind := range []string{"netplan", "eni", "networkd"} {
		cmd := exec.Command(tool, "devel", "net-convert", "--network-data", filepath.Join(dir, "network-config"),
			"--kind", "yaml", "--directory", filepath.Join(dir, kind), "--distro", "debian", "--output-kind", kind,
			"--mac", "eth0,02:00:07:00:00:01", "--mac", "eth1,02:00:07:00:00:02")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", kind, err, out)
		}
	}
}
