package agent

import (
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"tabard.dev/tabard/internal/host/link"
)

// sentBody returns what is sent for a batch.
func sentBody(t *testing.T, b link.Events) []byte {
	t.Helper()
	var body []byte
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { body, _ = io.ReadAll(r.Body) }))
	defer srv.Close()
	if err := post(t.Context(), srv.Client(), srv.URL, "", "", b, nil); err != nil {
		t.Fatal(err)
	}
	return body
}
