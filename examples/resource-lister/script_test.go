package main

import (
	"fmt"
	"net/http"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
)

// script runs list-resources.sh as a pod does, and returns its exit code and
// what it prints.
func script(t *testing.T, settings ...string) (code int, stdout, stderr string) {
	t.Helper()
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("curl is not installed")
	}
	cmd := exec.CommandContext(t.Context(), "sh", "list-resources.sh")
	var out, errOut strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errOut
	cmd.Env = append([]string{"PATH=/usr/local/bin:/usr/bin:/bin"}, settings...)
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errOut.String()
}

// busyFirst answers each first request with 503 in the words of an error that
// must not be taken for the answer that follows.
func busyFirst(asked *atomic.Int64, then http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1) == 1 {
			w.Header().Set("Retry-After", "1")
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprint(w, `{"errorCode": "BUSY", "access_token": "not this one", "next_url": "/v2/not-this-one", "crn": "crn:not:this:one"}`)
			return
		}
		then(w, r)
	}
}

func TestTheScriptReadsEveryPageAlsoFromAServerThatIsBusyAtFirst(t *testing.T) {
	c := newCloud(t)
	pages := map[string]string{
		"/v2/resource_instances?limit=100":         `{"next_url": "/v2/resource_instances?limit=100\u0026start=b", "resources": [{"crn": "crn:v1:a::", "name": "a"}, {"crn": "crn:v1:b::"}]}`,
		"/v2/resource_instances?limit=100&start=b": `{"next_url": "` + c.URL + `/v2/resource_instances?start=c", "resources": []}`,
		"/v2/resource_instances?start=c":           "{\n  \"next_url\": null,\n  \"resources\": [\n    {\n      \"crn\": \"crn:v1:c::\"\n    }\n  ]\n}\n",
	}
	var exchanges, lists atomic.Int64
	c.Token = busyFirst(&exchanges, grantByName)
	c.List = busyFirst(&lists, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer "+accessToken("my-profile") {
			t.Errorf("%s with %q", r.URL, r.Header.Get("Authorization"))
		}
		fmt.Fprint(w, pages[r.URL.RequestURI()])
	})
	code, out, errOut := script(t, "IAM_URL="+c.URL+"/", "PROFILE_NAME=my-profile", "TOKEN_FILE="+tokenFile(t, clusterToken))
	want := "This pod acts as the trusted profile 'my-profile' now.\ncrn:v1:a::\ncrn:v1:b::\ncrn:v1:c::\nThat is all it may see.\n"
	if code != 0 || out != want {
		t.Errorf("%d %q, want %q\n%s", code, out, want, errOut)
	}
	wantCalls := []string{
		"POST /identity/token", "POST /identity/token", "GET /v2/resource_instances?limit=100", "GET /v2/resource_instances?limit=100",
		"GET /v2/resource_instances?limit=100&start=b", "GET /v2/resource_instances?start=c",
	}
	if got := c.called(); !slices.Equal(got, wantCalls) {
		t.Errorf("it called %q", got)
	}
}

func TestTheScriptGoesByWhatAnAdmissionWebhookHasPutThere(t *testing.T) {
	c := newCloud(t)
	code, out, errOut := script(t, "RESOURCE_CONTROLLER_AUTH_URL="+c.URL, "RESOURCE_CONTROLLER_IAM_PROFILE_NAME=my-profile",
		"RESOURCE_CONTROLLER_CR_TOKEN_FILENAME="+tokenFile(t, clusterToken))
	if code != 0 || !strings.Contains(out, "'my-profile'") {
		t.Errorf("%d %s%s", code, out, errOut)
	}
}

func TestTheScriptSaysWhyThereIsNoList(t *testing.T) {
	c := newCloud(t)
	other := trap(t)
	good := tokenFile(t, clusterToken)
	elsewhere := func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, `{"next_url": "%s/v2/resource_instances?start=b", "resources": []}`, other)
	}
	for name, s := range map[string]struct {
		iam, profile, file string
		list               http.HandlerFunc
		code               int
		says               []string
	}{
		"no settings":        {"", "", good, nil, 2, []string{"must be set"}},
		"no token":           {c.URL, "p", good + "-gone", nil, 2, []string{"cannot be read", "audience 'iam'"}},
		"nobody there":       {"http://127.0.0.1:1", "p", good, nil, 1, []string{"does not answer"}},
		"no such profile":    {c.URL, "no-such-profile", good, nil, 1, []string{"HTTP 400 BXNIM0102E", "no trusted profile of this name"}},
		"not trusted":        {c.URL, "unlinked-profile", good, nil, 1, []string{"HTTP 400 BXNIM0398E", "none of its links"}},
		"a page elsewhere":   {c.URL, "my-profile", good, elsewhere, 1, []string{"another server"}},
		"the list is closed": {c.URL, "my-profile", good, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) }, 1, []string{"The list was refused: HTTP 403"}},
	} {
		c.mu.Lock() // the script is a process of its own: nothing else orders this and its requests
		if c.List = twoResources; s.list != nil {
			c.List = s.list
		}
		c.mu.Unlock()
		code, out, errOut := script(t, "IAM_URL="+s.iam, "PROFILE_NAME="+s.profile, "TOKEN_FILE="+s.file)
		if code != s.code {
			t.Errorf("%s: it ends with %d\n%s%s", name, code, out, errOut)
		}
		for _, text := range s.says {
			if !strings.Contains(errOut, text) {
				t.Errorf("%s: it does not say %q\n%s", name, text, errOut)
			}
		}
		if strings.Contains(out+errOut, crSignature) {
			t.Errorf("%s: the token is printed", name)
		}
	}
}
