package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"io"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestOneShotPrintsTheAnswerAndTellsTheOutcomeByItsExitCode(t *testing.T) {
	c := newCloud(t)
	e := env{"IAM_URL": c.URL, "TOKEN_FILE": tokenFile(t, clusterToken)}
	for _, test := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"--once", "--profile", "my-profile"}, 0, `"reached": "list-resources"`},
		{[]string{"--once", "--profile", "unlinked-profile"}, 1, "BXNIM0398E"},
		{[]string{"--once"}, 1, `"stopped_at": "request"`},
		{[]string{"--once", "--profile", "p", "--token-file", "/none"}, 1, `"stopped_at": "read-token"`},
		{[]string{"--unknown"}, 2, ""},
		{[]string{"--once", "--profile", "my", "profile"}, 2, ""},
		{[]string{"--help"}, 0, ""},
	} {
		var stdout, stderr bytes.Buffer
		code := run(t.Context(), test.args, e.get, &stdout, &stderr)
		if code != test.code || !strings.Contains(stdout.String(), test.want) {
			t.Errorf("%q: exit code %d, want %d\n%s%s", test.args, code, test.code, &stdout, &stderr)
		}
		if test.want == "" && (stdout.Len() != 0 || stderr.Len() == 0) {
			t.Errorf("%q: usage belongs on stderr\n%s", test.args, &stdout)
		}
	}
}

func TestTheServerAnswersUntilItIsToldToStop(t *testing.T) {
	c := newCloud(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	logs, stderr := io.Pipe()
	exit := make(chan int, 1)
	e := env{"IAM_URL": c.URL, "TOKEN_FILE": tokenFile(t, clusterToken), "LISTEN": "127.0.0.1:0"}
	go func() {
		exit <- run(ctx, nil, e.get, io.Discard, stderr)
		stderr.Close()
	}()
	var line struct {
		Address string `json:"address"`
	}
	lines := json.NewDecoder(logs)
	if err := lines.Decode(&line); err != nil {
		t.Fatal(err)
	}
	go io.Copy(io.Discard, logs)

	for path, want := range map[string]string{
		"/": `"version":"dev"`, "/healthz": `"ok"`, "/api/listresources?tpname=my-profile": `"reached": "list-resources"`,
	} {
		status, body := fetch(t, "http://"+line.Address+path)
		if status != http.StatusOK || !strings.Contains(body, want) {
			t.Errorf("%s: got %d\n%s", path, status, body)
		}
	}
	if status, _ := fetch(t, "http://"+line.Address+"/other"); status != http.StatusNotFound {
		t.Errorf("an unknown path: got %d", status)
	}

	// A request that is under way when the signal comes is still answered.
	entered := make(chan struct{})
	c.List = func(w http.ResponseWriter, r *http.Request) {
		close(entered)
		time.Sleep(200 * time.Millisecond)
		twoResources(w, r)
	}
	answered := make(chan int, 1)
	go func() {
		status, _ := fetch(t, "http://"+line.Address+"/api/listresources?tpname=my-profile")
		answered <- status
	}()
	<-entered
	cancel()
	if status := <-answered; status != http.StatusOK {
		t.Errorf("the request under way got %d", status)
	}
	if code := <-exit; code != 0 {
		t.Errorf("exit code %d", code)
	}
}

func fetch(t *testing.T, url string) (int, string) {
	t.Helper()
	response, err := http.Get(url)
	if err != nil {
		t.Error(err)
		return 0, ""
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Error(err)
	}
	return response.StatusCode, string(body)
}

func TestTheEnvironmentConfigures(t *testing.T) {
	for _, test := range []struct {
		env  env
		want config
	}{
		{env{}, config{"https://iam.cloud.ibm.com", "https://resource-controller.cloud.ibm.com", "/var/run/secrets/tokens/sa-token", ":8080", ""}},
		{
			env{"IAM_URL": "https://tabard.example.com/", "TOKEN_FILE": "/t", "LISTEN": ":1"},
			config{"https://tabard.example.com", "https://tabard.example.com", "/t", ":1", ""},
		},
		{
			env{"IAM_URL": "https://iam.example.com/identity/token", "RESOURCE_CONTROLLER_URL": "https://rc.example.com/"},
			config{"https://iam.example.com", "https://rc.example.com", "/var/run/secrets/tokens/sa-token", ":8080", ""},
		},
		{
			env{
				"RESOURCE_CONTROLLER_AUTH_TYPE": "container", "RESOURCE_CONTROLLER_AUTH_URL": "https://tabard.example.com",
				"RESOURCE_CONTROLLER_CR_TOKEN_FILENAME": "/elsewhere/token", "RESOURCE_CONTROLLER_IAM_PROFILE_NAME": "my-profile",
			},
			config{"https://tabard.example.com", "https://tabard.example.com", "/elsewhere/token", ":8080", "my-profile"},
		},
		{
			env{"IAM_URL": "https://iam.example.com", "RESOURCE_CONTROLLER_AUTH_URL": "https://other.example.com", "PROFILE_NAME": "a", "RESOURCE_CONTROLLER_IAM_PROFILE_NAME": "b"},
			config{"https://iam.example.com", "https://iam.example.com", "/var/run/secrets/tokens/sa-token", ":8080", "a"},
		},
	} {
		if got, err := loadConfig(test.env.get); err != nil || got != test.want {
			t.Errorf("%v: got %+v, %v", test.env, got, err)
		}
	}
	for _, bad := range []string{"iam.example.com", "ftp://iam.example.com", "https://", "https://a b"} {
		if _, err := loadConfig(env{"IAM_URL": bad}.get); err == nil {
			t.Errorf("IAM_URL %q is accepted", bad)
		}
	}
}

func TestTheManifestsMountTheTokenWhereTheProgramReadsIt(t *testing.T) {
	cfg, err := loadConfig(env{}.get)
	if err != nil {
		t.Fatal(err)
	}
	dir, file := cfg.TokenFile[:strings.LastIndexByte(cfg.TokenFile, '/')], cfg.TokenFile[strings.LastIndexByte(cfg.TokenFile, '/')+1:]
	for _, name := range []string{"kubernetes.yaml", "job.yaml", "shell.yaml"} {
		manifest := read(t, name)
		for _, want := range []string{"mountPath: " + dir + "\n", "path: " + file + "\n", "audience: iam\n", "expirationSeconds: 3600\n"} {
			if !strings.Contains(manifest, want) {
				t.Errorf("%s lacks %q", name, want)
			}
		}
	}
}

var update = flag.Bool("update", false, "write what the program prints into README.md")

// A sample in the README is a curl command, at times through a jq filter, and
// what it prints.
var sample = regexp.MustCompile("(?s)(```console\n\\$ curl [^\n]*tpname=([a-z-]+)'(?: \\| jq '\\{([a-z_, ]+)\\}')?\n)(.*?)(```)")

func TestTheSamplesInTheREADMEAreWhatTheProgramPrints(t *testing.T) {
	c := newCloud(t)
	l := c.lister(t)
	var profiles []string
	readme := read(t, "README.md")
	now := sample.ReplaceAllStringFunc(readme, func(block string) string {
		m := sample.FindStringSubmatch(block)
		profiles = append(profiles, m[2])
		out := get(t, l, "?tpname="+m[2]).Raw
		if m[3] != "" {
			out = pick(t, out, strings.Split(m[3], ", "))
		}
		out = strings.NewReplacer(l.cfg.TokenFile, "/var/run/secrets/tokens/sa-token", c.URL, "https://tabard.example.com").Replace(out)
		return m[1] + out + m[5]
	})
	if want := []string{"my-profile", "no-such-profile", "unlinked-profile", "no-access-profile"}; !slices.Equal(profiles, want) {
		t.Errorf("the README has samples for %q, want %q", profiles, want)
	}
	if now == readme {
		return
	}
	if !*update {
		t.Fatal("README.md shows something else than the program prints; run go test -update .")
	}
	if err := os.WriteFile("README.md", []byte(now), 0o644); err != nil {
		t.Fatal(err)
	}
}

// pick does what jq '{a, b}' does.
func pick(t *testing.T, object string, keys []string) string {
	t.Helper()
	var all map[string]json.RawMessage
	if err := json.Unmarshal([]byte(object), &all); err != nil {
		t.Fatal(err)
	}
	var parts []string
	for _, key := range keys {
		if all[key] == nil {
			t.Fatalf("the answer has no %s:\n%s", key, object)
		}
		parts = append(parts, `"`+key+`":`+string(all[key]))
	}
	var b bytes.Buffer
	if err := json.Indent(&b, []byte("{"+strings.Join(parts, ",")+"}"), "", "  "); err != nil {
		t.Fatal(err)
	}
	return b.String() + "\n"
}

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
