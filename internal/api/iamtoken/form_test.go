package iamtoken_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"

	"tabard.dev/tabard/internal/grant"
)

func TestOnlyPOSTGetsTokens(t *testing.T) {
	s := start(t)
	for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodPut, http.MethodDelete, http.MethodPatch, http.MethodOptions} {
		target := "/identity/token?" + apiKeyForm(s.Owner.APIKey).Encode()
		a := s.do(httptest.NewRequest(method, target, nil))
		a.wantError(405, "BXNIM0060E")
		if a.header.Get("Allow") != http.MethodPost {
			t.Errorf("%s: Allow %q", method, a.header.Get("Allow"))
		}
	}
}

func TestTheFormIsReadStrictly(t *testing.T) {
	s := start(t)
	key := "grant_type=" + grant.TypeAPIKey + "&apikey=" + s.Owner.APIKey
	many := key
	for n := range 40 {
		many += fmt.Sprintf("&f%d=x", n)
	}
	for name, c := range map[string]struct {
		path, body, contentType string
		status                  int
		code, about             string
	}{
		"empty":                     {"", "", formType, 400, grant.CodeMissing, "'grant_type'"},
		"no grant_type":             {"", "apikey=x", formType, 400, grant.CodeMissing, "'grant_type'"},
		"empty grant_type":          {"", "grant_type=&apikey=x", formType, 400, grant.CodeMissing, "'grant_type'"},
		"unknown grant_type":        {"", "grant_type=password", formType, 400, grant.CodeMissing, "password"},
		"short grant_type":          {"", "grant_type=apikey&apikey=" + s.Owner.APIKey, formType, 400, grant.CodeMissing, "apikey"},
		"everything in the URL":     {"?" + key, "", formType, 400, grant.CodeMissing, "'grant_type'"},
		"the secret in the URL":     {"?apikey=" + s.Owner.APIKey, "grant_type=" + grant.TypeAPIKey, formType, 400, grant.CodeMissing, "'apikey'"},
		"a doubled field":           {"", key + "&apikey=x", formType, 400, "BXNIM0107E", "apikey"},
		"a doubled equal field":     {"", key + "&apikey=" + s.Owner.APIKey, formType, 400, "BXNIM0107E", "apikey"},
		"a doubled grant_type":      {"", key + "&grant_type=" + grant.TypeCRToken, formType, 400, "BXNIM0107E", "grant_type"},
		"a doubled unknown field":   {"", key + "&x=1&x=2", formType, 400, "BXNIM0107E", "x"},
		"too many fields":           {"", many, formType, 400, "BXNIM0107E", "32"},
		"a broken escape":           {"", key + "&x=%zz", formType, 400, "BXNIM0107E", ""},
		"a semicolon":               {"", "grant_type=" + grant.TypeAPIKey + ";apikey=" + s.Owner.APIKey, formType, 400, "BXNIM0107E", ""},
		"too large":                 {"", key + "&x=" + strings.Repeat("x", 64<<10), formType, 413, "BXNIM0106E", "65536"},
		"JSON":                      {"", `{"grant_type":"x"}`, "application/json", 415, "BXNIM0105E", "x-www-form-urlencoded"},
		"multipart":                 {"", key, "multipart/form-data; boundary=x", 415, "BXNIM0105E", ""},
		"a type that is none":       {"", key, "////", 415, "BXNIM0105E", ""},
		"no content type":           {"", key, "", 400, grant.CodeMissing, "'grant_type'"},
		"a content type with space": {"", key, formType + " ; charset=UTF-8", 200, "", ""},
		"a content type in caps":    {"", key, "Application/X-WWW-Form-Urlencoded", 200, "", ""},
		"unknown fields":            {"", key + "&response_type=cloud_iam&extra=1", formType, 200, "", ""},
		"parameters in the URL too": {"?account=x&apikey=y", key, formType, 200, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			defer s.as(t)()
			a := s.send("/identity/token"+c.path, c.body, with("Content-Type", c.contentType))
			if c.status == 200 {
				a.want(200)
				return
			}
			m := a.wantError(c.status, c.code)
			if d := fmt.Sprint(m["errorMessage"], m["errorDetails"]); !strings.Contains(d, c.about) {
				t.Errorf("the error says %q, want something about %q", d, c.about)
			}
			if strings.Contains(a.raw, s.Owner.APIKey) {
				t.Errorf("the answer repeats the secret: %s", a.raw)
			}
			e := s.event(a)
			if _, explained := e.Trace.Failed(); !explained || e.AccountID != s.Owner.AccountID || e.Reason.Code != c.status {
				t.Errorf("event %+v", e)
			}
		})
	}
}

const formType = "application/x-www-form-urlencoded"

func TestSpacesAndNewlinesComeAsClientsSendThem(t *testing.T) {
	s := start(t)
	k := s.issuer("https://cluster.test")
	p := s.profile(s.Owner.AccountID, "my prof")
	s.link(p, k.cluster(s.Owner.AccountID, "c"))
	for _, encoded := range []string{"my+prof&scope=openid+ibm", "my%20prof&scope=openid%20ibm"} {
		body := "cr_token=" + k.token() + "%0A&grant_type=urn%3Aibm%3Aparams%3Aoauth%3Agrant-type%3Acr-token&profile_id=" + p.ID + "&profile_name=" + encoded
		m := s.send("/identity/token", body).want(200)
		if c := claims(t, m["access_token"]); c["scope"] != "ibm openid" {
			t.Errorf("scope %v", c["scope"])
		}
	}
	// A token carries no scope that its holder has made up.
	for _, scope := range []string{"admin superuser", strings.Repeat("x", 20_000), "openid admin ibm"} {
		m := s.post(crForm(k.token(), "profile_id", p.ID, "scope", scope)).want(200)
		if c := claims(t, m["access_token"]); c["scope"] != "ibm openid" || m["scope"] != "ibm openid" {
			t.Errorf("scope %.40q gave %v", scope, c["scope"])
		}
	}
	for _, space := range []string{"\n", "\r\n", " \n", "\t"} {
		s.post(crForm(k.token()+space, "profile_id", p.ID)).want(200)
	}
}

func TestATokenCarriesNoScopeThatItsHolderMadeUp(t *testing.T) {
	s := start(t)
	for asked, want := range map[string]string{
		"": "ibm openid", "openid": "openid", "openid ibm": "ibm openid", "admin": "ibm openid", "openid admin": "openid",
		strings.Repeat("x", 60000): "ibm openid",
	} {
		f := apiKeyForm(s.Owner.APIKey)
		f.Set("scope", asked)
		m := s.post(f).want(200)
		if c := claims(t, m["access_token"]); c["scope"] != want || m["scope"] != want {
			t.Errorf("asked for %.20q: token has %v, answer %v, want %q", asked, c["scope"], m["scope"], want)
		}
	}
}

func TestAnErrorTellsItsContext(t *testing.T) {
	s := start(t)
	a := s.post(apiKeyForm("nonsense"), with("Transaction-Id", "my-transaction"))
	m := a.wantError(400, grant.CodeKeyNotFound)
	c := m["context"].(map[string]any)
	for name, want := range map[string]string{
		"requestId": "^my-transaction$", "requestType": `^incoming\.Identity_Token$`, "userAgent": `^test-agent/1\.0$`,
		"url": "^http://tabard.test/identity/token$", "locale": "^en_US$", "elapsedTime": `^\d+$`,
		"startTime": `^\d\d\.\d\d\.\d{4} \d\d:\d\d:\d\d:\d{3} UTC$`, "endTime": `^\d\d\.\d\d\.\d{4} \d\d:\d\d:\d\d:\d{3} UTC$`,
	} {
		if got := fmt.Sprint(c[name]); !regexp.MustCompile(want).MatchString(got) {
			t.Errorf("context.%s is %q, want %s", name, got, want)
		}
	}
	if _, ok := m["errorDetails"]; ok {
		t.Error("errorDetails without details")
	}
	if a.header.Get("Content-Type") != "application/json" || a.header.Get("Cache-Control") != "no-cache, no-store, must-revalidate" ||
		a.header.Get("Pragma") != "no-cache" {
		t.Errorf("headers %v", a.header)
	}
	// The URL is the server's own, whatever the request says.
	a = s.post(apiKeyForm("nonsense"), func(r *http.Request) { r.Host = "evil.test" })
	if strings.Contains(a.raw, "evil.test") {
		t.Errorf("the answer takes its URL from the request: %s", a.raw)
	}
}

func TestATransactionIDIsTheCallersWhenItIsSane(t *testing.T) {
	s := start(t)
	made := regexp.MustCompile("^[0-9a-f]{32}$")
	for id, sane := range map[string]bool{
		"abc": true, "a-b_c.d:e": true, strings.Repeat("x", 128): true,
		"": false, strings.Repeat("x", 129): false, "a b": false, "a\nb": false, "<script>": false, "a\x00b": false, "ä": false, "a,b": false, `a"b`: false,
	} {
		for _, secret := range []string{"nonsense", s.Owner.APIKey} {
			a := s.post(apiKeyForm(secret), func(r *http.Request) { r.Header["Transaction-Id"] = []string{id} })
			got := a.header.Get("Transaction-Id")
			if sane && got != id || !sane && !made.MatchString(got) {
				t.Errorf("sent %.20q, got %q", id, got)
			}
			if len(s.events(got)) == 0 {
				t.Errorf("no event of transaction %q", got)
			}
		}
	}
}
