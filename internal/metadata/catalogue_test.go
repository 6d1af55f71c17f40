package metadata

import (
	"testing"

	"tabard.dev/tabard/internal/activity"
)

func TestEveryRouteHasItsEventInTheCatalogue(t *testing.T) {
	s := &Service{}
	for _, rt := range append(s.routes(), *unknown("")) {
		e, ok := activity.EntryOf(rt.action)
		if !ok {
			t.Errorf("%s %s: %s is not in the catalogue", rt.method, rt.path, rt.action)
		}
		if e.Data == rt.issues {
			t.Errorf("%s: issues credentials: %v, data event: %v", rt.action, rt.issues, e.Data)
		}
	}
}
