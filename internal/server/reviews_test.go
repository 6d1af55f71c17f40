package server

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
)

func TestMetricsShowReviewsKeyFetchesAndCredentialsThatEnd(t *testing.T) {
	s := open(t, config(t.TempDir()))
	sealer, err := s.openSealer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	account := s.directory.Accounts.All()[0].ID
	add := func(id string, ends time.Duration) *cluster.Cluster {
		c := &cluster.Cluster{
			ID: id, CRN: "crn:" + id, AccountID: account, Name: id, Type: identity.IKSSA, Issuer: "https://issuer.test", Audience: "iam",
			Server: &cluster.APIServer{URL: "https://127.0.0." + id[1:] + ":1"},
		}
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.HS256, Key: []byte(strings.Repeat("k", 32))}, nil)
		if err != nil {
			t.Fatal(err)
		}
		credential, err := jwt.Signed(signer).Claims(map[string]any{"exp": time.Now().Add(ends).Unix()}).Serialize()
		if err != nil {
			t.Fatal(err)
		}
		c.Server.Sealed = sealer.Seal([]byte(credential), c.SealLabel())
		err = s.directory.Update(t.Context(), "test", func(tx *directory.Tx) error { s.directory.Clusters.Put(tx, c); return nil })
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	add("c1", 24*time.Hour)
	add("c2", 59*time.Minute)
	add("c3", -time.Minute)
	// Nothing listens there.
	if err := s.reviewer.Check(t.Context(), add("c5", 24*time.Hour)); err == nil {
		t.Error("a reviewer was found")
	}
	rec := &answerRecorder{header: http.Header{}}
	s.handler().ServeHTTP(rec, mustRequest(t, "http://x/metrics"))
	for _, line := range []string{
		"tabard_cluster_credentials_ending 2",
		fmt.Sprintf(`tabard_token_reviews_total{outcome="%s",remembered="no"} 0`, attest.ReviewBroken),
		fmt.Sprintf(`tabard_token_reviews_total{outcome="%s",remembered="no"} 0`, attest.ReviewAllowed),
		fmt.Sprintf(`tabard_key_fetches_total{outcome="failed",source="%s"} 0`, attest.FromServer),
	} {
		if !strings.Contains(rec.String(), line+"\n") {
			t.Errorf("no line %s", line)
		}
	}
}
