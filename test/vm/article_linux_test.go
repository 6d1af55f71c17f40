package vm

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/test/guest"
)

// bootPatience is how long a guest may take to let us in. Under software
// emulation on two busy cores it takes most of a minute.
const bootPatience = 4 * time.Minute

// machine is an instance that a test has signed on to.
type machine struct {
	instance
	site   *site
	client guest.Client
}

// run runs a line in the guest's shell.
func (m *machine) run(line string) string {
	m.site.t.Helper()
	out, err := m.try(line)
	if err != nil {
		m.site.t.Fatalf("%s: %s: %v\n%s", m.Name, line, err, out)
	}
	return out
}

func (m *machine) try(line string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return m.client.Run(ctx, line)
}

func (m *machine) wait() {
	m.site.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), bootPatience)
	defer cancel()
	if err := m.client.Wait(ctx); err != nil {
		m.site.t.Fatalf("signing on to %s: %v", m.Name, err)
	}
}

// prepare makes what the article's first steps make, with an image that boots.
func (s *site) prepare(image string, key guest.Key) {
	s.t.Helper()
	s.cli("is", "image-create", "lab", "--file", image, "--os-name", "debian-12-amd64")
	s.cli("iam", "trusted-profile-create", "my-trusted-profile")
	s.cli("iam", "trusted-profile-policy-create", "my-trusted-profile", "--roles", "Operator", "--service-name", "is")
	s.cli("is", "vpc-create", "my-vpc")
	s.cli("is", "subnet-create", "my-subnet", "my-vpc", "--zone", "us-south-3", "--ipv4-address-count", "256")
	s.cli("is", "key-create", "my-key", key.Public, "--key-type", "ed25519")
	var v struct {
		Group struct{ ID string } `json:"default_security_group"`
	}
	s.json(&v, "is", "vpc", "my-vpc")
	s.cli("is", "security-group-rule-add", v.Group.ID, "inbound", "tcp", "--port-min", "22", "--port-max", "22")
}

// boot creates an instance, gives it a floating IP, and tells the network around
// the hosts which of them has it.
func (s *site) boot(name string, key guest.Key, args ...string) *machine {
	s.t.Helper()
	s.cli(append([]string{"is", "instance-create", name, "my-vpc", "us-south-3", "tabard-1x1", "my-subnet", "--image", "lab", "--keys", "my-key",
		"--metadata-service", "true", "--default-trusted-profile", "my-trusted-profile"}, args...)...)
	i := s.become(name, "running")
	var fip struct{ Address string }
	s.json(&fip, "is", "floating-ip-reserve", name+"-ip", "--zone", "us-south-3")
	s.cli("is", "instance-network-interface-floating-ip-add", name, i.PrimaryInterface.ID, name+"-ip")
	s.ip(s.core, "route replace "+fip.Address+"/32 via "+s.hostOf(i.ID).address)
	return &machine{i, s, guest.Client{Address: fip.Address, Key: key, Namespace: s.core}}
}

// hostOf finds the host that an instance runs on.
func (s *site) hostOf(id string) *node {
	s.t.Helper()
	var found *node
	s.await("a host has "+id, func() bool {
		for _, h := range s.hosts {
			out, err := s.try("", "ls", h.dir+"/vm/machines", h.dir+"/namespaces")
			if (err == nil || out != "") && strings.Contains(out, id) {
				found = h
				return true
			}
		}
		return false
	})
	return found
}

// The three calls of the article's steps 5 to 7, as they stand there.
const (
	identityCall = `curl -sS -X PUT "http://169.254.169.254/instance_identity/v1/token?version=2022-03-31" -H "Metadata-Flavor: ibm" -d '{ "expires_in": 600}'`
	iamCall      = `curl -sS -X POST "http://169.254.169.254/instance_identity/v1/iam_token?version=2022-03-31" -H "Authorization: Bearer %s"`
	listCall     = `curl -sS --cacert /root/ca.pem -X GET "` + serverURL + `/v1/instances?version=2022-03-31&generation=2" -H "Authorization: Bearer %s"`
)

func field(t *testing.T, body string, path ...string) string {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(body), &v); err != nil {
		t.Fatalf("no JSON: %v\n%s", err, body)
	}
	for _, p := range path {
		switch x := v.(type) {
		case map[string]any:
			v = x[p]
		case []any:
			if len(x) == 0 {
				return ""
			}
			v = x[0]
		}
	}
	s, _ := v.(string)
	return s
}

// play plays steps 5 to 7 inside, and returns the identity token.
func (m *machine) play() string {
	t := m.site.t
	t.Helper()
	identity := field(t, m.run(identityCall), "access_token")
	iam := field(t, m.run(fmt.Sprintf(iamCall, identity)), "access_token")
	list := m.run(fmt.Sprintf(listCall, iam))
	if !strings.Contains(list, m.ID) {
		t.Errorf("%s lists instances without itself: %s", m.Name, list)
	}
	var claims struct {
		IaaS struct{ CRN string } `json:"iaas"`
		JTI  string               `json:"jti"`
	}
	b, err := base64.RawURLEncoding.DecodeString(strings.Split(identity, ".")[1])
	if err == nil {
		err = json.Unmarshal(b, &claims)
	}
	if err != nil || claims.IaaS.CRN != m.CRN || claims.JTI == "" {
		t.Errorf("%s: identity token with %+v, %v", m.Name, claims, err)
	}
	return identity
}

func TestAVirtualMachinePlaysTheArticle(t *testing.T) {
	for _, hosts := range []int{1, 2} {
		t.Run(fmt.Sprintf("%d hosts", hosts), func(t *testing.T) { playArticle(t, hosts) })
	}
}

func playArticle(t *testing.T, hosts int) {
	image := guest.Image(t)
	key := guest.NewKey(t)
	s := newSite(t, hosts, "--driver", "qemu", "--accel", "tcg")
	s.prepare(image, key)
	data := s.write("user-data", []byte("#cloud-config\nwrite_files:\n- path: /root/ca.pem\n  content: |\n"+indent(s.must("cat", s.dir+"/ca.pem"), "    ")))

	machines := []*machine{}
	for n := range hosts {
		machines = append(machines, s.boot(fmt.Sprintf("my-instance-%d", n+1), key, "--user-data", "@"+data))
	}
	on := map[string]bool{}
	for _, m := range machines {
		on[s.hostOf(m.ID).name] = true
		m.wait()
		if got := strings.TrimSpace(m.run("hostname")); got != m.Name {
			t.Errorf("host name %q, want %q", got, m.Name)
		}
	}
	if len(on) != hosts {
		t.Errorf("the instances are on %v, want one on each host", on)
	}
	for _, m := range machines {
		m.play()
		// By name, and what the metadata service tells.
		byName := strings.Replace(identityCall, "169.254.169.254", "api.metadata.cloud.ibm.com", 1)
		token := field(t, m.run(byName), "access_token")
		own := m.run(fmt.Sprintf(`curl -sS "http://api.metadata.cloud.ibm.com/metadata/v1/instance?version=2025-08-26" -H "Authorization: Bearer %s"`, token))
		if field(t, own, "crn") != m.CRN {
			t.Errorf("metadata: %s", own)
		}
	}
	if hosts > 1 {
		first, second := machines[0], machines[1]
		if out, err := first.try("ping -c 1 -W 5 " + second.PrimaryInterface.PrimaryIP.Address); err != nil {
			t.Errorf("instances of one VPC on two hosts do not reach each other: %v\n%s", err, out)
		}
	}

	var events []struct {
		Action, Outcome string
		Initiator       struct {
			AuthnID string `json:"authnId"`
		}
	}
	s.await("the events have come from the hosts", func() bool {
		s.json(&events, "activity", "events", "--limit", "1000")
		found := map[string]int{}
		for _, e := range events {
			for _, m := range machines {
				if e.Initiator.AuthnID == "crn-"+m.CRN && e.Outcome == "success" {
					found[e.Action]++
				}
			}
		}
		return found["is.metadata.jwt-token.create"] == 2*hosts && found["is.metadata.computeresource-token.request"] == hosts &&
			found["iam-identity.computeresource-token.login"] == hosts
	})

	m := machines[0]
	m.run("echo kept > /root/kept && sync")
	s.cli("is", "instance-stop", m.Name, "-f")
	s.become(m.Name, "stopped")
	s.cli("is", "instance-start", m.Name)
	s.become(m.Name, "running")
	m.wait()
	if got := strings.TrimSpace(m.run("cat /root/kept")); got != "kept" {
		t.Errorf("after stop and start the disk has %q", got)
	}
	before := m.run("cat /proc/sys/kernel/random/boot_id")
	s.cli("is", "instance-reboot", m.Name, "-f", "--no-wait")
	s.await("it was rebooted", func() bool {
		now, err := m.try("cat /proc/sys/kernel/random/boot_id")
		return err == nil && now != before
	})
	m.play()

	// Who goes by himself is seen to have gone.
	_, _ = m.try("poweroff")
	s.become(m.Name, "stopped")
}

func indent(s, by string) string {
	return by + strings.ReplaceAll(strings.TrimSpace(s), "\n", "\n"+by) + "\n"
}
