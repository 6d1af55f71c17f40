package webhook

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"
)

// Bounds on questions to Tabard. An admission has 10 s in all.
const (
	askTimeout   = 2 * time.Second
	maxToken     = 64 << 10
	maxAnswer    = 1 << 20
	rememberYes  = 30 * time.Second
	rememberNo   = 3 * time.Second // somebody is about to create it
	rememberDown = 3 * time.Second
	maxKnown     = 10000
)

const grantCRToken = "urn:ibm:params:oauth:grant-type:cr-token"

// profiles asks Tabard whether profiles exist, with an identity like any pod's:
// the webhook's own token exchanged for its own profile. Answers are remembered
// for a short time.
type profiles struct {
	url       string
	profile   string // that is put on
	tokenFile string
	http      *http.Client
	now       func() time.Time

	mu    sync.Mutex
	known map[string]knowledge
	down  knowledge // Tabard itself: when it was last unreachable, and why

	// asking holds the one place for the renewal of the token, which is the
	// content.
	asking chan access
}

type knowledge struct {
	exists bool
	err    error
	until  time.Time
}

type access struct {
	token   string
	account string
	renew   time.Time
}

func newProfiles(iamURL, profile, tokenFile string, ca []byte, now func() time.Time) (*profiles, error) {
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool() // an image without any
	}
	if len(ca) > 0 && !pool.AppendCertsFromPEM(ca) {
		return nil, errors.New("ca-file: it holds no certificate in PEM")
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: pool}
	p := &profiles{
		url: iamURL, profile: profile, tokenFile: tokenFile, now: now, known: map[string]knowledge{}, asking: make(chan access, 1),
		http: &http.Client{
			Transport: transport, Timeout: askTimeout,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}
	p.asking <- access{}
	return p, nil
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
	a, err := p.access(ctx)
	if err != nil {
		return false, err
	}
	if id := profileID.FindStringSubmatch(profile); id != nil {
		status, _, err := p.get(ctx, a, "/v1/profiles/"+url.PathEscape(id[1]))
		switch {
		case err != nil:
			return false, err
		case status == http.StatusNotFound:
			return false, nil
		case status != http.StatusOK:
			return false, fmt.Errorf("Tabard answered the question for a profile with status %d", status)
		}
		return true, nil
	}
	found, err := p.named(ctx, a, profile)
	if err != nil || found {
		return found, err
	}
	// A list leaves out what one may not see. Whoever sees not even himself
	// cannot say that something is not there.
	if own, err := p.named(ctx, a, p.profile); err != nil {
		return false, err
	} else if !own {
		return false, fmt.Errorf("the webhook's profile %q may not see profiles; give it the role Viewer on iam-identity", p.profile)
	}
	return false, nil
}

// named reports whether the list of profiles has one of a name.
func (p *profiles) named(ctx context.Context, a access, name string) (bool, error) {
	status, body, err := p.get(ctx, a, "/v1/profiles?"+url.Values{"account_id": {a.account}, "name": {name}, "pagesize": {"1"}}.Encode())
	if err != nil {
		return false, err
	}
	if status != http.StatusOK {
		return false, fmt.Errorf("Tabard answered the question for a profile with status %d", status)
	}
	var list struct {
		Profiles []struct {
			Name string `json:"name"`
		} `json:"profiles"`
	}
	if err := json.Unmarshal(body, &list); err != nil {
		return false, fmt.Errorf("read the list of profiles: %w", err)
	}
	return len(list.Profiles) == 1 && list.Profiles[0].Name == name, nil
}

func (p *profiles) get(ctx context.Context, a access, path string) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.url+path, nil)
	if err != nil {
		return 0, nil, fmt.Errorf("ask for a profile: %w", err)
	}
	req.Header.Set("Authorization", "Bearer "+a.token)
	status, body, err := p.do(req)
	if status == http.StatusUnauthorized {
		p.forget(a)
	}
	return status, body, err
}

func (p *profiles) do(req *http.Request) (int, []byte, error) {
	req.Header.Set("Accept", "application/json")
	resp, err := p.http.Do(req)
	if err != nil {
		return 0, nil, fmt.Errorf("ask Tabard: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return 0, nil, fmt.Errorf("read Tabard's answer: %w", err)
	}
	return resp.StatusCode, body, nil
}

// access returns an access token of the webhook's profile.
func (p *profiles) access(ctx context.Context) (access, error) {
	select {
	case a := <-p.asking:
		var err error
		if !p.now().Before(a.renew) {
			var next access
			if next, err = p.exchange(ctx); err == nil {
				a = next
			}
		}
		p.asking <- a
		return a, err
	case <-ctx.Done():
		return access{}, fmt.Errorf("wait for an access token: %w", ctx.Err())
	}
}

// forget has the next question renew a token that was refused.
func (p *profiles) forget(refused access) {
	a := <-p.asking
	if a.token == refused.token {
		a = access{}
	}
	p.asking <- a
}

// exchange exchanges the webhook's own token, as any pod does
// (reference/iam-identity.md section 1.2).
func (p *profiles) exchange(ctx context.Context) (access, error) {
	own, err := readToken(p.tokenFile)
	if err != nil {
		return access{}, err
	}
	form := url.Values{"grant_type": {grantCRToken}, "cr_token": {own}}
	if id := profileID.FindStringSubmatch(p.profile); id != nil {
		form.Set("profile_id", id[1])
	} else {
		form.Set("profile_name", p.profile)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.url+"/identity/token", strings.NewReader(form.Encode()))
	if err != nil {
		return access{}, fmt.Errorf("put on the webhook's profile: %w", err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	status, body, err := p.do(req)
	if err != nil {
		return access{}, err
	}
	var answer struct {
		AccessToken string `json:"access_token"`
		ExpiresIn   int64  `json:"expires_in"` // seconds
		Code        string `json:"errorCode"`
		Message     string `json:"errorMessage"`
	}
	// An answer that is no JSON has a status that says as much.
	_ = json.Unmarshal(body, &answer)
	if status != http.StatusOK || answer.AccessToken == "" {
		return access{}, fmt.Errorf("put on the webhook's profile %q: status %d %s %s", p.profile, status, answer.Code, answer.Message)
	}
	account, err := accountOf(answer.AccessToken)
	if err != nil {
		return access{}, err
	}
	life := time.Duration(min(max(answer.ExpiresIn, 0), 24*3600)) * time.Second
	return access{answer.AccessToken, account, p.now().Add(life / 5 * 4)}, nil
}

// accountOf reads the account out of an access token that Tabard just gave.
func accountOf(token string) (string, error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return "", errors.New("Tabard's access token is not a JWT")
	}
	var claims struct {
		Account struct {
			BSS string `json:"bss"`
		} `json:"account"`
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err == nil {
		err = json.Unmarshal(payload, &claims)
	}
	if err != nil || claims.Account.BSS == "" {
		return "", errors.New("Tabard's access token names no account")
	}
	return claims.Account.BSS, nil
}

// readToken reads a projected token, which the kubelet replaces before it ends.
func readToken(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", fmt.Errorf("read the webhook's own token: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxToken))
	if err != nil {
		return "", fmt.Errorf("read the webhook's own token: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}
