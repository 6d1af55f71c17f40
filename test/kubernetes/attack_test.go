package kubernetes

import (
	"encoding/json"
	"encoding/pem"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"tabard.dev/tabard/test/kubetest"
)

// spy is what an attacker registers as the API server of somebody else's
// cluster, to be shown that cluster's tokens. It stands by every one of them.
type spy struct {
	*httptest.Server

	mu   sync.Mutex
	seen strings.Builder
}

func newSpy(t *testing.T) *spy {
	t.Helper()
	p := &spy{}
	p.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
		if err != nil {
			return
		}
		p.mu.Lock()
		p.seen.Write(body)
		p.mu.Unlock()
		var review object
		if json.Unmarshal(body, &review) != nil {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		spec, _ := review["spec"].(object)
		token, _ := spec["token"].(string)
		review["status"] = object{"authenticated": strings.Count(token, ".") == 2}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(review)
	}))
	t.Cleanup(p.Close)
	return p
}

func (p *spy) saw(token string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Contains(p.seen.String(), token)
}

// asked is whether it was called at all.
func (p *spy) asked() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.seen.Len() > 0
}

// A cluster's issuer and keys are public, so that anybody can register them.
func TestATokenIsNotShownToAnAPIServerThatAnotherAccountRegistered(t *testing.T) {
	t.Parallel()
	k := kubetest.Start(t, kubetest.Options{})
	k.Namespace("shop", nil, nil)
	k.ServiceAccount("shop", "web", nil)
	claim := func(s *site, p *spy) {
		t.Helper()
		s.resources("pod", "mine")
		body := uploaded(k)
		body["review"] = true
		body["server"] = object{
			"url": p.URL, "token": "anything",
			"ca": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.Certificate().Raw})),
		}
		c := s.register("claimed", body)
		s.link("pod", c, "shop", "web")
		s.link("mine", c, "shop", "web")
	}
	for _, order := range []struct {
		name  string
		first bool // the attacker registers before the owner
	}{{"after its owner", false}, {"before its owner", true}} {
		t.Run("which registered it "+order.name, func(t *testing.T) {
			s := newSite(t)
			attacker, p := s.account("attacker"), newSpy(t)
			if order.first {
				claim(attacker, p)
			}
			s.resources("pod", "own")
			c := s.register("my-cluster", uploaded(k))
			s.link("pod", c, "shop", "web")
			s.link("own", c, "shop", "web")
			if !order.first {
				claim(attacker, p)
			}
			if !p.asked() {
				t.Fatal("the attacker's server was not tried when it was registered: this test would see nothing")
			}
			var own struct{ ID string }
			s.JSON(&own, "iam", "trusted-profile", "own")

			token := k.Token("shop", "web", "iam", 600, nil)
			s.admitted(t, token, "own")
			if a := exchangeByID(s, token, own.ID); a.Status != http.StatusOK {
				t.Errorf("by id: %d %s", a.Status, a.Body)
			}
			s.exchange(token, "pod")    // which both have
			s.exchange(token, "nobody") // which neither has
			if p.saw(token) {
				t.Error("the attacker has the token")
			}
		})
	}
}
