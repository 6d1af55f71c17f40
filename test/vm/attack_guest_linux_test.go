package vm

import (
	"fmt"
	"strings"
	"testing"

	"tabard.dev/tabard/test/guest"
)

// What a whole kernel of one's own makes possible, and what a virtual machine
// can check that it was given: the authority of its host.
func TestAVirtualMachineIsHeldToItsOwnWireAndTrustsItsOwnHost(t *testing.T) {
	key, image := guest.NewKey(t), guest.Image(t)
	s := newSite(t, 1, "--driver", "qemu,netns", "--accel", "tcg")
	s.prepare(image, key)
	vm := s.boot("thief", key, "--metadata-service-protocol", "https")
	victim := s.box("victim")
	vm.wait()

	const name = "https://api.metadata.cloud.ibm.com"
	ask := func(base, more string) string {
		return fmt.Sprintf(`curl -s --connect-timeout 3 -m 6 %s -X PUT '%s%s' -H '%s' -d '{}'`, more, base, tokenPath, flavor)
	}
	code := func(t *testing.T, line string) string {
		t.Helper()
		return strings.TrimSpace(vm.run(line + ` >/dev/null 2>&1; echo $?`))
	}
	own := func(t *testing.T) string {
		t.Helper()
		token := field(t, vm.run(ask(name, "")), "access_token")
		if got := subject(token); got != vm.ID {
			t.Fatalf("the machine gets the identity of %q", got)
		}
		return token
	}

	s.sub("over https the service has the certificate that cloud-init had it trust, for one name alone", func(t *testing.T) {
		own(t)
		if got := code(t, ask(name, "--cacert /dev/null")); got != "60" && got != "77" {
			t.Errorf("without the host's authority curl ends with %s", got)
		}
		for base, more := range map[string]string{
			"https://169.254.169.254":                         "",
			"https://iam.cloud.ibm.com":                       "--resolve iam.cloud.ibm.com:443:169.254.169.254",
			"https://10.99.0.1":                               "--connect-to 10.99.0.1:443:169.254.169.254:443",
			"https://api.metadata.cloud.ibm.com.evil.example": "--resolve api.metadata.cloud.ibm.com.evil.example:443:169.254.169.254",
		} {
			if got := code(t, ask(base, more)); got != "60" && got != "35" {
				t.Errorf("%s: curl ends with %s, want a certificate that is refused", base, got)
			}
		}
		if got := code(t, ask("http://169.254.169.254", "")); got != "28" {
			t.Errorf("over http curl ends with %s, want no answer", got)
		}
	})

	device := strings.TrimSpace(vm.run(`ip route | sed -n 's/^default.* dev \([^ ]*\).*/\1/p' | head -n 1`))
	mac := strings.TrimSpace(vm.run("cat /sys/class/net/" + device + "/address"))
	theirs, _ := victim.card(t)
	// It cannot be spoken to while it pretends, so it notes what it gets.
	pretend := func(t *testing.T, begin, end, more string) {
		t.Helper()
		vm.run(fmt.Sprintf(`rm -f /root/code; (%s; %s > /root/answer; echo $? > /root/code.new; %s; mv /root/code.new /root/code) </dev/null >/dev/null 2>&1 &`,
			begin, ask(name, more), end))
		var got string
		s.await("the machine is itself again", func() bool {
			out, err := vm.try("cat /root/code && cat /root/answer")
			got = strings.TrimSpace(out)
			return err == nil
		})
		if got != "28" {
			t.Errorf("curl ended with, and got: %s", got)
		}
		own(t)
		victim.works(t)
	}
	setMAC := func(to string) string { return "ip link set " + device + " address " + to }
	address := victim.address() + "/32 dev " + device
	s.sub("a neighbour's address gets it nothing", func(t *testing.T) {
		pretend(t, "ip addr add "+address, "ip addr del "+address, "--interface "+victim.address())
	})
	s.sub("a neighbour's MAC gets it nothing", func(t *testing.T) {
		pretend(t, setMAC(theirs.String()), setMAC(mac), "")
	})
	s.sub("both together get it nothing", func(t *testing.T) {
		pretend(t, "ip addr add "+address+"; "+setMAC(theirs.String()), setMAC(mac)+"; ip addr del "+address, "--interface "+victim.address())
	})
	s.sub("a neighbour's identity token gets it nothing", func(t *testing.T) {
		for what, call := range map[string]string{"an access token": "-X POST '" + name + iamPath + "'", "metadata": "'" + name + ownPath + "'"} {
			got := vm.run(fmt.Sprintf(`curl -s -m 20 -w '\n%%{http_code}' %s -H 'Authorization: Bearer %s'`, call, victim.identity(600)))
			if !strings.HasSuffix(strings.TrimSpace(got), "401") || strings.Contains(got, victim.ID) {
				t.Errorf("%s: %s", what, got)
			}
		}
	})
	s.sub("it follows its settings while it runs", func(t *testing.T) {
		update := func(args ...string) { s.cli(append([]string{"is", "instance-update", vm.Name}, args...)...) }
		update("--metadata-service-protocol", "http")
		s.await("http is served", func() bool { return code(t, ask("http://169.254.169.254", "-f")) == "0" })
		s.await("https is silent", func() bool { return code(t, ask(name, "")) == "28" })
		update("--metadata-service", "false")
		s.await("http is silent", func() bool { return code(t, ask("http://169.254.169.254", "")) == "28" })
		update("--metadata-service", "true", "--metadata-service-protocol", "https")
		s.await("https is served", func() bool { return code(t, ask(name, "-f")) == "0" })
		own(t)
	})
}
