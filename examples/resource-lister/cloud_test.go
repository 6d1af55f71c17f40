package main

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// The two signatures must never come out.
const (
	crSignature     = "c2lnbmF0dXJlLW9mLXRoZS1jbHVzdGVy"
	accessSignature = "c2lnbmF0dXJlLW9mLXRoZS1JQU0tc2VydmVy"
)

const (
	account   = "9f2b6c1d4e8a4b7f8c3d5e6f7a8b9c0d"
	profileID = "Profile-5b3c2d1e-0f9a-4c8b-a7d6-e5f4c3b2a190"
	workload  = "my-cluster:resource-lister:resource-lister:resource-lister-7d9c6b5f4-x2kqp"
	txn       = "6f1f7c52-2a4e-4f0e-9a51-0d3f7f0c9b11"
)

var clusterToken = jwt(`{"alg":"RS256","kid":"Jx2y0T8PqfC6bS1nZk5vA9mWr3uQe7LhXd4oGtIiYcE"}`,
	`{"aud":["iam"],"exp":1795424400,"iat":1795420800,"iss":"https://kubernetes.default.svc.cluster.local",`+
		`"jti":"0c8f4f0e-6f0b-4b7e-8f63-5a1c2f1f9d77","kubernetes.io":{"namespace":"resource-lister",`+
		`"pod":{"name":"resource-lister-7d9c6b5f4-x2kqp","uid":"b7b7a1a4-3a5f-4a57-9a2e-0f6f3f5f8c21"},`+
		`"serviceaccount":{"name":"resource-lister","uid":"2f0f5d0c-9d1d-4f0c-8a3a-6b1e8a7d4e90"}},`+
		`"nbf":1795420800,"sub":"system:serviceaccount:resource-lister:resource-lister"}`, crSignature)

func accessToken(profile string) string {
	cluster := "crn:v1:bluemix:public:containers-kubernetes:us-south:a/" + account + ":c8n5q2ld0o3m7h6k1j9g::"
	return jwt(`{"alg":"ES256","kid":"202611220900"}`, fmt.Sprintf(
		`{"iam_id":"iam-%[1]s","id":"iam-%[1]s","realmid":"iam","jti":"e1d3c5b7-90a2-4f84-b6c8-1a2b3c4d5e6f","identifier":"%[1]s",`+
			`"name":%[2]q,"sub":"%[1]s","sub_type":"Profile","authn":{"sub":%[3]q,"iam_id":"crn-%[3]s","sub_type":"ComputeResource","name":%[4]q},`+
			`"account":{"valid":true,"bss":%[5]q,"frozen":false},"iat":1795421000,"exp":1795424600,"iss":"https://tabard.example.com/identity",`+
			`"grant_type":"urn:ibm:params:oauth:grant-type:cr-token","scope":"ibm openid","client_id":"default","acr":0}`,
		profileID, profile, cluster, workload, account), accessSignature)
}

func jwt(header, claims, signature string) string {
	e := base64.RawURLEncoding.EncodeToString
	return e([]byte(header)) + "." + e([]byte(claims)) + "." + signature
}

// cloud stands in for IAM and the resource controller: one server that speaks
// for both, as a self-hosted one does. A test replaces the half it is about.
type cloud struct {
	*httptest.Server
	Token http.HandlerFunc
	List  http.HandlerFunc

	mu    sync.Mutex
	calls []string // method and request URI
}

func newCloud(t *testing.T) *cloud {
	t.Helper()
	c := &cloud{Token: grantByName, List: twoResources}
	c.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.mu.Lock()
		c.calls = append(c.calls, r.Method+" "+r.URL.RequestURI())
		token, list := c.Token, c.List
		c.mu.Unlock()
		w.Header().Set("Transaction-Id", txn)
		if r.URL.Path == "/identity/token" {
			token(w, r)
			return
		}
		list(w, r)
	}))
	t.Cleanup(c.Close)
	return c
}

func (c *cloud) called() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]string(nil), c.calls...)
}

// lister returns one whose token file holds the cluster's token, with the final
// newline that a file may have.
func (c *cloud) lister(t *testing.T) *lister {
	t.Helper()
	cfg, err := loadConfig(env{"IAM_URL": c.URL, "TOKEN_FILE": tokenFile(t, clusterToken+"\n")}.get)
	if err != nil {
		t.Fatal(err)
	}
	return newLister(cfg)
}

type env map[string]string

func (e env) get(name string) string { return e[name] }

func tokenFile(t *testing.T, content string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "sa-token")
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// grantByName is IAM with the profiles of the README.
func grantByName(w http.ResponseWriter, r *http.Request) {
	name := r.PostFormValue("profile_name")
	switch {
	case r.PostFormValue("grant_type") != "urn:ibm:params:oauth:grant-type:cr-token",
		strings.TrimSpace(r.PostFormValue("cr_token")) != clusterToken:
		refuse(w, "BXNIM0401E", "Provided token is malformed", "The compute resource token is not a JWT that can be checked.")
	case name == "no-such-profile":
		refuse(w, "BXNIM0102E", "Unable to find Object.", "Object Type: 'Profile' with name no-such-profile.")
	case name == "unlinked-profile":
		refuse(w, "BXNIM0398E", "Selected trusted profile not eligible.",
			"The given token with identifier '"+workload+"' is not permitted to assume the indicated trusted profile; profile ID 'iam-"+profileID+"'")
	default:
		reply(w, http.StatusOK, map[string]any{
			"access_token": accessToken(name), "refresh_token": "not_supported", "token_type": "Bearer",
			"expires_in": 3600, "expiration": 1795424600, "scope": "ibm openid",
		})
	}
}

func refuse(w http.ResponseWriter, code, message, details string) {
	reply(w, http.StatusBadRequest, map[string]any{
		"errorCode": code, "errorMessage": message, "errorDetails": details,
		"context": map[string]string{"requestId": txn, "requestType": "incoming.Identity_Token", "locale": "en_US"},
	})
}

// twoResources is a resource controller with two resources, which the profile
// of the README without access does not see.
func twoResources(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Authorization") == "Bearer "+accessToken("no-access-profile") {
		reply(w, http.StatusOK, map[string]any{"rows_count": 0, "next_url": nil, "resources": []any{}})
		return
	}
	reply(w, http.StatusOK, map[string]any{"rows_count": 2, "next_url": nil, "resources": []any{
		instance("cloud-object-storage", "backups", "3d5a1f0e-7c2b-4a9d-8e6f-1b2c3d4e5f60"),
		instance("kms", "keys", "8a7b6c5d-4e3f-4210-9fed-cba987654321"),
	}})
}

func instance(service, name, guid string) map[string]any {
	return map[string]any{
		"name": name, "crn": "crn:v1:bluemix:public:" + service + ":global:a/" + account + ":" + guid + "::",
		"state": "active", "type": "service_instance", "guid": guid, "locked": false,
	}
}

func reply(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body)
}

// answer is the report as a caller reads it.
type answer struct {
	Status    int
	Raw       string
	Profile   string     `json:"profile"`
	Steps     []step     `json:"steps"`
	Reached   string     `json:"reached"`
	StoppedAt string     `json:"stopped_at"`
	Error     *problem   `json:"error"`
	Resources []resource `json:"resources"`
}

// get asks the program's own endpoint, and holds what must hold of every answer.
func get(t *testing.T, l *lister, query string) answer {
	t.Helper()
	rec := httptest.NewRecorder()
	handler(l, slog.New(slog.NewTextHandler(io.Discard, nil))).
		ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/api/listresources"+query, nil))
	a := answer{Status: rec.Code, Raw: rec.Body.String()}
	if err := json.Unmarshal(rec.Body.Bytes(), &a); err != nil {
		t.Fatalf("the answer is not JSON: %v\n%s", err, a.Raw)
	}
	for _, signature := range []string{crSignature, accessSignature} {
		if strings.Contains(a.Raw, signature) {
			t.Fatalf("the answer shows a signature:\n%s", a.Raw)
		}
	}
	if (a.Error == nil) != (a.Status == http.StatusOK) || (a.Error == nil) != (a.StoppedAt == "") {
		t.Fatalf("status %d, stopped_at %q and error %v do not agree", a.Status, a.StoppedAt, a.Error)
	}
	if a.Error != nil && (a.Error.Message == "" || a.Error.Hint == "") {
		t.Fatalf("the error does not explain itself: %+v", a.Error)
	}
	return a
}

// stopped checks where an answer stopped and what was reached before.
func (a answer) stopped(t *testing.T, status int, at, reached string) {
	t.Helper()
	if a.Status != status || a.StoppedAt != at || a.Reached != reached {
		t.Fatalf("got status %d, stopped at %q after %q; want %d, %q, %q\n%s", a.Status, a.StoppedAt, a.Reached, status, at, reached, a.Raw)
	}
	if len(a.Resources) != 0 {
		t.Fatalf("an incomplete list is shown: %v", a.Resources)
	}
}

func (a answer) says(t *testing.T, texts ...string) {
	t.Helper()
	for _, s := range texts {
		if !strings.Contains(a.Raw, s) {
			t.Errorf("the answer does not say %q:\n%s", s, a.Raw)
		}
	}
}
