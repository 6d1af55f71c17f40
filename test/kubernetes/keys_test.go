package kubernetes

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/test/kubetest"
)

// Three servers have one cluster registered, each with another source of its keys.
func TestARotatedSigningKeyIsNoticedWithoutARestart(t *testing.T) {
	t.Parallel()
	k := kubetest.Start(t, withReviewer(kubetest.Options{}))
	allowReviewer(k)
	k.OpenDiscovery()
	k.Namespace("shop", nil, nil)
	k.ServiceAccount("shop", "web", nil)

	const maxAge = 2 * time.Second
	sites, clusters := map[string]*site{}, map[string]registered{}
	for name, body := range map[string]object{"open": discovered(k), "reached": reached(k, false), "given": uploaded(k)} {
		s := newSite(t, "--cluster-keys-max-age", maxAge.String())
		sites[name] = s
		s.resources(name)
		clusters[name] = s.register("my-cluster", body)
		s.link(name, clusters[name], "shop", "web")
	}
	old := k.Token("shop", "web", "iam", 3600, nil)
	for name, s := range sites {
		s.admitted(t, old, name)
	}

	t.Run("both keys count while both are published", func(t *testing.T) {
		k.RotateSigningKey(true)
		between := k.Token("shop", "web", "iam", 3600, nil)
		for _, name := range []string{"open", "reached"} {
			admittedSoon(t, sites[name], between, name)
			sites[name].admitted(t, old, name)
		}
		sites["given"].refused(t, between, "given", "BXNIM0405E", "token-signature")
	})
	t.Run("the old one stops when it is withdrawn", func(t *testing.T) {
		k.RotateSigningKey(false)
		fresh := k.Token("shop", "web", "iam", 3600, nil)
		for _, name := range []string{"open", "reached"} {
			admittedSoon(t, sites[name], fresh, name)
			sites[name].eventuallyRefused(t, old, name, "BXNIM0405E", "token-signature")
			sites[name].admitted(t, fresh, name)
		}
	})
	t.Run("and keys that were given stay until others are given", func(t *testing.T) {
		s := sites["given"]
		s.admitted(t, old, "given")
		shown := s.Do(http.MethodGet, "/v1/clusters/"+clusters["given"].ID, s.OwnerToken(), nil)
		a := s.Do(http.MethodPatch, "/v1/clusters/"+clusters["given"].ID, s.OwnerToken(),
			object{"jwks": json.RawMessage(k.JWKS())}, "If-Match", shown.Header.Get("ETag"))
		if a.Status != http.StatusOK || !strings.Contains(string(a.Body), `"uploaded"`) {
			t.Fatalf("%d %s", a.Status, a.Body)
		}
		s.admitted(t, k.Token("shop", "web", "iam", 3600, nil), "given")
		s.refused(t, old, "given", "BXNIM0405E", "token-signature")
	})
	t.Run("and while the cluster is away its keys are not known, which is not the token's fault", func(t *testing.T) {
		fresh := k.Token("shop", "web", "iam", 3600, nil)
		k.Stop()
		time.Sleep(2 * maxAge)
		for _, name := range []string{"open", "reached"} {
			a := sites[name].exchange(fresh, name)
			if a.Status != http.StatusOK && (a.Status != http.StatusServiceUnavailable || a.Header.Get("Retry-After") == "") {
				t.Errorf("%s: %d %s", name, a.Status, a.Body)
			}
		}
		sites["given"].admitted(t, fresh, "given")
		k.Restart()
		for _, name := range []string{"open", "reached"} {
			admittedSoon(t, sites[name], fresh, name)
		}
	})
}

// admittedSoon exchanges a token with a key that the server has not seen: it
// asks for keys at once, but not at every unknown one.
func admittedSoon(t *testing.T, s *site, token, profile string) {
	t.Helper()
	eventually(t, "a token with a new key passes", func() bool { return s.exchange(token, profile).Status == http.StatusOK })
}

func TestSeveralAccountsMayRegisterOneCluster(t *testing.T) {
	t.Parallel()
	k := kubetest.Start(t, kubetest.Options{})
	for _, ns := range []string{"shop", "billing"} {
		k.Namespace(ns, nil, nil)
		k.ServiceAccount(ns, "web", nil)
	}
	shop, billing := k.Token("shop", "web", "iam", 600, nil), k.Token("billing", "web", "iam", 600, nil)
	one := newSite(t)
	two := one.account("two")
	for _, s := range []*site{one, two} {
		s.resources("same", "of-"+s.Owner.AccountID)
		c := s.register("my-cluster", uploaded(k))
		s.link("of-"+s.Owner.AccountID, c, "shop", "web")
		s.link("same", c, "shop", "web")
	}
	t.Run("the profile's account decides", func(t *testing.T) {
		for _, s := range []*site{one, two} {
			token := s.admitted(t, shop, "of-"+s.Owner.AccountID)
			if got := accountOf(t, token); got != s.Owner.AccountID {
				t.Errorf("the token is of account %s, want %s", got, s.Owner.AccountID)
			}
			if n := len(s.Events("--action", loginAction, "--outcome", "success")); n != 1 {
				t.Errorf("%d logins in the account's log, want its own", n)
			}
		}
	})
	t.Run("a name that both have decides nothing", func(t *testing.T) {
		for _, s := range []*site{one, two} {
			s.refused(t, shop, "same", "BXNIM0398E", "profile")
		}
	})
	t.Run("each log has its own part of a refusal", func(t *testing.T) {
		profile := "of-" + one.Owner.AccountID
		before := len(two.Events("--action", loginAction, "--outcome", "failure"))
		one.refused(t, billing, profile, "BXNIM0398E", "profile-link")
		if after := len(two.Events("--action", loginAction, "--outcome", "failure")); after != before {
			t.Errorf("the other account's log has %d more refusals of a profile that is not its own", after-before)
		}
	})
	t.Run("and one account registers it once", func(t *testing.T) {
		if a := one.tryRegister("again", uploaded(k)); a.Status != http.StatusConflict {
			t.Errorf("%d %s", a.Status, a.Body)
		}
	})
	t.Run("an account with outdated keys sees why it admits nobody, and the caller does not", func(t *testing.T) {
		k.RotateSigningKey(false)
		fresh := k.Token("shop", "web", "iam", 600, nil)
		three := one.account("three")
		three.resources("of-three")
		three.link("of-three", three.register("my-cluster", uploaded(k)), "shop", "web")
		three.admitted(t, fresh, "of-three")
		for _, s := range []*site{one, two} {
			s.refused(t, fresh, "of-"+s.Owner.AccountID, "BXNIM0102E", "token-signature")
		}
	})
}

func TestAFreshClusterClosesItsDiscovery(t *testing.T) {
	t.Parallel()
	k := kubetest.Start(t, withReviewer(kubetest.Options{}))
	k.Namespace("shop", nil, nil)
	k.ServiceAccount("shop", "web", nil)
	token := k.Token("shop", "web", "iam", 600, nil)
	s := newSite(t)
	s.resources("pod")

	t.Run("so that its issuer alone does not do", func(t *testing.T) {
		a := s.tryRegister("closed", discovered(k))
		if a.Status/100 != 4 || !strings.Contains(string(a.Body), "403") {
			t.Errorf("%d %s", a.Status, a.Body)
		}
	})
	t.Run("nor does a credential without rights", func(t *testing.T) {
		a := s.tryRegister("forbidden", reached(k, false))
		if a.Status/100 != 4 || strings.Contains(string(a.Body), reviewerToken) {
			t.Errorf("%d %s", a.Status, a.Body)
		}
	})
	t.Run("nor does an authority that did not sign the API server's certificate", func(t *testing.T) {
		other := kubetest.Start(t, kubetest.Options{})
		body := reached(k, false)
		body["server"].(object)["ca"] = authority(other)
		if a := s.tryRegister("mistaken", body); a.Status/100 != 4 {
			t.Errorf("%d %s", a.Status, a.Body)
		}
	})
	t.Run("but a credential with rights does", func(t *testing.T) {
		allowReviewer(k)
		body := reached(k, true)
		body["test_token"] = token
		a := s.tryRegister("my-cluster", body)
		if a.Status != http.StatusCreated || a.Field("keys_from") != "server" || strings.Contains(string(a.Body), reviewerToken) {
			t.Fatalf("%d %s", a.Status, a.Body)
		}
		if a.Field("tested", "subject") != "system:serviceaccount:shop:web" || a.Field("tested", "key_id") != k.KeyID() {
			t.Errorf("the token was tested as %s", a.Body)
		}
		s.link("pod", registered{ID: a.Field("id"), CRN: a.Field("crn")}, "shop", "web")
		s.admitted(t, token, "pod")
	})
	t.Run("and a token that does not pass keeps a cluster from being registered", func(t *testing.T) {
		other := s.account("other")
		for name, bad := range map[string]string{
			"audience": k.Token("shop", "web", "somebody else", 600, nil),
			"foreign":  kubetest.Start(t, kubetest.Options{}).Sign(kubetest.Claims(t, token)),
		} {
			body := reached(k, true)
			body["test_token"] = bad
			a := other.tryRegister(name, body)
			if a.Status != http.StatusBadRequest || strings.Contains(string(a.Body), "eyJ") {
				t.Errorf("%s: %d %s", name, a.Status, a.Body)
			}
		}
		if a := other.Do(http.MethodGet, "/v1/clusters", other.OwnerToken(), nil); strings.Contains(string(a.Body), k.Issuer) {
			t.Errorf("a cluster was registered: %s", a.Body)
		}
	})
}
