// Command bench measures token exchanges with durable audit beside a bare
// net/http handler that does only the same signature check and the same
// signature, in the same run on the same machine, and prints the ratio.
//
// With -tree it measures, beside them, the same server without the Merkle tree of
// its activity log, and with -exports the same server with every event sent to
// targets of all kinds; it prints what they cost.
//
// All run as processes of their own and are loaded by the same clients in
// turn, in many short rounds, in an order that is drawn anew and then backwards,
// so that a drift of the machine's speed hits all. Beside the rates it compares the processor time of
// an exchange, which depends far less on what else the machine does.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	cryptorand "crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/go-jose/go-jose/v4"
	josejwt "github.com/go-jose/go-jose/v4/jwt"
	"github.com/google/uuid"

	"tabard.dev/tabard/internal/server"
)

const (
	grantType   = "urn:ibm:params:oauth:grant-type:cr-token"
	contentType = "application/x-www-form-urlencoded"
	keyID       = "bench"
	exporting   = "exporting" // the side that sends its events
)

func main() {
	log.SetFlags(0)
	var o options
	flag.IntVar(&o.clients, "clients", 32, "concurrent clients")
	flag.IntVar(&o.blocks, "blocks", 8, "blocks of two rounds of each side: in a drawn order, and backwards")
	flag.DurationVar(&o.length, "length", time.Second, "length of a round")
	flag.StringVar(&o.clusterAlg, "cluster-alg", "RS256", "algorithm of the service-account tokens: RS256 (what kube-apiserver uses most) or ES256")
	flag.StringVar(&o.profile, "profile", "", "write a CPU profile of the server to this `file`")
	flag.BoolVar(&o.control, "control", false, "measure the same server twice, too: what differs then is noise")
	flag.BoolVar(&o.tree, "tree", false, "measure the server without the activity log's Merkle tree and checkpoints, too")
	flag.BoolVar(&o.exports, "exports", false, "measure the server with every event sent to a file, a webhook, a syslog daemon, an OTLP collector and a Kafka broker, too")
	routes := flag.String("routes", "", "internal: file of routes")
	treeless := flag.Bool("treeless", false, "internal: play the server without the tree")
	role := flag.String("role", "", "internal: what this process plays")
	dir := flag.String("dir", "", "internal: data directory")
	jwks := flag.String("jwks", "", "internal: key set of the cluster")
	flag.Parse()
	var err error
	switch *role {
	case "tabard":
		err = playTabard(*dir, o.profile, *routes, *treeless)
	case "sinks":
		err = playSinks()
	case "bare":
		err = playBare(*jwks)
	default:
		err = measure(o)
	}
	if err != nil {
		log.Fatal(err)
	}
}

type options struct {
	clients, blocks int
	length          time.Duration
	clusterAlg      string
	profile         string
	tree, exports   bool
	control         bool
}

// playTabard runs the server as it ships: SQLite with full durability.
func playTabard(dir, profile, routes string, treeless bool) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if profile != "" {
		f, err := os.Create(profile)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	s, err := server.Open(ctx, server.Config{
		DataDir: dir, Listen: []string{"127.0.0.1:0"}, Driver: server.DriverNone, Treeless: treeless, ActivityRoutes: routes,
		Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
	})
	if err != nil {
		return err
	}
	fmt.Println(s.URL())
	go tellTime()
	return s.Run(ctx)
}

// tellTime answers each line of the input with the nanoseconds of processor time
// that the process has used. It ends with the input.
func tellTime() {
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			log.Fatal(err)
		}
		fmt.Println(u.Utime.Nano() + u.Stime.Nano())
	}
}

// playBare is the limit: parse the form, check the signature, sign a token of
// the same size, answer.
func playBare(jwks string) error {
	var set jose.JSONWebKeySet
	b, err := os.ReadFile(jwks)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, &set); err != nil {
		return err
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader)
	if err != nil {
		return err
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: private, KeyID: keyID}}, nil)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // lives as long as the process
	if err != nil {
		return err
	}
	fmt.Println("http://" + l.Addr().String())
	go tellTime()
	payload := bytes.Repeat([]byte("x"), 900) // as large as an access token's claims
	mux := http.NewServeMux()
	mux.HandleFunc("POST /identity/token", func(w http.ResponseWriter, r *http.Request) {
		var claims map[string]any
		token, err := josejwt.ParseSigned(r.PostFormValue("cr_token"), []jose.SignatureAlgorithm{jose.RS256, jose.ES256})
		if err == nil {
			err = token.Claims(set.Keys[0].Key, &claims)
		}
		if err != nil {
			http.Error(w, "bad token", http.StatusBadRequest)
			return
		}
		jws, err := signer.Sign(payload)
		var raw string
		if err == nil {
			raw, err = jws.CompactSerialize()
		}
		if err != nil {
			http.Error(w, "cannot sign", http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = fmt.Fprintf(w, `{"access_token":%q,"expires_in":3600}`, raw) // the client may be gone
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	return srv.Serve(l)
}

// side is a process under load.
type side struct {
	name string
	url  string
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Reader

	blocks    []block
	latencies []time.Duration
}

func start(name string, args ...string) (*side, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	s := &side{name: name, cmd: exec.Command(self, args...)} //nolint:noctx // ended by stop
	s.cmd.Stderr = os.Stderr
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	s.out = bufio.NewReader(out)
	if s.in, err = s.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	line, err := s.out.ReadString('\n')
	if err != nil {
		return nil, fmt.Errorf("%s did not start: %w", name, err)
	}
	s.url = strings.TrimSpace(line)
	return s, nil
}

func (s *side) stop() {
	// Throw-away processes; the server writes its profile on the way out.
	_ = s.cmd.Process.Signal(os.Interrupt)
	_ = s.cmd.Wait()
}

// cpu is the processor time that the side has used so far.
func (s *side) cpu() (time.Duration, error) {
	if _, err := io.WriteString(s.in, "\n"); err != nil {
		return 0, fmt.Errorf("ask %s for its processor time: %w", s.name, err)
	}
	line, err := s.out.ReadString('\n')
	if err != nil {
		return 0, fmt.Errorf("ask %s for its processor time: %w", s.name, err)
	}
	n, err := strconv.ParseInt(strings.TrimSpace(line), 10, 64)
	return time.Duration(n), err
}

// A side is quiet when it uses less than a tenth of a processor. What it does
// after a round because of the round is part of what the round costs, and must
// not slow the next side's.
const (
	quietLook = 50 * time.Millisecond
	quietUse  = quietLook / 10
	quietWait = 30 * time.Second // at most
)

// round loads the side once and returns when it is quiet.
func (s *side) round(tokens []string, o options) (block, []time.Duration, error) {
	before, err := s.cpu()
	if err != nil {
		return block{}, nil, err
	}
	wall, latencies, err := load(s.url, tokens, o)
	if err != nil {
		return block{}, nil, fmt.Errorf("%s: %w", s.name, err)
	}
	ended := time.Now()
	last, err := s.cpu()
	for err == nil {
		time.Sleep(quietLook)
		var now time.Duration
		now, err = s.cpu()
		busy := now-last > quietUse
		last = now
		if !busy {
			break
		}
		if time.Since(ended) > quietWait {
			return block{}, nil, fmt.Errorf("%s is still busy %s after a round", s.name, quietWait)
		}
	}
	return block{exchanges: len(latencies), wall: wall, cpu: last - before, after: time.Since(ended) - quietLook}, latencies, err
}

func measure(o options) (err error) {
	dir, err := os.MkdirTemp("", "tabard-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	tokens, jwks, err := workload(dir, o.clusterAlg)
	if err != nil {
		return err
	}
	data := filepath.Join(dir, "data")
	tabard, err := start("tabard", "-role", "tabard", "-dir", data, "-profile", o.profile)
	if err != nil {
		return err
	}
	defer tabard.stop()
	bare, err := start("bare", "-role", "bare", "-jwks", jwks)
	if err != nil {
		return err
	}
	defer bare.stop()
	if err := furnish(tabard.url, data, jwks); err != nil {
		return err
	}
	fmt.Printf("%d clients, %d blocks of 2 rounds of %s each, cluster tokens %s, access tokens ES256, durable audit on\n\n", o.clients, o.blocks, o.length, o.clusterAlg)
	sides := []*side{tabard, bare}
	variants := map[string][]string{}
	if o.control {
		variants["again"] = nil
	}
	if o.tree {
		variants["treeless"] = []string{"-treeless"}
	}
	if o.exports {
		taking, err := start("sinks", "-role", "sinks")
		if err != nil {
			return err
		}
		defer taking.stop()
		var to sinks
		if err := json.Unmarshal([]byte(taking.url), &to); err != nil {
			return err
		}
		routes, err := writeRoutes(dir, to)
		if err != nil {
			return err
		}
		variants[exporting] = []string{"-routes", routes}
	}
	for _, name := range slices.Sorted(maps.Keys(variants)) {
		data := filepath.Join(dir, name)
		variant, err := start(name, append([]string{"-role", "tabard", "-dir", data}, variants[name]...)...)
		if err != nil {
			return err
		}
		defer variant.stop()
		if err := furnish(variant.url, data, jwks); err != nil {
			return err
		}
		sides = slices.Insert(sides, len(sides)-1, variant)
	}
	r := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // an order
	for n := range o.blocks + 1 {
		blocks := map[*side]block{}
		order := slices.Clone(sides)
		r.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		for range 2 { // there and back
			for _, s := range order {
				b, latencies, err := s.round(tokens, o)
				if err != nil {
					return err
				}
				blocks[s] = blocks[s].plus(b)
				if n > 0 {
					s.latencies = append(s.latencies, latencies...)
				}
			}
			slices.Reverse(order)
		}
		if n == 0 {
			continue // it warmed up
		}
		for s, b := range blocks {
			s.blocks = append(s.blocks, b)
		}
	}
	if n := slices.IndexFunc(sides, func(s *side) bool { return s.name == exporting }); n >= 0 {
		if err := delivered(sides[n].url, filepath.Join(dir, exporting), len(sides[n].latencies)); err != nil {
			return err
		}
	}
	fmt.Printf("%-10s %12s %10s %10s %16s %14s\n", "", "exchanges/s", "p50", "p99", "CPU/exchange", "quiet after")
	for _, s := range sides {
		slices.Sort(s.latencies)
		fmt.Printf("%-10s %12.0f %10s %10s %13.0f µs %14s\n", s.name, median(each(s.blocks, block.rate)),
			quantile(s.latencies, .5), quantile(s.latencies, .99), median(each(s.blocks, block.cost)), quietAfter(s.blocks))
	}
	fmt.Println()
	printRatio(tabard, bare)
	for _, variant := range sides[1 : len(sides)-1] {
		printRatio(tabard, variant)
	}
	return nil
}

// printRatio compares two sides block by block.
func printRatio(a, b *side) {
	fmt.Printf("%s / %s, medians of %d blocks with their 95 %% intervals:\n", a.name, b.name, len(a.blocks))
	for _, what := range []struct {
		name string
		of   func(block) float64
	}{{"exchanges/s", block.rate}, {"CPU/exchange", block.cost}} {
		ratios := each(a.blocks, what.of)
		for i, v := range each(b.blocks, what.of) {
			ratios[i] /= v
		}
		low, high := interval(ratios)
		fmt.Printf("  %-14s %.3f  (%.3f to %.3f)\n", what.name, median(ratios), low, high)
	}
}

// load keeps all clients busy for a round, and returns how long it was.
func load(base string, tokens []string, o options) (time.Duration, []time.Duration, error) {
	bodies := make([]string, len(tokens))
	for i, t := range tokens {
		bodies[i] = url.Values{"grant_type": {grantType}, "cr_token": {t}, "profile_name": {"bench"}}.Encode()
	}
	client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: o.clients}}
	defer client.CloseIdleConnections()
	var mu sync.Mutex
	var all []time.Duration
	var failed error
	begin := time.Now()
	end := begin.Add(o.length)
	var workers sync.WaitGroup
	for w := range o.clients {
		workers.Go(func() {
			var own []time.Duration
			var err error
			for n := w; time.Now().Before(end) && err == nil; n++ {
				at := time.Now()
				err = exchange(client, base, bodies[n%len(bodies)])
				own = append(own, time.Since(at))
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, own...)
			failed = errors.Join(failed, err)
		})
	}
	workers.Wait()
	return time.Since(begin), all, failed
}

func exchange(client *http.Client, base, body string) error {
	resp, err := client.Post(base+"/identity/token", contentType, strings.NewReader(body)) //nolint:noctx // the client has a timeout
	if err != nil {
		return err
	}
	b, err := io.ReadAll(resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("status %d: %s", resp.StatusCode, b)
	}
	return nil
}

// workload makes a cluster's key and a handful of pods' tokens.
func workload(dir, alg string) (tokens []string, jwks string, err error) {
	var private, public any
	if alg == "ES256" {
		key, err := ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader)
		if err != nil {
			return nil, "", err
		}
		private, public = key, key.Public()
	} else {
		key, err := rsa.GenerateKey(cryptorand.Reader, 2048)
		if err != nil {
			return nil, "", err
		}
		private, public = key, key.Public()
	}
	set, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: public, KeyID: keyID, Algorithm: alg, Use: "sig"}}})
	if err != nil {
		return nil, "", err
	}
	jwks = filepath.Join(dir, "jwks.json")
	if err := os.WriteFile(jwks, set, 0o600); err != nil {
		return nil, "", err
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.SignatureAlgorithm(alg), Key: jose.JSONWebKey{Key: private, KeyID: keyID}}, nil)
	if err != nil {
		return nil, "", err
	}
	now := time.Now()
	for n := range 64 {
		named := map[string]string{"name": "web", "uid": uuid.NewString()}
		payload, err := json.Marshal(map[string]any{
			"iss": "https://bench.invalid", "aud": []string{"iam"}, "sub": "system:serviceaccount:shop:web", "jti": uuid.NewString(),
			"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(time.Hour).Unix(),
			"kubernetes.io": map[string]any{"namespace": "shop", "serviceaccount": named, "pod": map[string]string{"name": fmt.Sprintf("web-%d", n), "uid": uuid.NewString()}},
		})
		if err != nil {
			return nil, "", err
		}
		jws, err := signer.Sign(payload)
		if err != nil {
			return nil, "", err
		}
		raw, err := jws.CompactSerialize()
		if err != nil {
			return nil, "", err
		}
		tokens = append(tokens, raw)
	}
	return tokens, jwks, nil
}

// ownerToken logs the owner of a server's first account in.
func ownerToken(base, data string) (token, account string, err error) {
	var owner struct {
		AccountID string `json:"account_id"`
		APIKey    string `json:"apikey"`
	}
	b, err := os.ReadFile(filepath.Join(data, "owner.json"))
	if err != nil {
		return "", "", err
	}
	if err := json.Unmarshal(b, &owner); err != nil {
		return "", "", err
	}
	resp, err := http.PostForm(base+"/identity/token", url.Values{"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}, "apikey": {owner.APIKey}}) //nolint:noctx // at start and end
	if err != nil {
		return "", "", err
	}
	var answer struct {
		AccessToken string `json:"access_token"`
	}
	err = errors.Join(json.NewDecoder(resp.Body).Decode(&answer), resp.Body.Close())
	return answer.AccessToken, owner.AccountID, err
}

// furnish registers the cluster and a linked profile over the API.
func furnish(base, data, jwksFile string) error {
	token, account, err := ownerToken(base, data)
	if err != nil {
		return err
	}
	post := func(path string, body any, into any) error {
		b, err := json.Marshal(body)
		if err != nil {
			return err
		}
		req, err := http.NewRequest(http.MethodPost, base+path, bytes.NewReader(b)) //nolint:noctx // at start
		if err != nil {
			return err
		}
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		answer, err := io.ReadAll(resp.Body)
		if err := errors.Join(err, resp.Body.Close()); err != nil {
			return err
		}
		if resp.StatusCode != http.StatusCreated {
			return fmt.Errorf("POST %s: %d %s", path, resp.StatusCode, answer)
		}
		return json.Unmarshal(answer, into)
	}
	jwks, err := os.ReadFile(jwksFile)
	if err != nil {
		return err
	}
	var cluster struct{ CRN string }
	if err := post("/v1/clusters", map[string]any{"name": "bench", "issuer": "https://bench.invalid", "jwks": json.RawMessage(jwks)}, &cluster); err != nil {
		return err
	}
	var profile struct{ ID string }
	if err := post("/v1/profiles", map[string]any{"name": "bench", "account_id": account}, &profile); err != nil {
		return err
	}
	var link any
	return post("/v1/profiles/"+profile.ID+"/links", map[string]any{
		"cr_type": "IKS_SA", "name": "bench", "link": map[string]string{"crn": cluster.CRN, "namespace": "shop", "name": "web"},
	}, &link)
}
