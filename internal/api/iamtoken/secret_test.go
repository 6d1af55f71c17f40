package iamtoken_test

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/token"
)

func TestAUsersAPIKeyGivesAToken(t *testing.T) {
	s := start(t)
	u := s.user(s.Owner.AccountID, "IBMid-ADA")
	key, secret := s.apiKey(s.Owner.AccountID, u.IAMID)
	before := s.clock.now().Unix()
	a := s.post(apiKeyForm(secret))
	m := a.want(200)
	if exp := int64(m["expiration"].(float64)); exp < before+3600 || exp > s.clock.now().Unix()+3600 {
		t.Errorf("expiration %d", exp)
	}
	raw := m["access_token"]
	delete(m, "access_token")
	delete(m, "expiration")
	want := map[string]any{"refresh_token": "not_supported", "token_type": "Bearer", "expires_in": 3600.0, "scope": "ibm openid"}
	if diff := cmp.Diff(want, m); diff != "" {
		t.Errorf("answer:\n%s", diff)
	}
	wantClaims := map[string]any{
		"iam_id": "IBMid-ADA", "id": "IBMid-ADA", "realmid": "IBMid", "identifier": "ADA", "sub": "ada@example.com",
		"name": "Ada Lovelace King", "given_name": "Ada", "family_name": "Lovelace King", "email": "ada@example.com",
		"authn":   map[string]any{"sub": "ada@example.com", "iam_id": "IBMid-ADA", "name": "Ada Lovelace King", "email": "ada@example.com"},
		"account": map[string]any{"valid": true, "bss": s.Owner.AccountID, "frozen": false},
		"iss":     issuerURL, "grant_type": grant.TypeAPIKey, "scope": "ibm openid", "client_id": "default",
		"acr": 1.0, "amr": []any{"pwd"}, "apikey_id": key.ID,
	}
	if diff := cmp.Diff(wantClaims, steady(t, raw, 3600)); diff != "" {
		t.Errorf("claims:\n%s", diff)
	}
	e := s.event(a)
	if e.Action != "iam-identity.user-apikey.login" || e.Outcome != activity.Success || e.AccountID != s.Owner.AccountID ||
		e.Initiator.ID != "IBMid-ADA" || e.Initiator.AuthnID != "IBMid-ADA" || e.Initiator.TypeURI != activity.UserType ||
		e.Initiator.Credential.Type != "apikey" || !strings.HasSuffix(e.Target.ID, ":apikey:"+key.ID) || e.Initiator.Host.Agent != "test-agent/1.0" {
		t.Errorf("event %+v", e)
	}
	if !strings.Contains(string(e.ResponseData), claims(t, raw)["jti"].(string)) {
		t.Errorf("response data %s does not have the token's id", e.ResponseData)
	}
}

func TestAServiceIDsAPIKeyGivesAToken(t *testing.T) {
	s := start(t)
	id := s.serviceID(s.Other.AccountID, "robot")
	key, secret := s.apiKey(s.Other.AccountID, "iam-"+id.ID)
	a := s.post(apiKeyForm(secret))
	want := map[string]any{
		"iam_id": "iam-" + id.ID, "id": "iam-" + id.ID, "realmid": "iam", "identifier": id.ID, "sub": id.ID, "sub_type": "ServiceId",
		"name":    "robot",
		"authn":   map[string]any{"sub": id.ID, "iam_id": "iam-" + id.ID, "sub_type": "ServiceId", "name": "robot"},
		"account": map[string]any{"valid": true, "bss": s.Other.AccountID, "frozen": false},
		"iss":     issuerURL, "grant_type": grant.TypeAPIKey, "scope": "ibm openid", "client_id": "default", "acr": 0.0, "apikey_id": key.ID,
	}
	if diff := cmp.Diff(want, steady(t, a.want(200)["access_token"], 3600)); diff != "" {
		t.Errorf("claims:\n%s", diff)
	}
	e := s.event(a)
	if e.Action != "iam-identity.serviceid-apikey.login" || e.AccountID != s.Other.AccountID || e.Initiator.TypeURI != activity.ServiceIDType ||
		e.Initiator.Credential.Type != "apikey-serviceid" {
		t.Errorf("event %+v", e)
	}
}

func TestTheOwnersKeyWorks(t *testing.T) {
	s := start(t)
	for _, o := range []struct{ account, iamID, secret string }{
		{s.Owner.AccountID, s.Owner.IAMID, s.Owner.APIKey}, {s.Other.AccountID, s.Other.IAMID, s.Other.APIKey},
	} {
		c := claims(t, s.post(apiKeyForm(o.secret)).want(200)["access_token"])
		if c["iam_id"] != o.iamID || c["account"].(map[string]any)["bss"] != o.account {
			t.Errorf("claims %v", c)
		}
	}
}

func TestAnAPIKeyThatDoesNotCountIsRefusedAndToldApart(t *testing.T) {
	s := start(t)
	owner := s.Owner.AccountID
	u := s.user(owner, "IBMid-ADA")
	id := s.serviceID(owner, "robot")

	disabled, disabledSecret := s.apiKey(owner, u.IAMID)
	disabled.Disabled = true
	expired, expiredSecret := s.apiKey(owner, u.IAMID)
	expired.ExpiresAt = s.clock.now().Add(-time.Second)
	ending, endingSecret := s.apiKey(owner, u.IAMID)
	ending.ExpiresAt = s.clock.now().Add(time.Hour)
	deleted, deletedSecret := s.apiKey(owner, u.IAMID)
	_, orphanSecret := s.apiKey(owner, "IBMid-GONE")
	_, orphanIDSecret := s.apiKey(owner, "iam-"+id.ID)
	_, foreignSecret := s.apiKey(s.Other.AccountID, u.IAMID) // he is no user of that account
	s.update(func(tx *directory.Tx) {
		for _, k := range []*identity.APIKey{disabled, expired, ending} {
			s.d.APIKeys.Put(tx, k)
		}
		s.d.APIKeys.Delete(tx, deleted)
		s.d.ServiceIDs.Delete(tx, id)
	})

	for name, c := range map[string]struct{ secret, code, account, check string }{
		"unknown":                     {"no-such-key", grant.CodeKeyNotFound, owner, grant.CheckCredential},
		"the hash for the key":        {disabled.Hash, grant.CodeKeyNotFound, owner, grant.CheckCredential},
		"the id for the key":          {disabled.ID, grant.CodeKeyNotFound, owner, grant.CheckCredential},
		"with a space":                {endingSecret + " ", grant.CodeKeyNotFound, owner, grant.CheckCredential},
		"very long":                   {strings.Repeat("x", 50000), grant.CodeKeyNotFound, owner, grant.CheckCredential},
		"absent":                      {"", grant.CodeMissing, owner, grant.CheckCredential},
		"disabled":                    {disabledSecret, grant.CodeKeyDisabled, owner, grant.CheckCredential},
		"expired":                     {expiredSecret, grant.CodeKeyNotFound, owner, grant.CheckCredential},
		"deleted":                     {deletedSecret, grant.CodeKeyNotFound, owner, grant.CheckCredential},
		"of no user":                  {orphanSecret, grant.CodeUserGone, owner, grant.CheckSubject},
		"of a deleted service ID":     {orphanIDSecret, grant.CodeUserGone, owner, grant.CheckSubject},
		"of another account's member": {foreignSecret, grant.CodeUserGone, s.Other.AccountID, grant.CheckSubject},
	} {
		t.Run(name, func(t *testing.T) {
			defer s.as(t)()
			for _, options := range [][]option{nil, {bx}} {
				a := s.post(apiKeyForm(c.secret), options...)
				if a.status != 400 {
					t.Errorf("status %d", a.status)
				}
				s.refused(a, c.code, c.account, c.check)
			}
		})
	}
	s.post(apiKeyForm(endingSecret)).want(200)
	s.clock.advance(time.Hour)
	s.refused(s.post(apiKeyForm(endingSecret)), grant.CodeKeyNotFound, owner, grant.CheckCredential)
}

func TestTheCommandLinesClientGetsARefreshTokenAndASession(t *testing.T) {
	s := start(t)
	m := s.post(apiKeyForm(s.Owner.APIKey), bx).want(200)
	c := claims(t, m["access_token"])
	if c["client_id"] != "bx" || c["session_id"] != m["session_id"] || !strings.HasPrefix(m["session_id"].(string), "C-") {
		t.Errorf("session %v, claims %v", m["session_id"], c)
	}
	if r := m["refresh_token"].(string); r == "not_supported" || r == m["access_token"] {
		t.Errorf("refresh token %s", r)
	}
}

func TestAnUnknownClientIsRefused(t *testing.T) {
	s := start(t)
	for name, o := range map[string]option{
		"unknown":         basic("nobody", "nobody"),
		"wrong secret":    basic("bx", "wrong"),
		"empty secret":    basic("bx", ""),
		"empty":           basic("", ""),
		"no secret known": basic("kube", ""),
		"not basic":       with("Authorization", "Bearer x"),
		"not base64":      with("Authorization", "Basic !!!"),
	} {
		t.Run(name, func(t *testing.T) {
			defer s.as(t)()
			a := s.post(apiKeyForm(s.Owner.APIKey), o)
			if a.status != 401 {
				t.Errorf("status %d", a.status)
			}
			s.refused(a, grant.CodeClient, s.Owner.AccountID, "request-form")
		})
	}
}

func TestARefreshTokenGivesNewAccessTokensUntilTheSessionEnds(t *testing.T) {
	s := start(t)
	first := s.post(apiKeyForm(s.Owner.APIKey), bx).want(200)
	end := claims(t, first["refresh_token"])["exp"]
	refresh := first["refresh_token"].(string)
	for range 3 {
		s.clock.advance(20 * time.Hour)
		a := s.post(refreshForm(refresh), bx)
		m := a.want(200)
		if m["session_id"] != first["session_id"] {
			t.Errorf("session %v, began as %v", m["session_id"], first["session_id"])
		}
		if c := claims(t, m["access_token"]); c["iam_id"] != s.Owner.IAMID || c["grant_type"] != "refresh_token" {
			t.Errorf("claims %v", c)
		}
		refresh = m["refresh_token"].(string)
		if got := claims(t, refresh)["exp"]; got != end {
			t.Errorf("the session ends at %v, not at %v as it began: it renews itself", got, end)
		}
		if e := s.event(a); e.Action != "iam-identity.user-refreshtoken.login" || e.Initiator.ID != s.Owner.IAMID || e.AccountID != s.Owner.AccountID {
			t.Errorf("event %+v", e)
		}
	}
	s.clock.advance(12 * time.Hour)
	s.refused(s.post(refreshForm(refresh), bx), grant.CodeRefreshExpired, s.Owner.AccountID, grant.CheckCredential)
}

func TestARefreshTokenNeedsItsClientAndItsKey(t *testing.T) {
	s := start(t)
	u := s.user(s.Other.AccountID, "IBMid-ADA")
	key, secret := s.apiKey(s.Other.AccountID, u.IAMID)
	refresh := s.post(apiKeyForm(secret), bx).want(200)["refresh_token"].(string)
	other := s.Other.AccountID

	s.refused(s.post(refreshForm(refresh)), grant.CodeInvalidToken, other, grant.CheckCredential)
	s.post(refreshForm(refresh+"\n"), bx).want(200)

	disabled := *key
	disabled.Disabled = true
	s.update(func(tx *directory.Tx) { s.d.APIKeys.Put(tx, &disabled) })
	s.refused(s.post(refreshForm(refresh), bx), grant.CodeKeyDisabled, other, grant.CheckCredential)
	enabled := disabled
	enabled.Disabled = false
	s.update(func(tx *directory.Tx) { s.d.APIKeys.Put(tx, &enabled) })
	s.post(refreshForm(refresh), bx).want(200)

	s.update(func(tx *directory.Tx) { s.d.Users.Delete(tx, u) })
	s.refused(s.post(refreshForm(refresh), bx), grant.CodeUserGone, other, grant.CheckSubject)
	s.user(other, "IBMid-ADA")
	s.update(func(tx *directory.Tx) { s.d.APIKeys.Delete(tx, &enabled) })
	s.refused(s.post(refreshForm(refresh), bx), grant.CodeInvalidToken, other, grant.CheckCredential)
}

func TestNoOtherTokenPassesForARefreshToken(t *testing.T) {
	s := start(t)
	m := s.post(apiKeyForm(s.Owner.APIKey), bx).want(200)
	refresh, access := m["refresh_token"].(string), m["access_token"].(string)
	k := s.issuer("https://cluster.test")
	k.cluster(s.Owner.AccountID, "my-cluster")
	for name, raw := range map[string]string{
		"an access token":         access,
		"a service-account token": k.token(),
		"garbage":                 "garbage",
		"not_supported":           "not_supported",
		"a tampered one":          refresh[:len(refresh)-8] + "AAAAAAAA",
		"the API key":             s.Owner.APIKey,
	} {
		t.Run(name, func(t *testing.T) {
			defer s.as(t)()
			s.refused(s.post(refreshForm(raw), bx), grant.CodeInvalidToken, s.Owner.AccountID, grant.CheckCredential)
		})
	}
	s.refused(s.post(refreshForm(""), bx), grant.CodeMissing, s.Owner.AccountID, grant.CheckCredential)

	// And a refresh token passes for nothing else.
	if _, err := s.grants.Caller(refresh); err == nil {
		t.Error("a refresh token is accepted as a bearer")
	}
	p := s.profile(s.Owner.AccountID, "p", identity.ProfileIdentity{Type: "user", IAMID: s.Owner.IAMID})
	s.refused(s.post(assumeForm(refresh, "profile_id", p.ID)), grant.CodeInvalidToken, s.Owner.AccountID, grant.CheckCredential)
	s.refused(s.post(crForm(refresh, "profile_id", p.ID)), grant.CodeMalformed, s.Owner.AccountID, "token-form")
	s.refused(s.post(crForm(access, "profile_id", p.ID)), grant.CodeUnsupported, s.Owner.AccountID, "token-issuer")
}

func TestAForgedRefreshTokenWithoutALivingKeyIsRefused(t *testing.T) {
	s := start(t)
	u := s.user(s.Owner.AccountID, "IBMid-ADA")
	key, _ := s.apiKey(s.Owner.AccountID, u.IAMID)
	tokens := &token.Issuer{Keys: s.keys, URL: issuerURL, Now: s.clock.now}
	for name, r := range map[string]token.Refresh{
		"another identity's key": {IAMID: s.Owner.IAMID, AccountID: s.Owner.AccountID, KeyID: key.ID, ClientID: "bx"},
		"no key":                 {IAMID: s.Owner.IAMID, AccountID: s.Owner.AccountID, ClientID: "bx"},
	} {
		raw, _, err := tokens.IssueRefresh(r)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(name, func(t *testing.T) {
			defer s.as(t)()
			s.refused(s.post(refreshForm(raw), bx), grant.CodeInvalidToken, s.Owner.AccountID, grant.CheckCredential)
		})
	}
}
