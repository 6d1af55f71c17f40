// Resource-lister shows, step by step, how a pod gets from its service-account
// token to a list of cloud resources without any stored key. It is a sample to
// read, run and copy from: the steps are in lister.go, what the caller is told
// about them in report.go, and here is the web server around them.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

// version is set by the build: -ldflags "-X main.version=1.2.3".
var version = "dev"

// Bounds on the work for one request. The server must be allowed to write for
// longer than the exchange and the listing take together.
const (
	callTimeout  = 15 * time.Second // one call to IAM or the resource controller
	listTimeout  = 60 * time.Second // all pages together
	writeTimeout = 90 * time.Second
	drainTimeout = 20 * time.Second // less than a pod's 30 s of grace
)

type config struct {
	IAMURL                string
	ResourceControllerURL string
	TokenFile             string
	Listen                string
	Profile               string // with -once, unless a flag names another
}

// loadConfig reads the environment: the sample's own variables, and then those
// that the published SDKs read for the resource controller, which an admission
// webhook may have put there. With IAM's URL set, one server is taken to speak
// for both services unless RESOURCE_CONTROLLER_URL says otherwise.
func loadConfig(getenv func(string) string) (config, error) {
	or := func(name, fallback string) string {
		if v := getenv(name); v != "" {
			return v
		}
		return fallback
	}
	given := or("IAM_URL", getenv("RESOURCE_CONTROLLER_AUTH_URL"))
	iam, resources := "https://iam.cloud.ibm.com", "https://resource-controller.cloud.ibm.com"
	if given != "" {
		iam = strings.TrimSuffix(strings.TrimRight(given, "/"), "/identity/token")
		resources = iam
	}
	cfg := config{
		IAMURL:                iam,
		ResourceControllerURL: strings.TrimRight(or("RESOURCE_CONTROLLER_URL", resources), "/"),
		TokenFile:             or("TOKEN_FILE", or("RESOURCE_CONTROLLER_CR_TOKEN_FILENAME", "/var/run/secrets/tokens/sa-token")),
		Listen:                or("LISTEN", ":8080"),
		Profile:               or("PROFILE_NAME", getenv("RESOURCE_CONTROLLER_IAM_PROFILE_NAME")),
	}
	for _, s := range []struct{ name, value string }{{"IAM_URL", cfg.IAMURL}, {"RESOURCE_CONTROLLER_URL", cfg.ResourceControllerURL}} {
		u, err := url.Parse(s.value)
		if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
			return config{}, fmt.Errorf("%s: %q is not a URL such as https://iam.example.com", s.name, s.value)
		}
	}
	return cfg, nil
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	code := run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run returns the exit code: 0 done, 1 refused or failed, 2 wrong usage.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("resource-lister", flag.ContinueOnError)
	flags.SetOutput(stderr)
	once := flags.Bool("once", false, "list once, print the answer and exit, for a Kubernetes Job")
	profile := flags.String("profile", "", "name of the trusted profile, with -once (default $PROFILE_NAME)")
	tokenFile := flags.String("token-file", "", "file with the service-account token (default $TOKEN_FILE)")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return 0
	} else if err != nil {
		return 2
	}
	cfg, err := loadConfig(getenv)
	if err == nil && flags.NArg() > 0 {
		err = fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	if err != nil {
		fmt.Fprintln(stderr, "resource-lister:", err)
		return 2
	}
	if *tokenFile != "" {
		cfg.TokenFile = *tokenFile
	}
	if *profile != "" {
		cfg.Profile = *profile
	}
	l := newLister(cfg)
	if *once {
		r := l.list(ctx, cfg.Profile)
		if _, err := stdout.Write(r.encode()); err != nil || r.Error != nil {
			return 1
		}
		return 0
	}
	log := slog.New(slog.NewJSONHandler(stderr, nil))
	if err := serve(ctx, l, log); err != nil {
		log.Error("resource-lister stopped", "error", err)
		return 1
	}
	return 0
}

// serve answers requests until ctx ends, then lets those under way finish.
func serve(ctx context.Context, l *lister, log *slog.Logger) error {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", l.cfg.Listen)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	server := &http.Server{
		Handler:           handler(l, log),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
	}
	log.Info("resource-lister is listening", "address", listener.Addr().String(), "version", version,
		"iam", l.cfg.IAMURL, "resource_controller", l.cfg.ResourceControllerURL)

	drained := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		grace, cancel := context.WithTimeout(context.Background(), drainTimeout)
		defer cancel()
		drained <- server.Shutdown(grace)
	})
	defer stop()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve: %w", err)
	}
	if err := <-drained; err != nil {
		return fmt.Errorf("drain: %w", err)
	}
	return nil
}

func handler(l *lister, log *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		body, _ := json.Marshal(map[string]string{"name": "resource-lister", "status": "alive", "version": version})
		write(w, http.StatusOK, append(body, '\n'))
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		write(w, http.StatusOK, []byte(`{"status":"ok"}`+"\n"))
	})
	mux.HandleFunc("GET /api/listresources", func(w http.ResponseWriter, r *http.Request) {
		// Several names, or a query that cannot be read, count as none.
		var profile string
		if query, err := url.ParseQuery(r.URL.RawQuery); err == nil && len(query["tpname"]) == 1 {
			profile = query.Get("tpname")
		}
		answer := l.list(r.Context(), profile)
		status := answer.httpStatus()
		log.Info("listed", "status", status, "profile", answer.Profile, "reached", answer.Reached, "stopped_at", answer.StoppedAt)
		write(w, status, answer.encode())
	})
	return mux
}

func write(w http.ResponseWriter, status int, body []byte) {
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	// The caller may be gone; there is nobody left to tell.
	_, _ = w.Write(body)
}
