//go:build linux

package main

import (
	"bytes"
	"log"
	"os"
	"strings"
	"testing"

	"tabard.dev/tabard/internal/host/namespace"
)

// The program starts itself in its roles; here that is the test's.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && strings.HasPrefix(os.Args[1], "-role=") {
		if err := command(os.Args[1:], os.Stdout); err != nil {
			log.Fatal(err)
		}
		return
	}
	os.Exit(m.Run())
}

func run(t *testing.T, args ...string) {
	t.Helper()
	var out bytes.Buffer
	args = append([]string{"-n", "5", "-per-vpc", "3", "-clients", "3", "-rounds", "1", "-length", "100ms"}, args...)
	err := command(args, &out)
	t.Log(out.String())
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"5 instances, 3 in a VPC", "identity tokens / signatures alone: ", "server away / bare handler: ", "memory of the agent"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the report lacks %q", want)
		}
	}
}

func TestAFewListenersAreMeasuredToTheEnd(t *testing.T) { run(t) }

func TestAFewNamespacesAreMeasuredAndLeaveNothing(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	before, err := namespace.Named("tabard-")
	if err != nil {
		t.Fatal(err)
	}
	run(t, "-netns", "-inside", "2")
	after, err := namespace.Named("tabard-")
	if err != nil {
		t.Fatal(err)
	}
	if len(after) > len(before) {
		t.Logf("namespaces before %v and after %v; others may work on this machine too", before, after)
	}
}

func TestWhatCannotBeMeasuredIsRefused(t *testing.T) {
	for _, args := range [][]string{{"-n", "0"}, {"-n", "max"}, {"-n", "10001"}, {"-clients", "0"}, {"-rounds", "0"}, {"-per-vpc", "-1"}, {"-role", "none"}} {
		if err := command(args, &bytes.Buffer{}); err == nil {
			t.Errorf("%v is taken", args)
		}
	}
}
