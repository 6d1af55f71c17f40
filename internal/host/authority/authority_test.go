package authority

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/internal/token"
)

// clock is set by hand.
type clock struct{ t time.Time }

func (c *clock) now() time.Time { return c.t }

// bed is an authority on a real file.
type bed struct {
	*Authority
	clock  *clock
	file   File
	sealer *token.Sealer
}

func start(t testing.TB) *bed {
	t.Helper()
	sealer, err := token.NewSealer(make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	b := &bed{clock: &clock{time.Now()}, file: File(filepath.Join(t.TempDir(), "authority.json")), sealer: sealer}
	b.Authority = b.open(t)
	return b
}

func (b *bed) open(t testing.TB) *Authority {
	t.Helper()
	a, err := New(Config{Host: "host-1", Sealer: b.sealer, Store: b.file, Now: b.clock.now})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

var machine = Instance{ID: "0717_1e09281b-f177-46fb-baf1-bc152b2e391a", CRN: "crn:v1:bluemix:public:is:us-south-1:a/aa2432b1fa4d4ace891e9b80fc104e34::instance:0717_1e09281b-f177-46fb-baf1-bc152b2e391a"}

func key(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// csr makes a request in PEM.
func csr(t testing.TB, template *x509.CertificateRequest, k crypto.Signer) string {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, template, k)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

func parse(t testing.TB, text string) *x509.Certificate {
	t.Helper()
	block, rest := pem.Decode([]byte(text))
	if block == nil || len(rest) > 0 {
		t.Fatalf("not one PEM block: %s", text)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func pool(t testing.TB, texts ...string) *x509.CertPool {
	t.Helper()
	p := x509.NewCertPool()
	for _, text := range texts {
		if !p.AppendCertsFromPEM([]byte(text)) {
			t.Fatalf("no certificate in %s", text)
		}
	}
	return p
}

// serve answers over TLS as the metadata service does, and returns its address.
func (b *bed) serve(t *testing.T) string {
	t.Helper()
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = w.Write([]byte(r.Proto + "\n"))
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.Listener = tls.NewListener(s.Listener, b.TLSConfig())
	s.Start()
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

func (b *bed) dial(t *testing.T, addr string, c *tls.Config) (*tls.ConnectionState, error) {
	t.Helper()
	conn, err := tls.Dial("tcp", addr, c)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	st := conn.ConnectionState()
	return &st, nil
}

func TestAGuestThatTrustsTheRootReachesTheServiceByItsNameOnly(t *testing.T) {
	b := start(t)
	addr := b.serve(t)
	roots := pool(t, b.RootPEM())
	st, err := b.dial(t, addr, &tls.Config{RootCAs: roots, ServerName: ServerName, NextProtos: []string{"h2", "http/1.1"}})
	if err != nil {
		t.Fatal(err)
	}
	if st.NegotiatedProtocol != "http/1.1" || st.Version != tls.VersionTLS13 {
		t.Errorf("protocol %q over TLS %x", st.NegotiatedProtocol, st.Version)
	}
	leaf := st.PeerCertificates[0]
	if d := leaf.NotAfter.Sub(b.clock.t); d > serverLife || len(leaf.IPAddresses) > 0 || len(leaf.DNSNames) != 1 {
		t.Errorf("the certificate lives %s for %v and %v", d, leaf.DNSNames, leaf.IPAddresses)
	}
	for _, c := range []*tls.Config{
		{RootCAs: roots, ServerName: "evil.test"},
		{RootCAs: roots, ServerName: "169.254.169.254"},
		{RootCAs: pool(t, b.IdentityRootPEM()), ServerName: ServerName},
		{RootCAs: pool(t, start(t).RootPEM()), ServerName: ServerName},
		{RootCAs: roots, ServerName: ServerName, MaxVersion: tls.VersionTLS11, MinVersion: tls.VersionTLS10},
	} {
		if _, err := b.dial(t, addr, c); err == nil {
			t.Errorf("a connection to %q with TLS at most %x is made", c.ServerName, c.MaxVersion)
		}
	}
}

func TestTheServersCertificateIsRenewedBeforeItEnds(t *testing.T) {
	b := start(t)
	get := func() *x509.Certificate {
		c, err := b.TLSConfig().GetCertificate(nil)
		if err != nil {
			t.Fatal(err)
		}
		return c.Leaf
	}
	first := get()
	b.clock.t = b.clock.t.Add(serverLife/2 - time.Minute)
	if again := get(); !again.Equal(first) {
		t.Error("the certificate changed before half of its life was over")
	}
	b.clock.t = b.clock.t.Add(2 * time.Minute)
	next := get()
	if next.Equal(first) || next.NotAfter.Sub(b.clock.t) != serverLife.Truncate(time.Second)-b.clock.t.Sub(b.clock.t.Truncate(time.Second)) {
		t.Errorf("after half of its life the certificate ends at %s", next.NotAfter)
	}
}

func TestTheRootsStayTheSameAndTheirKeysAreSealed(t *testing.T) {
	b := start(t)
	again := b.open(t)
	if again.RootPEM() != b.RootPEM() || again.IdentityRootPEM() != b.IdentityRootPEM() {
		t.Error("the roots changed when the authority was opened again")
	}
	info, err := os.Stat(string(b.file))
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 {
		t.Errorf("mode %o", info.Mode().Perm())
	}
	saved, err := b.file.Load()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []*root{b.service, b.clients} {
		der, err := x509.MarshalPKCS8PrivateKey(r.key)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(saved, der) || bytes.Contains(r.Sealed, der[len(der)/2:]) {
			t.Error("a private key stands on the disk")
		}
	}
	other, err := token.NewSealer(bytes.Repeat([]byte{1}, 32))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(Config{Host: "host-1", Sealer: other, Store: b.file, Now: b.clock.now}); err == nil {
		t.Error("the authority opens under another master key")
	}
	// One key cannot be put in the place of the other.
	swapped := bytes.NewBuffer(nil)
	swapped.WriteString(strings.NewReplacer("metadata_service", "instance_identity", "instance_identity", "metadata_service").Replace(string(saved)))
	if err := b.file.Save(swapped.Bytes()); err != nil {
		t.Fatal(err)
	}
	if _, err := New(Config{Host: "host-1", Sealer: b.sealer, Store: b.file, Now: b.clock.now}); err == nil {
		t.Error("the roots can be exchanged for each other")
	}
	if err := b.file.Save([]byte("{")); err != nil {
		t.Fatal(err)
	}
	if _, err := New(Config{Host: "host-1", Sealer: b.sealer, Store: b.file, Now: b.clock.now}); err == nil {
		t.Error("a broken file is taken for none")
	}
}

type failing struct{ File }

func (failing) Save([]byte) error { return errors.New("disk full") }

func TestARootThatCannotBeKeptIsNotUsed(t *testing.T) {
	b := start(t)
	f := failing{File(filepath.Join(t.TempDir(), "a"))}
	if _, err := New(Config{Host: "h", Sealer: b.sealer, Store: f, Now: b.clock.now}); err == nil {
		t.Error("the authority opens without having saved its roots")
	}
	if err := File(filepath.Join(t.TempDir(), "missing", "a")).Save(nil); err == nil {
		t.Error("a file in no directory is saved")
	}
}

func TestRootsThatCameToTheirEndAreMadeAnew(t *testing.T) {
	b := start(t)
	b.clock.t = b.clock.t.Add(rootLife - time.Minute)
	again := b.open(t)
	if again.RootPEM() == b.RootPEM() || again.IdentityRootPEM() == b.IdentityRootPEM() {
		t.Error("a root that ends in a minute is used")
	}
	if b.open(t).RootPEM() != again.RootPEM() {
		t.Error("the new root was not kept")
	}
}

// What a thief of the roots' keys could make is worth nothing to those who
// trust the roots.
func TestTheRootsVouchForNothingElse(t *testing.T) {
	b := start(t)
	k := key(t)
	leaf := func(by *root, change func(*x509.Certificate)) *x509.Certificate {
		c := &x509.Certificate{
			Subject: pkix.Name{CommonName: "x"}, NotBefore: b.clock.t.Add(-time.Minute), NotAfter: b.clock.t.Add(time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}
		change(c)
		cert, err := by.sign(c, k.Public())
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	verify := func(by *root, c *x509.Certificate, usage x509.ExtKeyUsage) error {
		_, err := c.Verify(x509.VerifyOptions{
			Roots: pool(t, encode(by.cert)), CurrentTime: b.clock.t, KeyUsages: []x509.ExtKeyUsage{usage},
		})
		return err
	}
	named := leaf(b.service, func(c *x509.Certificate) { c.DNSNames = []string{ServerName} })
	if err := verify(b.service, named, x509.ExtKeyUsageServerAuth); err != nil {
		t.Fatal(err)
	}
	if err := verify(b.service, named, x509.ExtKeyUsageClientAuth); err == nil {
		t.Error("the root that guests trust vouches for a client")
	}
	uri := &url.URL{Scheme: "crn", Opaque: "v1:bluemix"}
	web := &url.URL{Scheme: "https", Host: "evil.test"}
	for name, change := range map[string]func(*x509.Certificate){
		"another name":   func(c *x509.Certificate) { c.DNSNames = []string{"iam.cloud.ibm.com"} },
		"a name beside":  func(c *x509.Certificate) { c.DNSNames = []string{ServerName, "evil.test"} },
		"a wildcard":     func(c *x509.Certificate) { c.DNSNames = []string{"*.metadata.cloud.ibm.com"} },
		"an address":     func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(169, 254, 169, 254)} },
		"an IPv6":        func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv6loopback} },
		"a mail address": func(c *x509.Certificate) { c.EmailAddresses = []string{"root@evil.test"} },
		"a URI":          func(c *x509.Certificate) { c.URIs = []*url.URL{web} },
		"a CRN":          func(c *x509.Certificate) { c.URIs = []*url.URL{uri} },
	} {
		if err := verify(b.service, leaf(b.service, change), x509.ExtKeyUsageServerAuth); err == nil {
			t.Errorf("the root that guests trust vouches for %s", name)
		}
		opensslRefuses(t, b.service, leaf(b.service, change), "sslserver")
	}
	for name, change := range map[string]func(*x509.Certificate){
		"the metadata service": func(c *x509.Certificate) { c.DNSNames = []string{ServerName} },
		"any name":             func(c *x509.Certificate) { c.DNSNames = []string{"evil.test"} },
		"an instance":          func(c *x509.Certificate) { c.URIs = []*url.URL{uri} },
	} {
		if err := verify(b.clients, leaf(b.clients, change), x509.ExtKeyUsageServerAuth); err == nil {
			t.Errorf("the root of instances vouches for %s as a server", name)
		}
		opensslRefuses(t, b.clients, leaf(b.clients, change), "sslserver")
	}
	// Under the root that guests trust there is no other issuer.
	sub := leaf(b.service, func(c *x509.Certificate) {
		c.IsCA, c.BasicConstraintsValid, c.KeyUsage = true, true, x509.KeyUsageCertSign
	})
	below := issuer{sub, k}
	grandchild, err := below.sign(&x509.Certificate{DNSNames: []string{ServerName}, NotBefore: sub.NotBefore, NotAfter: sub.NotAfter}, k.Public())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := grandchild.Verify(x509.VerifyOptions{
		Roots: pool(t, b.RootPEM()), Intermediates: pool(t, encode(sub)), CurrentTime: b.clock.t,
	}); err == nil {
		t.Error("an issuer below the root that guests trust counts")
	}
}

// openssl runs the program, which most guests check certificates with.
func openssl(t testing.TB, stdin string, args ...string) (string, error) {
	t.Helper()
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("needs openssl")
	}
	cmd := exec.CommandContext(t.Context(), "openssl", args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func write(t testing.TB, text string) string {
	t.Helper()
	f := filepath.Join(t.TempDir(), "f.pem")
	if err := os.WriteFile(f, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return f
}

func opensslRefuses(t *testing.T, by *root, c *x509.Certificate, purpose string) {
	t.Helper()
	if out, err := openssl(t, "", "verify", "-purpose", purpose, "-CAfile", write(t, encode(by.cert)), write(t, encode(c))); err == nil {
		t.Errorf("openssl takes a certificate for %v %v %v %v: %s", c.DNSNames, c.IPAddresses, c.EmailAddresses, c.URIs, out)
	}
}

func TestCurlReachesTheService(t *testing.T) {
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("needs curl")
	}
	b := start(t)
	host, port, err := net.SplitHostPort(b.serve(t))
	if err != nil {
		t.Fatal(err)
	}
	get := func(ca string) (string, error) {
		out, err := exec.CommandContext(t.Context(), "curl", "-sS", "--noproxy", "*", "--cacert", write(t, ca),
			"--resolve", ServerName+":"+port+":"+host, "https://"+ServerName+":"+port+"/").CombinedOutput()
		return string(out), err
	}
	if out, err := get(b.RootPEM()); err != nil || out != "HTTP/1.1\n" {
		t.Errorf("%v: %s", err, out)
	}
	if out, err := get(b.IdentityRootPEM()); err == nil {
		t.Errorf("the service is trusted by the root of instances: %s", out)
	}
}

func TestAnIdentityCertificateSaysWhatTheHostKnows(t *testing.T) {
	b := start(t)
	k := key(t)
	r, err := ParseRequest(csr(t, &x509.CertificateRequest{Subject: pkix.Name{
		Country: []string{"DE"}, Province: []string{"Baden-Württemberg"}, Locality: []string{"Konstanz"},
		Organization: []string{"Example"}, OrganizationalUnit: []string{"One", "Two"},
	}}, k))
	if err != nil {
		t.Fatal(err)
	}
	c, err := b.Certify(r, machine, 5*time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Chain) != 2 || c.Expires.Sub(c.Created) != 5*time.Minute {
		t.Fatalf("certificate %+v", c)
	}
	leaf := parse(t, c.Chain[0])
	if s := leaf.Subject; s.CommonName != machine.ID || s.Country[0] != "DE" || s.Province[0] != "Baden-Württemberg" ||
		s.Locality[0] != "Konstanz" || s.Organization[0] != "Example" || len(s.OrganizationalUnit) != 2 {
		t.Errorf("subject %s", s)
	}
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != machine.CRN || len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) > 0 {
		t.Errorf("names %v %v %v %v", leaf.URIs, leaf.DNSNames, leaf.IPAddresses, leaf.EmailAddresses)
	}
	if !k.PublicKey.Equal(leaf.PublicKey) || leaf.IsCA || !leaf.NotAfter.Equal(c.Expires) {
		t.Errorf("key %v, CA %v, ends %s", leaf.PublicKey, leaf.IsCA, leaf.NotAfter)
	}
	opts := x509.VerifyOptions{
		Roots: pool(t, b.IdentityRootPEM()), Intermediates: pool(t, c.Chain[1]), CurrentTime: b.clock.t,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if _, err := leaf.Verify(opts); err != nil {
		t.Error(err)
	}
	opts.KeyUsages = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	if _, err := leaf.Verify(opts); err == nil {
		t.Error("an instance's certificate is one of a server")
	}
	if out, err := openssl(t, "", "verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", write(t, b.IdentityRootPEM()),
		"-untrusted", write(t, c.Chain[1]), write(t, c.Chain[0])); err != nil {
		t.Errorf("openssl: %s", out)
	}
	for _, roots := range []string{b.RootPEM(), start(t).IdentityRootPEM()} {
		opts.Roots, opts.KeyUsages = pool(t, roots), []x509.ExtKeyUsage{x509.ExtKeyUsageAny}
		if _, err := leaf.Verify(opts); err == nil {
			t.Error("an instance's certificate is trusted through another root")
		}
	}
}

// The worst that an instance can do with its certificate: serve others as the
// metadata service.
func TestAnInstanceCannotServeAsTheMetadataService(t *testing.T) {
	b := start(t)
	k := key(t)
	r, err := ParseRequest(csr(t, &x509.CertificateRequest{}, k))
	if err != nil {
		t.Fatal(err)
	}
	c, err := b.Certify(r, machine, MaxIdentityLife)
	if err != nil {
		t.Fatal(err)
	}
	chain := [][]byte{parse(t, c.Chain[0]).Raw, parse(t, c.Chain[1]).Raw}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{{Certificate: chain, PrivateKey: k}}, MinVersion: tls.VersionTLS12})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = conn.(*tls.Conn).Handshake()
			conn.Close()
		}
	}()
	if _, err := b.dial(t, l.Addr().String(), &tls.Config{RootCAs: pool(t, b.RootPEM()), ServerName: ServerName}); err == nil {
		t.Error("a guest takes another one for the metadata service")
	}
}

func TestACertificateNeedsAnInstanceAndALifeWithinBounds(t *testing.T) {
	b := start(t)
	r, err := ParseRequest(csr(t, &x509.CertificateRequest{}, key(t)))
	if err != nil {
		t.Fatal(err)
	}
	for _, life := range []time.Duration{0, -time.Second, MaxIdentityLife + time.Second} {
		if _, err := b.Certify(r, machine, life); err == nil {
			t.Errorf("a certificate lives %s", life)
		}
	}
	for _, i := range []Instance{{}, {ID: "x"}, {CRN: machine.CRN}, {ID: "x", CRN: "https://evil.test"}, {ID: "x", CRN: "%"}} {
		if _, err := b.Certify(r, i, time.Minute); err == nil {
			t.Errorf("a certificate of %+v is made", i)
		}
	}
}

func TestAnIssuerOutlivesWhatItIssues(t *testing.T) {
	b := start(t)
	r, err := ParseRequest(csr(t, &x509.CertificateRequest{}, key(t)))
	if err != nil {
		t.Fatal(err)
	}
	issuers := map[string]bool{}
	for range 20 {
		c, err := b.Certify(r, machine, MaxIdentityLife)
		if err != nil {
			t.Fatal(err)
		}
		by := parse(t, c.Chain[1])
		if by.NotAfter.Before(c.Expires) {
			t.Fatalf("the issuer ends at %s, the certificate at %s", by.NotAfter, c.Expires)
		}
		issuers[c.Chain[1]] = true
		b.clock.t = b.clock.t.Add(intermediateLife / 10)
	}
	if len(issuers) != 2 {
		t.Errorf("%d issuers in two of their lives", len(issuers))
	}
}
