package authority

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// MaxRequest bounds a certificate request in PEM, in bytes. The largest key
// that is accepted needs less than a tenth of it.
const MaxRequest = 16 << 10

// Request is a certificate request that has been checked: its key is of an
// accepted kind and its sender has the private half.
type Request struct {
	subject pkix.Name // without a common name
	key     crypto.PublicKey
}

// Bounds on a request's subject (RFC 5280 appendix A).
const maxAttributes = 10

// attribute is a part of a name that a request may have.
type attribute struct {
	oid   asn1.ObjectIdentifier
	name  string
	bound int // characters
	into  func(*pkix.Name) *[]string
}

func attributes() []attribute {
	return []attribute{
		{asn1.ObjectIdentifier{2, 5, 4, 6}, "C", 2, func(n *pkix.Name) *[]string { return &n.Country }},
		{asn1.ObjectIdentifier{2, 5, 4, 8}, "ST", 128, func(n *pkix.Name) *[]string { return &n.Province }},
		{asn1.ObjectIdentifier{2, 5, 4, 7}, "L", 128, func(n *pkix.Name) *[]string { return &n.Locality }},
		{asn1.ObjectIdentifier{2, 5, 4, 10}, "O", 64, func(n *pkix.Name) *[]string { return &n.Organization }},
		{asn1.ObjectIdentifier{2, 5, 4, 11}, "OU", 64, func(n *pkix.Name) *[]string { return &n.OrganizationalUnit }},
	}
}

// ParseRequest reads a PKCS #10 certificate request in PEM and checks it by the
// rules of reference/instance-metadata-and-vpc.md section 1.7: the subject has
// nothing but C, ST, L, O and OU, there is no extension, and the signature is
// that of the key. Other attributes are refused with the extensions, because one
// of them is another maker's way to ask for extensions and another holds a
// password. Errors are for the sender.
func ParseRequest(text string) (*Request, error) {
	if len(text) > MaxRequest {
		return nil, fmt.Errorf("it is longer than %d bytes", MaxRequest)
	}
	text = strings.TrimSpace(text)
	block, rest := pem.Decode([]byte(text))
	switch {
	case block == nil || !strings.HasPrefix(text, "-----BEGIN "):
		return nil, errors.New("it is not in PEM")
	case block.Type != "CERTIFICATE REQUEST" && block.Type != "NEW CERTIFICATE REQUEST":
		return nil, errors.New("the PEM block is not of type CERTIFICATE REQUEST")
	case len(block.Headers) > 0 || len(rest) > 0:
		return nil, errors.New("the PEM text holds more than one certificate request")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, errors.New("it is not a PKCS #10 certificate request")
	}
	if err := bare(csr); err != nil {
		return nil, err
	}
	// Before the signature: what checking it costs depends on the key.
	if err := acceptable(csr.PublicKey); err != nil {
		return nil, err
	}
	if !slices.Contains(signatures(), csr.SignatureAlgorithm) {
		return nil, fmt.Errorf("the signature algorithm %s is not accepted; use SHA-256 or stronger", csr.SignatureAlgorithm)
	}
	if csr.CheckSignature() != nil {
		return nil, errors.New("the signature is not that of the key in it")
	}
	subject, err := subjectOf(csr)
	if err != nil {
		return nil, err
	}
	return &Request{subject: subject, key: csr.PublicKey}, nil
}

// bare checks that a request has no attributes, and so no extensions.
func bare(csr *x509.CertificateRequest) error {
	if csr.Version != 0 {
		return errors.New("it is not of version 1")
	}
	if len(csr.Extensions) > 0 {
		return errors.New("it asks for extensions; the certificate has those that the service decides on")
	}
	var tbs struct {
		Raw        asn1.RawContent
		Version    int
		Subject    asn1.RawValue
		PublicKey  asn1.RawValue
		Attributes []asn1.RawValue `asn1:"tag:0"`
	}
	if rest, err := asn1.Unmarshal(csr.RawTBSCertificateRequest, &tbs); err != nil || len(rest) > 0 {
		return errors.New("it is not a PKCS #10 certificate request")
	}
	if len(tbs.Attributes) > 0 {
		return errors.New("it has attributes; make it without extensions and without a challenge password")
	}
	return nil
}

func signatures() []x509.SignatureAlgorithm {
	return []x509.SignatureAlgorithm{
		x509.SHA256WithRSA, x509.SHA384WithRSA, x509.SHA512WithRSA,
		x509.SHA256WithRSAPSS, x509.SHA384WithRSAPSS, x509.SHA512WithRSAPSS,
		x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512,
		x509.PureEd25519,
	}
}

// acceptable checks the kind and size of a key.
func acceptable(key crypto.PublicKey) error {
	switch k := key.(type) {
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < 2048 || n > 4096 {
			return fmt.Errorf("the RSA key has %d bits; 2048 to 4096 are accepted", n)
		}
		// FIPS 186-5 appendix A.1.1.
		if k.E < 1<<16+1 || k.E%2 == 0 || k.N.Bit(0) == 0 {
			return errors.New("the RSA key is not a good one: its exponent must be odd and at least 65537, its modulus odd")
		}
		return nil
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() || k.Curve == elliptic.P384() {
			return nil
		}
		return fmt.Errorf("keys on the curve %s are not accepted; use P-256 or P-384", k.Curve.Params().Name)
	case ed25519.PublicKey:
		return nil
	}
	return errors.New("the key is of a kind that is not accepted; use RSA, ECDSA on P-256 or P-384, or Ed25519")
}

// subjectOf returns the request's subject, made anew of the parts that it may
// have.
func subjectOf(csr *x509.CertificateRequest) (pkix.Name, error) {
	var out pkix.Name
	if len(csr.Subject.Names) > maxAttributes {
		return out, fmt.Errorf("the subject has more than %d parts", maxAttributes)
	}
	allowed := attributes()
	for _, part := range csr.Subject.Names {
		n := slices.IndexFunc(allowed, func(a attribute) bool { return a.oid.Equal(part.Type) })
		if n < 0 {
			if part.Type.Equal(asn1.ObjectIdentifier{2, 5, 4, 3}) {
				return out, errors.New("the subject has a common name; the service sets it to the id of the instance")
			}
			return out, fmt.Errorf("the subject has a part of type %s; only C, ST, L, O and OU are accepted", part.Type)
		}
		a := allowed[n]
		s, ok := part.Value.(string)
		if !ok || s == "" || !utf8.ValidString(s) || utf8.RuneCountInString(s) > a.bound || strings.ContainsFunc(s, unicode.IsControl) {
			return out, fmt.Errorf("the part %s of the subject is not a text of 1 to %d printable characters", a.name, a.bound)
		}
		if a.name == "C" && (len(s) != 2 || strings.ContainsFunc(s, func(r rune) bool { return r < 'A' || r > 'z' || r > 'Z' && r < 'a' })) {
			return out, errors.New("the part C of the subject is not a country code of two letters")
		}
		list := a.into(&out)
		*list = append(*list, s)
	}
	return out, nil
}
