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
	"sync"
	"time"
)

// MaxAge is how long a decision is kept at most. The server may ask for less.
const MaxAge = time.Second

// Bounds.
const (
	maxKept   = 10_000  // decisions in memory
	maxAnswer = 1 << 20 // bytes of an answer
)

type decision struct {
	allowed     bool
	reason      string
	transaction string
	age         time.Duration // for which the server lets it be kept
	until       time.Time
}

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
	kind := g.cfg.Service
	if r.Type != "" {
		kind += "/" + r.Type
	}
	return json.Marshal(map[string]any{
		"subject":  map[string]any{"id": caller.IAMID, "properties": map[string]string{"accountId": caller.AccountID, "access_token": token}},
		"action":   map[string]string{"name": action},
		"resource": map[string]any{"type": kind, "id": r.ID, "properties": properties},
	})
}

func (g *Guard) decide(ctx context.Context, question []byte) (decision, error) {
	key := sha256.Sum256(question)
	if d, ok := g.decisions.get(key, g.cfg.Now()); ok {
		return d, nil
	}
	answer, err, _ := g.flight.Do(string(key[:]), func() (any, error) {
		// Others may wait for this answer: it must not end with the first.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		asked := g.cfg.Now() // what happens from here on is not in the answer
		d, err := g.ask(ctx, question)
		if err != nil {
			return decision{}, err
		}
		d.until = asked.Add(min(MaxAge, d.age))
		g.decisions.put(key, d, g.cfg.Now())
		return d, nil
	})
	if err != nil {
		return decision{}, err
	}
	return answer.(decision), nil
}

// ask makes the call. A token of our own that does not count any more is
// replaced once.
func (g *Guard) ask(ctx context.Context, question []byte) (decision, error) {
	for attempt := 0; ; attempt++ {
		own, err := g.cfg.Token.Token(ctx, g.cfg.URL, attempt > 0)
		if err != nil {
			return decision{}, fmt.Errorf("%w: get the service's own token: %w", ErrUnavailable, err)
		}
		status, body, err := g.post(ctx, own, question)
		if err != nil {
			return decision{}, fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		if status == http.StatusUnauthorized && attempt == 0 {
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
			age: time.Duration(answer.Context.MaxAge) * time.Second,
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

// cache keeps decisions for their second.
type cache struct {
	mu   sync.Mutex
	kept map[[32]byte]decision
}

func newCache() *cache { return &cache{kept: map[[32]byte]decision{}} }

func (c *cache) get(key [32]byte, now time.Time) (decision, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	d, ok := c.kept[key]
	if ok && !now.Before(d.until) {
		delete(c.kept, key)
		return decision{}, false
	}
	return d, ok
}

func (c *cache) put(key [32]byte, d decision, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.kept) >= maxKept {
		maps.DeleteFunc(c.kept, func(_ [32]byte, d decision) bool { return !now.Before(d.until) })
	}
	if len(c.kept) < maxKept && now.Before(d.until) {
		c.kept[key] = d
	}
}
