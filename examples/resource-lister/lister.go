package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/IBM/go-sdk-core/v5/core"
)

// The steps, by the names that the answer uses.
const (
	stepRequest  = "request"
	stepRead     = "read-token"
	stepExchange = "exchange"
	stepList     = "list-resources"
)

// Bounds on what others can make us read.
const (
	maxProfileName = 256      // characters
	maxTokenFile   = 64 << 10 // bytes
	maxPage        = 16 << 20 // bytes
	maxPages       = 1000     // of 100 resources each
	firstPage      = "/v2/resource_instances?limit=100"
)

type lister struct {
	cfg    config
	client *http.Client
}

func newLister(cfg config) *lister {
	return &lister{cfg: cfg, client: &http.Client{
		Timeout: callTimeout,
		// A redirect could carry a token to another host. Neither service
		// redirects, so a redirect is an error.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// list does the three steps for the trusted profile of the given name and
// reports on each. It stops at the first that fails.
func (l *lister) list(ctx context.Context, profile string) *report {
	r := newReport()
	if p := checkProfileName(profile); p != nil {
		return r.stop(stepRequest, p)
	}
	r.Profile = profile

	crToken, p := readToken(l.cfg.TokenFile)
	r.keepSecret(crToken)
	if p != nil {
		return r.stop(stepRead, p)
	}
	shown := showToken(crToken)
	detail := "The service-account token was read from " + l.cfg.TokenFile + "; " + validity(shown) + "."
	if shown == nil {
		// Not our decision: IAM is asked all the same, and says what it thinks.
		detail = "The file " + l.cfg.TokenFile + " was read, but it does not hold a JWT."
	}
	r.pass(stepRead, detail, shown)

	accessToken, p := l.exchange(profile)
	r.keepSecret(accessToken)
	if p != nil {
		return r.stop(stepExchange, p)
	}
	shown = showToken(accessToken)
	r.pass(stepExchange, "IAM exchanged it for an access token of the trusted profile; "+validity(shown)+".", shown)

	resources, pages, p := l.resources(ctx, accessToken)
	if p != nil {
		return r.stop(stepList, p)
	}
	if len(resources) == 0 {
		r.Hint = hintEmpty
	}
	r.Resources = resources
	r.pass(stepList, fmt.Sprintf("The profile sees %d resource(s), read from %d page(s).", len(resources), pages), nil)
	return r
}

// checkProfileName bounds what is sent on to IAM and into the log.
func checkProfileName(name string) *problem {
	switch {
	case name == "":
		return &problem{Message: "The name of a trusted profile is missing.", Hint: hintUsage}
	case utf8.RuneCountInString(name) > maxProfileName:
		return &problem{Message: fmt.Sprintf("The name of the trusted profile is longer than %d characters.", maxProfileName), Hint: hintUsage}
	case !utf8.ValidString(name) || strings.ContainsFunc(name, func(c rune) bool { return !unicode.IsPrint(c) }):
		return &problem{Message: "The name of the trusted profile has characters that cannot be printed.", Hint: hintUsage}
	}
	return nil
}

// readToken reads the token that the kubelet keeps fresh in the file. The
// authenticator reads the file itself; this is for showing what is in it.
func readToken(name string) (string, *problem) {
	f, err := os.Open(name)
	if err != nil {
		return "", &problem{Message: err.Error(), Hint: hintTokenFile}
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxTokenFile+1))
	token := strings.TrimSpace(string(b))
	switch {
	case err != nil:
		return "", &problem{Message: err.Error(), Hint: hintTokenFile}
	case len(b) > maxTokenFile:
		return "", &problem{Message: fmt.Sprintf("%s is larger than %d bytes.", name, maxTokenFile), Hint: hintTokenFile}
	case token == "":
		return "", &problem{Message: name + " is empty.", Hint: hintTokenFile}
	}
	return token, nil
}

// exchange gets an access token of the trusted profile for the token in the
// file. The authenticator is made anew for each request and asked by
// RequestToken, which never answers from a cache: a link that was removed a
// second ago is seen at once, and no profile gets another one's token. A
// service that calls often would rather keep one authenticator for each profile
// and call its Authenticate or GetToken, which renew the token before it ends.
func (l *lister) exchange(profile string) (string, *problem) {
	authenticator, err := core.NewContainerAuthenticatorBuilder().
		SetURL(l.cfg.IAMURL).
		SetIAMProfileName(profile).
		SetCRTokenFilename(l.cfg.TokenFile).
		SetClient(l.client).
		Build()
	if err != nil {
		return "", &problem{Message: err.Error(), Hint: hintUsage}
	}
	answer, err := authenticator.RequestToken()
	var refused *core.AuthenticationError
	switch {
	case errors.As(err, &refused) && refused.Response.GetStatusCode() != 0:
		p := problemOf(refused.Response.StatusCode, refused.Response.Headers, sdkBody(refused.Response))
		p.Hint = hintFor(stepExchange, p)
		return "", p
	case err != nil:
		return "", &problem{Message: err.Error(), Hint: hintIAMUnreachable}
	case answer.AccessToken == "":
		return "", &problem{Message: "The answer of " + l.cfg.IAMURL + " has no access_token.", Hint: hintNotIAM}
	}
	return answer.AccessToken, nil
}

// sdkBody is the body of an error as it came: the SDK keeps JSON decoded and
// anything else raw.
func sdkBody(response *core.DetailedResponse) []byte {
	if b, err := json.Marshal(response.Result); err == nil && response.Result != nil {
		return b
	}
	return response.RawResult
}

// resources reads all pages of the resource list and tells how many there were.
func (l *lister) resources(ctx context.Context, accessToken string) ([]resource, int, *problem) {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	at, err := url.Parse(l.cfg.ResourceControllerURL + firstPage)
	if err != nil {
		return nil, 0, &problem{Message: err.Error(), Hint: hintResourcesUnreachable}
	}
	all := []resource{}
	visited := map[string]bool{}
	for {
		visited[at.String()] = true
		page, p := l.page(ctx, at, accessToken)
		if p != nil {
			return nil, len(visited), p
		}
		all = append(all, page.Resources...)
		if page.NextURL == "" { // absent and null too
			return all, len(visited), nil
		}
		next, p := nextPage(at, page.NextURL)
		switch {
		case p != nil:
			return nil, len(visited), p
		case visited[next.String()]:
			return nil, len(visited), &problem{Message: "next_url leads back to a page that was read already: " + next.String(), Hint: hintPaging}
		case len(visited) == maxPages:
			return nil, len(visited), &problem{Message: fmt.Sprintf("The list has more than %d pages.", maxPages), Hint: hintPaging}
		}
		at = next
	}
}

// nextPage resolves next_url, which may be relative, and refuses one that
// points to another server: the access token would go there too.
func nextPage(at *url.URL, next string) (*url.URL, *problem) {
	u, err := at.Parse(next)
	if err != nil {
		return nil, &problem{Message: fmt.Sprintf("next_url is not a URL: %.200q", next), Hint: hintPaging}
	}
	u.Fragment = ""
	if u.Scheme != at.Scheme || !strings.EqualFold(u.Host, at.Host) {
		return nil, &problem{
			Message: fmt.Sprintf("next_url points to %s://%s, but the list is read from %s://%s.", u.Scheme, u.Host, at.Scheme, at.Host),
			Hint:    hintForeign,
		}
	}
	return u, nil
}

type resourcePage struct {
	NextURL   string     `json:"next_url"`
	Resources []resource `json:"resources"`
}

func (l *lister) page(ctx context.Context, at *url.URL, accessToken string) (*resourcePage, *problem) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, at.String(), nil)
	if err != nil {
		return nil, &problem{Message: err.Error(), Hint: hintResourcesUnreachable}
	}
	request.Header.Set("Accept", "application/json")
	request.Header.Set("Authorization", "Bearer "+accessToken)
	request.Header.Set("User-Agent", "resource-lister/"+version)
	response, err := l.client.Do(request)
	if err != nil {
		return nil, &problem{Message: err.Error(), Hint: hintResourcesUnreachable}
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxPage+1))
	switch {
	case err != nil:
		return nil, &problem{Message: "Reading the resource list: " + err.Error(), Hint: hintResourcesUnreachable}
	case len(body) > maxPage:
		return nil, &problem{Message: fmt.Sprintf("A page of the list is larger than %d bytes.", maxPage), Hint: hintPaging}
	case response.StatusCode != http.StatusOK:
		p := problemOf(response.StatusCode, response.Header, body)
		p.Hint = hintFor(stepList, p)
		return nil, p
	}
	var page resourcePage
	if err := json.Unmarshal(body, &page); err != nil {
		return nil, &problem{StatusCode: response.StatusCode, Message: "The answer is not a list of resources: " + err.Error(), Hint: hintNotResources}
	}
	return &page, nil
}

// validity says until when a token is good, as far as it can be read.
func validity(t *shownToken) string {
	var claims struct {
		Expires float64 `json:"exp"`
	}
	if t == nil || json.Unmarshal(t.Claims, &claims) != nil || claims.Expires == 0 {
		return "it does not say until when it is valid"
	}
	return "it is valid until " + time.Unix(int64(claims.Expires), 0).UTC().Format(time.RFC3339)
}
