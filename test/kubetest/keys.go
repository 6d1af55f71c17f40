package kubetest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// signingKey is the key with which the API server signs service-account tokens.
type signingKey struct {
	key  crypto.Signer
	id   string
	alg  jose.SignatureAlgorithm
	file string // PEM of the private key
}

// newSigningKey makes a key for service-account tokens, effective when the API
// server starts the next time.
func (c *Cluster) newSigningKey(keepOld bool) error {
	k := signingKey{alg: jose.RS256}
	var err error
	switch c.options.Alg {
	case "", "RS256":
		k.key, err = rsa.GenerateKey(rand.Reader, 2048)
	case "ES256":
		k.alg = jose.ES256
		k.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	default:
		return fmt.Errorf("kubetest.Options.Alg is %q; it is RS256 or ES256", c.options.Alg)
	}
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(k.key.Public())
	if err != nil {
		return err
	}
	// Kubernetes names a key by the hash of its DER form.
	sum := sha256.Sum256(public)
	k.id = base64.RawURLEncoding.EncodeToString(sum[:])
	private, err := x509.MarshalPKCS8PrivateKey(k.key)
	if err != nil {
		return err
	}
	name := "sa-" + k.id[:8]
	k.file = c.file(name + ".key")
	if err := writePEM(k.file, "PRIVATE KEY", private); err != nil {
		return err
	}
	publicFile := c.file(name + ".pub")
	if err := writePEM(publicFile, "PUBLIC KEY", public); err != nil {
		return err
	}
	c.key = k
	if !keepOld {
		c.keyFiles = nil
	}
	c.keyFiles = append([]string{publicFile}, c.keyFiles...)
	return nil
}

// KeyID is the id of the key that signs service-account tokens at present.
func (c *Cluster) KeyID() string { return c.key.id }

// Sign signs claims with the API server's own key, for tokens that the API
// server would have made at another time or does not make at all.
func (c *Cluster) Sign(claims map[string]any) string {
	c.T.Helper()
	return c.SignAs(c.key.id, claims)
}

// SignAs signs with the API server's own key and names another one, as an
// attacker does who has that key only.
func (c *Cluster) SignAs(keyID string, claims map[string]any) string {
	c.T.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: c.key.alg, Key: jose.JSONWebKey{Key: c.key.key, KeyID: keyID}}, nil)
	if err != nil {
		c.T.Fatal(err)
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		c.T.Fatal(err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		c.T.Fatal(err)
	}
	raw, err := jws.CompactSerialize()
	if err != nil {
		c.T.Fatal(err)
	}
	return raw
}

// Claims are the claims of a token as it stands, not verified.
func Claims(t interface {
	Helper()
	Fatalf(string, ...any)
}, token string) map[string]any {
	t.Helper()
	jws, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.RS256, jose.ES256})
	if err != nil {
		t.Fatalf("parse a service-account token: %v", err)
	}
	var claims map[string]any
	if err := json.Unmarshal(jws.UnsafePayloadWithoutVerification(), &claims); err != nil {
		t.Fatalf("parse a service-account token's claims: %v", err)
	}
	return claims
}

// JWKS is the key set that the API server publishes, as an administrator
// fetches it to upload it elsewhere.
func (c *Cluster) JWKS() []byte {
	c.T.Helper()
	ctx, cancel := c.context()
	defer cancel()
	b, err := c.client.RESTClient().Verb(http.MethodGet).AbsPath("/openid/v1/jwks").DoRaw(ctx)
	if err != nil {
		c.T.Fatal(err)
	}
	return b
}

// makeCertificates makes the API server's certificate and its authority.
func (c *Cluster) makeCertificates() error {
	now := time.Now()
	authority := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "kubetest"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	authorityKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.CreateCertificate(rand.Reader, authority, authority, authorityKey.Public(), authorityKey)
	if err != nil {
		return err
	}
	c.CAFile = c.file("ca.crt")
	if err := writePEM(c.CAFile, "CERTIFICATE", der); err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "kube-apiserver"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames: []string{"localhost", "kubernetes.default.svc"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	if der, err = x509.CreateCertificate(rand.Reader, leaf, authority, key.Public(), authorityKey); err != nil {
		return err
	}
	if err := writePEM(c.file("server.crt"), "CERTIFICATE", der); err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return writePEM(c.file("server.key"), "PRIVATE KEY", private)
}

func writePEM(file, kind string, der []byte) error {
	return os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}
