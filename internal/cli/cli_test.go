package cli

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
)

func TestTheExitCodeTellsWrongUsageFromFailure(t *testing.T) {
	s := sceneA(t)
	run(t, "iam", "trusted-profiles").want(1, "you are not logged in", "tabard login")
	s.login()
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"iam", "trusted-profiles"}, 0, ""},
		{[]string{}, 0, ""},
		{[]string{"iam"}, 0, ""},
		{[]string{"--version"}, 0, ""},
		{[]string{"iam", "trusted-profile-create", "--help"}, 0, ""},
		{[]string{"completion", "bash"}, 0, ""},
		{[]string{"iam", "trusted-profile", "absent"}, 1, "absent"},
		{[]string{"nonsense"}, 2, "nonsense"},
		{[]string{"iam", "trusted-profle-create", "x"}, 2, "did you mean trusted-profile-create"},
		{[]string{"iam", "trusted-profile-create"}, 2, "missing NAME\nUsage: tabard iam trusted-profile-create NAME [flags]"},
		{[]string{"iam", "trusted-profiles", "extra"}, 2, "extra"},
		{[]string{"iam", "trusted-profiles", "--no-such-flag"}, 2, "no-such-flag"},
		{[]string{"iam", "trusted-profiles", "-o", "yaml"}, 2, "want json"},
		{[]string{"iam", "trusted-profile-identity-create", "p"}, 2, "required flag"},
		{[]string{"is", "subnet-create", "a", "b"}, 2, "--zone"},
		{[]string{"is", "floating-ip-reserve", "a"}, 2, "zone"},
		{[]string{"iam", "trusted-profile-rule-create", "p", "--type", "Profile-CR", "--cr-type", "VSI", "--conditions", "claim:zone"}, 2, "condition"},
		{[]string{"iam", "trusted-profile-link-create", "p", "--cr-type", "IKS_SA", "--link-crn", "crn:x"}, 2, "--link-namespace"},
		{[]string{"login", "-a", "ftp://x", "--apikey", "k"}, 2, "ftp://x"},
		{[]string{"login", "-a", s.URL}, 2, "--apikey"},
		{[]string{"login", "-a", s.URL, "--cr-token", "t"}, 2, "--profile"},
	} {
		run(t, c.args...).want(c.code, c.says)
	}
}

func TestAnExtraCommandFollowsTheSameExitCodes(t *testing.T) {
	newServer(t)
	extra := &cobra.Command{Use: "extra", Args: cobra.MaximumNArgs(1), RunE: func(_ *cobra.Command, args []string) error {
		if len(args) == 1 && args[0] == "usage" {
			return Usage("not like this")
		}
		if len(args) == 1 {
			return errors.New("it broke")
		}
		return nil
	}}
	for args, code := range map[string]int{"extra": 0, "extra x": 1, "extra usage": 2, "extra a b": 2} {
		var b strings.Builder
		if got := Execute(t.Context(), strings.Fields(args), strings.NewReader(""), &b, &b, extra); got != code {
			t.Errorf("%s ended with %d, want %d: %s", args, got, code, b.String())
		}
	}
}

func TestEveryCommandExplainsItselfWithAnExampleThatParses(t *testing.T) {
	each(New(), func(c *cobra.Command) {
		if c.Short == "" || c.Long == "" || c.Example == "" {
			t.Errorf("%s lacks a text: Short %q, Long %q, Example %q", c.CommandPath(), c.Short, c.Long, c.Example)
		}
		mine := false
		for line := range strings.Lines(c.Example) {
			root := New()
			words := shellWords(line)
			if words[0] == "curl" {
				mine = true
				continue
			}
			found, rest, err := root.Find(words[1:])
			if err != nil || words[0] != "tabard" {
				t.Errorf("%s: the example %q is no command: %v", c.CommandPath(), line, err)
				continue
			}
			mine = mine || found.CommandPath() == c.CommandPath() || strings.HasPrefix(found.CommandPath(), c.CommandPath()+" ")
			if err := errors.Join(found.ParseFlags(rest), found.ValidateArgs(found.Flags().Args()), found.ValidateRequiredFlags(), found.ValidateFlagGroups()); err != nil {
				t.Errorf("%s: the example %q is wrong usage: %v", c.CommandPath(), line, err)
			}
		}
		if !mine {
			t.Errorf("%s: no example shows the command itself: %s", c.CommandPath(), c.Example)
		}
	})
}

// shellWords splits a line as far as the examples need it.
func shellWords(line string) []string {
	var words []string
	quoted, word, open := false, "", false
	for _, r := range strings.TrimSpace(line) {
		switch {
		case r == '"':
			quoted, open = !quoted, true
		case r == ' ' && !quoted:
			if open {
				words = append(words, word)
			}
			word, open = "", false
		default:
			word, open = word+string(r), true
		}
	}
	return append(words, word)
}

func TestTheSessionIsPrivateAndHoldsNoAPIKey(t *testing.T) {
	s := newServer(t)
	s.answer("GET /v2/resource_groups", list("resources", item("id", account, "name", "Default", "default", true)))
	s.answer("GET /v2/resource_groups/"+account, item("id", account, "name", "Default"))
	out := run(t, "login", "-a", s.URL+"/", "--apikey", secretKey, "-r", "eu-de", "-g", "Default").want(0, "eu-de", "Default", "owner", account)
	path := filepath.Join(os.Getenv("TABARD_HOME"), "config.json")
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 {
		t.Errorf("the session has mode %v", info.Mode())
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), secretKey) {
		t.Errorf("the session holds the API key: %s", text)
	}
	for _, secret := range []string{secretKey, "a-refresh-token", "c2lnbmF0dXJl"} {
		if strings.Contains(out.stdout+out.stderr, secret) {
			t.Errorf("login prints %q", secret)
		}
	}
	if left, err := filepath.Glob(filepath.Join(os.Getenv("TABARD_HOME"), ".*")); err != nil || len(left) != 0 {
		t.Errorf("files are left behind: %v %v", left, err)
	}

	run(t, "iam", "bearer-token").want(0, "c2lnbmF0dXJl")
	run(t, "iam", "oauth-tokens").want(0, "IAM token:  Bearer ey")
	var tokens map[string]string
	if err := json.Unmarshal([]byte(run(t, "iam", "oauth-tokens", "--output", "json").want(0).stdout), &tokens); err != nil || !strings.HasPrefix(tokens["iam_token"], "Bearer ey") {
		t.Errorf("oauth-tokens as JSON: %v %v", tokens, err)
	}
	if target := run(t, "target").want(0, s.URL, "eu-de", "Default"); strings.Contains(target.stdout, "c2lnbmF0dXJl") {
		t.Error("target prints the token")
	}
	run(t, "target", "--unset-region", "--unset-resource-group").want(0, "(none targeted)")

	run(t, "logout").want(0)
	if text, err := os.ReadFile(path); err != nil || strings.Contains(string(text), "token") {
		t.Errorf("tokens outlive the logout: %s %v", text, err)
	}
	run(t, "target").want(1, "not logged in")
}

func TestAFailedLoginTellsNoSecret(t *testing.T) {
	s := newServer(t)
	s.answer("POST /identity/token", reply{status: 400, body: item("errorCode", "BXNIM0415E", "errorMessage", "Provided API key could not be found.", "context", item("requestId", "abc"))})
	r := run(t, "login", "-a", s.URL, "--apikey", secretKey).want(1, "FAILED\n", "Provided API key could not be found.", "BXNIM0415E", "Transaction ID: ")
	writeFile(t, "broken.json", `{"apikey": `+secretKey)
	b := run(t, "login", "-a", s.URL, "--apikey", "@broken.json").want(1, "key file")
	if all := r.stdout + r.stderr + b.stdout + b.stderr; strings.Contains(all, secretKey) {
		t.Errorf("the key is printed: %s", all)
	}
	if _, err := os.Stat(filepath.Join(os.Getenv("TABARD_HOME"), "config.json")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a failed login left a session: %v", err)
	}
}

func TestTheCredentialCanComeFromFilesAndTheEnvironment(t *testing.T) {
	s := newServer(t)
	apikey := func() string {
		t.Helper()
		for pair := range strings.SplitSeq(s.sent("POST /identity/token").Body, "&") {
			if v, ok := strings.CutPrefix(pair, "apikey="); ok {
				return v
			}
		}
		return ""
	}
	writeFile(t, "plain.txt", "  key-in-a-file\n")
	run(t, "login", "-a", s.URL, "--apikey", "@plain.txt").want(0)
	if got := apikey(); got != "key-in-a-file" {
		t.Errorf("plain file: %q", got)
	}
	writeFile(t, "owner.json", `{"apikey":"key-in-json","url":"`+s.URL+`"}`)
	if err := os.RemoveAll(os.Getenv("TABARD_HOME")); err != nil {
		t.Fatal(err)
	}
	run(t, "login", "--apikey", "@owner.json").want(0)
	if got := apikey(); got != "key-in-json" {
		t.Errorf("JSON file with the server's URL: %q", got)
	}
	runWith(t, strings.NewReader("key-on-stdin\n"), "login", "--apikey", "@-").want(0)
	if got := apikey(); got != "key-on-stdin" {
		t.Errorf("standard input: %q", got)
	}
	t.Setenv("IBMCLOUD_API_KEY", "@plain.txt")
	run(t, "login").want(0)
	if got := apikey(); got != "key-in-a-file" {
		t.Errorf("IBMCLOUD_API_KEY: %q", got)
	}
	t.Setenv("TABARD_API_KEY", "key-of-tabard")
	run(t, "login").want(0)
	if got := apikey(); got != "key-of-tabard" {
		t.Errorf("TABARD_API_KEY: %q", got)
	}
	run(t, "login", "--apikey", "@absent").want(1, "absent")
	run(t, "login", "-c", "another").want(1, "belongs to account "+account)
}

func TestAServiceAccountTokenLogsInAsTheProfile(t *testing.T) {
	s := newServer(t)
	writeFile(t, "sa-token", "ey.sa.token\n")
	for profile, field := range map[string]string{"my-profile": "profile_name", profileID: "profile_id", "crn:v1:x": "profile_crn"} {
		run(t, "login", "-a", s.URL, "--cr-token", "@sa-token", "--profile", profile).want(0)
		body := s.sent("POST /identity/token").Body
		form := map[string]string{}
		for pair := range strings.SplitSeq(body, "&") {
			k, v, _ := strings.Cut(pair, "=")
			form[k] = v
		}
		if form["cr_token"] != "ey.sa.token" || form[field] == "" || len(form) != 3 {
			t.Errorf("profile %s: the form is %s", profile, body)
		}
	}
}

func TestAVirtualServerLogsInThroughItsMetadataService(t *testing.T) {
	s := newServer(t)
	t.Setenv("IBMCLOUD_CR_VPC_URL", s.URL)
	s.answer("PUT /identity/v1/token", item("access_token", "identity-token", "expires_at", "2099-01-01T00:00:00Z"))
	s.answer("POST /identity/v1/iam_tokens", item("access_token", accessToken(time.Hour), "expires_at", time.Now().Add(time.Hour).UTC().Format(time.RFC3339)))
	s.answer("GET /v1/profiles", list("profiles"))

	run(t, "login", "-a", s.URL, "--vpc-cri", "--profile", profileID).want(0, "owner")
	all := s.requests()
	if all[0].Method != http.MethodPut || all[0].Header.Get("Metadata-Flavor") != "ibm" || all[0].Query.Get("version") != metadataVersion {
		t.Errorf("the identity token was asked for with %+v", all[0])
	}
	if all[1].Header.Get("Authorization") != "Bearer identity-token" || all[1].Body != `{"trusted_profile":{"id":"`+profileID+`"}}` {
		t.Errorf("the IAM token was asked for with %+v", all[1])
	}
	run(t, "iam", "trusted-profiles").want(0, "No trusted profiles found.")

	run(t, "login", "-a", s.URL, "--vpc-cri").want(0)
	if r := s.sent("POST /identity/v1/iam_tokens"); r.Body != "" {
		t.Errorf("the default profile was asked for with the body %q", r.Body)
	}
	// Without -a the server is the issuer of the token, a plain one elsewhere here.
	if err := os.RemoveAll(os.Getenv("TABARD_HOME")); err != nil {
		t.Fatal(err)
	}
	r := run(t, "login", "--vpc-cri").want(0, "http://issuer.example")
	if !strings.Contains(r.stderr, "Warning: http://issuer.example is not encrypted") {
		t.Errorf("no warning about plain http: %s", r.stderr)
	}
}

func TestAnAgingTokenIsRenewed(t *testing.T) {
	s := newServer(t)
	s.life = 30 * time.Second
	s.login()
	s.answer("GET /v1/profiles", list("profiles"))
	s.life = time.Hour
	run(t, "iam", "trusted-profiles").want(0)
	if got := s.sent("POST /identity/token").Body; got != "grant_type=refresh_token&refresh_token=a-refresh-token" {
		t.Errorf("the token was renewed with %q", got)
	}
	run(t, "iam", "trusted-profiles").want(0)
	for _, r := range s.requests() {
		if r.Path == "/identity/token" {
			t.Error("a fresh token was renewed")
		}
	}

	s.life = 30 * time.Second
	s.login()
	s.answer("POST /identity/token", reply{status: 400, body: item("errorCode", "BXNIM0408E", "errorMessage", "Provided refresh token is expired")})
	run(t, "iam", "trusted-profiles").want(1, "the session has ended, log in again with tabard login: Provided refresh token is expired.")
}

func TestErrorsOfEveryFamilyAreTold(t *testing.T) {
	s := newServer(t)
	s.login()
	for name, c := range map[string]struct {
		status int
		body   any
		says   []string
	}{
		"identity": {404, item("trace", "x", "status_code", 404, "errors", []any{item("code", "not_found", "message_code", "BXNIM0102E", "message", "no such thing", "details", "really not")}),
			[]string{": no such thing.", "Details: really not", "Status: 404 Not Found", "Error code: not_found BXNIM0102E"}},
		"policy": {409, item("errors", []any{item("code", "policy_conflict_error", "message", "conflict", "details", item("conflicts_with", item("policy", item())))}),
			[]string{": conflict.", "Error code: policy_conflict_error"}},
		"vpc": {400, item("errors", []any{item("code", "invalid_value", "message", "bad", "more_info", "https://docs", "target", item("name", "id", "type", "parameter", "value", "7"))}),
			[]string{": bad.", "Error target: id 7", "More information: https://docs"}},
		"resource":  {422, item("message", "locked", "status_code", 422), []string{": locked.", "Status: 422"}},
		"token":     {401, item("errorCode", "BXNIM0407E", "errorMessage", "invalid token"), []string{": invalid token.", "Error code: BXNIM0407E", "Log in again with: tabard login"}},
		"denied":    {403, item("errors", []any{item("code", "not_authorized", "message", "no")}), []string{"tabard activity explain "}},
		"not JSON":  {502, "<html>", []string{"he server answered 502 Bad Gateway."}},
		"no errors": {500, item("errors", []any{}), []string{"he server answered 500"}},
		"redirect":  {302, nil, []string{"he server answered 302"}},
	} {
		t.Run(name, func(t *testing.T) {
			s.answer("GET /v1/profiles", reply{status: c.status, body: c.body, header: map[string]string{"Location": "http://other.invalid"}})
			r := run(t, "iam", "trusted-profiles").want(1, append(c.says, "FAILED\n")...)
			id := s.sent("GET /v1/profiles").Header.Get("Transaction-Id")
			if len(id) != 32 || !strings.Contains(r.stderr, "Transaction ID: "+id) {
				t.Errorf("the transaction id %q is not told:\n%s", id, r.stderr)
			}
		})
	}
	s.answer("GET /v1/profiles", "this is not JSON")
	run(t, "iam", "trusted-profiles").want(1, "is not what was expected")
	s.Close()
	run(t, "iam", "trusted-profiles").want(1, "each the server at "+s.URL)
}

func TestListsFollowEveryKindOfPageToTheEnd(t *testing.T) {
	s := newServer(t)
	s.login()
	for name, c := range map[string]struct {
		args         []string
		route, array string
		next         any
		parameter    string
	}{
		"identity": {[]string{"iam", "trusted-profiles"}, "/v1/profiles", "profiles", item("next", "http://other.invalid/v1/profiles?pagetoken=two"), "pagetoken"},
		"vpc":      {[]string{"is", "vpcs"}, "/v1/vpcs", "vpcs", item("next", item("href", "http://other.invalid/v1/vpcs?start=two")), "start"},
		"groups":   {[]string{"iam", "access-groups"}, "/v2/groups", "groups", item("next", item("href", "/v2/groups?offset=two&limit=1")), "offset"},
		"resource": {[]string{"resource", "service-instances"}, "/v2/resource_instances", "resources", item("next_url", "/v2/resource_instances?start=two"), "start"},
		"policies": {[]string{"iam", "access-group-policies", "AccessGroupId-" + uuidA}, "/v1/policies", "policies", item("next", item("start", "two")), "start"},
		"events":   {[]string{"activity", "events", "--limit", "0"}, "/v1/events", "events", item("next", item("start", "two")), "start"},
	} {
		t.Run(name, func(t *testing.T) {
			s.answer("GET "+c.route, func(r seen) any {
				switch r.Query.Get(c.parameter) {
				case "two":
					return with(list(c.array, item("id", "2", "name", "second")), "next_url", "")
				case "":
					return with(list(c.array, item("id", "1", "name", "first")), firstKey(c.next), c.next.(map[string]any)[firstKey(c.next)])
				}
				t.Errorf("an unknown page was asked for: %v", r.Query)
				return item()
			})
			var got []map[string]any
			out := run(t, append(c.args, "--output", "JSON")...).want(0)
			if err := json.Unmarshal([]byte(out.stdout), &got); err != nil {
				t.Fatalf("not a bare array: %v\n%s", err, out.stdout)
			}
			if diff := cmp.Diff([]map[string]any{item("id", "1", "name", "first"), item("id", "2", "name", "second")}, got); diff != "" {
				t.Error(diff)
			}
		})
	}
	s.answer("GET /v1/profiles", with(list("profiles"), "next", "/v1/profiles?pagetoken=again"))
	run(t, "iam", "trusted-profiles").want(1, "circle")
}

func firstKey(m any) string {
	for k := range m.(map[string]any) {
		return k
	}
	return ""
}

func TestNamesAndIDsAreInterchangeable(t *testing.T) {
	s := newServer(t)
	s.login()
	one := item("id", profileID, "name", "twin", "iam_id", "iam-"+profileID)
	s.answer("GET /v1/profiles/"+profileID, one)
	for _, ref := range []string{profileID, "crn:v1:bluemix:public:iam-identity::a/" + account + "::profile:" + profileID} {
		run(t, "iam", "trusted-profile", ref).want(0, "twin")
		if sent := s.requests(); len(sent) != 1 {
			t.Errorf("%s took %d requests", ref, len(sent))
		}
	}
	s.answer("GET /v1/profiles", list("profiles", item("id", profileID, "name", "solo"), item("id", "Profile-"+uuidB, "name", "solo-2")))
	run(t, "iam", "trusted-profile", "solo", "--id").want(0, profileID)
	if r := s.sent("GET /v1/profiles"); r.Query.Get("name") != "solo" || r.Query.Get("account_id") != account {
		t.Errorf("the name was looked up with %v", r.Query)
	}
	run(t, "iam", "trusted-profile", "so").want(1, `no trusted profile has the name or ID "so".`)
	s.answer("GET /v1/profiles", list("profiles", one, item("id", "Profile-"+uuidB, "name", "twin")))
	run(t, "iam", "trusted-profile", "twin").want(1, "2 trusted profiles have the name", profileID, "Profile-"+uuidB)
}

func TestOutputIsATableOrTheAPIObjects(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("GET /v1/profiles", `{"profiles":[{"zebra":1,"name":"a\u001b[31m<b>","id":"Profile-1","count":12345678901234567890}]}`)

	text := run(t, "iam", "trusted-profiles").want(0, "Listing trusted profiles under account "+account+" as user owner...\nOK\nName")
	if strings.Contains(text.stdout, "\x1b") {
		t.Errorf("a name steers the terminal: %q", text.stdout)
	}
	quiet := run(t, "iam", "trusted-profiles", "-q").want(0)
	if !strings.HasPrefix(quiet.stdout, "Name") {
		t.Errorf("-q prints %q", quiet.stdout)
	}
	want := "[\n  {\n    \"zebra\": 1,\n    \"name\": \"a\\u001b[31m<b>\",\n    \"id\": \"Profile-1\",\n    \"count\": 12345678901234567890\n  }\n]\n"
	for _, f := range []string{"json", "JSON"} {
		if got := run(t, "iam", "trusted-profiles", "-o", f).want(0).stdout; got != want {
			t.Errorf("JSON is\n%s\nwant\n%s", got, want)
		}
	}
	if got := run(t, "iam", "trusted-profiles", "--id").want(0).stdout; got != "Profile-1\n" {
		t.Errorf("--id prints %q", got)
	}
	s.answer("GET /v1/profiles", list("profiles"))
	if got := run(t, "iam", "trusted-profiles", "--output", "json").want(0).stdout; got != "[]\n" {
		t.Errorf("an empty list as JSON is %q", got)
	}
}

func TestEveryRequestSaysWhoSentIt(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("GET /v1/profiles", list("profiles"))
	run(t, "iam", "trusted-profiles").want(0)
	r := s.sent("GET /v1/profiles")
	if !strings.HasPrefix(r.Header.Get("User-Agent"), "tabard-cli/") || !strings.HasPrefix(r.Header.Get("Authorization"), "Bearer ey") {
		t.Errorf("headers are %v", r.Header)
	}
}

func TestAnAnswerWithoutEndIsCutOff(t *testing.T) {
	s := newServer(t)
	s.login()
	endless := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		block := []byte(strings.Repeat(" ", 1<<20))
		for range 64 {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
	}))
	defer endless.Close()
	_, err := newClient(endless.URL, "").do(t.Context(), request{method: "GET", path: "/"}, nil)
	if err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("the error is %v", err)
	}
}

func TestPlainHTTPIsOnlyForThisMachine(t *testing.T) {
	for base, want := range map[string]bool{
		"http://127.0.0.1:8470": false, "http://localhost": false, "http://[::1]:80": false, "https://example.com": false,
		"http://example.com": true, "http://10.0.0.1": true, "http://127.0.0.1.example.com": true,
	} {
		if got := remotePlain(base); got != want {
			t.Errorf("remotePlain(%q) = %v", base, got)
		}
	}
}
