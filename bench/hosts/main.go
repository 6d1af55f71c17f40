//go:build linux

// Command hosts measures the agent of one host with many instances: how long an
// instance takes to start, the memory it costs, and the identity tokens a second
// beside the bare signing rate, in the same run on the same machine.
//
// Server, agent and a bare handler run as processes of their own, joined as they
// are in an installation; this process plays the instances' programs. What is
// compared is loaded in turn, several rounds each, so that a drift of the
// machine's speed hits all. All of them share its processors, clients included;
// the processor time that one answer costs the process that gives it is shown
// too, and depends less on what else the machine does.
//
// Without -netns an instance is a loopback listener and nothing else, so that
// what is measured is the agent, not the kernel. With it, and as root, instances
// are network namespaces and their programs' connections come from inside them.
// They are removed at the end; a run that is killed leaves them, named
// tabard-<state>-…, as ip netns shows.
//
// An instance's rate limit is not what is measured: requests go round all
// instances, and answers that say 429 are counted apart.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

func main() {
	log.SetFlags(0)
	if err := command(os.Args[1:], os.Stdout); err != nil && !errors.Is(err, flag.ErrHelp) {
		log.Fatal(err)
	}
}

// Roles that this program plays.
const (
	roleServer = "server"
	roleAgent  = "agent"
	roleBare   = "bare"
)

// options are what a run can be told.
type options struct {
	instances int // 0 means as many as the machine allows
	netns     bool
	perVPC    int
	inside    int // instances that programs ask from; 0 means all
	clients   int
	rounds    int
	length    time.Duration
	patience  time.Duration
	profile   string

	out io.Writer
}

func command(args []string, out io.Writer) error {
	o := options{out: out}
	f := flag.NewFlagSet("hosts", flag.ContinueOnError)
	count := f.String("n", "", "`number` of instances, or, with -netns, max (default 1000, with -netns 100)")
	f.BoolVar(&o.netns, "netns", false, "instances are network namespaces, not loopback listeners; needs root")
	f.IntVar(&o.perVPC, "per-vpc", 100, "instances in one VPC; its security group lets each of them reach the others")
	f.IntVar(&o.inside, "inside", 0, "instances that programs ask from, 0 for all (default with -netns 50)")
	f.IntVar(&o.clients, "clients", 32, "concurrent clients")
	f.IntVar(&o.rounds, "rounds", 5, "rounds of each side; they take turns")
	f.DurationVar(&o.length, "length", 2*time.Second, "length of a round")
	f.DurationVar(&o.patience, "patience", 10*time.Minute, "bound on each wait for instances")
	f.StringVar(&o.profile, "profile", "", "write profiles to files that begin with `PREFIX`: the agent's CPU while it starts what is made, starts again, and is loaded; the server's; heaps at the end")
	var r roleOptions
	f.StringVar(&r.role, "role", "", "internal: what this process plays")
	f.StringVar(&r.dir, "dir", "", "internal: its data directory")
	f.StringVar(&r.server, "server", "", "internal: URL of the server")
	f.StringVar(&r.join, "join", "", "internal: file of the join token")
	f.StringVar(&r.state, "state", "", "internal: whose namespaces they are")
	f.StringVar(&r.claims, "claims", "", "internal: file with the claims to sign")
	if err := f.Parse(args); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if r.role != "" {
		return play(ctx, r, o)
	}
	switch {
	case *count == "max" && o.netns:
	case *count == "" && o.netns:
		o.instances = 100
	case *count == "":
		o.instances = 1000
	default:
		n, err := strconv.Atoi(*count)
		if err != nil || n < 1 || n > most {
			return fmt.Errorf("-n %q is not a number from 1 to %d, nor max with -netns", *count, most)
		}
		o.instances = n
	}
	if o.netns && o.inside == 0 {
		o.inside = 50
	}
	for name, v := range map[string]int{"per-vpc": o.perVPC, "clients": o.clients, "rounds": o.rounds} {
		if v < 1 || v > 10000 {
			return fmt.Errorf("-%s %d is not a number from 1 to 10000", name, v)
		}
	}
	return measure(ctx, o)
}

// most is how many instances a run makes at most.
const most = 10000

type roleOptions struct {
	role, dir, server, join, state, claims string
}

func play(ctx context.Context, r roleOptions, o options) error {
	switch r.role {
	case roleServer:
		return playServer(ctx, r.dir, o.profile)
	case roleAgent:
		return playAgent(ctx, r, o)
	case roleBare:
		return playBare(ctx, r.claims)
	}
	return fmt.Errorf("no role %q", r.role)
}
