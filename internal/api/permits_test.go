package api_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/api/apitest"
)

// listing is a family with lists of n things.
func listing(e *apitest.Env, n int, resource func(c *api.Call, i int) map[string]string) {
	f := &api.Family{Config: e.Config, Mux: e.Mux, Service: "Test", Shape: api.PlainShape}
	api.List(f, fmt.Sprintf("GET /list/%d", n), "iam-identity.profile.get", func(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
		seen := 0
		for i := range n {
			if may(resource(c, i)) {
				seen++
			}
		}
		return api.Reply{Body: seen}, nil
	})
}

const someone = "iam-ServiceId-0f3b1c2d-1111-4222-8333-444455556666"

// A list is one request, of which every thing that it shows may be another
// resource.
func TestAListCountsOnceAndTouchesAllThatItShows(t *testing.T) {
	e := apitest.New(t)
	listing(e, 100, func(c *api.Call, i int) map[string]string {
		return c.InAccount("iam-identity", access.ResourceType, "profile", access.Region, fmt.Sprint("r", i%3))
	})
	e.Grant(someone, "iam-identity", "Viewer")
	if r := e.Do(apitest.Request{Path: "/list/100", As: someone}); r.Status != http.StatusOK {
		t.Fatalf("%d: %s", r.Status, r.Raw)
	}
	uses := e.Usage.Uses(e.Owner.AccountID, someone)
	if len(uses) != 1 || uses[0].Count != 1 || len(uses[0].Touched.Region.List) != 3 {
		t.Fatalf("%+v", uses)
	}
	if n, _ := e.Usage.Of(uses[0].PolicyID); n != 1 {
		t.Errorf("the policy has %d permits", n)
	}
}

// Many services in one request count once each, however many there are.
func TestARequestAboutManyServicesCountsOnceForEach(t *testing.T) {
	e := apitest.New(t)

	f := &api.Family{Config: e.Config, Mux: e.Mux, Service: "Test", Shape: api.PlainShape}
	api.List(f, "GET /common", "iam.policy.read", func(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
		for i := range 90 {
			may(c.InAccount(fmt.Sprint("service-", i%45)))
		}
		return api.Reply{Body: 0}, nil
	})
	e.Do(apitest.Request{Path: "/common"})
	uses := e.Usage.Uses(e.Owner.AccountID, e.Owner.IAMID)
	if len(uses) != 45 {
		t.Fatalf("%d records", len(uses))
	}
	for _, u := range uses {
		if u.Count != 1 {
			t.Errorf("%+v", u)
		}
	}
	if n, _ := e.Usage.Of(uses[0].PolicyID); n != 1 {
		t.Errorf("the policy has %d permits", n)
	}
}

// BenchmarkAPermittedRequest is a whole request, without the network.
func BenchmarkAPermittedRequest(b *testing.B) {
	e := apitest.New(b)
	for _, n := range []int{1, 1000} {
		listing(e, n, func(c *api.Call, _ int) map[string]string {
			return c.InAccount("iam-identity", access.ResourceType, "profile", access.Resource, "Profile-1", access.Region, "us-south")
		})
	}
	e.Grant(someone, "iam-identity", "Viewer")
	for _, n := range []int{1, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				r := httptest.NewRequest(http.MethodGet, fmt.Sprint("/list/", n), nil)
				r.Header.Set("Authorization", "Bearer "+e.Owner.AccountID+"/"+someone)
				e.Mux.ServeHTTP(httptest.NewRecorder(), r)
			}
		})
	}
}
