package netns

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net/http/httptest"
	"testing"
	"time"
)

// Outside and inside the server speaks the same protocol, so that its URL works
// in both places.
func TestAServerThatSpeaksTLSSpeaksItInsideToo(t *testing.T) {
	r := newRig(t)
	// Only its certificate is wanted.
	other := httptest.NewTLSServer(nil)
	defer other.Close()
	m := spec("0717_tls", "r006-tls", "10.240.0.4", 4)
	h := handlers(m, "127.0.0.1:18473")
	h.ServerTLS = &tls.Config{Certificates: other.TLS.Certificates, MinVersion: tls.VersionTLS12}
	if err := r.d.Start(context.Background(), m, h); err != nil {
		t.Fatal(err)
	}
	i := &inst{r, m}
	conn, err := i.dial("", "127.0.0.1:18473", 2*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	roots := x509.NewCertPool()
	roots.AddCert(other.Certificate())
	secure := tls.Client(conn, &tls.Config{RootCAs: roots, ServerName: "127.0.0.1", MinVersion: tls.VersionTLS12})
	if err := secure.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if err := secure.HandshakeContext(t.Context()); err != nil {
		t.Fatalf("the server inside does not speak TLS: %v", err)
	}
}
