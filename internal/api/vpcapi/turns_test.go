package vpcapi

import (
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/internal/object"
	"tabard.dev/tabard/internal/vpc"
)

func TestAccountsTakeTurns(t *testing.T) {
	var waiting []*vpc.Image
	for n, id := range []string{"a1", "a2", "a3", "b1", "b2", "c1"} {
		waiting = append(waiting, &vpc.Image{ID: id, AccountID: id[:1], Meta: object.Meta{CreatedAt: time.Unix(int64(n), 0)}})
	}
	line, got := turns{}, []string{}
	for len(waiting) > 0 {
		waiting = line.order(waiting)
		next := waiting[0]
		waiting = waiting[1:]
		line.take(next.AccountID)
		got = append(got, next.ID)
		if next.ID == "b1" { // who comes later waits no longer than the others
			waiting = append(waiting, &vpc.Image{ID: "d1", AccountID: "d", Meta: object.Meta{CreatedAt: time.Unix(100, 0)}})
		}
	}
	if order := strings.Join(got, " "); order != "a1 b1 c1 d1 a2 b2 a3" {
		t.Errorf("order %s", order)
	}
}
