package vm

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
)

// A machine that Tabard neither made nor runs: it is behind a bridge of the
// host's, with others, and knows nothing of Tabard.
func TestAMachineMadeElsewhereGetsAnIdentity(t *testing.T) {
	s := newSite(t, 1, "--driver", "adopt")
	h := s.hosts[0]
	s.ip(h.space, "link add br9 type bridge")
	s.ip(h.space, "addr add 192.168.9.1/24 dev br9")
	s.ip(h.space, "link set br9 up")
	guests := map[string]string{}
	for n, name := range []string{"legacy", "neighbour"} {
		space := fmt.Sprintf("tvm%d-%s", os.Getpid(), name)
		guests[name] = space
		s.must("ip", "netns", "add", space)
		t.Cleanup(func() { _, _ = s.try("", "ip", "netns", "del", space) })
		mac := fmt.Sprintf("52:54:00:00:09:%02d", n+10)
		s.ip(h.space, "link add vnet"+fmt.Sprint(n)+" type veth peer name eth0 netns "+space)
		s.ip(h.space, "link set vnet"+fmt.Sprint(n)+" master br9 up")
		for _, line := range []string{
			"link set lo up", "link set eth0 address " + mac, fmt.Sprintf("addr add 192.168.9.%d/24 dev eth0", n+10), "link set eth0 up",
			"route add default via 192.168.9.1",
		} {
			s.ip(space, line)
		}
	}
	s.cli("iam", "trusted-profile-create", "db-backup")
	s.cli("iam", "trusted-profile-policy-create", "db-backup", "--roles", "Operator", "--service-name", "is")
	s.await("the host has found the devices", func() bool {
		return strings.Contains(s.cli("host", "machines", "h1"), "vnet0")
	})
	var adopted struct{ ID, CRN string }
	s.json(&adopted, "host", "adopt", "h1", "--device", "vnet0", "--mac", "52:54:00:00:09:10", "--address", "192.168.9.10",
		"--name", "legacy-db", "--default-trusted-profile", "db-backup")
	s.become("legacy-db", "running")

	call := func(space string, args ...string) (string, error) {
		return s.try(guests[space], append([]string{"curl", "-sS", "-m", "10"}, args...)...)
	}
	identity := func(space string) (string, error) {
		return call(space, "-X", "PUT", "http://169.254.169.254/instance_identity/v1/token?version=2022-03-31", "-H", "Metadata-Flavor: ibm", "-d", "{}")
	}
	var token string
	s.await("the machine gets an identity token", func() bool {
		out, err := identity("legacy")
		var a struct {
			AccessToken string `json:"access_token"`
		}
		if err != nil || json.Unmarshal([]byte(out), &a) != nil {
			return false
		}
		token = a.AccessToken
		return token != ""
	})
	out, err := call("legacy", "-X", "POST", "http://169.254.169.254/instance_identity/v1/iam_token?version=2022-03-31", "-H", "Authorization: Bearer "+token)
	if err != nil {
		t.Fatal(err)
	}
	list, err := s.try(s.core, "curl", "-sS", "--cacert", s.dir+"/ca.pem", serverURL+"/v1/instances?version=2022-03-31&generation=2",
		"-H", "Authorization: Bearer "+field(t, out, "access_token"))
	if err != nil || !strings.Contains(list, adopted.ID) {
		t.Errorf("the list is %s, %v", list, err)
	}
	if out, err := identity("neighbour"); err == nil {
		t.Errorf("a machine that was not adopted got %s", out)
	}
	// A neighbour on the same bridge takes the adopted machine's addresses.
	s.ip(guests["legacy"], "link set eth0 down")
	s.ip(guests["neighbour"], "link set eth0 address 52:54:00:00:09:10")
	s.ip(guests["neighbour"], "addr add 192.168.9.10/24 dev eth0")
	if out, err := call("neighbour", "--interface", "192.168.9.10", "-X", "PUT", "http://169.254.169.254/instance_identity/v1/token?version=2022-03-31",
		"-H", "Metadata-Flavor: ibm", "-d", "{}"); err == nil {
		t.Errorf("a forger got %s", out)
	}
	s.ip(guests["neighbour"], "link set eth0 down")
	s.ip(guests["legacy"], "link set eth0 up")
	s.ip(guests["legacy"], "route replace default via 192.168.9.1")

	if _, err := s.tryCLI("is", "instance-stop", "legacy-db", "-f"); err == nil {
		t.Error("Tabard says that it can stop a machine that it does not run")
	}
	s.cli("is", "instance-delete", "legacy-db", "-f")
	s.await("the machine is only itself again", func() bool {
		_, err := s.tryCLI("is", "instance", "legacy-db")
		return err != nil
	})
	if out, err := identity("legacy"); err == nil {
		t.Errorf("after the instance was deleted: %s", out)
	}
	// A refusal comes from the gateway, so the way there is open.
	const refused = 7
	if out, err := call("legacy", "http://192.168.9.1:9/"); exitCode(err) != refused {
		t.Errorf("the machine has lost its network: %v %s", err, out)
	}
}
