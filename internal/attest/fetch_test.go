package attest_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
)

func TestAnIssuerDoesNotChooseThePathThatIsFetched(t *testing.T) {
	var asked atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	t.Cleanup(server.Close)
	keys := &attest.Keys{Now: time.Now}
	for _, issuer := range []string{server.URL + "/admin/stop?force=1&x=", server.URL + "/admin/stop?"} {
		if _, err := keys.Check(context.Background(), &cluster.Cluster{ID: "c", Issuer: issuer}); err == nil {
			t.Errorf("%s: no error", issuer)
		}
	}
	if n := asked.Load(); n != 0 {
		t.Errorf("%d requests were made", n)
	}
}
