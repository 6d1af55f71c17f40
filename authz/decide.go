package authz

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strings"
	"sync"
	"time"

	"tabard.dev/tabard/internal/crn"
)

// MaxAge is how long a decision is kept at most. The server may ask for less.
const MaxAge = time.Second

// Bounds.
const (
	maxKept   = 10_000  // decisions of one second
	maxAnswer = 1 << 20 // bytes of an answer
)

type decision struct {
	allowed     bool
	reason      string
	transaction string
	age         time.Duration // for which the server lets it be kept
	asked       time.Time
	until       time.Time
}

// serves reports whether the decision is fresh enough for a request that came
// at a time: asked after it, or not long before.
func (d decision) serves(came time.Time) bool { return !d.asked.Before(came) || came.Before(d.until) }

// question encodes what is asked. The encoding is also what the answer is kept
// under: it has the token in it, so an answer never serves another one. The
// resource is in the service's own account, whatever account the caller is in.
func (g *Guard) question(caller Caller, token, action string, r Resource) ([]byte, error) {
	properties := map[string]string{}
	maps.Copy(properties, r.Attributes)
	for name, value := range map[string]string{
		"serviceInstance": r.Instance, "resourceGroupId": r.Group, "region": r.Region,
	} {
		if value != "" {
			properties[name] = value
		}
	}
	kind, id := g.cfg.Service, r.ID
	if r.Type != "" {
		kind += "/" + r.Type
	}
	if strings.HasPrefix(id, "crn:") {
		// As the id of a question it would be taken apart, and the answer be
		// about what a caller has written into a name.
		properties["resource"], id = id, ""
	}
	return json.Marshal(map[string]any{
		"subject":  map[string]any{"type": subjectType(caller.IAMID), "id": caller.IAMID, "properties": map[string]string{"accountId": caller.AccountID, "access_token": token}},
		"action":   map[string]string{"name": action},
		"resource": map[string]any{"type": kind, "id": id, "properties": properties},
	})
}

// subjectType is the AuthZEN type of an IAM ID.
func subjectType(iamID string) string {
	switch crn.KindOf(iamID) {
	case crn.KindServiceID:
		return "service_id"
	case crn.KindProfile:
		return "profile"
	case crn.KindCRN:
		return "crn"
	}
	return "user"
}

// decide returns the answer that is kept, or asks. Requests with one question
// at the same time share one call.
func (g *Guard) decide(ctx context.Context, question []byte) (decision, error) {
	key := sha256.Sum256(question)
	came := g.cfg.Now()
	if d, ok := g.decisions.get(key, came); ok {
		return d, nil
	}
	for range 3 {
		d, err := g.shared(ctx, key, question)
		if err != nil || d.serves(came) {
			return d, err
		}
		// The call was under way for long when this request came, so that its
		// answer may be from before a revocation. The next one's is not.
	}
	return decision{}, fmt.Errorf("%w: its answers are older than the question, as if the clock went back", ErrUnavailable)
}

func (g *Guard) shared(ctx context.Context, key [32]byte, question []byte) (decision, error) {
	result := g.flight.DoChan(string(key[:]), func() (any, error) {
		// Others may wait for this answer: it must not end with the first.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
		defer cancel()
		asked := g.cfg.Now() // what happens from here on is not in the answer
		d, err := g.ask(ctx, question)
		if err != nil {
			return decision{}, err
		}
		d.asked, d.until = asked, asked.Add(min(MaxAge, d.age))
		g.decisions.put(key, d, g.cfg.Now())
		return d, nil
	})
	select {
	case <-ctx.Done():
		return decision{}, fmt.Errorf("%w: the request ended: %w", ErrUnavailable, ctx.Err())
	case r := <-result:
		d, _ := r.Val.(decision)
		return d, r.Err
	}
}

// ask makes the call. A token of our own that does not count any more is
// replaced once.
func (g *Guard) ask(ctx context.Context, question []byte) (decision, error) {
	refused := ""
	for attempt := 0; ; attempt++ {
		own, err := g.cfg.Token.Token(ctx, Server{URL: g.cfg.URL, Client: g.cfg.Client, Now: g.cfg.Now}, refused)
		if err != nil {
			return decision{}, fmt.Errorf("%w: get the service's own token: %w", ErrUnavailable, err)
		}
		status, body, err := g.post(ctx, own, question)
		if err != nil {
			return decision{}, fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		if status == http.StatusUnauthorized && attempt == 0 {
			refused = own
			continue
		}
		if status != http.StatusOK {
			return decision{}, fmt.Errorf("%w: the decision endpoint answers %d: %.300s", ErrUnavailable, status, body)
		}
		var answer struct {
			Decision *bool `json:"decision"`
			Context  struct {
				Reason      string `json:"reason"`
				MaxAge      int    `json:"max_cache_age_seconds"`
				Transaction string `json:"transaction_id"`
			} `json:"context"`
		}
		if err := json.Unmarshal(body, &answer); err != nil || answer.Decision == nil {
			return decision{}, fmt.Errorf("%w: the decision endpoint's answer is not one: %.300s", ErrUnavailable, body)
		}
		return decision{
			allowed: *answer.Decision, reason: answer.Context.Reason, transaction: answer.Context.Transaction,
			age: time.Duration(min(max(answer.Context.MaxAge, 0), 60)) * time.Second,
		}, nil
	}
}

func (g *Guard) post(ctx context.Context, own string, body []byte) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, g.cfg.URL+"/access/v1/evaluation", bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Authorization", "Bearer "+own)
	req.Header.Set("Content-Type", "application/json")
	resp, err := g.cfg.Client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	return resp.StatusCode, answer, err
}

// cache keeps decisions for their second: those of the present period and of
// the one before. Dropping a whole period costs nothing.
type cache struct {
	mu         sync.Mutex
	began      time.Time // of the present period
	young, old map[[32]byte]decision
}

func newCache() *cache { return &cache{young: map[[32]byte]decision{}} }

func (c *cache) get(key [32]byte, now time.Time) (decision, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	d, ok := c.young[key]
	if !ok {
		d, ok = c.old[key]
	}
	return d, ok && now.Before(d.until)
}

func (c *cache) put(key [32]byte, d decision, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if age := now.Sub(c.began); age < 0 || age >= MaxAge {
		c.began, c.old, c.young = now, c.young, map[[32]byte]decision{}
	}
	if len(c.young) < maxKept && now.Before(d.until) {
		c.young[key] = d
	}
}
