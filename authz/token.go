package authz

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
)

// TokenSource gives the service's own access token for a server. refused is
// the token that the server has just refused, which must not be given again,
// or "".
type TokenSource interface {
	Token(ctx context.Context, server Server, refused string) (string, error)
}

// Server is where and how a [TokenSource] asks.
type Server struct {
	URL    string
	Client *http.Client // does not follow redirects
	Now    func() time.Time
}

// APIKey gets tokens with the API key of a service ID.
func APIKey(key string) TokenSource {
	return newExchange(func() (url.Values, error) {
		return url.Values{"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}, "apikey": {key}}, nil
	})
}

// ComputeResource gets tokens of a trusted profile with the compute resource
// token in a file, such as a pod's projected service-account token. No secret
// has to be deployed.
func ComputeResource(file, profileName string) TokenSource {
	return newExchange(func() (url.Values, error) {
		token, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("read the compute resource token: %w", err)
		}
		return url.Values{
			"grant_type": {"urn:ibm:params:oauth:grant-type:cr-token"},
			"cr_token":   {strings.TrimSpace(string(token))}, "profile_name": {profileName},
		}, nil
	})
}

// exchange keeps a token until shortly before its end.
type exchange struct {
	form func() (url.Values, error)
	turn chan struct{} // held while exchanging: who waits needs the answer too

	token string
	until time.Time
}

func newExchange(form func() (url.Values, error)) *exchange {
	return &exchange{form: form, turn: make(chan struct{}, 1)}
}

// early is how long before its end a token is replaced; one that lives shortly
// is used for three quarters of its time.
const early = time.Minute

func (e *exchange) Token(ctx context.Context, s Server, refused string) (string, error) {
	select {
	case e.turn <- struct{}{}:
		defer func() { <-e.turn }()
	case <-ctx.Done():
		return "", fmt.Errorf("wait for an access token: %w", ctx.Err())
	}
	if e.token != refused && s.Now().Before(e.until) {
		return e.token, nil
	}
	asked := s.Now()
	token, life, err := e.get(ctx, s)
	if err != nil {
		return "", err
	}
	e.token, e.until = token, asked.Add(life-min(early, life/4))
	return token, nil
}

func (e *exchange) get(ctx context.Context, s Server) (token string, life time.Duration, err error) {
	form, err := e.form()
	if err != nil {
		return "", 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.URL+"/identity/token", strings.NewReader(form.Encode()))
	if err != nil {
		return "", 0, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	resp, err := s.Client.Do(req)
	if err != nil {
		return "", 0, fmt.Errorf("exchange for an access token: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return "", 0, fmt.Errorf("exchange for an access token: %w", err)
	}
	var answer struct {
		Token     string `json:"access_token"`
		ExpiresIn int64  `json:"expires_in"`
		Message   string `json:"errorMessage"`
		Details   string `json:"errorDetails"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return "", 0, fmt.Errorf("exchange for an access token: status %s with a body that is not JSON", resp.Status)
	}
	if resp.StatusCode != http.StatusOK || answer.Token == "" {
		return "", 0, fmt.Errorf("exchange for an access token: status %s: %s %s", resp.Status, answer.Message, answer.Details)
	}
	return answer.Token, time.Duration(min(max(answer.ExpiresIn, 0), 86400)) * time.Second, nil
}
