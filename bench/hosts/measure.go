//go:build linux

package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"tabard.dev/tabard/internal/host/namespace"
	"tabard.dev/tabard/internal/host/netns"
	"tabard.dev/tabard/internal/host/network"
	"tabard.dev/tabard/internal/vpc"
)

// bench is a run.
type bench struct {
	options
	dir       string
	state     string // of the network of instances, with -netns
	server    *process
	agent     *process
	admin     *installation
	join      string // file
	baseline  memory
	kernel    map[string]uint64
	instances int // that run
}

// measure makes an installation in a directory of its own, measures it and
// removes it.
func measure(ctx context.Context, o options) (err error) {
	// See start: processes are tied to the thread that has started them.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	dir, err := os.MkdirTemp("", "tabard-bench-hosts-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	tag := make([]byte, 4)
	rand.Read(tag)
	b := &bench{options: o, dir: dir, state: hex.EncodeToString(tag), join: filepath.Join(dir, "join-token")}
	if o.netns {
		if os.Geteuid() != 0 {
			return errors.New("network namespaces need root")
		}
		defer func() { err = errors.Join(err, b.sweep()) }()
	}
	defer func() {
		// Resumed first: what is stopped by a signal does not end.
		_ = b.agent.stop()
		if b.server != nil {
			_ = b.server.cmd.Process.Signal(syscall.SIGCONT)
		}
		_ = b.server.stop()
	}()
	if err := b.open(ctx); err != nil {
		return err
	}
	if err := b.fill(ctx); err != nil {
		return err
	}
	if err := b.restart(ctx); err != nil {
		return err
	}
	programs, err := b.programs(ctx)
	if err != nil {
		return err
	}
	defer func() {
		for _, p := range programs {
			p.client.CloseIdleConnections()
		}
	}()
	if err := b.compare(ctx, programs); err != nil {
		return err
	}
	if err := b.cost(ctx, fmt.Sprintf("after the rounds, %d of them with a connection", len(programs))); err != nil {
		return err
	}
	if !o.netns {
		return nil
	}
	for _, p := range programs {
		p.client.CloseIdleConnections()
	}
	return b.empty(ctx)
}

func (b *bench) printf(format string, args ...any) { fmt.Fprintf(b.out, format, args...) }

// open starts the server and an agent without instances.
func (b *bench) open(ctx context.Context) error {
	synced, err := b.sync()
	if err != nil {
		return err
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return err
	}
	b.printf("%d processors, load %s before, one fsync %s; clients and what they ask share the processors\n\n",
		runtime.NumCPU(), strings.Join(strings.Fields(string(load))[:3], " "), synced)
	if busy, err := strconv.ParseFloat(strings.Fields(string(load))[0], 64); err == nil && busy > float64(runtime.NumCPU())/2 {
		b.printf("others are at work on this machine: go by processor times, not by rates\n\n")
	}
	data := filepath.Join(b.dir, "server")
	if b.server, err = start(roleServer, b.profiled("server", "-dir", data)...); err != nil {
		return err
	}
	if b.admin, err = login(ctx, b.server.url, data); err != nil {
		return fmt.Errorf("log in: %w", err)
	}
	if err := b.admin.prepare(ctx); err != nil {
		return err
	}
	secret, err := b.admin.joinToken(ctx)
	if err != nil {
		return err
	}
	if err := os.WriteFile(b.join, []byte(secret), 0o600); err != nil {
		return err
	}
	if err := b.startAgent("made"); err != nil {
		return err
	}
	if err := b.agent.ask(ctx, http.MethodPost, "/memory", &b.baseline); err != nil {
		return err
	}
	b.kernel, err = kernelMemory()
	return err
}

// sync returns how long it takes to make a few bytes durable where the run's
// files are: no durable record is faster.
func (b *bench) sync() (time.Duration, error) {
	f, err := os.Create(filepath.Join(b.dir, "sync"))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var took []time.Duration
	for range 20 {
		begin := time.Now()
		if _, err := f.WriteString("a few bytes\n"); err != nil {
			return 0, err
		}
		if err := f.Sync(); err != nil {
			return 0, err
		}
		took = append(took, time.Since(begin))
	}
	return quantile(took, .5), nil
}

// startAgent starts the agent; its profiles, if any, go by the name.
func (b *bench) startAgent(name string) (err error) {
	args := []string{"-dir", filepath.Join(b.dir, "agent"), "-server", b.server.url, "-join", b.join, "-state", b.state}
	if b.netns {
		args = append(args, "-netns")
	}
	b.agent, err = start(roleAgent, b.profiled(name, args...)...)
	return err
}

func (b *bench) profiled(name string, args ...string) []string {
	if b.profile == "" {
		return args
	}
	return append(args, "-profile", b.profile+"-"+name)
}

// Bounds on as many namespaces as the machine allows.
const (
	batch  = 50
	enough = 4000
)

// fill makes the instances and waits until they run.
func (b *bench) fill(ctx context.Context) error {
	begin := time.Now()
	agent, err := b.agent.processor()
	server, err2 := b.server.processor()
	if err := errors.Join(err, err2); err != nil {
		return err
	}
	var p progress
	var took time.Duration
	for {
		n := b.options.instances
		if n == 0 {
			n = b.instances + batch
		}
		if err := b.admin.grow(ctx, n, b.perVPC); err != nil {
			return fmt.Errorf("make instances: %w", err)
		}
		asked := time.Since(begin)
		var err error
		if p, err = b.wait(ctx, n); err != nil {
			return err
		}
		took = time.Since(begin)
		b.instances = p.Running
		if p.Failed > 0 {
			if b.options.instances != 0 {
				return fmt.Errorf("%d instances did not start: %s", p.Failed, p.Reason)
			}
			b.printf("no more than %d instances start here: %s\n", p.Running, p.Reason)
			break
		}
		if b.options.instances != 0 {
			b.printf("%d instances, %d in a VPC, made through the API in %s\n", n, b.perVPC, asked.Round(10*time.Millisecond))
			break
		}
		if reason, err := b.full(n, took); err != nil {
			return err
		} else if reason != "" {
			b.printf("stopped at %d instances after %s: %s\n", n, took.Round(time.Second), reason)
			break
		}
	}
	agent2, err := b.agent.processor()
	server2, err2 := b.server.processor()
	if err := errors.Join(err, err2); err != nil {
		return err
	}
	b.printf("  all run %s after the first was asked for: %s for each; processor time for each: agent %s, server %s\n",
		took.Round(10*time.Millisecond), each(took, b.instances), each(agent2-agent, b.instances), each(server2-server, b.instances))
	b.printf("  the driver's part of it: p50 %s, p99 %s\n", quantile(p.Starts, .5), quantile(p.Starts, .99))
	return b.cost(ctx, "while they have run since they were made")
}

// full tells why there should not be more instances; "" means that there may be.
func (b *bench) full(n int, took time.Duration) (string, error) {
	m, err := sizes("/proc/meminfo", "MemAvailable", "MemTotal")
	switch {
	case err != nil:
		return "", err
	case m["MemAvailable"] < m["MemTotal"]/4:
		return "a quarter of the machine's memory is left", nil
	case n >= enough:
		return "that is enough", nil
	case took > b.patience:
		return "the time is over", nil
	}
	return "", nil
}

func each(d time.Duration, n int) time.Duration {
	return (d / time.Duration(max(n, 1))).Round(10 * time.Microsecond)
}

// wait waits until n instances run, for the agent and for the server, or have
// failed.
func (b *bench) wait(ctx context.Context, n int) (progress, error) {
	var p progress
	err := b.until(ctx, func(ctx context.Context) (string, error) {
		p = progress{}
		if err := b.agent.ask(ctx, http.MethodGet, "/progress", &p); err != nil || p.Running+p.Failed < n {
			return fmt.Sprintf("%d of %d instances run", p.Running, n), err
		}
		s, err := b.admin.statuses(ctx)
		if err != nil || s[vpc.Running]+s[vpc.Failed] < n {
			return fmt.Sprintf("%d of %d instances run for the server", s[vpc.Running], n), err
		}
		return "", nil
	})
	return p, err
}

// until asks again until there is nothing to wait for, within the run's
// patience.
func (b *bench) until(ctx context.Context, what func(context.Context) (waiting string, err error)) error {
	ctx, cancel := context.WithTimeout(ctx, b.patience)
	defer cancel()
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	for {
		waiting, err := what(ctx)
		if err != nil || waiting == "" {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w while %s", ctx.Err(), waiting)
		case <-ticker.C:
		}
	}
}

// restart has the agent end and begin again with what it has on its disk.
func (b *bench) restart(ctx context.Context) error {
	if err := b.agent.stop(); err != nil {
		return err
	}
	begin := time.Now()
	if err := b.startAgent("again"); err != nil {
		return err
	}
	opened := time.Since(begin)
	var p progress
	err := b.until(ctx, func(ctx context.Context) (string, error) {
		p = progress{}
		if err := b.agent.ask(ctx, http.MethodGet, "/progress", &p); err != nil || p.Running < b.instances {
			return fmt.Sprintf("%d of %d instances are taken up", p.Running, b.instances), err
		}
		return "", nil
	})
	if err != nil {
		return err
	}
	took := time.Since(begin) - opened
	b.printf("agent started again: all run %s after it was ready: %s for each; the driver's part of it: p50 %s, p99 %s\n",
		took.Round(time.Millisecond), each(took, b.instances), quantile(p.Starts, .5), quantile(p.Starts, .99))
	if err := b.quiet(ctx); err != nil {
		return err
	}
	return b.cost(ctx, "after that start")
}

// quiet waits until the server and the agent have done what was left to do.
func (b *bench) quiet(ctx context.Context) error {
	const look, idle = 250 * time.Millisecond, 3 * tick
	last := -time.Hour
	return b.until(ctx, func(ctx context.Context) (string, error) {
		time.Sleep(look)
		a, err := b.agent.processor()
		s, err2 := b.server.processor()
		used := a + s - last
		last = a + s
		if err := errors.Join(err, err2); err != nil || used > idle {
			return "the agent and the server are still at work", err
		}
		return "", nil
	})
}

// kernelParts are the lines of /proc/meminfo that namespaces and sockets show in.
var kernelParts = []string{"Slab", "Percpu", "KernelStack"}

func kernelMemory() (map[string]uint64, error) {
	return sizes("/proc/meminfo", append([]string{"MemAvailable"}, kernelParts...)...)
}

// cost prints the memory that an instance costs.
func (b *bench) cost(ctx context.Context, when string) error {
	var m memory
	if err := b.agent.ask(ctx, http.MethodPost, "/memory", &m); err != nil {
		return err
	}
	per := func(now, before uint64) string {
		return fmt.Sprintf("%.1f kB", float64(int64(now)-int64(before))/1024/float64(max(b.instances, 1)))
	}
	b.printf("  memory of the agent for each instance, %s: heap %s, stacks %s, resident %s (%.1f MB in all, %.1f without instances), %.1f goroutines\n",
		when, per(m.Heap, b.baseline.Heap), per(m.Stacks, b.baseline.Stacks), per(m.Resident, b.baseline.Resident),
		float64(m.Resident)/1e6, float64(b.baseline.Resident)/1e6, float64(m.Goroutines-b.baseline.Goroutines)/float64(max(b.instances, 1)))
	if !b.netns {
		return nil
	}
	k, err := kernelMemory()
	if err != nil {
		return err
	}
	parts := make([]string, len(kernelParts))
	for i, name := range kernelParts {
		parts[i] = name + " " + per(k[name], b.kernel[name])
	}
	b.printf("  memory of the kernel for each: %s; of all that is available on the machine, others' doings included, %s\n",
		strings.Join(parts, ", "), per(b.kernel["MemAvailable"], k["MemAvailable"]))
	return nil
}

// programs returns a program in each instance that is asked from, with an
// identity token.
func (b *bench) programs(ctx context.Context) ([]*program, error) {
	if err := b.agent.ask(ctx, http.MethodPost, "/loaded", nil); err != nil {
		return nil, err
	}
	var machines []machine
	if err := b.agent.ask(ctx, http.MethodGet, "/machines", &machines); err != nil {
		return nil, err
	}
	n := len(machines)
	if b.inside > 0 {
		n = min(n, b.inside)
	}
	all := make([]*program, n)
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(b.clients)
	for i := range all {
		p := newProgram(machines[i*len(machines)/n])
		all[i] = p
		group.Go(func() (err error) {
			p.token, err = p.identity(ctx, 3600)
			return err
		})
	}
	return all, group.Wait()
}

// compare loads the sides in turn and prints what came of it.
func (b *bench) compare(ctx context.Context, programs []*program) error {
	_, payload, _ := strings.Cut(programs[0].token, ".")
	payload, _, _ = strings.Cut(payload, ".")
	claims, err := base64.RawURLEncoding.DecodeString(payload)
	if err != nil {
		return fmt.Errorf("read an identity token: %w", err)
	}
	file := filepath.Join(b.dir, "claims")
	if err := os.WriteFile(file, claims, 0o600); err != nil {
		return err
	}
	bare, err := start(roleBare, "-claims", file)
	if err != nil {
		return err
	}
	defer func() { _ = bare.stop() }()
	signer, err := newSigner()
	if err != nil {
		return err
	}
	// Each worker goes round instances of its own, so that no two are at one
	// connection.
	turn := func(worker, n int) *program {
		workers := min(b.clients, len(programs))
		share := (len(programs) - worker%workers + workers - 1) / workers
		return programs[worker%workers+n%share*workers]
	}
	identity := func(ctx context.Context, worker, n int) error {
		_, err := turn(worker, n).identity(ctx, 300)
		return err
	}
	callers := make([]*program, b.clients)
	for i := range callers {
		callers[i] = newProgram(machine{ID: "bare", Address: strings.TrimPrefix(bare.url, "http://")})
		defer callers[i].client.CloseIdleConnections()
	}
	signal := func(s syscall.Signal) func() error { return func() error { return b.server.cmd.Process.Signal(s) } }
	signing := &side{name: "signatures alone", op: func(context.Context, int, int) error {
		_, err := sign(signer, claims)
		return err
	}}
	handler := &side{name: "bare handler", process: bare, op: func(ctx context.Context, worker, _ int) error {
		_, err := callers[worker].identity(ctx, 300)
		return err
	}}
	tokens := &side{name: "identity tokens", process: b.agent, op: identity}
	alone := &side{name: "  server away", process: b.agent, op: identity, before: signal(syscall.SIGSTOP), after: signal(syscall.SIGCONT)}
	access := &side{name: "access tokens", process: b.agent, op: func(ctx context.Context, worker, n int) error {
		return turn(worker, n).access(ctx, b.admin.profile)
	}}
	sides := []*side{signing, handler, tokens, alone, access}
	b.printf("\n%d clients in %d instances, %d rounds of %s each, claims of %d bytes, RS256 with 2048 bits, durable outbox on\n\n",
		b.clients, len(programs), b.rounds, b.length, len(claims))
	for round := range b.rounds + 1 {
		for _, s := range sides {
			if err := s.round(ctx, b.server, b.options, round > 0); err != nil { // the first one warms up
				return err
			}
			if err := b.quiet(ctx); err != nil {
				return err
			}
		}
	}
	b.printf("%-18s %9s %15s %10s %10s %12s %12s\n", "", "per s", "range", "p50", "p99", "processor", "server's")
	for _, s := range sides {
		rates := sorted(s.rates)
		b.printf("%-18s %9.0f %15s %10s %10s %12s %12s\n", s.name, median(s.rates), fmt.Sprintf("%.0f to %.0f", rates[0], rates[len(rates)-1]),
			quantile(s.latencies, .5), quantile(s.latencies, .99), median(s.spent).Round(time.Microsecond), median(s.server).Round(time.Microsecond))
		if s.limited > 0 {
			b.printf("  %d more answers were the limits of instances: too few are asked from\n", s.limited)
		}
	}
	b.printf("\n")
	for _, r := range []struct{ over, under *side }{{tokens, signing}, {tokens, handler}, {alone, signing}, {alone, handler}} {
		b.printf("%s / %s: %s; processor time %s\n", strings.TrimSpace(r.over.name), r.under.name, ratio(r.over.rates, r.under.rates), ratio(r.over.spent, r.under.spent))
	}
	return nil
}

// empty deletes the instances as their owner would.
func (b *bench) empty(ctx context.Context) error {
	begin := time.Now()
	if err := b.admin.remove(ctx); err != nil {
		return fmt.Errorf("delete instances: %w", err)
	}
	err := b.until(ctx, func(ctx context.Context) (string, error) {
		var p progress
		if err := b.agent.ask(ctx, http.MethodGet, "/progress", &p); err != nil || p.Running > 0 {
			return fmt.Sprintf("%d instances are not gone", p.Running), err
		}
		return "", nil
	})
	took := time.Since(begin)
	b.printf("all instances deleted and gone in %s: %s for each\n", took.Round(10*time.Millisecond), each(took, b.instances))
	return err
}

// sweep removes the namespaces that are left, such as when the run was broken
// off, and reports what cannot be removed.
func (b *bench) sweep() error {
	n, err := network.New(network.Config{State: b.state})
	if err != nil {
		return err
	}
	d, err := netns.New(netns.Config{Network: n})
	if err == nil {
		err = d.Close()
	}
	err = errors.Join(err, n.Close())
	left, err2 := namespace.Named("tabard-" + b.state + "-")
	if len(left) > 0 {
		err2 = errors.Join(err2, fmt.Errorf("namespaces are left: %v", left))
	}
	return errors.Join(err, err2)
}
