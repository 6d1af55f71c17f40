package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/retention"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/diskwatch"
)

// units of sizes, the larger ones first.
var units = []struct {
	name  string
	bytes int64
}{{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"", 1}}

// parseSize reads a size such as 20GiB, or a number of bytes; "" is the default.
func parseSize(s string, def int64) (int64, error) {
	if s == "" {
		return def, nil
	}
	for _, u := range units {
		number, ok := strings.CutSuffix(s, u.name)
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSpace(number), 10, 64)
		if err != nil || n < 0 || n > math.MaxInt64/u.bytes {
			break
		}
		return n * u.bytes, nil
	}
	return 0, fmt.Errorf("%q is not a size such as 20GiB, 512MiB, or a number of bytes", s)
}

// sizes are the settings of space, in bytes.
type sizes struct{ max, alarm, stop, reserve int64 }

func (c *Config) sizes() (s sizes, err error) {
	for _, f := range []struct {
		name, value string
		into        *int64
		def         int64
	}{
		{"activity-max-size", c.ActivityMaxSize, &s.max, 0},
		{"disk-alarm", c.DiskAlarm, &s.alarm, diskwatch.Auto},
		{"disk-stop", c.DiskStop, &s.stop, diskwatch.Auto},
		{"disk-reserve", c.DiskReserve, &s.reserve, diskwatch.Auto},
	} {
		if *f.into, err = parseSize(f.value, f.def); err != nil {
			return s, fmt.Errorf("%s %w", f.name, err)
		}
	}
	if s.alarm >= 0 && s.stop > s.alarm {
		return s, fmt.Errorf("disk-stop %s is more than disk-alarm %s: the alarm comes first", c.DiskStop, c.DiskAlarm)
	}
	return s, nil
}

// storeName is the name of the store's file in the data directory.
const storeName = "tabard.db"

// storeWasRemoved reports that there was an installation whose store is gone: a
// new one in its place would hide the loss.
func (s *Server) storeWasRemoved() error {
	owner, db := filepath.Join(s.cfg.DataDir, "owner.json"), filepath.Join(s.cfg.DataDir, storeName)
	if _, err := os.Stat(owner); err != nil {
		return nil
	}
	for _, name := range []string{db, db + ".restored", db + ".restoring"} { // the store itself judges the latter two
		if _, err := os.Stat(name); !errors.Is(err, os.ErrNotExist) {
			return nil
		}
	}
	return fmt.Errorf("there is %s and no %s: it was removed. Put a backup back, or, to begin anew, remove %s", owner, db, owner)
}

// watchStore puts a watch before the store.
func (s *Server) watchStore(ctx context.Context, opened diskwatch.Watched, names crn.Names) (err error) {
	size, err := s.cfg.sizes()
	if err != nil {
		return err
	}
	s.watch, err = diskwatch.New(ctx, diskwatch.Config{
		Store: opened, Dir: s.cfg.DataDir, Alarm: size.alarm, Stop: size.stop, Reserve: size.reserve,
		Event: func(c diskwatch.Change) (store.Event, error) { return s.storeEvent(names, c) },
		Now:   s.cfg.Now, Log: s.cfg.Log,
	})
	if err == nil {
		s.store = s.watch
	}
	return err
}

// keepLog makes what drops old days of the log.
func (s *Server) keepLog(names crn.Names) error {
	size, err := s.cfg.sizes()
	if err != nil {
		return err
	}
	s.logKeeper = &retention.Log{
		Store: s.watch, MaxDays: s.cfg.ActivityMaxDays, MaxBytes: size.max, Pressed: s.watch.Pressed, NeededFrom: s.exports.NeededFrom,
		OperatorAccount: s.operator, Names: names, Now: s.cfg.Now, Log: s.cfg.Log,
	}
	if !s.cfg.Treeless {
		s.logKeeper.Sign = func(ctx context.Context) (store.Checkpoint, error) {
			err := s.signer.Sign(ctx)
			c, _ := s.signer.Newest()
			return c, err
		}
	}
	return nil
}

// storeEvent is the event of something that happened to the store.
func (s *Server) storeEvent(names crn.Names, c diskwatch.Change) (store.Event, error) {
	data := map[string]any{"state": c.Is, "was": c.Was, "free": c.Free}
	if c.Why != "" {
		data["why"] = c.Why
	}
	verb, severity := "update", activity.Warning
	if c.Restored != nil {
		verb, severity = "restore", activity.Critical
		data["found"], data["set_aside"] = c.Restored.Found, c.Restored.Aside
	}
	if !c.Is.Takes() {
		severity = activity.Critical
	}
	response, err := json.Marshal(data)
	if err != nil {
		return store.Event{}, fmt.Errorf("encode the event of the store: %w", err)
	}
	source := names.Of("activity", "global", s.operator, "", "", "").String()
	e := &activity.Event{
		ID: uuid.NewString(), Time: activity.Time{Time: c.At.UTC()}, Action: c.Action, AccountID: s.operator,
		Message:       fmt.Sprintf("Activity Log: %s store %s", verb, c.Is),
		CorrelationID: strings.ReplaceAll(uuid.NewString(), "-", ""),
		LogSourceCRN:  source,
		Initiator:     activity.Initiator{ID: "tabard", Name: "tabard", TypeURI: activity.UnknownType},
		Target:        activity.Target{ID: source, Name: "store", TypeURI: "activity/store"},
		Observer:      activity.Observer{Name: "ActivityTracker"},
		ResponseData:  response,
	}
	e.SetReason(200, "")
	e.Severity = severity
	return store.NewEvent(e)
}
