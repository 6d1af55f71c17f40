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
	"sync"
	"time"
)

// TokenSource gives the service's own access token for a server. fresh asks
// for a new one, because the last one was refused.
type TokenSource interface {
	Token(ctx context.Context, serverURL string, fresh bool) (string, error)
}

// APIKey gets tokens with the API key of a service ID.
func APIKey(key string) TokenSource {
	return &exchange{form: func() (url.Values, error) {
		return url.Values{"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}, "apikey": {key}}, nil
	}}
}

// ComputeResource gets tokens of a trusted profile with the compute resource
// token in a file, such as a pod's projected service-account token. No secret
// has to be deployed.
func ComputeResource(file, profileName string) TokenSource {
	return &exchange{form: func() (url.Values, error) {
		token, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("read the compute resource token: %w", err)
		}
		return url.Values{
			"grant_type": {"urn:ibm:params:oauth:grant-type:cr-token"},
			"cr_token":   {strings.TrimSpace(string(token))}, "profile_name": {profileName},
		}, nil
	}}
}

// exchange keeps a token until shortly before its end.
type exchange struct {
	form  func() (url.Values, error)
	mu    sync.Mutex // held while exchanging: who waits needs the answer too
	token string
	until time.Time
}

// early is how long before its end a token is replaced.
const early = time.Minute

var client = http.Client{Timeout: 10 * time.Second}

func (e *exchange) Token(ctx context.Context, serverURL string, fresh bool) (string, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !fresh && time.Now().Before(e.until) {
		return e.token, nil
	}
	form, err := e.form()
	if err != nil {
		return "", err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, serverURL+"/identity/token", strings.NewReader(form.Encode()))
	if err != nil {
		return "", err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	resp, err := client.Do(req)
	if err != nil {
		return "", fmt.Errorf("exchange for an access token: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return "", fmt.Errorf("exchange for an access token: %w", err)
	}
	var answer struct {
		Token     string `json:"access_token"`
		ExpiresIn int64  `json:"expires_in"`
		Message   string `json:"errorMessage"`
		Details   string `json:"errorDetails"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return "", fmt.Errorf("exchange for an access token: status %s with a body that is not JSON", resp.Status)
	}
	if resp.StatusCode != http.StatusOK || answer.Token == "" {
		return "", fmt.Errorf("exchange for an access token: status %s: %s %s", resp.Status, answer.Message, answer.Details)
	}
	e.token = answer.Token
	e.until = time.Now().Add(time.Duration(answer.ExpiresIn)*time.Second - early)
	return e.token, nil
}
