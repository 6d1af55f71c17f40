package routes

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const all = `
routes:
  - name: siem
    match: {severities: [warning, critical], except_actions: ["activity.*"]}
    start: now
    batch: {events: 100, bytes: 65536, wait: 1s}
    timeout: 10s
    webhook: {url: "https://siem.example.com/tabard", secret_file: /etc/tabard/siem.secret}
  - name: archive
    file: {path: /var/log/tabard/events.jsonl, daily: true, max_size: 256MiB, keep: 30, gzip: true}
  - name: syslog
    match:
      actions: [iam-identity.*, iam-am.policy.create]
      outcomes: [failure]
      accounts: [abc]
    syslog: {address: "syslog.example.com:6514", facility: 10, tls: {ca_file: /etc/tabard/ca.pem}}
  - name: collector
    otlp: {endpoint: "https://collector.example.com:4318", bearer_token_file: /etc/tabard/collector.token, headers_file: /etc/tabard/headers, compression: none}
  - name: bus
    kafka:
      brokers: [kafka-1.example.com:9093, kafka-2.example.com:9093]
      topic: audit
      compression: lz4
      max_message_bytes: 500000
      tls: {}
      sasl: {mechanism: scram-sha-512, user: tabard, password_file: /etc/tabard/kafka.password}
`

func TestAFileOfRoutesIsRead(t *testing.T) {
	routes, err := Parse([]byte(all))
	if err != nil || len(routes) != 5 {
		t.Fatalf("%d routes, %v", len(routes), err)
	}
	siem, archive, syslog := routes[0], routes[1], routes[2]
	if siem.Name != "siem" || siem.Kind != "webhook" || siem.Target != "https://siem.example.com/…" || !siem.FromNow || siem.Timeout != 10*time.Second ||
		siem.Batch.Events != 100 || siem.Batch.Wait != time.Second || len(siem.Match.Severities) != 2 {
		t.Errorf("siem is %+v", siem)
	}
	if archive.Kind != "file" || archive.Target != "/var/log/tabard/events.jsonl" || archive.FromNow {
		t.Errorf("archive is %+v", archive)
	}
	if syslog.Kind != "syslog" || syslog.Target != "tls://syslog.example.com:6514" || len(syslog.Match.Actions) != 2 {
		t.Errorf("syslog is %+v", syslog)
	}
	collector, bus := routes[3], routes[4]
	if collector.Kind != "otlp" || collector.Target != "https://collector.example.com:4318/v1/logs" {
		t.Errorf("collector is %+v", collector)
	}
	if bus.Kind != "kafka" || bus.Target != "kafka-1.example.com:9093,kafka-2.example.com:9093/audit" {
		t.Errorf("bus is %+v", bus)
	}
	for _, text := range []string{"", "routes:", "routes: []", "# nothing"} {
		if routes, err := Parse([]byte(text)); err != nil || len(routes) != 0 {
			t.Errorf("%q has %d routes, %v", text, len(routes), err)
		}
	}
}

func TestAFileThatCannotBeMeantIsRefused(t *testing.T) {
	for text, say := range map[string]string{
		"routes:\n  - name: a\n    fiel: {path: /x}":            "fiel",
		"routes:\n  - name: a\n    file: {path: /x, rotate: 1}": "[3:",
		"route: []":                       "route",
		"routes:\n  - name: a":            "0 targets; give it one of file, webhook, syslog, otlp, kafka",
		"routes:\n  - name: a\n    file:": "0 targets",
		"routes:\n  - name: a\n    file: {path: /x}\n    syslog: {address: 'h:1'}":           "2 targets",
		"routes:\n  - name: A\n    file: {path: /x}":                                         `"A" is not one`,
		"routes:\n  - file: {path: /x}":                                                      "route 1",
		"routes:\n  - name: a\n    file: {path: x}":                                          `route "a": file: path`,
		"routes:\n  - name: a\n    file: {path: /x}\n  - name: a\n    file: {path: /y}":      "another one",
		"routes:\n  - name: a\n    file: {path: /x}\n  - name: b\n    file: {path: /y/../x}": "so does route",
		"routes:\n  - name: a\n    start: later\n    file: {path: /x}":                       "start",
		"routes:\n  - name: a\n    match: {severities: [high]}\n    file: {path: /x}":        "severities",
		"routes:\n  - name: a\n    batch: {events: -1}\n    file: {path: /x}":                "batch.events",
		"routes:\n  - name: a\n    batch: {events: 100000}\n    file: {path: /x}":            "batch.events",
		"routes:\n  - name: a\n    batch: {bytes: 999999999}\n    file: {path: /x}":          "batch.bytes",
		"routes:\n  - name: a\n    batch: {wait: 1h}\n    file: {path: /x}":                  "batch.wait",
		"routes:\n  - name: a\n    timeout: 1h\n    file: {path: /x}":                        "timeout",
		"routes:\n  - name: a\n    file: {path: /x, path: /y}":                               "path",
		"routes:\n  -": "route 1 is empty",
		"routes: {}":   "",
		"[]":           "",
		"routes:\n  - name: a\n    webhook: {url: 'https://u:hidden@h/', secret_file: x}": "authorization_file",
		"routes: []\n---\nroutes: []":                                "more than one document",
		"routes:" + strings.Repeat("\n  - {}", 65):                   "65 routes",
		"\xff\xfe\x00":                                               "",
		"routes:\n  - &a\n    name: a\n    file: {path: /x}\n  - *a": "another one",
		"routes:\n  - name: a\n    webhook: {url: 'https://h/', secret_file: x, secret: hidden}":                    "secret",
		"routes:\n  - name: a\n    syslog: {address: h, tls: {insecure: true}}":                                     "insecure",
		"routes:\n  - name: " + strings.Repeat("a", 64) + "\n    file: {path: /x}":                                  "name",
		"routes:\n  - name: a\n    file: {path: /x, max_size: 5}\n  - name: b\n    file: {path: /y, max_size: 1TB}": "",
	} {
		routes, err := Parse([]byte(text))
		if err == nil || !strings.Contains(err.Error(), say) || strings.Contains(err.Error(), "hidden@") {
			t.Errorf("%q: %d routes, %v; want %q", text, len(routes), err, say)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(all)
	f.Add("routes: [{name: a, file: {path: /x}}]")
	f.Fuzz(func(t *testing.T, text string) {
		routes, err := Parse([]byte(text))
		if err != nil {
			return
		}
		for _, r := range routes {
			if r.Open == nil || r.Kind == "" || !named(r.Name) {
				t.Errorf("route %+v", r)
			}
		}
	})
}

func TestOthersMustNotWriteTheFile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "routes.yaml")
	if err := os.WriteFile(name, []byte(all), 0o600); err != nil {
		t.Fatal(err)
	}
	for mode, ok := range map[os.FileMode]bool{0o600: true, 0o644: true, 0o664: false, 0o646: false} {
		if err := os.Chmod(name, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(name); (err == nil) != ok || err != nil && !strings.Contains(err.Error(), "chmod go-w") {
			t.Errorf("mode %o: %v", mode, err)
		}
	}
	if _, err := Load(name + ".none"); err == nil {
		t.Error("a file that is not there passes")
	}
	if err := os.WriteFile(name, []byte(strings.Repeat("#", maxFile+1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(name, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(name); err == nil {
		t.Error("a huge file passes")
	}
}

func TestTheExampleOfTheDeploymentIsAFileOfRoutes(t *testing.T) {
	text, err := os.ReadFile("../../../deploy/activity/routes.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if routes, err := Parse(text); err != nil || len(routes) < 3 {
		t.Errorf("%d routes, %v", len(routes), err)
	}
}
