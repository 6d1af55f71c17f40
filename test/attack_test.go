package test

import (
	"net/url"
	"regexp"
	"strings"
	"testing"

	"tabard.dev/tabard/test/harness"
)

// in runs a shell command inside an instance and returns its output, whatever
// its status.
func in(s *harness.Server, instance, script string) string {
	s.T.Helper()
	r := s.Run("is", "instance-exec", instance, "--", "sh", "-c", script)
	return r.Out + r.Err
}

// Two instances stand side by side; the first one tries everything it can to
// get an identity token of the second.
func TestAnInstanceCannotGetItsNeighboursIdentity(t *testing.T) {
	needRoot(t)
	s := harness.Start(t, "--driver", "netns")
	prepareSceneA(t, s)
	createInstance(s, "victim")
	waitStatus(t, s, "victim", "running")
	waitStatus(t, s, "my-instance", "running")
	type instance struct {
		ID, CRN string
		NIC     struct {
			IP struct{ Address string } `json:"primary_ip"`
		} `json:"primary_network_interface"`
	}
	var me, victim instance
	s.JSON(&me, "is", "instance", "my-instance")
	s.JSON(&victim, "is", "instance", "victim")
	victimAddress := victim.NIC.IP.Address

	mac := regexp.MustCompile(`link/ether ([0-9a-f:]{17})`)
	hardwareAddress := func(instance string) string {
		m := mac.FindStringSubmatch(in(s, instance, "ip -o link show eth0"))
		if m == nil {
			t.Fatalf("%s has no hardware address", instance)
		}
		return m[1]
	}
	own, neighbours := hardwareAddress("my-instance"), hardwareAddress("victim")

	put := "curl -sS --max-time 4 -X PUT '" + metadataAddress + "/instance_identity/v1/token?version=2022-03-31' -H 'Metadata-Flavor: ibm' -d '{}' "
	for name, script := range map[string]string{
		"by source address":   "ip addr add " + victimAddress + "/32 dev eth0; " + put + "--interface " + victimAddress + "; ip addr del " + victimAddress + "/32 dev eth0",
		"by hardware address": "ip link set eth0 address " + neighbours + "; " + put + "; ip link set eth0 address " + own,
		"by both addresses": "ip link set eth0 address " + neighbours + "; ip addr add " + victimAddress + "/32 dev eth0; " + put + "--interface " + victimAddress +
			"; ip addr del " + victimAddress + "/32 dev eth0; ip link set eth0 address " + own,
		"by Host":               put + "-H 'Host: victim'",
		"by X-Forwarded-For":    put + "-H 'X-Forwarded-For: " + victimAddress + "'",
		"by Forwarded":          put + "-H 'Forwarded: for=" + victimAddress + "'",
		"through its address":   strings.ReplaceAll(put, "169.254.169.254", victimAddress),
		"through absolute form": put + "--proxy http://169.254.169.254:80 -H 'X-Real-IP: " + victimAddress + "'",
	} {
		t.Run(name, func(t *testing.T) {
			out := in(s, "my-instance", script)
			start := strings.Index(out, `"access_token":"`)
			if start < 0 {
				return // nothing got out
			}
			token := strings.SplitN(out[start+len(`"access_token":"`):], `"`, 2)[0]
			iaas, _ := claimsOf(t, token)["iaas"].(map[string]any)
			if iaas["instanceID"] == victim.ID {
				t.Fatal("got the neighbour's identity")
			}
			if iaas["instanceID"] != me.ID {
				t.Fatalf("got an identity of %v", iaas)
			}
		})
	}
	if iamToken(s, "my-instance", identityToken(s, "my-instance")) == "" {
		t.Fatal("the attacker's own service does not work any more, so the attacks proved nothing")
	}
	t.Run("its identity token, stolen, is worth nothing here", func(t *testing.T) {
		stolen := identityToken(s, "victim")
		for _, call := range []string{
			"-X POST " + metadataAddress + "/instance_identity/v1/iam_token?version=2022-03-31",
			metadataAddress + "/metadata/v1/instance?version=2022-03-31",
		} {
			out := in(s, "my-instance", "curl -sS --max-time 4 -w ' %{http_code}' -H 'Authorization: Bearer "+stolen+"' "+strings.ReplaceAll(call, "?", `\?`))
			if !strings.HasSuffix(strings.TrimSpace(out), " 401") {
				t.Errorf("%s: %s", call, out)
			}
		}
	})
	t.Run("an identity token is no compute resource token at the public endpoint", func(t *testing.T) {
		a := s.Do("POST", "/identity/token", "", url.Values{
			"grant_type": {"urn:ibm:params:oauth:grant-type:cr-token"}, "cr_token": {identityToken(s, "my-instance")}, "profile_name": {"my-trusted-profile"},
		})
		if a.Status == 200 {
			t.Fatal("it was exchanged")
		}
	})
	t.Run("and no access token", func(t *testing.T) {
		if a := s.Do("GET", "/v1/instances?version=2022-03-31&generation=2", identityToken(s, "my-instance"), nil); a.Status != 401 {
			t.Fatalf("%d %s", a.Status, a.Body)
		}
	})
}
