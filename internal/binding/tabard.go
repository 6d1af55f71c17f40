package binding

import (
	"context"
	"errors"
	"net/http"
	"net/url"

	"tabard.dev/tabard/internal/iamclient"
)

const maxPages = 100_000 // of 100 profiles

// iam is what the controller asks of the IAM server.
type iam struct {
	*iamclient.Client
	holds func() bool // the replica may still change something
}

// errNotLeading means that another replica may lead by now. Whether a change is
// still wanted, that one knows.
var errNotLeading = errors.New("the lease has ended, and another controller may lead")

// unavailable reports whether the IAM server has not answered as to the matter,
// so that the same request may succeed later.
func unavailable(err error) bool {
	var e *iamclient.Error
	if errors.As(err, &e) {
		return e.Status >= 500 || e.Status == http.StatusTooManyRequests || e.Status < 400
	}
	return true
}

// registeredCluster is a cluster as the IAM server shows it.
type registeredCluster struct {
	CRN  string `json:"crn"`
	Type string `json:"type"` // of compute resource: IKS_SA or ROKS_SA
}

func (c iam) cluster(ctx context.Context, ref string) (registeredCluster, error) {
	var k registeredCluster
	err := c.Do(ctx, http.MethodGet, "/v1/clusters/"+url.PathEscape(ref), nil, &k)
	return k, err
}

type profile struct {
	ID   string `json:"id"`
	Name string `json:"name"`
}

func (c iam) profileByID(ctx context.Context, id string) (profile, error) {
	var p profile
	err := c.Do(ctx, http.MethodGet, "/v1/profiles/"+url.PathEscape(id), nil, &p)
	return p, err
}

// errNoProfile means that no profile has a name, or none that the controller may
// see.
var errNoProfile = errors.New("no profile has this name")

func (c iam) profileByName(ctx context.Context, name string) (profile, error) {
	for p, err := range c.profiles(ctx, name) {
		if err != nil {
			return profile{}, err
		}
		if p.Name == name {
			return p, nil
		}
	}
	return profile{}, errNoProfile
}

// profiles yields the account's profiles that the controller may see, or those
// with a name.
func (c iam) profiles(ctx context.Context, name string) func(yield func(profile, error) bool) {
	return func(yield func(profile, error) bool) {
		who, err := c.Session(ctx)
		if err != nil {
			yield(profile{}, err)
			return
		}
		q := url.Values{"account_id": {who.Account}, "pagesize": {"100"}}
		if name != "" {
			q.Set("name", name)
		}
		for range maxPages {
			var page struct {
				Next     string    `json:"next"`
				Profiles []profile `json:"profiles"`
			}
			if err := c.Do(ctx, http.MethodGet, "/v1/profiles?"+q.Encode(), nil, &page); err != nil {
				yield(profile{}, err)
				return
			}
			for _, p := range page.Profiles {
				if !yield(p, nil) {
					return
				}
			}
			if page.Next == "" {
				return
			}
			// Of the next page's address only the token counts: the server may
			// know itself by another name than the controller reaches it by.
			next, err := url.Parse(page.Next)
			if err != nil || next.Query().Get("pagetoken") == "" {
				yield(profile{}, errors.New("list the trusted profiles: the next page has no token"))
				return
			}
			q = next.Query()
		}
		yield(profile{}, errors.New("list the trusted profiles: there is no end to them"))
	}
}

type link struct {
	ID     string `json:"id,omitempty"`
	Name   string `json:"name"`
	CRType string `json:"cr_type"`
	Link   linked `json:"link"`
}

type linked struct {
	CRN       string `json:"crn"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

func (c iam) links(ctx context.Context, profile string) ([]link, error) {
	var answer struct {
		Links []link `json:"links"`
	}
	err := c.Do(ctx, http.MethodGet, "/v1/profiles/"+url.PathEscape(profile)+"/links", nil, &answer)
	return answer.Links, err
}

func (c iam) createLink(ctx context.Context, profile string, l link) (link, error) {
	if !c.holds() {
		return link{}, errNotLeading
	}
	var made link
	err := c.Do(ctx, http.MethodPost, "/v1/profiles/"+url.PathEscape(profile)+"/links", l, &made)
	return made, err
}

// deleteLink is content when the link is not there any more.
func (c iam) deleteLink(ctx context.Context, profile, id string) error {
	if !c.holds() {
		return errNotLeading
	}
	err := c.Do(ctx, http.MethodDelete, "/v1/profiles/"+url.PathEscape(profile)+"/links/"+url.PathEscape(id), nil, nil)
	if iamclient.Status(err) == http.StatusNotFound {
		return nil
	}
	return err
}
