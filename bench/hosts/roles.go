//go:build linux

package main

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"golang.org/x/sync/errgroup"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/agent"
	"tabard.dev/tabard/internal/host/link"
	"tabard.dev/tabard/internal/placement"
	"tabard.dev/tabard/internal/server"
	"tabard.dev/tabard/internal/token"
)

func quietly() *slog.Logger {
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
}

// playServer runs the server as it ships: SQLite with full durability. It runs
// no instances itself.
func playServer(ctx context.Context, dir, profile string) error {
	p := &profiles{prefix: profile}
	if err := p.begin("all"); err != nil {
		return err
	}
	s, err := server.Open(ctx, server.Config{DataDir: dir, Listen: []string{"127.0.0.1:0"}, Driver: server.DriverNone, Log: quietly()})
	if err != nil {
		return err
	}
	fmt.Println(s.URL())
	return errors.Join(s.Run(ctx), p.end())
}

// machine is a running instance as its programs reach it: at an address, or in
// a namespace.
type machine struct {
	ID        string `json:"id"`
	Address   string `json:"address,omitempty"`
	Namespace string `json:"namespace,omitempty"`
}

// progress is how far the agent is.
type progress struct {
	Running int             `json:"running"`
	Starts  []time.Duration `json:"starts"` // what each took in the driver
	Failed  int             `json:"failed"` // starts
	Reason  string          `json:"reason"` // why one failed last
}

// memory is what the agent uses after what it does not need was given back.
type memory struct {
	Heap       uint64 `json:"heap"`     // bytes in use
	Stacks     uint64 `json:"stacks"`   // bytes
	Resident   uint64 `json:"resident"` // bytes, of the process
	Goroutines int    `json:"goroutines"`
}

// playAgent runs an agent as it ships but for the loopback driver, and beside it
// a listener that tells the measuring process how it is.
func playAgent(ctx context.Context, r roleOptions, o options) error {
	w := &watched{running: map[string]bool{}}
	profiles := &profiles{prefix: o.profile}
	if err := profiles.begin("start"); err != nil {
		return err
	}
	a, err := agent.Open(ctx, agent.Config{
		Server: r.server, Dir: r.dir, JoinToken: r.join, Version: "bench", Log: quietly(),
		Master: token.MasterKey{File: filepath.Join(r.dir, "master.key")},
		Drivers: func(ctx context.Context, e agent.Environment) (host.Driver, link.Capacity, error) {
			if !o.netns {
				w.Driver = newLoopback(e.Log)
				return w, link.Capacity{Drivers: []string{placement.DriverLocal}, VCPUs: runtime.NumCPU()}, nil
			}
			c := agent.DriverConfig{State: r.state, Driver: agent.DriverNetns, Accel: "auto", NoUplink: true}
			d, capacity, err := c.Open(ctx, e)
			w.Driver = d
			return w, capacity, err
		},
	})
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /progress", func(rw http.ResponseWriter, _ *http.Request) {
		w.mu.Lock()
		p := progress{Running: len(w.running), Starts: slices.Clone(w.starts), Failed: w.failed, Reason: w.reason}
		w.mu.Unlock()
		answer(rw, p)
	})
	mux.HandleFunc("GET /machines", func(rw http.ResponseWriter, _ *http.Request) { answer(rw, w.machines()) })
	mux.HandleFunc("POST /memory", func(rw http.ResponseWriter, _ *http.Request) {
		runtime.GC() // the first one runs finalizers, whose garbage the next collects
		debug.FreeOSMemory()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		resident, err := residentOf(os.Getpid())
		if err != nil {
			http.Error(rw, err.Error(), http.StatusInternalServerError)
			return
		}
		answer(rw, memory{Heap: m.HeapInuse, Stacks: m.StackInuse, Resident: resident, Goroutines: runtime.NumGoroutine()})
	})
	mux.HandleFunc("POST /loaded", func(rw http.ResponseWriter, _ *http.Request) {
		if err := profiles.begin("load"); err != nil {
			http.Error(rw, err.Error(), http.StatusInternalServerError)
		}
	})
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return a.Run(ctx) })
	group.Go(func() error { return tell(ctx, mux) })
	return errors.Join(group.Wait(), profiles.end())
}

// machines are those that run, in the order of their ids.
func (w *watched) machines() []machine {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := []machine{}
	for id := range w.running {
		if a, ok := w.Access(id); ok {
			out = append(out, machine{ID: id, Address: a.Environment[addressVariable], Namespace: a.Namespace})
		}
	}
	slices.SortFunc(out, func(a, b machine) int {
		if a.ID < b.ID {
			return -1
		}
		return 1
	})
	return out
}

// profiles writes CPU profiles one after the other, and at the end the heap.
type profiles struct {
	prefix string // "" writes none
	file   *os.File
}

func (p *profiles) begin(name string) error {
	if p.prefix == "" {
		return nil
	}
	if err := p.stop(); err != nil {
		return err
	}
	f, err := os.Create(p.prefix + "-" + name + ".pprof")
	if err != nil {
		return err
	}
	p.file = f
	return pprof.StartCPUProfile(f)
}

func (p *profiles) stop() error {
	if p.file == nil {
		return nil
	}
	pprof.StopCPUProfile()
	return p.file.Close()
}

func (p *profiles) end() error {
	if p.prefix == "" {
		return nil
	}
	f, err := os.Create(p.prefix + "-heap.pprof")
	if err != nil {
		return errors.Join(err, p.stop())
	}
	return errors.Join(pprof.WriteHeapProfile(f), f.Close(), p.stop())
}

// bareAnswer is as large as the agent's.
type bareAnswer struct {
	AccessToken string `json:"access_token"`
	CreatedAt   string `json:"created_at"`
	ExpiresAt   string `json:"expires_at"`
	ExpiresIn   int64  `json:"expires_in"`
}

// playBare is the limit of what an agent can do: read the body, sign claims of
// the same size, answer.
func playBare(ctx context.Context, file string) error {
	payload, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	signer, err := newSigner()
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("PUT /identity/v1/token", func(w http.ResponseWriter, r *http.Request) {
		var body struct {
			ExpiresIn int64 `json:"expires_in"`
		}
		if err := json.NewDecoder(io.LimitReader(r.Body, 8<<10)).Decode(&body); err != nil {
			http.Error(w, "bad body", http.StatusBadRequest)
			return
		}
		raw, err := sign(signer, payload)
		if err != nil {
			http.Error(w, "cannot sign", http.StatusInternalServerError)
			return
		}
		now := time.Now().UTC()
		answer(w, bareAnswer{raw, now.Format(time.RFC3339), now.Add(time.Duration(body.ExpiresIn) * time.Second).Format(time.RFC3339), body.ExpiresIn})
	})
	return tell(ctx, mux)
}

func newSigner() (jose.Signer, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	return jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: key, KeyID: "bench"}}, nil)
}

func sign(signer jose.Signer, payload []byte) (string, error) {
	jws, err := signer.Sign(payload)
	if err != nil {
		return "", err
	}
	return jws.CompactSerialize()
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the client may be gone
}

// tell serves on a free port of loopback, prints its URL and goes on until the
// context ends.
func tell(ctx context.Context, h http.Handler) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp4", "127.0.0.1:0")
	if err != nil {
		return err
	}
	srv := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second}
	var serving errgroup.Group
	serving.Go(func() error {
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	fmt.Println("http://" + l.Addr().String())
	<-ctx.Done()
	srv.Close()
	return serving.Wait()
}
