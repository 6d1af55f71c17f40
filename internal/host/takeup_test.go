package host_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/vpc"
)

func TestAMachineThatCannotBeTakenUpNowIsNotStopped(t *testing.T) {
	s := start(t)
	id := s.instance("h1", vpc.Running)
	s.driver.left = []string{id}
	tries := 0
	s.driver.onStart = func(context.Context, string) error {
		if tries++; tries < 3 {
			return errors.New("its monitor does not answer")
		}
		return nil
	}
	s.run()
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		if _, ok := s.driver.machine(id); ok {
			break
		}
		if i, _ := s.d.Instances.Get(id); i.Status != vpc.Running || time.Now().After(end) {
			t.Fatalf("the instance is %s after %v", i.Status, s.driver.called())
		}
		s.instance("h2", vpc.Stopped) // each change makes the controller look again
	}
	if calls := s.driver.called(); slices.ContainsFunc(calls, func(c string) bool { return c != "start "+id }) {
		t.Errorf("calls %v", calls)
	}
}

func TestAMachineThatTheDriverRefusesHasFailed(t *testing.T) {
	s := start(t)
	id := s.instance("h1", vpc.Running)
	s.driver.left = []string{id}
	s.driver.onStart = func(context.Context, string) error {
		return &host.Refusal{Reason: "The instance's disk is not on this host."}
	}
	s.run()
	if i := s.become(id, vpc.Failed); i.StatusReason != "The instance's disk is not on this host." {
		t.Errorf("reason %q", i.StatusReason)
	}
}

func TestItIsSettledWhenWhatWasThereHasBeenSeenTo(t *testing.T) {
	s := start(t)
	s.instance("h1", vpc.Running)
	goOn := make(chan struct{})
	s.driver.onStart = func(context.Context, string) error {
		<-goOn
		return errors.New("it does not start")
	}
	s.run()
	s.instance("h1", vpc.Stopped) // the controller looks again, and waits still
	for len(s.driver.called()) == 0 {
		time.Sleep(time.Millisecond)
	}
	select {
	case <-s.controller.Settled():
		t.Fatal("it is settled while a machine starts")
	default:
	}
	close(goOn)
	select {
	case <-s.controller.Settled():
	case <-time.After(patience):
		t.Fatal("it is not settled after the machine was tried")
	}

	s = start(t)
	s.run()
	select {
	case <-s.controller.Settled():
	case <-time.After(patience):
		t.Fatal("it is not settled with nothing to do")
	}
}
