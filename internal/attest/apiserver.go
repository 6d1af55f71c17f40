package attest

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"

	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/kube"
)

// serverClient is a client of a cluster's API server, with the credential that
// it sends. Texts that come from the server must go through redact before they
// are shown: the server has seen the credential, the reader may not have.
type serverClient struct {
	*kube.Client
	credential string
}

// newServerClient opens the cluster's credential. It makes no request.
func newServerClient(c *cluster.Cluster, opener Opener) (*serverClient, error) {
	if c.Server == nil {
		return nil, errors.New("the cluster is registered without an API server")
	}
	credential, err := credentialOf(c, opener)
	if err != nil {
		return nil, err
	}
	client, err := kube.New(kube.Config{
		URL: c.Server.URL, CA: []byte(c.Server.CA), Token: kube.StaticToken(credential),
		Timeout: fetchTimeout, MaxAnswer: maxDocument, Dial: dialer(c.Server.URL),
	})
	if err != nil {
		return nil, err
	}
	return &serverClient{Client: client, credential: credential}, nil
}

func credentialOf(c *cluster.Cluster, opener Opener) (string, error) {
	if len(c.Server.Sealed) == 0 {
		return "", errors.New("the cluster is registered without a credential for its API server")
	}
	if opener == nil {
		return "", errors.New("this server cannot open the credential of the cluster's API server")
	}
	b, err := opener.Open(c.Server.Sealed, c.SealLabel())
	if err != nil {
		return "", err
	}
	return string(b), nil
}

// do makes a request. The status is that of the server's answer, 0 without one.
// Neither the credential nor the secret stand in the error.
func (s *serverClient) do(ctx context.Context, method, path string, in, out any, secret string) (status int, _ error) {
	err := s.Do(ctx, method, path, in, out)
	if err == nil {
		return http.StatusOK, nil
	}
	return kube.Code(err), errors.New(redact(err.Error(), s.credential, secret))
}

// redact takes secrets out of a text that somebody else has written.
func redact(text string, secrets ...string) string {
	for _, s := range secrets {
		if s != "" {
			text = strings.ReplaceAll(text, s, "(token)")
		}
	}
	return text
}

// fetchFromServer asks the API server for the keys that it signs with.
func fetchFromServer(ctx context.Context, c *cluster.Cluster, opener Opener) ([]jose.JSONWebKey, error) {
	client, err := newServerClient(c, opener)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	var doc []byte
	status, err := client.do(ctx, http.MethodGet, "/openid/v1/jwks", nil, &doc, "")
	if err != nil {
		hint := ""
		switch status {
		case http.StatusUnauthorized:
			hint = " (the cluster does not accept the credential: has it expired?)"
		case http.StatusForbidden:
			hint = " (the credential may not read the keys: bind its service account to the cluster role system:service-account-issuer-discovery)"
		}
		return nil, fmt.Errorf("ask the API server %s for its keys: %w%s", c.Server.URL, err, hint)
	}
	keys, err := ParseKeys(doc)
	if err != nil {
		return nil, fmt.Errorf("the keys of the API server %s: %w", c.Server.URL, err)
	}
	return keys, nil
}

// CredentialEnd returns when the credential for a cluster's API server ends, as
// it says itself. Not all of them say.
func CredentialEnd(c *cluster.Cluster, opener Opener) (time.Time, bool) {
	if c.Server == nil {
		return time.Time{}, false
	}
	credential, err := credentialOf(c, opener)
	if err != nil {
		return time.Time{}, false
	}
	return endOf(credential)
}

// endOf reads the end of a token that is nobody's evidence, so that nothing of
// it needs to be verified.
func endOf(credential string) (time.Time, bool) {
	parts := strings.Split(credential, ".")
	if len(parts) != 3 {
		return time.Time{}, false
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return time.Time{}, false
	}
	var claims struct {
		Expiry float64 `json:"exp"`
	}
	if json.Unmarshal(payload, &claims) != nil || claims.Expiry <= 0 || claims.Expiry > 1<<40 {
		return time.Time{}, false
	}
	return time.Unix(int64(claims.Expiry), 0), true
}
