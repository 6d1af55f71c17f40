// Package routes reads the file in which the operator says where events of the
// activity log go, and makes the routes of it. It knows every kind of target;
// what each of them wants in the file is in its own package.
package routes

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"strings"
	"time"

	"github.com/goccy/go-yaml"

	"tabard.dev/tabard/internal/export"
	"tabard.dev/tabard/internal/export/file"
	"tabard.dev/tabard/internal/export/kafka"
	"tabard.dev/tabard/internal/export/otlp"
	"tabard.dev/tabard/internal/export/syslog"
	"tabard.dev/tabard/internal/export/webhook"
)

// Route is a route as the file has it.
type Route struct {
	Name    string        `yaml:"name"` // a to z, 0 to 9 and -, at most 63
	Match   export.Match  `yaml:"match"`
	Start   string        `yaml:"start"` // of a route that is new: beginning (the default) or now
	Batch   Batch         `yaml:"batch"`
	Timeout time.Duration `yaml:"timeout"` // of one attempt
	Target  `yaml:",inline"`
}

// Batch is what is delivered at once.
type Batch struct {
	Events int           `yaml:"events"`
	Bytes  int           `yaml:"bytes"`
	Wait   time.Duration `yaml:"wait"` // for more, after the first one
}

// Target is where events go: one of them.
type Target struct {
	File    *file.Config    `yaml:"file"`
	Webhook *webhook.Config `yaml:"webhook"`
	Syslog  *syslog.Config  `yaml:"syslog"`
	OTLP    *otlp.Config    `yaml:"otlp"`
	Kafka   *kafka.Config   `yaml:"kafka"`
}

// Sender is who sends, for targets whose protocol tells it.
type Sender struct {
	Issuer  string // URL
	Version string // of Tabard
}

// tell gives the sender to the targets.
func (t *Target) tell(from Sender) {
	if t.OTLP != nil {
		t.OTLP.Instance, t.OTLP.Version = from.Issuer, from.Version
	}
	if t.Kafka != nil {
		t.Kafka.Version = from.Version
	}
}

// target is a target of any kind.
type target struct {
	kind  string
	name  string // for people to read
	check func() error
	open  func() (export.Sink, error)
}

// all lists the targets that a route has.
func (t *Target) all() []target {
	var out []target
	out = add(out, "file", t.File, file.New)
	out = add(out, "webhook", t.Webhook, webhook.New)
	out = add(out, "syslog", t.Syslog, syslog.New)
	out = add(out, "otlp", t.OTLP, otlp.New)
	out = add(out, "kafka", t.Kafka, kafka.New)
	return out
}

// config is what the settings of any target can do.
type config[C any] interface {
	*C
	Check() error
}

func add[C any, P config[C], S export.Sink](to []target, kind string, c P, open func(C) (S, error)) []target {
	if c == nil {
		return to
	}
	t := target{kind: kind, check: c.Check, open: func() (export.Sink, error) {
		// Not returned as it is: a nil S would be a Sink that is not nil.
		s, err := open(*c)
		if err != nil {
			return nil, err
		}
		return s, nil
	}}
	if named, ok := any(c).(interface{ Target() string }); ok {
		t.name = named.Target()
	}
	return append(to, t)
}

// maxFile bounds the file, in bytes, and maxRoutes what is in it.
const (
	maxFile   = 1 << 20
	maxRoutes = 64
)

// Load reads a file. It may be written by nobody but its owner: whoever writes
// it has the events of all accounts sent to where he wants.
func Load(name string) ([]export.Route, error) { return load(name, Sender{}) }

func load(name string, from Sender) (_ []export.Route, err error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("read the routes: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read the routes: %w", err)
	}
	if info.Mode().IsRegular() && info.Mode().Perm()&0o022 != 0 {
		return nil, fmt.Errorf("the routes in %s could be changed by others than the file's owner, who would then get the events of all accounts; run: chmod go-w %s", name, name)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read the routes: %w", err)
	}
	if len(text) > maxFile {
		return nil, fmt.Errorf("the file of routes %s has more than %d bytes", name, maxFile)
	}
	routes, err := parse(text, from)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return routes, nil
}

// Parse reads the text of a file.
func Parse(text []byte) ([]export.Route, error) { return parse(text, Sender{}) }

func parse(text []byte, from Sender) ([]export.Route, error) {
	var doc struct {
		Routes []*Route `yaml:"routes"`
	}
	dec := yaml.NewDecoder(bytes.NewReader(text), yaml.Strict())
	if err := dec.Decode(&doc); err != nil && !errors.Is(err, io.EOF) {
		return nil, errors.New(yaml.FormatError(err, false, true))
	}
	if err := dec.Decode(new(any)); !errors.Is(err, io.EOF) {
		return nil, errors.New("there is more than one document in the file")
	}
	if len(doc.Routes) > maxRoutes {
		return nil, fmt.Errorf("there are %d routes; at most %d are possible", len(doc.Routes), maxRoutes)
	}
	var errs []error
	var out []export.Route
	names, files := map[string]bool{}, map[string]string{}
	for i, r := range doc.Routes {
		if r == nil {
			errs = append(errs, fmt.Errorf("route %d is empty", i+1))
			continue
		}
		called := fmt.Sprintf("route %q", r.Name)
		if r.Name == "" {
			called = fmt.Sprintf("route %d", i+1)
		}
		r.tell(from)
		route, err := r.make()
		if err != nil {
			errs = append(errs, indent(called, err))
			continue
		}
		if names[r.Name] {
			errs = append(errs, fmt.Errorf("%s: there is another one with this name", called))
		}
		names[r.Name] = true
		if r.File != nil {
			if other, taken := files[route.Target]; taken {
				errs = append(errs, fmt.Errorf("%s: it writes to %s, and so does route %q; give each a file of its own", called, route.Target, other))
			}
			files[route.Target] = r.Name
		}
		out = append(out, route)
	}
	return out, errors.Join(errs...)
}

// indent puts the name of a route before each line of an error.
func indent(name string, err error) error {
	lines := strings.Split(err.Error(), "\n")
	for i := range lines {
		lines[i] = name + ": " + lines[i]
	}
	return errors.New(strings.Join(lines, "\n"))
}

// make checks a route, without touching what it names.
func (r *Route) make() (export.Route, error) {
	var errs []error
	refuse := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if !named(r.Name) {
		refuse("name: %q is not one; it has to begin with a letter and to consist of a to z, 0 to 9 and -, 63 at most", r.Name)
	}
	if err := r.Match.Check(); err != nil {
		errs = append(errs, err)
	}
	if r.Start != "" && r.Start != "beginning" && r.Start != "now" {
		refuse("start: %q is neither beginning nor now", r.Start)
	}
	between := func(name string, value, most int64, unit string) {
		if value < 0 || value > most {
			refuse("%s: want at most %d%s", name, most, unit)
		}
	}
	between("batch.events", int64(r.Batch.Events), export.MaxEvents, "")
	between("batch.bytes", int64(r.Batch.Bytes), export.MaxBytes, "")
	if r.Batch.Wait < 0 || r.Batch.Wait > export.MaxWait {
		refuse("batch.wait: want at most %s", export.MaxWait)
	}
	if r.Timeout < 0 || r.Timeout > export.MaxTimeout {
		refuse("timeout: want at most %s", export.MaxTimeout)
	}
	out := export.Route{
		Name: r.Name, Match: r.Match, FromNow: r.Start == "now", Timeout: r.Timeout,
		Batch: export.Batch{Events: r.Batch.Events, Bytes: r.Batch.Bytes, Wait: r.Batch.Wait},
	}
	targets := r.all()
	if len(targets) != 1 {
		refuse("it has %d targets; give it one of %s, with its settings", len(targets), strings.Join(kinds(), ", "))
		return out, errors.Join(errs...)
	}
	t := targets[0]
	if err := t.check(); err != nil {
		errs = append(errs, indent(t.kind, err))
	}
	out.Kind, out.Target, out.Open = t.kind, t.name, t.open
	return out, errors.Join(errs...)
}

// kinds names the targets that there are, for messages.
func kinds() []string {
	t := reflect.TypeFor[Target]()
	var out []string
	for i := range t.NumField() {
		out = append(out, t.Field(i).Tag.Get("yaml"))
	}
	return out
}

func named(s string) bool {
	if len(s) == 0 || len(s) > 63 || s[0] < 'a' || s[0] > 'z' {
		return false
	}
	return strings.IndexFunc(s, func(c rune) bool { return (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' }) < 0
}

// Keeper has a manager follow a file of routes.
type Keeper struct {
	File    string // "" means that there are no routes
	Manager *export.Manager
	Sender  Sender
}

// Read reads the file and sets the routes. A file that cannot be used changes
// nothing.
func (k *Keeper) Read() error {
	if k.File == "" {
		return nil
	}
	routes, err := load(k.File, k.Sender)
	if err != nil {
		return err
	}
	k.Manager.Set(routes)
	return nil
}
