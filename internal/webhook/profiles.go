package webhook

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"sync"
	"time"

	"tabard.dev/tabard/internal/iamclient"
)

// Bounds on questions to Tabard. An admission has 10 s in all.
const (
	askTimeout   = 2 * time.Second
	rememberYes  = 30 * time.Second
	rememberNo   = 3 * time.Second // somebody is about to create it
	rememberDown = 3 * time.Second
	maxKnown     = 10000
)

// profiles asks Tabard whether profiles exist, as the webhook's own profile.
// Answers are remembered for a short time.
type profiles struct {
	iam     *iamclient.Client
	profile string // that is put on
	now     func() time.Time

	mu    sync.Mutex
	known map[string]knowledge
	down  knowledge // Tabard itself: when it was last unreachable, and why
}

type knowledge struct {
	exists bool
	err    error
	until  time.Time
}

func newProfiles(cfg *Config) (*profiles, error) {
	client, err := iamclient.New(iamclient.Config{
		URL: cfg.IAMURL, Insecure: cfg.InsecureHTTP, CAFile: cfg.CAFile, Profile: cfg.Profile, TokenFile: cfg.TokenFile,
		Timeout: askTimeout, Now: cfg.Now,
	})
	if err != nil {
		return nil, err
	}
	return &profiles{iam: client, profile: cfg.Profile, now: cfg.Now, known: map[string]knowledge{}}, nil
}

// exist reports whether Tabard has a profile, by its name or id. An error means
// that nobody knows.
func (p *profiles) exist(ctx context.Context, profile string) (bool, error) {
	now := p.now()
	p.mu.Lock()
	k, ok := p.known[profile]
	down := p.down
	p.mu.Unlock()
	if ok && now.Before(k.until) {
		return k.exists, nil
	}
	if now.Before(down.until) {
		return false, down.err
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	exists, err := p.ask(ctx, profile)
	p.mu.Lock()
	defer p.mu.Unlock()
	now = p.now()
	if err != nil {
		// The time that the caller gave up is his, not Tabard's fault.
		if !errors.Is(ctx.Err(), context.Canceled) {
			p.down = knowledge{err: err, until: now.Add(rememberDown)}
		}
		return false, err
	}
	if len(p.known) >= maxKnown {
		clear(p.known)
	}
	remember := rememberNo
	if exists {
		remember = rememberYes
	}
	p.known[profile] = knowledge{exists: exists, until: now.Add(remember)}
	return exists, nil
}

func (p *profiles) ask(ctx context.Context, profile string) (bool, error) {
	if id, ok := iamclient.ProfileID(profile); ok {
		err := p.iam.Do(ctx, http.MethodGet, "/v1/profiles/"+url.PathEscape(id), nil, nil)
		if iamclient.Status(err) == http.StatusNotFound {
			return false, nil
		}
		return err == nil, err
	}
	found, err := p.named(ctx, profile)
	if err != nil || found {
		return found, err
	}
	// A list leaves out what one may not see. Whoever sees not even himself
	// cannot say that something is not there.
	if own, err := p.named(ctx, p.profile); err != nil {
		return false, err
	} else if !own {
		return false, fmt.Errorf("the webhook's profile %q may not see profiles; give it the role Viewer on iam-identity", p.profile)
	}
	return false, nil
}

// named reports whether the list of profiles has one of a name.
func (p *profiles) named(ctx context.Context, name string) (bool, error) {
	who, err := p.iam.Session(ctx)
	if err != nil {
		return false, err
	}
	var list struct {
		Profiles []struct {
			Name string `json:"name"`
		} `json:"profiles"`
	}
	query := url.Values{"account_id": {who.Account}, "name": {name}, "pagesize": {"1"}}
	if err := p.iam.Do(ctx, http.MethodGet, "/v1/profiles?"+query.Encode(), nil, &list); err != nil {
		return false, err
	}
	return len(list.Profiles) == 1 && list.Profiles[0].Name == name, nil
}
