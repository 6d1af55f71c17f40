package demo

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/uuid"
)

// issuer stands in for a Kubernetes API server: a discovery document, a key
// set, and service-account tokens of its form.
type issuer struct {
	url    string
	key    *ecdsa.PrivateKey
	signer jose.Signer
	srv    *http.Server
	done   chan struct{}
}

const issuerKeyID = "demo-cluster-key"

func newIssuer(ctx context.Context) (*issuer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: issuerKeyID}}, nil)
	if err != nil {
		return nil, err
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	i := &issuer{url: "http://" + l.Addr().String(), key: key, signer: signer, done: make(chan struct{})}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		i.write(w, map[string]any{
			"issuer": i.url, "jwks_uri": i.url + "/openid/v1/jwks", "response_types_supported": []string{"id_token"},
			"subject_types_supported": []string{"public"}, "id_token_signing_alg_values_supported": []string{"ES256"},
		})
	})
	mux.HandleFunc("GET /openid/v1/jwks", func(w http.ResponseWriter, _ *http.Request) {
		i.write(w, jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: issuerKeyID, Algorithm: "ES256", Use: "sig"}}})
	})
	i.srv = &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	go func() {
		defer close(i.done)
		_ = i.srv.Serve(l) // ends with close, which says so
	}()
	return i, nil
}

func (i *issuer) close() {
	_ = i.srv.Close() // nothing depends on it any more
	<-i.done
}

func (i *issuer) write(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the client may be gone
}

// token makes the token that the kubelet would project into a pod.
func (i *issuer) token(namespace, account, pod string) (string, error) {
	now := time.Now()
	named := func(name string) map[string]string { return map[string]string{"name": name, "uid": uuid.NewString()} }
	payload, err := json.Marshal(map[string]any{
		"iss": i.url, "aud": []string{"iam"}, "jti": uuid.NewString(),
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(time.Hour).Unix(),
		"sub": fmt.Sprintf("system:serviceaccount:%s:%s", namespace, account),
		"kubernetes.io": map[string]any{
			"namespace": namespace, "serviceaccount": named(account), "pod": named(pod), "node": named("node-1"),
		},
	})
	if err != nil {
		return "", err
	}
	jws, err := i.signer.Sign(payload)
	if err != nil {
		return "", err
	}
	return jws.CompactSerialize()
}

// claims shows a token's claims, never its signature.
func claims(raw string) string {
	parts := strings.Split(raw, ".")
	if len(parts) != 3 {
		return "(not a token)"
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return "(not a token)"
	}
	return string(b)
}
