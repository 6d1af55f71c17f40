package test

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"tabard.dev/tabard/test/harness"
)

// documentsBinary is the built examples/documents.
var documentsBinary = sync.OnceValues(func() (string, error) {
	if bin := os.Getenv("DOCUMENTS_BIN"); bin != "" {
		return bin, nil
	}
	dir, err := os.MkdirTemp("", "documents-bin-")
	if err != nil {
		return "", err
	}
	bin := filepath.Join(dir, "documents")
	cmd := exec.Command("go", "build", "-o", bin, "./examples/documents")
	cmd.Dir = harness.Root()
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the example: %w\n%s", err, out)
	}
	return bin, nil
})

// documents is the example running beside a server.
type documents struct {
	t   *testing.T
	url string
	dir string
}

func startDocuments(t *testing.T, s *harness.Server, key string) *documents {
	t.Helper()
	bin, err := documentsBinary()
	if err != nil {
		t.Fatal(err)
	}
	d := &documents{t: t, dir: t.TempDir()}
	addr := freeAddress(t)
	d.url = "http://" + addr
	if err := os.WriteFile(filepath.Join(d.dir, "plan.txt"), []byte("Sow early.\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.Env = append(os.Environ(), "TABARD_URL="+s.URL, "DOCUMENTS_APIKEY="+key, "DOCUMENTS_DIR="+d.dir, "LISTEN="+addr)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("the example's log:\n%s", &log)
		}
	})
	deadline := time.Now().Add(20 * time.Second)
	for time.Now().Before(deadline) {
		if conn, err := net.Dial("tcp", addr); err == nil {
			conn.Close()
			return d
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatal("the example does not listen")
	return nil
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// call returns the status and body of a request to the example.
func (d *documents) call(method, name, token, body string) (int, string) {
	d.t.Helper()
	req, err := http.NewRequest(method, d.url+"/documents/"+name, strings.NewReader(body))
	if err != nil {
		d.t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		d.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		d.t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func (d *documents) want(what, method, name, token string, status int) string {
	d.t.Helper()
	got, body := d.call(method, name, token, "new text")
	if got != status {
		d.t.Errorf("%s: %d, want %d; %s", what, got, status, body)
	}
	return body
}

func TestAServiceOfFiftyLinesIsProtected(t *testing.T) {
	s := harness.Start(t, "--driver", "none")
	s.Login()
	s.CLI("iam", "service-register", "-f", filepath.Join(harness.Root(), "examples", "documents", "service.yaml"))
	s.CLI("iam", "service-id-create", "documents")
	s.CLI("iam", "service-policy-create", "documents", "--roles", "Decision Point", "--service-name", "documents")
	var key struct{ APIKey string }
	s.JSON(&key, "iam", "service-api-key-create", "documents-key", "documents")
	d := startDocuments(t, s, key.APIKey)

	s.CLI("iam", "trusted-profile-create", "gardener")
	s.CLI("iam", "trusted-profile-identity-create", "gardener", "--id-type", "USER", "--id", s.Owner.IAMID)
	token := func() string {
		t.Helper()
		a := s.Do("POST", "/identity/token", "", url.Values{
			"grant_type": {"urn:ibm:params:oauth:grant-type:assume"}, "access_token": {s.OwnerToken()},
			"profile_name": {"gardener"}, "account": {s.Owner.AccountID},
		})
		if a.Status != http.StatusOK {
			t.Fatalf("assume: %d %s", a.Status, a.Body)
		}
		return a.Field("access_token")
	}()
	d.want("without a token", "GET", "plan.txt", "", 401)
	d.want("without a policy", "GET", "plan.txt", token, 403)

	policy := strings.TrimSpace(s.CLI("iam", "trusted-profile-policy-create", "gardener", "--roles", "Reader", "--service-name", "documents",
		"--resource-type", "document", "--resource", "plan.txt", "--id"))
	time.Sleep(time.Second) // the refusal is kept for so long
	if body := d.want("a Reader", "GET", "plan.txt", token, 200); body != "Sow early.\n" {
		t.Errorf("the document is %q", body)
	}
	d.want("a Reader writing", "PUT", "plan.txt", token, 403)
	d.want("another document", "GET", "other.txt", token, 403)
	d.want("another document by a path", "GET", "plan.txt%2fother.txt", token, 403)
	d.want("outside the folder", "GET", "..%2f..%2fetc%2fpasswd", s.OwnerToken(), 400)
	if body := d.want("the owner writing", "PUT", "other.txt", s.OwnerToken(), 200); !strings.Contains(body, s.Owner.IAMID) {
		t.Errorf("written by %s", body)
	}
	d.want("the owner reading it", "GET", "other.txt", s.OwnerToken(), 200)

	refusal := d.want("a Reader writing", "PUT", "plan.txt", token, 403)
	transaction := regexp.MustCompile(`transaction ([0-9a-f]+)`).FindStringSubmatch(refusal)
	if transaction == nil {
		t.Fatalf("no transaction in %s", refusal)
	}
	if out := s.CLI("activity", "explain", transaction[1]); !strings.Contains(out, "policy-action") {
		t.Errorf("the refusal is explained by\n%s", out)
	}

	d.want("a Reader before the revocation", "GET", "plan.txt", token, 200)
	s.CLI("iam", "trusted-profile-policy-delete", "gardener", policy, "-f")
	time.Sleep(time.Second)
	d.want("a second after the revocation", "GET", "plan.txt", token, 403)

	d.want("the owner", "GET", "plan.txt", s.OwnerToken(), 200)
	owner := s.OwnerToken()
	s.Stop()
	d.want("the owner, with the server stopped", "GET", "plan.txt", owner, 503)
}
