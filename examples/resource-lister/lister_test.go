package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
)

func TestEveryPageOfTheListIsRead(t *testing.T) {
	c := newCloud(t)
	c.List = func(w http.ResponseWriter, r *http.Request) {
		if got := r.Header.Get("Authorization"); got != "Bearer "+accessToken("my-profile") {
			t.Errorf("%s came with Authorization %q", r.URL, got)
		}
		page := map[string]any{"resources": []any{instance("kms", "page-"+r.FormValue("start"), "g")}}
		switch r.FormValue("start") {
		case "":
			page["next_url"] = c.URL + "/v2/resource_instances?start=two"
		case "two":
			page["next_url"] = "/v2/resource_instances?start=three"
		case "three":
			page["next_url"] = nil
		}
		reply(w, http.StatusOK, page)
	}
	a := get(t, c.lister(t), "?tpname=my-profile")

	if a.Status != http.StatusOK || a.Reached != stepList || len(a.Steps) != 3 {
		t.Fatalf("not done:\n%s", a.Raw)
	}
	var names []string
	for _, r := range a.Resources {
		names = append(names, r.Name)
	}
	if want := []string{"page-", "page-two", "page-three"}; !slices.Equal(names, want) {
		t.Errorf("got resources %q, want %q", names, want)
	}
	if want := []string{
		"POST /identity/token", "GET /v2/resource_instances?limit=100",
		"GET /v2/resource_instances?start=two", "GET /v2/resource_instances?start=three",
	}; !slices.Equal(c.called(), want) {
		t.Errorf("got calls %q, want %q", c.called(), want)
	}
	a.says(t, `"sub": "system:serviceaccount:resource-lister:resource-lister"`, `"sub_type": "ComputeResource"`, `"alg": "ES256"`)
}

func TestAListEndsWithoutNextURL(t *testing.T) {
	for name, body := range map[string]string{
		"absent": `{"resources":[]}`,
		"null":   `{"resources":[],"next_url":null}`,
		"empty":  `{"resources":[],"next_url":""}`,
	} {
		t.Run(name, func(t *testing.T) {
			c := newCloud(t)
			c.List = func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, body) }
			if a := get(t, c.lister(t), "?tpname=p"); a.Status != http.StatusOK {
				t.Errorf("got status %d:\n%s", a.Status, a.Raw)
			}
		})
	}
}

func TestAnEmptyListIsExplained(t *testing.T) {
	a := get(t, newCloud(t).lister(t), "?tpname=no-access-profile")
	if a.Status != http.StatusOK || a.Resources == nil || len(a.Resources) != 0 {
		t.Fatalf("got status %d, resources %v", a.Status, a.Resources)
	}
	a.says(t, "no policy lets the profile see one")
}

func TestATokenFileThatCannotBeReadStopsBeforeIAM(t *testing.T) {
	missing := t.TempDir() + "/none"
	for name, file := range map[string]string{
		"missing":   missing,
		"directory": t.TempDir(),
		"empty":     tokenFile(t, " \n"),
		"too large": tokenFile(t, strings.Repeat("x", maxTokenFile+1)),
	} {
		t.Run(name, func(t *testing.T) {
			c := newCloud(t)
			l := c.lister(t)
			l.cfg.TokenFile = file
			a := get(t, l, "?tpname=my-profile")
			a.stopped(t, http.StatusInternalServerError, stepRead, "none")
			a.says(t, file, "serviceAccountToken")
			if calls := c.called(); len(calls) != 0 {
				t.Errorf("called %q", calls)
			}
		})
	}
}

func TestAFileWithoutAJWTIsLeftToIAMToRefuse(t *testing.T) {
	c := newCloud(t)
	l := c.lister(t)
	l.cfg.TokenFile = tokenFile(t, "a.b."+crSignature)
	a := get(t, l, "?tpname=my-profile")
	a.stopped(t, http.StatusForbidden, stepExchange, stepRead)
	a.says(t, "does not hold a JWT", "BXNIM0401E")
	if a.Steps[0].Token != nil {
		t.Errorf("shows a token that is none: %+v", a.Steps[0].Token)
	}
}

func TestARefusalOfIAMIsPassedOnWithAHint(t *testing.T) {
	for name, hint := range map[string]string{
		"no-such-profile":  "Check the spelling",
		"unlinked-profile": "trusted-profile-link-create",
	} {
		t.Run(name, func(t *testing.T) {
			a := get(t, newCloud(t).lister(t), "?tpname="+name)
			a.stopped(t, http.StatusForbidden, stepExchange, stepRead)
			a.says(t, hint, "tabard activity explain "+txn)
			if a.Error.StatusCode != http.StatusBadRequest || a.Error.TransactionID != txn || a.Error.Details == "" {
				t.Errorf("the wire error is incomplete: %+v", a.Error)
			}
		})
	}
	a := get(t, newCloud(t).lister(t), "?tpname=unlinked-profile")
	if a.Error.Code != "BXNIM0398E" || a.Error.Message != "Selected trusted profile not eligible." || !strings.Contains(a.Error.Details, workload) {
		t.Errorf("got %+v", a.Error)
	}
}

func TestTheTransactionIDIsFoundInTheBodyToo(t *testing.T) {
	c := newCloud(t)
	c.Token = func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Del("Transaction-Id")
		reply(w, 400, map[string]any{"errorCode": "BXNIM0398E", "errorMessage": "no", "context": map[string]string{"requestId": "from-the-body"}})
	}
	if a := get(t, c.lister(t), "?tpname=p"); a.Error.TransactionID != "from-the-body" {
		t.Errorf("got %+v", a.Error)
	}
}

func TestAnIAMThatFailsIsToldFromOneThatRefuses(t *testing.T) {
	html := func(status int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			w.WriteHeader(status)
			fmt.Fprint(w, "<html>proxy</html>")
		}
	}
	for _, test := range []struct {
		name   string
		token  http.HandlerFunc
		status int
	}{
		{"unavailable", func(w http.ResponseWriter, _ *http.Request) {
			reply(w, 503, map[string]string{"errorCode": "BXNIM0503E", "errorMessage": "The token cannot be checked now"})
		}, http.StatusServiceUnavailable},
		{"too many requests", html(http.StatusTooManyRequests), http.StatusServiceUnavailable},
		{"broken", html(http.StatusInternalServerError), http.StatusBadGateway},
		{"another server", html(http.StatusNotFound), http.StatusBadGateway},
		{"another server that is content", html(http.StatusOK), http.StatusBadGateway},
		{"no token", func(w http.ResponseWriter, _ *http.Request) { reply(w, 200, map[string]any{}) }, http.StatusBadGateway},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := newCloud(t)
			c.Token = test.token
			get(t, c.lister(t), "?tpname=p").stopped(t, test.status, stepExchange, stepRead)
		})
	}
	t.Run("unreachable", func(t *testing.T) {
		c := newCloud(t)
		l := c.lister(t)
		c.Close()
		get(t, l, "?tpname=p").stopped(t, http.StatusBadGateway, stepExchange, stepRead)
	})
}

func TestARefusalOfTheResourceControllerIsPassedOn(t *testing.T) {
	for status, hint := range map[int]string{
		http.StatusUnauthorized: "same installation",
		http.StatusForbidden:    "no policy allows it",
	} {
		c := newCloud(t)
		c.List = func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Del("Transaction-Id")
			reply(w, status, map[string]any{
				"trace": txn, "status_code": status,
				"errors": []any{map[string]any{"code": "not_authorized", "message": "iam-" + profileID + " is not authorized.", "details": map[string]any{}}},
			})
		}
		a := get(t, c.lister(t), "?tpname=my-profile")
		a.stopped(t, http.StatusForbidden, stepList, stepExchange)
		a.says(t, hint)
		if a.Error.StatusCode != status || a.Error.Code != "not_authorized" || a.Error.TransactionID != txn || !strings.Contains(a.Error.Message, profileID) {
			t.Errorf("got %+v", a.Error)
		}
	}
}

func TestAResourceControllerThatCannotBeUnderstoodIsABadGateway(t *testing.T) {
	for name, list := range map[string]http.HandlerFunc{
		"not JSON":   func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") },
		"not a list": func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"resources":"none"}`) },
		"not found":  http.NotFound,
		"too large": func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprintf(w, `{"resources":[{"name":"%s"}]}`, strings.Repeat("x", maxPage))
		},
		"cut off": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			fmt.Fprint(w, `{"resources":`)
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCloud(t)
			c.List = list
			get(t, c.lister(t), "?tpname=p").stopped(t, http.StatusBadGateway, stepList, stepExchange)
		})
	}
}

func TestNoPageIsReadTwice(t *testing.T) {
	for name, next := range map[string]func(start string) string{
		"itself":        func(string) string { return "/v2/resource_instances?limit=100" },
		"with fragment": func(string) string { return "/v2/resource_instances?limit=100#again" },
		"a circle": func(start string) string {
			if start == "a" {
				return "?start=b"
			}
			return "?start=a"
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCloud(t)
			c.List = func(w http.ResponseWriter, r *http.Request) {
				reply(w, 200, map[string]any{"resources": []any{}, "next_url": next(r.FormValue("start"))})
			}
			a := get(t, c.lister(t), "?tpname=p")
			a.stopped(t, http.StatusBadGateway, stepList, stepExchange)
			a.says(t, "read already")
			seen := c.called()
			slices.Sort(seen)
			if len(slices.Compact(seen)) != len(c.called()) {
				t.Errorf("read twice: %q", c.called())
			}
		})
	}
}

func TestAnEndlessListIsCutOff(t *testing.T) {
	c := newCloud(t)
	n := 0
	c.List = func(w http.ResponseWriter, _ *http.Request) {
		n++
		reply(w, 200, map[string]any{"resources": []any{}, "next_url": fmt.Sprint("?start=", n)})
	}
	a := get(t, c.lister(t), "?tpname=p")
	a.stopped(t, http.StatusBadGateway, stepList, stepExchange)
	if n != maxPages {
		t.Errorf("read %d pages, want %d", n, maxPages)
	}
}

// trap is a server that must never be called.
func trap(t *testing.T) *url.URL {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("another server got %s %s with Authorization %q", r.Method, r.URL, r.Header.Get("Authorization"))
	}))
	t.Cleanup(s.Close)
	u, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func TestTheTokenDoesNotFollowNextURLToAnotherServer(t *testing.T) {
	other := trap(t)
	for name, next := range map[string]func(*cloud) string{
		"another port":      func(*cloud) string { return other.String() + "/v2/resource_instances?start=x" },
		"without scheme":    func(*cloud) string { return "//" + other.Host + "/v2/resource_instances" },
		"as user name":      func(c *cloud) string { return c.URL + "@" + other.Host + "/" },
		"another scheme":    func(c *cloud) string { return "https" + strings.TrimPrefix(c.URL, "http") },
		"another host name": func(c *cloud) string { return strings.Replace(c.URL, "127.0.0.1", "localhost", 1) },
		"not HTTP":          func(*cloud) string { return "file:///etc/passwd" },
	} {
		t.Run(name, func(t *testing.T) {
			c := newCloud(t)
			c.List = func(w http.ResponseWriter, _ *http.Request) {
				reply(w, 200, map[string]any{"resources": []any{}, "next_url": next(c)})
			}
			a := get(t, c.lister(t), "?tpname=p")
			a.stopped(t, http.StatusBadGateway, stepList, stepExchange)
			a.says(t, "next_url points to")
		})
	}
}

func TestNoTokenFollowsARedirect(t *testing.T) {
	other := trap(t)
	redirect := func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, other.String()+"/", http.StatusTemporaryRedirect)
	}
	c := newCloud(t)
	c.Token = redirect
	get(t, c.lister(t), "?tpname=p").stopped(t, http.StatusBadGateway, stepExchange, stepRead)
	c = newCloud(t)
	c.List = redirect
	get(t, c.lister(t), "?tpname=p").stopped(t, http.StatusBadGateway, stepList, stepExchange)
}

func TestAnErrorThatRepeatsATokenIsShownWithoutItsSignature(t *testing.T) {
	c := newCloud(t)
	c.Token = func(w http.ResponseWriter, r *http.Request) {
		refuse(w, "BXNIM0405E", "Not supported: "+r.PostFormValue("cr_token"), strings.ToUpper("details ")+r.PostFormValue("cr_token"))
	}
	get(t, c.lister(t), "?tpname=p").says(t, "(not shown)") // get looks for the signature

	c = newCloud(t)
	c.List = func(w http.ResponseWriter, r *http.Request) {
		reply(w, 403, map[string]string{"message": "Forbidden for " + r.Header.Get("Authorization")})
	}
	get(t, c.lister(t), "?tpname=p").says(t, "(not shown)")

	c = newCloud(t)
	c.List = func(w http.ResponseWriter, r *http.Request) {
		reply(w, 200, map[string]any{"resources": []any{instance("kms", r.Header.Get("Authorization"), "g")}})
	}
	get(t, c.lister(t), "?tpname=p").says(t, "(not shown)")
}

func TestABadProfileNameIsRefusedBeforeAnythingIsDone(t *testing.T) {
	for name, query := range map[string]string{
		"missing":    "",
		"empty":      "?tpname=",
		"twice":      "?tpname=a&tpname=b",
		"too long":   "?tpname=" + strings.Repeat("a", maxProfileName+1),
		"newline":    "?tpname=a%0Ab",
		"escape":     "?tpname=a%1B%5B2J",
		"direction":  "?tpname=a%E2%80%AEb",
		"not UTF-8":  "?tpname=a%FF",
		"bad escape": "?tpname=a%zz",
		"semicolon":  "?tpname=a;b",
	} {
		t.Run(name, func(t *testing.T) {
			c := newCloud(t)
			get(t, c.lister(t), query).stopped(t, http.StatusBadRequest, stepRequest, "none")
			if calls := c.called(); len(calls) != 0 {
				t.Errorf("called %q", calls)
			}
		})
	}
	for _, name := range []string{"My profile", "Größe ☂", strings.Repeat("ü", maxProfileName), `"quoted" & <odd>`} {
		if a := get(t, newCloud(t).lister(t), "?tpname="+url.QueryEscape(name)); a.Status != http.StatusOK || a.Profile != name {
			t.Errorf("%q: got status %d, profile %q", name, a.Status, a.Profile)
		}
	}
}

func TestALinkThatWasRemovedIsMissedAtOnce(t *testing.T) {
	c := newCloud(t)
	l := c.lister(t)
	if a := get(t, l, "?tpname=my-profile"); a.Status != http.StatusOK {
		t.Fatalf("got status %d", a.Status)
	}
	c.Token = func(w http.ResponseWriter, _ *http.Request) {
		refuse(w, "BXNIM0398E", "Selected trusted profile not eligible.", "")
	}
	get(t, l, "?tpname=my-profile").stopped(t, http.StatusForbidden, stepExchange, stepRead)
}

func TestARenewedTokenFileIsUsedAtOnce(t *testing.T) {
	c := newCloud(t)
	l := c.lister(t)
	if err := os.WriteFile(l.cfg.TokenFile, []byte("replaced.by."+crSignature), 0o600); err != nil {
		t.Fatal(err)
	}
	get(t, l, "?tpname=my-profile").stopped(t, http.StatusForbidden, stepExchange, stepRead)
}

func TestRequestsForDifferentProfilesDoNotShareTokens(t *testing.T) {
	c := newCloud(t)
	l := c.lister(t)
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			name := fmt.Sprint("profile-", i)
			a := get(t, l, "?tpname="+name)
			var claims struct {
				Name string `json:"name"`
			}
			if err := json.Unmarshal(a.Steps[1].Token.Claims, &claims); err != nil || claims.Name != name {
				t.Errorf("asked for %s, got a token of %q (%v)", name, claims.Name, err)
			}
		})
	}
	wg.Wait()
}
