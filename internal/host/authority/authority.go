// Package authority is a host's own certificate authority. It makes the server
// certificate of the metadata service, which guests trust because cloud-init
// brings them the root, and the identity certificates of the host's instances
// (reference/instance-metadata-and-vpc.md sections 1.1 and 1.7).
//
// The two come from roots that have nothing in common: the one that guests
// trust can vouch for the name of the metadata service and nothing else, the
// other for clients and never for a server. So no instance can pass for the
// metadata service, whatever it gets certified.
//
// It is not for the IAM server's certificate, nor for the connection between
// host and server.
package authority

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"sync"
	"time"

	"github.com/google/uuid"
)

// ServerName is the only name that the metadata service has a certificate for
// (reference section 1.1).
const ServerName = "api.metadata.cloud.ibm.com"

// Lives of certificates, and how far a reader's clock may be behind.
const (
	rootLife         = 10 * 365 * 24 * time.Hour // guests get the root once, when they are made
	serverLife       = 24 * time.Hour
	intermediateLife = 7 * 24 * time.Hour
	skew             = time.Hour
	identitySkew     = time.Minute
)

// MaxIdentityLife bounds identity certificates (reference section 1.7).
const MaxIdentityLife = time.Hour

// Sealer protects the private keys of the roots at rest.
type Sealer interface {
	Seal(secret []byte, label string) []byte
	Open(sealed []byte, label string) ([]byte, error)
}

// Store keeps the authority's state: its roots, with their keys sealed.
type Store interface {
	// Load returns what was saved last, or nil when there is nothing yet.
	Load() ([]byte, error)
	// Save returns when the state is on stable storage.
	Save(state []byte) error
}

// Config are the authority's collaborators.
type Config struct {
	Host   string // name of the host; stands in the names of its roots
	Sealer Sealer
	Store  Store
	Now    func() time.Time
}

// Authority is a host's two roots and what is in use of them now.
type Authority struct {
	cfg     Config
	service *root
	clients *root

	mu           sync.Mutex
	server       *tls.Certificate
	intermediate *issuer
}

// issuer is a certificate with its key.
type issuer struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// root is a self-signed issuer as it is kept.
type root struct {
	issuer
	Certificate []byte `json:"certificate"` // DER
	Sealed      []byte `json:"sealed_key"`  // PKCS #8
}

// state is what the store keeps.
type state struct {
	Service *root `json:"metadata_service"`
	Clients *root `json:"instance_identity"`
}

// New opens the authority, and makes its roots when there are none or when they
// have come to their end. Guests that trust an old root have to be given the
// new one.
func New(cfg Config) (*Authority, error) {
	a := &Authority{cfg: cfg}
	saved, err := cfg.Store.Load()
	if err != nil {
		return nil, fmt.Errorf("load the host's certificate authority: %w", err)
	}
	var st state
	if saved != nil {
		if err := json.Unmarshal(saved, &st); err != nil {
			return nil, fmt.Errorf("read the host's certificate authority: %w", err)
		}
	}
	changed := false
	for _, r := range []struct {
		root   **root
		label  string
		make   *x509.Certificate
		unused time.Duration // of the end: nothing made then would live out its life
	}{
		{&st.Service, "metadata service CA", serviceTemplate(cfg.Host), serverLife},
		{&st.Clients, "instance identity CA", clientsTemplate(cfg.Host), intermediateLife},
	} {
		if *r.root != nil {
			if err := (*r.root).open(cfg.Sealer, r.label); err != nil {
				return nil, fmt.Errorf("open the %s: %w", r.label, err)
			}
			if cfg.Now().Add(r.unused).Before((*r.root).cert.NotAfter) {
				continue
			}
		}
		if *r.root, err = newRoot(r.make, cfg.Now(), cfg.Sealer, r.label); err != nil {
			return nil, fmt.Errorf("make the %s: %w", r.label, err)
		}
		changed = true
	}
	if changed {
		b, err := json.Marshal(st)
		if err != nil {
			return nil, fmt.Errorf("encode the host's certificate authority: %w", err)
		}
		if err := cfg.Store.Save(b); err != nil {
			return nil, fmt.Errorf("save the host's certificate authority: %w", err)
		}
	}
	a.service, a.clients = st.Service, st.Clients
	return a, nil
}

// anyAddress are the ranges that hold every address: a root that excludes them
// vouches for none.
func anyAddress() []*net.IPNet {
	return []*net.IPNet{
		{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)},
		{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)},
	}
}

// serviceTemplate is the root that guests trust. Its constraints (RFC 5280
// section 4.2.1.10) are critical and cover every form of name that a client
// looks at, so that a stolen host key makes nothing of the rest of the Internet.
func serviceTemplate(host string) *x509.Certificate {
	return &x509.Certificate{
		Subject:                     pkix.Name{Organization: []string{"Tabard"}, CommonName: "metadata service of " + clip(host)},
		KeyUsage:                    x509.KeyUsageCertSign,
		ExtKeyUsage:                 []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		MaxPathLenZero:              true,
		PermittedDNSDomainsCritical: true,
		PermittedDNSDomains:         []string{ServerName},
		PermittedEmailAddresses:     []string{ServerName},
		PermittedURIDomains:         []string{ServerName},
		ExcludedIPRanges:            anyAddress(),
	}
}

// clientsTemplate is the root of instances' certificates. It vouches for
// clients and never for a server. It has no constraints on names: the one name
// that its certificates have is a CRN, a URI without a host, and crypto/x509
// takes no such URI below an issuer that has any constraint.
func clientsTemplate(host string) *x509.Certificate {
	return &x509.Certificate{
		Subject:     pkix.Name{Organization: []string{"Tabard"}, CommonName: "instances of " + clip(host)},
		KeyUsage:    x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		MaxPathLen:  1,
	}
}

// clip keeps a common name within its bound of 64 (RFC 5280 appendix A).
func clip(host string) string { return host[:min(len(host), 40)] }

func newRoot(t *x509.Certificate, now time.Time, sealer Sealer, label string) (*root, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make the key: %w", err)
	}
	t.BasicConstraintsValid, t.IsCA = true, true
	t.NotBefore, t.NotAfter = now.Add(-skew), now.Add(rootLife)
	self := issuer{cert: t, key: key}
	cert, err := self.sign(t, key.Public())
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode the key: %w", err)
	}
	return &root{issuer: issuer{cert, key}, Certificate: cert.Raw, Sealed: sealer.Seal(der, label)}, nil
}

func (r *root) open(sealer Sealer, label string) error {
	var err error
	if r.cert, err = x509.ParseCertificate(r.Certificate); err != nil {
		return fmt.Errorf("parse the certificate: %w", err)
	}
	der, err := sealer.Open(r.Sealed, label)
	if err != nil {
		return err
	}
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return fmt.Errorf("parse the key: %w", err)
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || !key.PublicKey.Equal(r.cert.PublicKey) {
		return errors.New("the key is not that of the certificate")
	}
	r.key = key
	return nil
}

// sign makes a certificate with a random serial number.
func (i *issuer) sign(t *x509.Certificate, public crypto.PublicKey) (*x509.Certificate, error) {
	if t.SerialNumber == nil {
		t.SerialNumber = serial(uuid.New())
	}
	der, err := x509.CreateCertificate(rand.Reader, t, i.cert, public, i.key)
	if err != nil {
		return nil, fmt.Errorf("sign the certificate: %w", err)
	}
	return x509.ParseCertificate(der)
}

// serial is a UUID as a number: unpredictable, and at most 16 bytes.
func serial(id uuid.UUID) *big.Int { return new(big.Int).SetBytes(id[:]) }

// RootPEM returns the certificate that guests have to trust to reach the
// metadata service over https.
func (a *Authority) RootPEM() string { return encode(a.service.cert) }

// IdentityRootPEM returns the certificate that whoever checks instances'
// certificates has to trust, about this host's instances only.
func (a *Authority) IdentityRootPEM() string { return encode(a.clients.cert) }

func encode(c *x509.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
}

// TLSConfig returns the metadata service's end of TLS. Its certificate lives a
// day, stands in memory only and is renewed when half of its life is over.
func (a *Authority) TLSConfig() *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS12,
		NextProtos:     []string{"http/1.1"},
		Time:           a.cfg.Now,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return a.serverCertificate() },
	}
}

func (a *Authority) serverCertificate() (*tls.Certificate, error) {
	now := a.cfg.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.server != nil && now.Add(serverLife/2).Before(a.server.Leaf.NotAfter) {
		return a.server, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make the metadata service's key: %w", err)
	}
	leaf, err := a.service.sign(&x509.Certificate{
		Subject:     pkix.Name{CommonName: ServerName},
		DNSNames:    []string{ServerName},
		NotBefore:   now.Add(-skew),
		NotAfter:    now.Add(serverLife),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, key.Public())
	if err != nil {
		return nil, fmt.Errorf("make the metadata service's certificate: %w", err)
	}
	a.server = &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}
	return a.server, nil
}

// Instance is whom an identity certificate is about.
type Instance struct {
	ID  string
	CRN string
}

// Certificate is an identity certificate as it is given out.
type Certificate struct {
	ID      string   // the serial number, as a UUID
	Chain   []string // PEM: the leaf, then the intermediate
	Created time.Time
	Expires time.Time
}

// Certify makes an instance's certificate for the key in a request that
// ParseRequest has let through. It says what the host knows of the instance, its
// id and CRN, beside the places and organizations that the request names.
func (a *Authority) Certify(r *Request, of Instance, life time.Duration) (Certificate, error) {
	if life <= 0 || life > MaxIdentityLife {
		return Certificate{}, fmt.Errorf("an identity certificate may not live %s", life)
	}
	name, err := url.Parse(of.CRN)
	if err != nil || name.Scheme != "crn" || of.ID == "" {
		return Certificate{}, fmt.Errorf("the instance %q has no CRN that a certificate can carry: %q", of.ID, of.CRN)
	}
	now := a.cfg.Now().UTC().Truncate(time.Second)
	by, err := a.identityIssuer(now)
	if err != nil {
		return Certificate{}, err
	}
	id := uuid.New()
	subject := r.subject
	subject.CommonName = of.ID
	c := Certificate{ID: id.String(), Created: now, Expires: now.Add(life)}
	leaf, err := by.sign(&x509.Certificate{
		SerialNumber: serial(id),
		Subject:      subject,
		URIs:         []*url.URL{name},
		NotBefore:    now.Add(-identitySkew),
		NotAfter:     c.Expires,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, r.key)
	if err != nil {
		return Certificate{}, fmt.Errorf("make the identity certificate: %w", err)
	}
	c.Chain = []string{encode(leaf), encode(by.cert)}
	return c, nil
}

// identityIssuer returns the intermediate that signs now. Its key stands in
// memory only, so that the root's is seldom used.
func (a *Authority) identityIssuer(now time.Time) (*issuer, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if i := a.intermediate; i != nil && now.Add(2*MaxIdentityLife).Before(i.cert.NotAfter) {
		return i, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make the key of the identity issuer: %w", err)
	}
	t := clientsTemplate(a.cfg.Host)
	t.Subject.CommonName = "issuer of " + clip(a.cfg.Host)
	t.BasicConstraintsValid, t.IsCA, t.MaxPathLen, t.MaxPathLenZero = true, true, 0, true
	t.NotBefore, t.NotAfter = now.Add(-skew), now.Add(intermediateLife)
	cert, err := a.clients.sign(t, key.Public())
	if err != nil {
		return nil, fmt.Errorf("make the certificate of the identity issuer: %w", err)
	}
	a.intermediate = &issuer{cert, key}
	return a.intermediate, nil
}
