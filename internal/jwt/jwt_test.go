package jwt_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"tabard.dev/tabard/internal/jwt"
	"tabard.dev/tabard/internal/jwt/jwttest"
)

type claims struct {
	Issuer  string `json:"iss"`
	Subject string `json:"sub"`
}

const payload = `{"iss":"https://issuer","sub":"somebody"}`

// verify does with a token what every verifier does.
func verify(raw string, key any) (claims, error) {
	var c claims
	t, err := jwt.Parse(raw, jwt.Asymmetric, "", "JWT")
	if err != nil {
		return c, err
	}
	return c, t.Verify(key, &c)
}

func wantRefused(t *testing.T, raw string, key any) {
	t.Helper()
	c, err := verify(raw, key)
	if err == nil {
		t.Fatal("accepted")
	}
	if !errors.Is(err, jwt.ErrMalformed) && !errors.Is(err, jwt.ErrSignature) {
		t.Errorf("error %v is of no kind", err)
	}
	if errors.Is(err, jwt.ErrSignature) && c != (claims{}) {
		t.Errorf("a token that does not verify gave claims %+v", c)
	}
}

func TestATokenOfEachAlgorithmVerifies(t *testing.T) {
	rsa := jwttest.RSA(t)
	for alg, key := range map[string]crypto.Signer{
		"RS256": rsa, "RS384": rsa, "RS512": rsa,
		"ES256": jwttest.Key(t, elliptic.P256()), "ES384": jwttest.Key(t, elliptic.P384()), "ES512": jwttest.Key(t, elliptic.P521()),
	} {
		var bits int
		if _, err := fmt.Sscanf(alg[2:], "%d", &bits); err != nil {
			t.Fatal(err)
		}
		for _, typ := range []string{"", `,"typ":"JWT"`, `,"typ":"jwt"`} {
			raw := jwttest.Sign(t, `{"alg":"`+alg+`","kid":"k1"`+typ+`}`, payload, key, bits)
			c, err := verify(raw, key.Public())
			if err != nil || c.Issuer != "https://issuer" || c.Subject != "somebody" {
				t.Errorf("%s%s: %+v, %v", alg, typ, c, err)
			}
		}
	}
}

func TestATokenWithoutASignatureIsRefused(t *testing.T) {
	key := jwttest.Key(t, elliptic.P256())
	for _, alg := range []string{"none", "None", "NONE", "nOnE", "", " none"} {
		t.Run(alg, func(t *testing.T) {
			wantRefused(t, jwttest.Sign(t, `{"alg":"`+alg+`","kid":"k1"}`, payload, nil, 256), key.Public())
			wantRefused(t, jwttest.Sign(t, `{"alg":"`+alg+`","kid":"k1"}`, payload, key, 256), key.Public())
		})
	}
	t.Run("no alg", func(t *testing.T) { wantRefused(t, jwttest.Sign(t, `{"kid":"k1"}`, payload, key, 256), key.Public()) })
	t.Run("an empty signature", func(t *testing.T) {
		wantRefused(t, jwttest.Sign(t, `{"alg":"ES256","kid":"k1"}`, payload, nil, 256), key.Public())
	})
	t.Run("an empty signature of RSA", func(t *testing.T) {
		wantRefused(t, jwttest.Sign(t, `{"alg":"RS256","kid":"k1"}`, payload, nil, 256), jwttest.RSA(t).Public())
	})
	t.Run("a signature of zeros", func(t *testing.T) {
		signed := strings.TrimSuffix(jwttest.Sign(t, `{"alg":"ES256","kid":"k1"}`, payload, nil, 256), ".")
		wantRefused(t, signed+"."+base64.RawURLEncoding.EncodeToString(make([]byte, 64)), key.Public())
	})
}

func TestAPublicKeyIsNoSharedSecret(t *testing.T) {
	for _, public := range []crypto.PublicKey{jwttest.Key(t, elliptic.P256()).Public(), jwttest.RSA(t).Public()} {
		for name, secret := range jwttest.SecretsOf(t, public, "k1") {
			for _, bits := range []int{256, 384, 512} {
				t.Run(fmt.Sprintf("%T as %s with HS%d", public, name, bits), func(t *testing.T) {
					wantRefused(t, jwttest.Sign(t, fmt.Sprintf(`{"alg":"HS%d","kid":"k1"}`, bits), payload, secret, bits), public)
					// The same signature under a name that is accepted.
					wantRefused(t, jwttest.Sign(t, `{"alg":"ES256","kid":"k1"}`, payload, secret, bits), public)
					wantRefused(t, jwttest.Sign(t, `{"alg":"RS256","kid":"k1"}`, payload, secret, bits), public)
				})
			}
		}
	}
}

func TestAHeaderCannotBringItsOwnKey(t *testing.T) {
	key, attacker := jwttest.Key(t, elliptic.P256()), jwttest.Key(t, elliptic.P256())
	for name, more := range jwttest.Headers(t, attacker, "k1") {
		t.Run(name, func(t *testing.T) {
			wantRefused(t, jwttest.ES256(t, attacker, "k1", payload, more), key.Public())
			// Even with a good signature such a header is not taken.
			wantRefused(t, jwttest.ES256(t, key, "k1", payload, more), key.Public())
		})
	}
	t.Run("a certificate", func(t *testing.T) {
		wantRefused(t, jwttest.ES256(t, attacker, "k1", payload, `,"x5c":["AAAA"]`), key.Public())
		wantRefused(t, jwttest.ES256(t, attacker, "k1", payload, `,"x5c":[]`), key.Public())
	})
}

func TestAThumbprintInAnIssuersTokenSaysNothing(t *testing.T) {
	key, attacker := jwttest.Key(t, elliptic.P256()), jwttest.Key(t, elliptic.P256())
	for _, more := range []string{`,"x5t":"AAAA"`, `,"x5t#S256":"AAAA"`, `,"typ":"JWT","x5t":"AAAA"`} {
		parsed, err := jwt.ParseOfIssuer(jwttest.ES256(t, key, "k1", payload, more), jwt.Asymmetric, "", "JWT")
		if err != nil || parsed.KeyID != "k1" {
			t.Fatalf("%s: %+v, %v", more, parsed, err)
		}
		if err := parsed.Verify(key.Public()); err != nil {
			t.Errorf("%s: %v", more, err)
		}
		parsed, err = jwt.ParseOfIssuer(jwttest.ES256(t, attacker, "k1", payload, more), jwt.Asymmetric, "", "JWT")
		if err == nil && parsed.Verify(key.Public()) == nil {
			t.Errorf("%s: the attacker's signature verifies", more)
		}
	}
	for name, more := range jwttest.Headers(t, attacker, "k1") {
		if name == "x5t" {
			continue
		}
		if _, err := jwt.ParseOfIssuer(jwttest.ES256(t, key, "k1", payload, more), jwt.Asymmetric, "", "JWT"); err == nil {
			t.Errorf("the header %s is taken", name)
		}
	}
}

func TestAKeyOfAnotherKindIsRefused(t *testing.T) {
	p256, p384, p521 := jwttest.Key(t, elliptic.P256()), jwttest.Key(t, elliptic.P384()), jwttest.Key(t, elliptic.P521())
	p224 := jwttest.Key(t, elliptic.P224())
	rsa := jwttest.RSA(t)
	for _, tt := range []struct {
		name, alg string
		signer    crypto.Signer
		bits      int
		key       any
	}{
		{"RS256 header on an elliptic-curve key", "RS256", p256, 256, p256.Public()},
		{"ES256 header on an RSA key", "ES256", rsa, 256, rsa.Public()},
		{"ES384 header on a P-256 key", "ES384", p256, 384, p256.Public()},
		{"ES512 header on a P-256 key", "ES512", p256, 512, p256.Public()},
		{"ES256 header on a P-384 key", "ES256", p384, 256, p384.Public()},
		{"ES256 header on a P-521 key", "ES256", p521, 256, p521.Public()},
		{"ES256 header on a P-224 key", "ES256", p224, 256, p224.Public()},
		{"PS256 header on an RSA key", "PS256", rsa, 256, rsa.Public()},
		{"the wrong hash", "RS256", rsa, 384, rsa.Public()},
		{"another key of the same kind", "ES256", jwttest.Key(t, elliptic.P256()), 256, p256.Public()},
		{"the private key in place of the public one", "ES256", p256, 256, p256},
		{"a private RSA key in place of the public one", "RS256", rsa, 256, rsa},
		{"a JSON web key in place of the key", "ES256", p256, 256, jwttest.JWK(p256.Public(), "k1", "ES256")},
		{"a key set in place of the key", "ES256", p256, 256, &jose.JSONWebKeySet{Keys: []jose.JSONWebKey{jwttest.JWK(p256.Public(), "k1", "")}}},
		{"bytes in place of the key", "ES256", p256, 256, []byte("secret")},
		{"an Ed25519 key", "ES256", p256, 256, make(ed25519.PublicKey, ed25519.PublicKeySize)},
		{"no key", "ES256", p256, 256, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			wantRefused(t, jwttest.Sign(t, `{"alg":"`+tt.alg+`","kid":"k1"}`, payload, tt.signer, tt.bits), tt.key)
		})
	}
}

func TestASmallRSAKeyIsRefused(t *testing.T) {
	key := jwttest.SmallRSA(t)
	wantRefused(t, jwttest.Sign(t, `{"alg":"RS256","kid":"k1"}`, payload, key, 256), key.Public())
}

func TestATokenThatIsNotACompactJWSIsRefused(t *testing.T) {
	key := jwttest.Key(t, elliptic.P256())
	good := jwttest.ES256(t, key, "k1", payload, "")
	part := strings.Split(good, ".")
	flat, err := json.Marshal(map[string]string{"protected": part[0], "payload": part[1], "signature": part[2]})
	if err != nil {
		t.Fatal(err)
	}
	general := fmt.Sprintf(`{"payload":%q,"signatures":[{"protected":%q,"signature":%q}]}`, part[1], part[0], part[2])
	dotted := fmt.Sprintf(`{"protected":%q,"payload":%q,"signature":%q,"x":".."}`, part[0], part[1], part[2])
	for name, raw := range map[string]string{
		"nothing":                    "",
		"dots":                       "..",
		"one dot":                    part[0] + "." + part[1],
		"a fourth part":              good + ".x",
		"an empty fourth part":       good + ".",
		"a leading dot":              "." + good,
		"five parts":                 good + ".x.y",
		"flattened JSON":             string(flat),
		"general JSON":               general,
		"JSON with two dots in it":   dotted,
		"no header":                  "." + part[1] + "." + part[2],
		"no payload":                 part[0] + ".." + part[2],
		"a payload of another token": part[0] + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"iss":"https://issuer","sub":"root"}`)) + "." + part[2],
		"trailing letters":           good + "AAAA",
		"trailing JSON":              good + `{"x":1}`,
		"a space in the middle":      part[0] + ". " + part[1] + "." + part[2],
		"padding":                    part[0] + "=." + part[1] + "." + part[2],
		"standard base64":            strings.NewReplacer("-", "+", "_", "/").Replace(good) + "+/",
		"a NUL at the end":           good + "\x00",
		"a header that is no JSON":   jwttest.Sign(t, `{"alg":"ES256"`, payload, key, 256),
		"a header that is a list":    jwttest.Sign(t, `["ES256"]`, payload, key, 256),
		"a header and more":          jwttest.Sign(t, `{"alg":"ES256","kid":"k1"}{"alg":"none"}`, payload, key, 256),
		"a number as kid":            jwttest.Sign(t, `{"alg":"ES256","kid":1}`, payload, key, 256),
		"a list as alg":              jwttest.Sign(t, `{"alg":["ES256"],"kid":"k1"}`, payload, key, 256),
		"a truncated signature":      good[:len(good)-4],
		"a JWE":                      "eyJhbGciOiJkaXIiLCJlbmMiOiJBMjU2R0NNIn0..AAAA.AAAA.AAAA",
	} {
		t.Run(name, func(t *testing.T) { wantRefused(t, raw, key.Public()) })
	}
}

func TestClaimsThatAreNotOneObjectWithEachNameOnceAreRefused(t *testing.T) {
	key := jwttest.Key(t, elliptic.P256())
	for name, p := range map[string]string{
		"a claim twice":             `{"iss":"https://issuer","sub":"a","iss":"https://other"}`,
		"a claim twice the same":    `{"iss":"https://issuer","iss":"https://issuer"}`,
		"an unknown claim twice":    `{"iss":"https://issuer","x":1,"x":2}`,
		"a claim twice by escape":   `{"iss":"https://issuer","\u0069ss":"https://other"}`,
		"a list":                    `[{"iss":"https://issuer"}]`,
		"a text":                    `"iss"`,
		"a number":                  `1`,
		"nothing":                   ``,
		"an unfinished object":      `{"iss":"https://issuer"`,
		"an object and more":        `{"iss":"https://issuer"}{"iss":"https://other"}`,
		"an object and text":        `{"iss":"https://issuer"} x`,
		"a number where a text is":  `{"iss":1}`,
		"a list where a text is":    `{"iss":["https://issuer"]}`,
		"an object where a text is": `{"sub":{}}`,
		"a boolean where a text is": `{"sub":true}`,
	} {
		t.Run(name, func(t *testing.T) {
			raw := jwttest.ES256(t, key, "k1", p, "")
			wantRefused(t, raw, key.Public())
			token, err := jwt.Parse(raw, jwt.Asymmetric, "")
			if err != nil {
				return
			}
			if err := token.Unverified(&claims{}); !errors.Is(err, jwt.ErrMalformed) {
				t.Errorf("unverified claims: error %v", err)
			}
		})
	}
}

func TestNamesOfClaimsMindTheCase(t *testing.T) {
	key := jwttest.Key(t, elliptic.P256())
	for _, p := range []string{
		`{"ISS":"https://issuer","Sub":"root"}`, `{"Iss":"https://issuer"}`, `{"iſs":"https://issuer"}`, `{"iss ":"https://issuer"}`,
	} {
		c, err := verify(jwttest.ES256(t, key, "k1", p, ""), key.Public())
		if err != nil || c != (claims{}) {
			t.Errorf("%s gave %+v, %v", p, c, err)
		}
	}
	c, err := verify(jwttest.ES256(t, key, "k1", `{"ISS":"https://other","iss":"https://issuer","Iss":"https://other"}`, ""), key.Public())
	if err != nil || c.Issuer != "https://issuer" {
		t.Errorf("got %+v, %v", c, err)
	}
}

func TestATokenOfAnotherTypeIsRefused(t *testing.T) {
	key := jwttest.Key(t, elliptic.P256())
	for _, tt := range []struct {
		typ   string
		types []string
		want  bool
	}{
		{``, []string{""}, true},
		{`,"typ":""`, []string{""}, true},
		{`,"typ":"JWT"`, []string{"", "JWT"}, true},
		{`,"typ":"JWT"`, []string{""}, false},
		{``, []string{"rt+jwt"}, false},
		{`,"typ":"rt+jwt"`, []string{""}, false},
		{`,"typ":"rt+jwt"`, []string{"rt+jwt"}, true},
		{`,"typ":"RT+JWT"`, []string{"rt+jwt"}, true},
		{`,"typ":"at+jwt"`, []string{"", "JWT"}, false},
		{`,"typ":"application/rt+jwt"`, []string{"rt+jwt"}, false},
		{`,"typ":null`, []string{"JWT"}, false},
		{``, nil, false},
	} {
		token, err := jwt.Parse(jwttest.ES256(t, key, "k1", payload, tt.typ), jwt.Asymmetric, tt.types...)
		if (err == nil) != tt.want {
			t.Errorf("typ %q for %q: %v, %v", tt.typ, tt.types, token, err)
		}
	}
}

func TestOnlyTheAlgorithmsOfTheListAreAccepted(t *testing.T) {
	key := jwttest.Key(t, elliptic.P384())
	raw := jwttest.Sign(t, `{"alg":"ES384","kid":"k1"}`, payload, key, 384)
	if _, err := jwt.Parse(raw, []jose.SignatureAlgorithm{jose.ES256, jose.RS256}, ""); !errors.Is(err, jwt.ErrMalformed) {
		t.Errorf("error %v", err)
	}
	if _, err := jwt.Parse(raw, nil, ""); !errors.Is(err, jwt.ErrMalformed) {
		t.Errorf("with an empty list: error %v", err)
	}
	for _, alg := range jwt.Asymmetric {
		if strings.HasPrefix(string(alg), "HS") || strings.EqualFold(string(alg), "none") {
			t.Errorf("%s is accepted from clusters", alg)
		}
	}
}

func TestATokenThatIsTooLongIsRefusedBeforeItIsRead(t *testing.T) {
	key := jwttest.Key(t, elliptic.P256())
	fill := func(n int) string {
		return jwttest.ES256(t, key, "k1", `{"iss":"`+strings.Repeat("x", n)+`"}`, "")
	}
	n := jwt.MaxLength / 2
	for len(fill(n)) < jwt.MaxLength-2 {
		n++
	}
	if _, err := verify(fill(n), key.Public()); err != nil {
		t.Errorf("%d bytes: %v", len(fill(n)), err)
	}
	wantRefused(t, fill(n+8), key.Public())
	wantRefused(t, strings.Repeat("A", 64<<20), key.Public())
	wantRefused(t, strings.Repeat(".", jwt.MaxLength), key.Public())
	wantRefused(t, fill(n)+strings.Repeat(" ", jwt.MaxLength), key.Public())
}

func TestDeeplyNestedClaimsAreRefused(t *testing.T) {
	key := jwttest.Key(t, elliptic.P256())
	deep := strings.Repeat(`{"x":`, 2000) + "1" + strings.Repeat("}", 2000)
	if _, err := verify(jwttest.ES256(t, key, "k1", deep, ""), key.Public()); err != nil && !errors.Is(err, jwt.ErrMalformed) {
		t.Errorf("error %v", err)
	}
}

// FuzzToken parses what a caller could send. Nothing panics, what verifies was
// signed by the key, and every error is of a kind.
func FuzzToken(f *testing.F) {
	key := jwttest.Key(f, elliptic.P256())
	public := key.Public().(*ecdsa.PublicKey)
	f.Add(`{"alg":"ES256","kid":"k1"}`, payload, []byte{0})
	f.Fuzz(func(t *testing.T, header, payload string, sig []byte) {
		encode := base64.RawURLEncoding.EncodeToString
		forged := encode([]byte(header)) + "." + encode([]byte(payload)) + "." + encode(sig)
		for _, raw := range []string{header, forged} {
			token, err := jwt.Parse(raw, jwt.Asymmetric, "", "JWT")
			if err != nil {
				if !errors.Is(err, jwt.ErrMalformed) {
					t.Errorf("error %v is of no kind", err)
				}
				continue
			}
			var unverified claims
			if err := token.Unverified(&unverified); err != nil && !errors.Is(err, jwt.ErrMalformed) {
				t.Errorf("error %v is of no kind", err)
			}
			if err := token.Verify(public, &claims{}); !errors.Is(err, jwt.ErrSignature) && !errors.Is(err, jwt.ErrMalformed) {
				t.Errorf("%q verifies: %v", raw, err)
			}
		}
		// With a real signature the header and claims decide.
		raw := jwttest.Sign(t, header, payload, key, 256)
		token, err := jwt.Parse(raw, jwt.Asymmetric, "", "JWT")
		if err != nil {
			return
		}
		var verified, unverified claims
		err = token.Verify(public, &verified)
		if err == nil && token.Alg != "ES256" {
			t.Errorf("%q verifies with alg %q", header, token.Alg)
		}
		if again := token.Unverified(&unverified); err == nil && (again != nil || verified != unverified) {
			t.Errorf("verified %+v, unverified %+v, %v", verified, unverified, again)
		}
		// No claim may be there that another reader of JSON would not see.
		var plain map[string]any
		if err == nil && json.Unmarshal([]byte(payload), &plain) == nil {
			if iss, _ := plain["iss"].(string); iss != verified.Issuer {
				t.Errorf("iss %q, another reader sees %q in %q", verified.Issuer, iss, payload)
			}
		}
	})
}
