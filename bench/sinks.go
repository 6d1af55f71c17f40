package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/twmb/franz-go/pkg/kfake"
)

// sinks are where the targets of a process that takes all events are. The Kafka
// broker is that of franz-go's tests.
type sinks struct {
	HTTP, Syslog, Kafka string
}

const topic = "activity"

// playSinks takes what it is sent, and does nothing with it.
func playSinks() error {
	broker, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.SeedTopics(1, topic))
	if err != nil {
		return err
	}
	defer broker.Close()
	web, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // lives as long as the process
	if err != nil {
		return err
	}
	logs, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // the same
	if err != nil {
		return err
	}
	go takeLines(logs)
	line, err := json.Marshal(sinks{web.Addr().String(), logs.Addr().String(), broker.ListenAddrs()[0]})
	if err != nil {
		return err
	}
	fmt.Println(string(line))
	go tellTime()
	mux := http.NewServeMux()
	take := func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			http.Error(w, "cut off", http.StatusBadRequest)
		}
	}
	mux.HandleFunc("POST /webhook", take)
	mux.HandleFunc("POST /v1/logs", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/x-protobuf") // an empty answer takes all
		take(w, r)
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	return srv.Serve(web)
}

// takeLines takes what comes over connections, until the listener ends.
func takeLines(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			_, _ = io.Copy(io.Discard, conn) // it ends when the other side does
			_ = conn.Close()
		}()
	}
}

// writeRoutes writes a file of routes that send every event to a target of each
// kind, and returns its name.
func writeRoutes(dir string, to sinks) (string, error) {
	secret := filepath.Join(dir, "webhook.secret")
	file := filepath.Join(dir, "routes.yaml")
	text := fmt.Sprintf(`routes:
  - name: file
    file: {path: %q, max_size: 64MiB, keep: 2}
  - name: webhook
    webhook: {url: "http://%s/webhook", secret_file: %q}
  - name: syslog
    syslog: {transport: tcp, address: %q}
  - name: otlp
    otlp: {endpoint: "http://%s", insecure: true}
  - name: kafka
    kafka: {brokers: [%q], topic: %s, insecure: true}
`, filepath.Join(dir, "events.jsonl"), to.HTTP, secret, to.Syslog, to.HTTP, to.Kafka, topic)
	return file, errors.Join(
		os.WriteFile(secret, []byte("whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n"), 0o600),
		os.WriteFile(file, []byte(text), 0o600),
	)
}

// delivered checks that every route has sent at least so many events, and that
// nothing is left to send.
func delivered(base, data string, events int) error {
	token, _, err := ownerToken(base, data)
	if err != nil {
		return err
	}
	req, err := http.NewRequest(http.MethodGet, base+"/v1/events/routes", nil) //nolint:noctx // at the end
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	var answer struct {
		Routes []struct {
			Name      string `json:"name"`
			State     string `json:"state"`
			Delivered int    `json:"delivered"`
			Behind    int    `json:"behind_events"`
		} `json:"routes"`
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	if err := errors.Join(json.NewDecoder(resp.Body).Decode(&answer), resp.Body.Close()); err != nil {
		return err
	}
	if len(answer.Routes) == 0 {
		return errors.New("the server has no routes")
	}
	for _, r := range answer.Routes {
		if r.Delivered < events || r.Behind > 100 { // what was recorded since the end may be under way
			return fmt.Errorf("the route %s (%s) delivered %d of %d events and is %d behind", r.Name, r.State, r.Delivered, events, r.Behind)
		}
	}
	return nil
}
