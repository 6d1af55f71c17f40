package api_test

import (
	"fmt"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/api/apitest"
)

func key(n int) string { return fmt.Sprintf("%06d", n) }

// next sends a cursor through its text, as clients do.
func next(t *rapid.T, c *api.Cursor) api.Cursor {
	parsed, err := api.ParseCursor("start", c.String())
	if err != nil {
		t.Fatal(err)
	}
	return parsed
}

func TestPagingVisitsEachItemOnceInOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		items := rapid.SliceOfNDistinct(rapid.IntRange(0, 999), 0, 40, rapid.ID[int]).Draw(t, "items")
		query := url.Values{"name": {rapid.String().Draw(t, "name")}}
		var seen []int
		after := api.Cursor{Query: query}
		for pages := 0; ; pages++ {
			if pages > len(items)+1 {
				t.Fatal("paging does not end")
			}
			limit := rapid.IntRange(1, 7).Draw(t, "limit")
			page, cursor := api.Page(slices.Clone(items), after, limit, key)
			if len(page) > limit {
				t.Fatalf("a page of %d items, limit %d", len(page), limit)
			}
			seen = append(seen, page...)
			if cursor == nil {
				break
			}
			if len(page) == 0 {
				t.Fatal("an empty page has a next one")
			}
			if cursor.Offset != len(seen) || cursor.Limit != limit || !reflect.DeepEqual(cursor.Query, query) {
				t.Fatalf("cursor %+v after %d items", cursor, len(seen))
			}
			after = next(t, cursor)
		}
		slices.Sort(items)
		if !slices.Equal(seen, items) {
			t.Fatalf("saw %v of %v", seen, items)
		}
	})
}

func TestPagingVisitsWhatStaysOnceWhileOtherThingsComeAndGo(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		// Even numbers stay, odd ones come and go.
		even := rapid.Map(rapid.IntRange(0, 100), func(n int) int { return 2 * n })
		odd := rapid.Map(rapid.IntRange(0, 100), func(n int) int { return 2*n + 1 })
		stay := rapid.SliceOfNDistinct(even, 0, 30, rapid.ID[int]).Draw(t, "stay")
		others := map[int]bool{}
		seen := map[int]int{}
		last := -1
		var after api.Cursor
		for pages := 0; ; pages++ {
			if pages > 300 {
				t.Fatal("paging does not end")
			}
			for _, n := range rapid.SliceOfN(odd, 0, 5).Draw(t, "toggle") {
				others[n] = !others[n]
			}
			items := slices.Clone(stay)
			for n, present := range others {
				if present {
					items = append(items, n)
				}
			}
			page, cursor := api.Page(items, after, rapid.IntRange(1, 7).Draw(t, "limit"), key)
			for _, n := range page {
				if n <= last {
					t.Fatalf("%d comes after %d", n, last)
				}
				last = n
				seen[n]++
			}
			if cursor == nil {
				break
			}
			after = next(t, cursor)
		}
		for _, n := range stay {
			if seen[n] != 1 {
				t.Fatalf("%d was seen %d times", n, seen[n])
			}
		}
	})
}

func TestSortKeysFollowTimeAndThenID(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		at := func(name string) time.Time {
			zone := time.FixedZone("", rapid.IntRange(-12, 12).Draw(t, name+" zone")*3600)
			return time.Unix(rapid.Int64Range(0, 1<<32).Draw(t, name), rapid.Int64Range(0, 3).Draw(t, name+" ns")).In(zone)
		}
		a, b := at("a"), at("b")
		x, y := rapid.StringMatching("[a-c]{3}").Draw(t, "x"), rapid.StringMatching("[a-c]{3}").Draw(t, "y")
		less := a.Before(b) || a.Equal(b) && x < y
		if got := api.SortKey(a, x) < api.SortKey(b, y); got != less {
			t.Fatalf("%s %s before %s %s: %v", a, x, b, y, got)
		}
	})
}

func TestAnyTextAsACursorIsRefusedOrHarmless(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c, err := api.ParseCursor("start", rapid.String().Draw(t, "text"))
		if err == nil && (c.Offset < 0 || c.Limit < 0) {
			t.Fatalf("cursor %+v", c)
		}
	})
}

func TestAListPagesOverHTTPWhileRobotsAreMade(t *testing.T) {
	f := start(t)
	want := []string{"a", "b", "c", "d", "e"}
	for _, name := range want {
		f.robot(name)
	}
	var seen []string
	path := "/robots?limit=2"
	for path != "" {
		m := f.Do(apitest.Request{Method: http.MethodGet, Path: path}).Want(200)
		for _, name := range m["robots"].([]any) {
			if name != "late" {
				seen = append(seen, name.(string))
			}
		}
		path = ""
		if n, ok := m["next"].(string); ok && len(seen) < 20 {
			path = "/robots?limit=2&start=" + n
			if len(seen) < 4 {
				f.robot("late")
			}
		}
	}
	if !slices.Equal(seen, want) {
		t.Errorf("saw %v, want %v", seen, want)
	}
}
