package token_test

import (
	"crypto/elliptic"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/internal/jwt"
	"tabard.dev/tabard/internal/jwt/jwttest"
	"tabard.dev/tabard/internal/token"
)

const (
	issuerURL = "https://tabard.test/identity"
	account   = "4f1e0c00000000000000000000000001"
)

func issue(t testing.TB, i *token.Issuer, change ...func(*token.Claims)) string {
	t.Helper()
	c := token.Claims{IAMID: "iam-Profile-1", Account: token.Account{BSS: account}}
	for _, f := range change {
		f(&c)
	}
	raw, _, err := i.Issue(c, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestAnAccessTokenCarriesWhatItsSubjectIs(t *testing.T) {
	c := newClock()
	_, i := newRing(t, c)
	raw, given, err := i.Issue(token.Claims{
		IAMID: "iam-Profile-1", SubType: token.SubProfile, Name: "my-profile", Account: token.Account{BSS: account}, GrantType: "g",
	}, 10*time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	got, err := i.Verify(raw)
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(*got) != fmt.Sprint(given) {
		t.Errorf("verified %+v, issued %+v", *got, given)
	}
	if got.ID != "iam-Profile-1" || got.RealmID != "iam" || got.Identifier != "Profile-1" || got.Subject != "Profile-1" ||
		got.Issuer != issuerURL || got.JTI == "" || !got.Account.Valid || got.Scope != "ibm openid" {
		t.Errorf("claims %+v", *got)
	}
	if got.Expires-got.IssuedAt != 600 || got.IssuedAt != c.Now().Unix() {
		t.Errorf("iat %d, exp %d", got.IssuedAt, got.Expires)
	}
	other, _, err := i.Issue(token.Claims{IAMID: "iam-Profile-1", Account: token.Account{BSS: account}}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := i.Verify(other); err != nil || again.JTI == got.JTI {
		t.Errorf("two tokens have the id %s, %v", got.JTI, err)
	}
}

func TestAnAccessTokenLivesAnHourAtMost(t *testing.T) {
	c := newClock()
	_, i := newRing(t, c)
	raw, claims, err := i.Issue(token.Claims{IAMID: "iam-Profile-1", Account: token.Account{BSS: account}}, 1000*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if claims.Expires-claims.IssuedAt != 3600 {
		t.Errorf("it lives %d s", claims.Expires-claims.IssuedAt)
	}
	c.advance(time.Hour - time.Second)
	if _, err := i.Verify(raw); err != nil {
		t.Errorf("in its last second: %v", err)
	}
	c.advance(time.Second)
	if _, err := i.Verify(raw); !errors.Is(err, token.ErrExpired) {
		t.Errorf("at its end: %v", err)
	}
}

func TestARefreshTokenAndAnAccessTokenDoNotPassForEachOther(t *testing.T) {
	_, i := newRing(t, newClock())
	access := issue(t, i)
	refresh, _, err := i.IssueRefresh(token.Refresh{IAMID: "iam-Profile-1", AccountID: account})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := i.Verify(refresh); !errors.Is(err, jwt.ErrMalformed) {
		t.Errorf("a refresh token as an access token: %v", err)
	}
	if _, err := i.VerifyRefresh(access); !errors.Is(err, jwt.ErrMalformed) {
		t.Errorf("an access token as a refresh token: %v", err)
	}
	if r, err := i.VerifyRefresh(refresh); err != nil || r.IAMID != "iam-Profile-1" || r.AccountID != account {
		t.Errorf("%+v, %v", r, err)
	}
	// The claims of the one under the type of the other, with our own key.
	for typ, claims := range map[string]any{
		"":       map[string]any{"iss": issuerURL, "iam_id": "iam-Profile-1", "account_id": account, "iat": 1, "exp": int64(1) << 40},
		"at+jwt": map[string]any{"iss": issuerURL, "iam_id": "iam-Profile-1", "account": map[string]any{"bss": account}, "iat": 1, "exp": int64(1) << 40},
	} {
		raw, err := i.Keys.Sign(claims, typ)
		if err != nil {
			t.Fatal(err)
		}
		if c, err := i.Verify(raw); err == nil {
			t.Errorf("typ %q: accepted as %+v", typ, c)
		}
	}
}

func TestARefreshedSessionKeepsItsFirstEnd(t *testing.T) {
	c := newClock()
	_, i := newRing(t, c, func(cfg *token.KeyRingConfig) { cfg.MaxLife = token.RefreshLife })
	raw, first, err := i.IssueRefresh(token.Refresh{IAMID: "iam-Profile-1", AccountID: account})
	if err != nil {
		t.Fatal(err)
	}
	if first.Expires-first.IssuedAt != int64(token.RefreshLife/time.Second) {
		t.Errorf("it lives %d s", first.Expires-first.IssuedAt)
	}
	c.advance(10 * time.Hour)
	old, err := i.VerifyRefresh(raw)
	if err != nil {
		t.Fatal(err)
	}
	again, second, err := i.IssueRefresh(*old)
	if err != nil || second.Expires != first.Expires || second.IssuedAt == first.IssuedAt {
		t.Errorf("the second one lives from %d to %d, the first from %d to %d; %v", second.IssuedAt, second.Expires, first.IssuedAt, first.Expires, err)
	}
	c.advance(token.RefreshLife - 10*time.Hour)
	if _, err := i.VerifyRefresh(again); !errors.Is(err, token.ErrExpired) {
		t.Errorf("at its end: %v", err)
	}
}

// claimsJSON are good claims with some of them replaced; null takes one away.
func claimsJSON(t testing.TB, c *clock, change map[string]any) string {
	t.Helper()
	m := map[string]any{
		"iss": issuerURL, "iam_id": "iam-Profile-1", "account": map[string]any{"valid": true, "bss": account},
		"iat": c.Now().Unix(), "exp": c.Now().Add(time.Hour).Unix(),
	}
	for k, v := range change {
		if m[k] = v; v == nil {
			delete(m, k)
		}
	}
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestClaimsOfOurOwnKeyAreCheckedAllTheSame(t *testing.T) {
	c := newClock()
	k, i := newRing(t, c)
	now := c.Now().Unix()
	for _, tt := range []struct {
		name   string
		change map[string]any
		want   error // nil for good
	}{
		{"as they should be", nil, nil},
		{"another issuer", map[string]any{"iss": "https://other.test/identity"}, token.ErrIssuer},
		{"the issuer with a slash", map[string]any{"iss": issuerURL + "/"}, token.ErrIssuer},
		{"the issuer in upper case", map[string]any{"iss": strings.ToUpper(issuerURL)}, token.ErrIssuer},
		{"no issuer", map[string]any{"iss": nil}, token.ErrIssuer},
		{"an issuer under another name", map[string]any{"iss": nil, "ISS": issuerURL}, token.ErrIssuer},
		{"a list of issuers", map[string]any{"iss": []string{issuerURL}}, jwt.ErrMalformed},
		{"expired", map[string]any{"exp": now - 1}, token.ErrExpired},
		{"expiring now", map[string]any{"exp": now}, token.ErrExpired},
		{"no end", map[string]any{"exp": nil}, token.ErrExpired},
		{"an end of zero", map[string]any{"exp": 0}, token.ErrExpired},
		{"a negative end", map[string]any{"exp": -1}, token.ErrExpired},
		{"an end under another name", map[string]any{"exp": nil, "EXP": now + 60}, token.ErrExpired},
		{"an end that is a text", map[string]any{"exp": "never"}, jwt.ErrMalformed},
		{"an end that is a text of digits", map[string]any{"exp": fmt.Sprint(now + 60)}, jwt.ErrMalformed},
		{"an end that is a fraction", map[string]any{"exp": float64(now) + 60.5}, jwt.ErrMalformed},
		{"an end that is too large for a number", map[string]any{"exp": 1e300}, jwt.ErrMalformed},
		{"made a little in the future", map[string]any{"iat": now + 30}, nil},
		{"made in the future", map[string]any{"iat": now + 31}, token.ErrTime},
		{"no subject", map[string]any{"iam_id": nil}, jwt.ErrMalformed},
		{"an empty subject", map[string]any{"iam_id": ""}, jwt.ErrMalformed},
		{"no account", map[string]any{"account": nil}, jwt.ErrMalformed},
		{"an account that is none", map[string]any{"account": map[string]any{"bss": "../../etc"}}, jwt.ErrMalformed},
		{"an account of another form", map[string]any{"account": account}, jwt.ErrMalformed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			raw, err := k.Sign(json.RawMessage(claimsJSON(t, c, tt.change)), "")
			if err != nil {
				t.Fatal(err)
			}
			got, err := i.Verify(raw)
			if tt.want == nil && err != nil || tt.want != nil && (!errors.Is(err, tt.want) || got != nil) {
				t.Errorf("claims %+v, error %v, want %v", got, err, tt.want)
			}
		})
	}
}

func TestATokenThatIsNotOursIsRefused(t *testing.T) {
	for _, alg := range []string{"ES256", "RS256"} {
		c := newClock()
		k, i := newRing(t, c, func(cfg *token.KeyRingConfig) { cfg.Alg = alg })
		kid := kids(k.JWKS())[0]
		public, ok := k.Public(kid)
		if !ok {
			t.Fatal("no key")
		}
		claims := claimsJSON(t, c, nil)
		attacker := jwttest.Key(t, elliptic.P256())
		good := issue(t, i)
		part := strings.Split(good, ".")
		hostile := map[string]string{
			"no signature":                        jwttest.Sign(t, `{"alg":"none","kid":"`+kid+`"}`, claims, nil, 256),
			"an empty signature":                  jwttest.Sign(t, `{"alg":"`+alg+`","kid":"`+kid+`"}`, claims, nil, 256),
			"our signature dropped":               part[0] + "." + part[1] + ".",
			"our signature on other claims":       part[0] + "." + strings.Split(jwttest.Sign(t, "{}", claims, nil, 256), ".")[1] + "." + part[2],
			"the attacker's key under our key id": jwttest.ES256(t, attacker, kid, claims, ""),
			"the attacker's RSA key":              jwttest.Sign(t, `{"alg":"RS256","kid":"`+kid+`"}`, claims, jwttest.RSA(t), 256),
			"an algorithm we do not use":          jwttest.Sign(t, `{"alg":"ES384","kid":"`+kid+`"}`, claims, jwttest.Key(t, elliptic.P384()), 384),
			"something after it":                  good + ".x",
			"too long":                            good + strings.Repeat("A", jwt.MaxLength),
			"empty":                               "",
			"a claim twice":                       jwttest.ES256(t, attacker, kid, strings.TrimSuffix(claims, "}")+`,"iam_id":"iam-Profile-2"}`, ""),
		}
		for name, secret := range jwttest.SecretsOf(t, public, kid) {
			hostile["HMAC with our public key as "+name] = jwttest.Sign(t, `{"alg":"HS256","kid":"`+kid+`"}`, claims, secret, 256)
		}
		for name, more := range jwttest.Headers(t, attacker, kid) {
			hostile["the header "+name] = jwttest.ES256(t, attacker, kid, claims, more)
		}
		for _, other := range jwttest.KeyIDs {
			hostile[fmt.Sprintf("the key id %q", other)] = jwttest.ES256(t, attacker, other, claims, "")
		}
		for name, raw := range hostile {
			t.Run(alg+" "+name, func(t *testing.T) {
				if c, err := i.Verify(raw); err == nil || c != nil {
					t.Errorf("accepted as %+v", c)
				}
				if r, err := i.VerifyRefresh(raw); err == nil || r != nil {
					t.Errorf("accepted as the refresh token %+v", r)
				}
			})
		}
		if _, err := i.Verify("\n " + good + "\r\n"); err != nil {
			t.Errorf("a good token with white space around it: %v", err)
		}
	}
}

// Key ids are minutes, so two installations easily have the same one.
func TestATokenOfAnotherInstallationIsRefused(t *testing.T) {
	c := newClock()
	k1, ours := newRing(t, c)
	k2, theirs := newRing(t, c)
	if kids(k1.JWKS())[0] != kids(k2.JWKS())[0] {
		t.Fatal("the key ids differ: the test proves nothing")
	}
	if _, err := ours.Verify(issue(t, theirs)); !errors.Is(err, jwt.ErrSignature) {
		t.Errorf("error %v", err)
	}
}

func TestAKeyThatIsGoneVerifiesNothing(t *testing.T) {
	c := newClock()
	k, i := newRing(t, c)
	// A token that outlives its key, as none is ever issued.
	raw, err := k.Sign(json.RawMessage(claimsJSON(t, c, map[string]any{"exp": c.Now().Add(100 * rotation).Unix()})), "")
	if err != nil {
		t.Fatal(err)
	}
	c.advance(rotation + maxLife)
	if _, err := i.Verify(raw); err != nil {
		t.Errorf("while its key is published: %v", err)
	}
	c.advance(time.Second)
	if _, err := i.Verify(raw); !errors.Is(err, token.ErrUnknownKey) {
		t.Errorf("before the rotation removed the key: %v", err)
	}
	if err := k.Rotate(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := i.Verify(raw); !errors.Is(err, token.ErrUnknownKey) {
		t.Errorf("after the rotation removed the key: %v", err)
	}
}
