package test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"tabard.dev/tabard/test/harness"
)

// witness plays the clients of a server that is killed, and remembers what they
// were answered.
type witness struct {
	t       *testing.T
	b       *sceneB
	pod     string // token of the service account that is linked
	nobody  string // and of one that is not
	bearer  atomic.Pointer[string]
	numbers atomic.Int64 // of transactions and names

	mu       sync.Mutex
	tokens   map[string]string  // jti of the tokens in a client's hands, and the transaction that gave each
	refusals map[string]bool    // transactions that were refused
	objects  map[string]*object // by their names, what was done to each last
	touched  map[string]bool    // of the objects, since the last check
	note     []byte             // the newest checkpoint that was given out
	size     int64
	key      string
	log      *logbook
}

// object is a thing that was made or deleted, with the newest operation on it.
type object struct {
	transaction string
	create      bool
	answered    bool         // the operation was; otherwise its outcome is unknown
	exists      func() bool  // asks the server
	refused     func() error // asks for what the deleted object gave; may be nil
}

type logged struct{ action, outcome string }

func newWitness(t *testing.T, b *sceneB) *witness {
	t.Helper()
	w := &witness{
		t: t, b: b, pod: b.issuer.Token("shop", "web"), nobody: b.issuer.Token("billing", "web"),
		tokens: map[string]string{}, refusals: map[string]bool{}, objects: map[string]*object{}, touched: map[string]bool{},
		log: newLogbook(),
	}
	token := b.OwnerToken()
	w.bearer.Store(&token)
	// The owner may put on the pod's profile.
	b.CLI("iam", "trusted-profile-identity-create", "pod", "--id-type", "USER", "--id", b.Owner.IAMID)
	return w
}

func (w *witness) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	answered := 0
	for _, o := range w.objects {
		if o.answered {
			answered++
		}
	}
	return fmt.Sprintf("%d tokens and %d refusals in clients' hands, %d objects made or deleted and %d of which nobody knows, a log of %d events",
		len(w.tokens), len(w.refusals), answered, len(w.objects)-answered, w.log.next)
}

// down is the status of a request that reached nobody.
const down = -1

// client is one of the witness's, with connections of its own.
type client struct {
	*witness
	http *http.Client
}

// ask makes a request, and reports whether it was answered as a whole. The status
// of one that reached nobody is down.
func (c *client) ask(method, path, transaction string, body any) (status int, answer []byte, ok bool) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	var r io.Reader
	contentType := "application/json"
	switch b := body.(type) {
	case nil:
	case url.Values:
		r, contentType = strings.NewReader(b.Encode()), "application/x-www-form-urlencoded"
	default:
		raw, err := json.Marshal(b)
		if err != nil {
			c.t.Error(err)
			return 0, nil, false
		}
		r = bytes.NewReader(raw)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.b.URL+path, r)
	if err != nil {
		c.t.Error(err)
		return 0, nil, false
	}
	req.Header.Set("Content-Type", contentType)
	req.Header.Set("Transaction-Id", transaction)
	if !strings.HasPrefix(path, "/identity/") {
		req.Header.Set("Authorization", "Bearer "+*c.bearer.Load())
	}
	resp, err := c.http.Do(req)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return down, nil, false
	}
	if err != nil {
		return 0, nil, false
	}
	answer, err = io.ReadAll(resp.Body)
	_ = resp.Body.Close() // what was read counts
	return resp.StatusCode, answer, err == nil
}

// transaction is the id of a new one. Its last letter ends the number where
// other bytes follow.
func (w *witness) transaction(what string) string {
	return fmt.Sprintf("crash-%s-%dx", what, w.numbers.Add(1))
}

// token asks for one and keeps it, or the refusal.
func (c *client) token(what string, form url.Values) (status int, ok bool) {
	transaction := c.transaction(what)
	status, answer, ok := c.ask(http.MethodPost, "/identity/token", transaction, form)
	if !ok {
		return 0, false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch status {
	case http.StatusOK:
		jti, err := jtiOf(answer)
		if err != nil {
			c.t.Errorf("%s: %v", transaction, err)
			return status, false
		}
		c.tokens[jti] = transaction
	case http.StatusBadRequest:
		c.refusals[transaction] = true
	default:
		// It had not started, or was overloaded; it says so and promises nothing.
		if status != http.StatusServiceUnavailable {
			c.t.Errorf("%s: %d %s", transaction, status, answer)
		}
	}
	return status, true
}

// jtiOf returns the id of the token in an answer.
func jtiOf(answer []byte) (string, error) {
	var a struct {
		AccessToken string `json:"access_token"`
	}
	if err := json.Unmarshal(answer, &a); err != nil {
		return "", err
	}
	_, rest, _ := strings.Cut(a.AccessToken, ".")
	payload, _, _ := strings.Cut(rest, ".")
	raw, err := base64.RawURLEncoding.DecodeString(payload)
	if err != nil {
		return "", fmt.Errorf("%s: %w", answer, err)
	}
	var claims struct{ JTI string }
	if err := json.Unmarshal(raw, &claims); err != nil || claims.JTI == "" {
		return "", fmt.Errorf("a token without id: %s (%w)", raw, err)
	}
	return claims.JTI, nil
}

func exchangeForm(token, profile string) url.Values {
	return url.Values{"grant_type": {grantCRToken}, "cr_token": {token}, "profile_name": {profile}}
}

// load keeps clients busy until the function that it returns is called; they
// have ended when that returns.
func (w *witness) load(round int) (stop func()) {
	stopped := make(chan struct{})
	var workers sync.WaitGroup
	work := func(step func(c *client, r *rand.Rand)) {
		n := w.numbers.Add(1)
		workers.Go(func() {
			c := &client{w, &http.Client{Transport: &http.Transport{}}}
			defer c.http.CloseIdleConnections()
			r := rand.New(rand.NewPCG(uint64(round), uint64(n)))
			for {
				select {
				case <-stopped:
					return
				default:
					step(c, r)
				}
			}
		})
	}
	pause := func(ok bool) {
		if !ok {
			time.Sleep(2 * time.Millisecond) // it is down
		}
	}
	for range 3 {
		work(func(c *client, _ *rand.Rand) {
			_, ok := c.token("exchange", exchangeForm(w.pod, "pod"))
			pause(ok)
		})
	}
	work(func(c *client, r *rand.Rand) {
		var ok bool
		switch r.IntN(3) {
		case 0:
			_, ok = c.token("refused", exchangeForm(w.nobody, "pod"))
		case 1:
			_, ok = c.token("apikey", url.Values{"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}, "apikey": {w.b.Owner.APIKey}})
		default:
			_, ok = c.token("assume", url.Values{
				"grant_type": {"urn:ibm:params:oauth:grant-type:assume"}, "access_token": {*w.bearer.Load()},
				"profile_name": {"pod"}, "account": {w.b.Owner.AccountID},
			})
		}
		pause(ok)
	})
	for range 2 {
		work(func(c *client, r *rand.Rand) { pause(c.change(r)) })
	}
	work(func(c *client, r *rand.Rand) { pause(c.search(r)) })
	work(func(c *client, _ *rand.Rand) { pause(c.takeCheckpoint()) })
	return func() {
		close(stopped)
		workers.Wait()
	}
}

// operate makes or deletes an object and remembers what came of it.
func (c *client) operate(name string, o *object, method, path string, body any) (answer []byte, ok bool) {
	o.transaction = c.transaction(strings.ToLower(method))
	status, answer, answered := c.ask(method, path, o.transaction, body)
	if status == down {
		return nil, false
	}
	if answered && status >= 400 {
		if status != http.StatusServiceUnavailable {
			c.t.Errorf("%s %s: %d %s", method, path, status, answer)
		}
		return nil, false
	}
	o.answered = answered
	c.mu.Lock()
	defer c.mu.Unlock()
	c.objects[name] = o
	c.touched[name] = true
	return answer, answered
}

func (w *witness) status(path string) int {
	w.t.Helper()
	return w.b.Do(http.MethodGet, path, *w.bearer.Load(), nil).Status
}

// list asks how many objects a collection has.
func (w *witness) list(path, field string) int {
	w.t.Helper()
	a := w.b.Do(http.MethodGet, path, *w.bearer.Load(), nil)
	var all map[string]json.RawMessage
	var of []json.RawMessage
	if err := json.Unmarshal(a.Body, &all); err != nil || a.Status != http.StatusOK || json.Unmarshal(all[field], &of) != nil {
		w.t.Errorf("GET %s: %d %s", path, a.Status, a.Body)
	}
	return len(of)
}

// change makes a profile with a link and a policy, uses it, and takes one of
// them away.
func (c *client) change(r *rand.Rand) bool {
	name := c.transaction("profile")
	account := c.b.Owner.AccountID
	made, ok := c.operate(name, &object{create: true, exists: func() bool {
		return c.list("/v1/profiles?account_id="+account+"&name="+name, "profiles") > 0
	}}, http.MethodPost, "/v1/profiles", map[string]any{"name": name, "account_id": account})
	if !ok {
		return false
	}
	var profile struct {
		ID    string
		IAMID string `json:"iam_id"`
	}
	if err := json.Unmarshal(made, &profile); err != nil {
		c.t.Errorf("%s: %v", made, err)
		return false
	}
	path := "/v1/profiles/" + profile.ID
	made, ok = c.operate(name+" link", &object{create: true, exists: func() bool { return c.list(path+"/links", "links") > 0 }},
		http.MethodPost, path+"/links", map[string]any{
			"cr_type": "IKS_SA", "name": "web", "link": map[string]string{"crn": c.b.clusterCRN, "namespace": "shop", "name": "web"},
		})
	if !ok {
		return false
	}
	var link struct{ ID string }
	if err := json.Unmarshal(made, &link); err != nil {
		c.t.Errorf("%s: %v", made, err)
		return false
	}
	policies := func() bool {
		return c.list("/v1/policies?account_id="+account+"&iam_id="+profile.IAMID, "policies") > 0
	}
	made, ok = c.operate(name+" policy", &object{create: true, exists: policies}, http.MethodPost, "/v1/policies", policyFor(profile.IAMID, account))
	if !ok {
		return false
	}
	var policy struct{ ID string }
	if err := json.Unmarshal(made, &policy); err != nil {
		c.t.Errorf("%s: %v", made, err)
		return false
	}
	if status, ok := c.token("linked", exchangeForm(c.pod, name)); !ok || status != http.StatusOK {
		return false
	}
	without := func() error {
		if a := c.b.exchange(c.pod, name); a.Status != http.StatusBadRequest {
			return fmt.Errorf("%s, which was taken away, gives %d %s", name, a.Status, a.Body)
		}
		return nil
	}
	switch r.IntN(4) {
	case 0: // everything stays
		return true
	case 1:
		_, ok = c.operate(name+" policy", &object{exists: policies}, http.MethodDelete, "/v1/policies/"+policy.ID, nil)
	case 2:
		_, ok = c.operate(name+" link", &object{
			exists: func() bool { return c.list(path+"/links", "links") > 0 }, refused: without,
		}, http.MethodDelete, path+"/links/"+link.ID, nil)
	default:
		// What belongs to the profile goes with it.
		_, ok = c.operate(name, &object{
			exists: func() bool { return c.status(path) != http.StatusNotFound }, refused: without,
		}, http.MethodDelete, path, nil)
		c.mu.Lock()
		for _, part := range []string{name + " link", name + " policy"} {
			delete(c.touched, part)
			delete(c.objects, part)
		}
		c.mu.Unlock()
	}
	return ok
}

func policyFor(iamID, account string) map[string]any {
	attribute := func(name, value string) map[string]string {
		return map[string]string{"name": name, "value": value, "operator": "stringEquals"}
	}
	return map[string]any{
		"type":      "access",
		"subjects":  []any{map[string]any{"attributes": []any{map[string]string{"name": "iam_id", "value": iamID}}}},
		"roles":     []any{map[string]string{"role_id": "crn:v1:bluemix:public:iam::::role:Viewer"}},
		"resources": []any{map[string]any{"attributes": []any{attribute("accountId", account), attribute("serviceName", "cloud-object-storage")}}},
	}
}

// search reads the log while it grows: a whole answer has whole events, newest
// first, and among them those of a transaction that was answered.
func (c *client) search(r *rand.Rand) bool {
	c.mu.Lock()
	wanted := ""
	for _, transaction := range c.tokens { // any
		wanted = transaction
		break
	}
	c.mu.Unlock()
	queries := []string{"limit=200", "limit=1000&outcome=failure", "action=iam-identity.computeresource-token.login&since=1h"}
	if wanted != "" {
		queries = append(queries, "correlation_id="+wanted, "correlation_id="+wanted)
	}
	query := queries[r.IntN(len(queries))]
	status, answer, ok := c.ask(http.MethodGet, "/v1/events?"+query, "search", nil)
	if !ok || status == http.StatusServiceUnavailable {
		return false
	}
	var page struct {
		Events    []struct{ ID, CorrelationID, Action string }
		Positions []int64
	}
	if err := json.Unmarshal(answer, &page); err != nil || status != http.StatusOK {
		c.t.Errorf("search for %s: %d %s", query, status, answer)
		return false
	}
	if !slices.IsSortedFunc(page.Positions, func(a, b int64) int { return int(b - a) }) {
		c.t.Errorf("search for %s: not newest first: %v", query, page.Positions)
	}
	if strings.HasPrefix(query, "correlation_id") && len(page.Events) == 0 {
		c.t.Errorf("%s was answered and has no event", query)
	}
	return true
}

func (c *client) takeCheckpoint() bool {
	status, answer, ok := c.ask(http.MethodGet, "/v1/events/checkpoint", "checkpoint", nil)
	if !ok || status == http.StatusServiceUnavailable {
		return false
	}
	var n struct {
		Size            int64
		Checkpoint, Key string
	}
	if err := json.Unmarshal(answer, &n); err != nil || status != http.StatusOK {
		c.t.Errorf("checkpoint: %d %s", status, answer)
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.key != "" && c.key != n.Key {
		c.t.Errorf("the log's key was %s and is %s", c.key, n.Key)
	}
	if n.Size < c.size {
		c.t.Errorf("a checkpoint of %d events after one of %d", n.Size, c.size)
	}
	c.note, c.size, c.key = []byte(n.Checkpoint), n.Size, n.Key
	time.Sleep(5 * time.Millisecond)
	return true
}

// keepCheckpoint writes the newest one to a file of the witness's, and returns
// the file's name, or the one before.
func (w *witness) keepCheckpoint(before string) string {
	w.t.Helper()
	if w.note == nil {
		return before
	}
	if before == "" {
		before = filepath.Join(w.t.TempDir(), "checkpoint.txt")
	}
	if err := os.WriteFile(before, w.note, 0o600); err != nil {
		w.t.Fatal(err)
	}
	return before
}

// check holds what the clients remember against the log and the objects that
// the restarted server has.
func (w *witness) check() {
	w.t.Helper()
	token := w.b.OwnerToken()
	w.bearer.Store(&token)
	w.log.read(w.t, w.b.Server, token)
	w.mu.Lock()
	defer w.mu.Unlock()
	missing := 0
	for jti, transaction := range w.tokens {
		if n := w.log.logins[jti]; n != 1 {
			missing++
			if missing <= 5 {
				w.t.Errorf("the token %s of %s is in a client's hands, and has %d events", jti, transaction, n)
			}
		}
	}
	if missing > 0 {
		w.t.Errorf("%d of %d tokens do not have one event each", missing, len(w.tokens))
	}
	for transaction := range w.refusals {
		if !slices.ContainsFunc(w.log.done[transaction], func(e logged) bool { return e.outcome == "failure" }) {
			w.t.Errorf("the refusal %s has no event, only %v", transaction, w.log.done[transaction])
		}
	}
	for name := range w.touched {
		w.checkObject(w.objects[name])
	}
	clear(w.touched)
}

// checkAll looks at every object again.
func (w *witness) checkAll() {
	w.t.Helper()
	for _, o := range w.objects {
		w.checkObject(o)
	}
	if len(w.tokens) == 0 || len(w.refusals) == 0 || len(w.objects) == 0 {
		w.t.Errorf("nothing was tested: %s", w)
	}
}

// checkObject: an operation that was answered is in force and has its event. One
// that was not has happened with its event, or not at all.
func (w *witness) checkObject(o *object) {
	w.t.Helper()
	happened := slices.ContainsFunc(w.log.done[o.transaction], func(e logged) bool { return e.outcome == "success" })
	if o.answered && !happened {
		w.t.Errorf("the change %s was answered and has no event", o.transaction)
	}
	if o.exists() != (o.create == happened) {
		w.t.Errorf("the change %s (create: %v, answered: %v) and its event (there: %v) are not there together", o.transaction, o.create, o.answered, happened)
	}
	if happened && o.refused != nil {
		if err := o.refused(); err != nil {
			w.t.Errorf("%s: %v", o.transaction, err)
		}
	}
}

// logbook is the log of a server, as far as it was read.
type logbook struct {
	next   int64               // position
	ids    map[string]bool     // of events
	logins map[string]int      // events by jti
	done   map[string][]logged // by transaction
}

func newLogbook() *logbook {
	return &logbook{ids: map[string]bool{}, logins: map[string]int{}, done: map[string][]logged{}}
}

// read reads what the log has new. Positions follow each other, and every event
// is a whole one with an id of its own.
func (l *logbook) read(t *testing.T, s *harness.Server, bearer string) {
	t.Helper()
	for {
		a := s.Do(http.MethodGet, fmt.Sprintf("/v1/events/log?limit=5000&from=%d", l.next), bearer, nil)
		if a.Status != http.StatusOK {
			t.Fatalf("read the log: %d %s", a.Status, a.Body)
		}
		before := l.next
		for raw := range bytes.Lines(a.Body) {
			var line struct {
				Index *int64
				Event json.RawMessage
			}
			if err := json.Unmarshal(raw, &line); err != nil {
				t.Fatalf("line %s: %v", raw, err)
			}
			if line.Index == nil {
				continue // a checkpoint
			}
			if *line.Index != l.next {
				t.Fatalf("position %d follows %d", *line.Index, l.next-1)
			}
			l.event(t, line.Event)
			l.next++
		}
		if l.next == before {
			return
		}
	}
}

func (l *logbook) event(t *testing.T, doc []byte) {
	t.Helper()
	var e struct {
		ID, Action, Outcome, CorrelationID, EventTime, Severity string
		Reason                                                  struct{ ReasonCode int }
		ResponseData                                            map[string]any
	}
	if err := json.Unmarshal(doc, &e); err != nil {
		t.Fatalf("position %d: %q: %v", l.next, doc, err)
	}
	if e.ID == "" || e.Action == "" || e.Outcome == "" || e.CorrelationID == "" || e.EventTime == "" || e.Severity == "" || e.Reason.ReasonCode == 0 {
		t.Errorf("position %d: half an event: %s", l.next, doc)
	}
	if l.ids[e.ID] {
		t.Errorf("position %d: the event %s is there twice", l.next, e.ID)
	}
	l.ids[e.ID] = true
	l.done[e.CorrelationID] = append(l.done[e.CorrelationID], logged{e.Action, e.Outcome})
	if jti, ok := e.ResponseData["jti"].(string); ok && e.Outcome == "success" {
		l.logins[jti]++
	}
}
