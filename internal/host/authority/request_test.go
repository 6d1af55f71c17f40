package authority

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"math/big"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/internal/jwt/jwttest"
)

func TestRequestsThatOpenSSLMakesAreTaken(t *testing.T) {
	b := start(t)
	for name, algorithm := range map[string][]string{
		"RSA 2048": {"-newkey", "rsa:2048"},
		"P-256":    {"-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"},
		"P-384":    {"-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-384", "-sha384"},
		"Ed25519":  {"-newkey", "ed25519"},
		"RSA PSS":  {"-newkey", "rsa:2048", "-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:digest"},
	} {
		for _, subject := range []string{"/C=US/ST=Texas/L=Dallas/O=Example/OU=Unit", "/O=Example"} {
			args := append([]string{"req", "-new", "-nodes", "-keyout", filepath.Join(t.TempDir(), "key"), "-subj", subject, "-config", write(t, "[req]\ndistinguished_name=dn\n[dn]\n")}, algorithm...)
			out, err := openssl(t, "", args...)
			if err != nil {
				t.Fatalf("%s: %s", name, out)
			}
			text := out[strings.Index(out, "-----BEGIN"):]
			r, err := ParseRequest(text)
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if _, err := b.Certify(r, machine, time.Minute); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

func generate(t testing.TB, curve elliptic.Curve) crypto.Signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// withAttribute adds an attribute of the request with a well-formed signature.
func withAttribute(t testing.TB, k *ecdsa.PrivateKey, oid asn1.ObjectIdentifier, value string) string {
	t.Helper()
	return csr(t, &x509.CertificateRequest{
		//nolint:staticcheck // SA1019: the only way to write such an attribute
		Attributes: []pkix.AttributeTypeAndValueSET{{Type: oid, Value: [][]pkix.AttributeTypeAndValue{{{Type: oid, Value: value}}}}},
	}, k)
}

func TestWhatARequestMayNotHaveIsRefusedWithItsReason(t *testing.T) {
	k := key(t)
	name := func(n pkix.Name) string { return csr(t, &x509.CertificateRequest{Subject: n}, k) }
	good := name(pkix.Name{Organization: []string{"Example"}})
	if _, err := ParseRequest("\n" + good + "\n\n"); err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode([]byte(good))
	spoilt := append([]byte(nil), block.Bytes...)
	spoilt[len(spoilt)-1] ^= 1
	reason := func(typ string, b []byte) string { return string(pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: b})) }
	small := jwttest.SmallRSA(t)
	extra := func(oid asn1.ObjectIdentifier, value any) pkix.Name {
		return pkix.Name{ExtraNames: []pkix.AttributeTypeAndValue{{Type: oid, Value: value}}}
	}
	for _, c := range []struct{ name, text, reason string }{
		{"nothing", "", "PEM"},
		{"no PEM", "MIIB", "PEM"},
		{"DER", string(block.Bytes), "PEM"},
		{"text before it", "Certificate Request:\n" + good, "PEM"},
		{"two of them", good + good, "more than one"},
		{"a PEM header", strings.Replace(good, "REQUEST-----\n", "REQUEST-----\nProc-Type: 4,ENCRYPTED\n\n", 1), "more than one"},
		{"a certificate", reason("CERTIFICATE", block.Bytes), "type"},
		{"a private key", reason("PRIVATE KEY", block.Bytes), "type"},
		{"garbage in PEM", reason("CERTIFICATE REQUEST", []byte("garbage")), "PKCS #10"},
		{"bytes after it", reason("CERTIFICATE REQUEST", append(append([]byte(nil), block.Bytes...), 0)), "PKCS #10"},
		{"a long one", good + strings.Repeat(" ", MaxRequest), "longer"},
		{"a wrong signature", reason("CERTIFICATE REQUEST", spoilt), "signature"},

		{"a common name", name(pkix.Name{CommonName: "0717_other"}), "common name"},
		{"a serial number", name(pkix.Name{SerialNumber: "1"}), "2.5.4.5"},
		{"a street", name(pkix.Name{StreetAddress: []string{"x"}}), "2.5.4.9"},
		{"a mail address", name(extra(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 1}, "root@evil.test")), "1.2.840.113549.1.9.1"},
		{"a domain component", name(extra(asn1.ObjectIdentifier{0, 9, 2342, 19200300, 100, 1, 25}, "test")), "0.9.2342"},
		{"a number as organization", name(extra(asn1.ObjectIdentifier{2, 5, 4, 10}, 7)), "part O"},
		{"an empty organization", name(pkix.Name{Organization: []string{""}}), "part O"},
		{"a long organization", name(pkix.Name{Organization: []string{strings.Repeat("x", 65)}}), "part O"},
		{"a line break in the unit", name(pkix.Name{OrganizationalUnit: []string{"x\ny"}}), "part OU"},
		{"a NUL in the locality", name(pkix.Name{Locality: []string{"x\x00.evil.test"}}), "part L"},
		{"a country of three letters", name(pkix.Name{Country: []string{"USA"}}), "part C"},
		{"a country of digits", name(pkix.Name{Country: []string{"12"}}), "country code"},
		{"many parts", name(pkix.Name{OrganizationalUnit: strings.Split(strings.Repeat("x ", 11)[:21], " ")}), "more than 10"},

		{"a DNS name", csr(t, &x509.CertificateRequest{DNSNames: []string{ServerName}}, k), "extensions"},
		{"an address", csr(t, &x509.CertificateRequest{IPAddresses: []net.IP{net.IPv4(169, 254, 169, 254)}}, k), "extensions"},
		{"the wish to be an issuer", csr(t, &x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Value: []byte{0x30, 3, 1, 1, 0xff}}}}, k), "extensions"},
		{"a challenge password", withAttribute(t, k, asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 7}, "secret"), "attributes"},
		{"another maker's extensions", withAttribute(t, k, asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 2, 1, 14}, "x"), "attributes"},

		{"a small RSA key", csr(t, &x509.CertificateRequest{}, small), "1024 bits"},
		{"P-224", csr(t, &x509.CertificateRequest{}, generate(t, elliptic.P224())), "P-224"},
		{"P-521", csr(t, &x509.CertificateRequest{}, generate(t, elliptic.P521())), "P-521"},
		{"SHA-1", weakHash(t), "SHA1"},
	} {
		r, err := ParseRequest(c.text)
		if r != nil || err == nil || !strings.Contains(err.Error(), c.reason) {
			t.Errorf("%s: %v, want an error about %q", c.name, err, c.reason)
		}
	}
}

// weakHash is a request signed with SHA-1.
func weakHash(t testing.TB) string {
	t.Helper()
	out, err := openssl(t, "", "req", "-new", "-sha1", "-nodes", "-newkey", "rsa:2048", "-keyout", filepath.Join(t.TempDir(), "key"),
		"-subj", "/O=Example", "-config", write(t, "[req]\ndistinguished_name=dn\n[dn]\n"))
	if err != nil {
		t.Fatal(out)
	}
	return out[strings.Index(out, "-----BEGIN"):]
}

// A key may cost those who check signatures with it no more than a good one.
func TestAKeyOfABadShapeIsRefusedBeforeItIsUsed(t *testing.T) {
	n := new(big.Int).Lsh(big.NewInt(1), 2047)
	for name, k := range map[string]*rsa.PublicKey{
		"an even modulus":    {N: n, E: 65537},
		"a small exponent":   {N: new(big.Int).SetBit(n, 0, 1), E: 3},
		"an even exponent":   {N: new(big.Int).SetBit(n, 0, 1), E: 65538},
		"too many bits":      {N: new(big.Int).SetBit(new(big.Int), 4096, 1), E: 65537},
		"a huge number":      {N: new(big.Int).SetBit(new(big.Int), 100_000, 1), E: 65537},
		"a bit less than it": {N: new(big.Int).SetBit(new(big.Int), 2046, 1), E: 65537},
	} {
		if acceptable(k) == nil {
			t.Errorf("a key with %s is accepted", name)
		}
	}
	if acceptable(&rsa.PublicKey{N: new(big.Int).SetBit(n, 0, 1), E: 65537}) != nil {
		t.Error("a key of a good shape is refused")
	}
	if acceptable("text") == nil {
		t.Error("a key of no kind is accepted")
	}
}

// Whatever is taken, the certificate is about the instance and says nothing
// that the host did not decide on.
func FuzzParseRequest(f *testing.F) {
	k := key(f)
	_, edwards, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	for _, signer := range []crypto.Signer{k, edwards} {
		for _, r := range []*x509.CertificateRequest{
			{}, {Subject: pkix.Name{Country: []string{"US"}, Organization: []string{"Example"}}}, {Subject: pkix.Name{CommonName: "x"}},
			{DNSNames: []string{"evil.test"}},
		} {
			block, _ := pem.Decode([]byte(csr(f, r, signer)))
			f.Add(block.Bytes)
		}
	}
	b := start(f)
	f.Fuzz(func(t *testing.T, der []byte) {
		r, err := ParseRequest(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})))
		if err != nil {
			if len(err.Error()) > 200 {
				t.Errorf("a long error: %v", err)
			}
			return
		}
		c, err := b.Certify(r, machine, time.Minute)
		if err != nil {
			t.Fatalf("a request that was taken cannot be certified: %v", err)
		}
		leaf := parse(t, c.Chain[0])
		if leaf.Subject.CommonName != machine.ID || leaf.IsCA || len(leaf.URIs) != 1 || leaf.URIs[0].String() != machine.CRN ||
			len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) > 0 || len(leaf.Extensions) != 4 {
			t.Errorf("certificate of %s with %v", leaf.Subject, leaf.Extensions)
		}
	})
}
