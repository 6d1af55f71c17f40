package cli

import (
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	"github.com/spf13/cobra"
)

// logSpace is what the server tells of its disk, in bytes.
type logSpace struct {
	State   string    `json:"state"`
	Why     string    `json:"why"`
	Since   time.Time `json:"since"`
	Refused int64     `json:"refused"`
	Disk    struct {
		Size  int64 `json:"size"`
		Free  int64 `json:"free"`
		Alarm int64 `json:"alarm_below"`
		Stop  int64 `json:"stop_below"`
	} `json:"disk"`
	Store struct {
		Size int64 `json:"size"`
		Used int64 `json:"used"`
	} `json:"store"`
	Reserve struct {
		Size   int64 `json:"size"`
		Wanted int64 `json:"wanted"`
	} `json:"reserve"`
	Retention struct {
		MaxDays int   `json:"max_days"`
		MaxSize int64 `json:"max_size"`
	} `json:"retention"`
	Days []struct {
		Day    int   `json:"day"`
		Events int64 `json:"events"`
	} `json:"days"`
}

func spaceCommand() *cobra.Command {
	return spec{
		use: "space", short: "Show how much space the activity log has, and what is kept of it",
		more: "The state is ok, alarm, full, read_only, failing, lost or damaged: in all but the first two tokens and changes are\n" +
			"refused, and reads go on. For the administrator of the operator's account.",
		example: "tabard activity space\ntabard activity space --output json",
		run: func(s *session, _ []string) error {
			s.announce("Looking at the space of the activity log")
			o, _, err := s.get("/v1/events/space", nil)
			if err != nil {
				return err
			}
			if s.json {
				return s.printJSON(o)
			}
			var l logSpace
			if err := json.Unmarshal(o.raw, &l); err != nil {
				return fmt.Errorf("read the answer: %w", err)
			}
			s.ok("")
			return l.print(s)
		},
	}.command()
}

func (l *logSpace) print(s *session) error {
	w := table(s.out)
	line := func(title, format string, args ...any) {
		fmt.Fprintf(w, "%s\t%s\n", title, plain(fmt.Sprintf(format, args...)))
	}
	line("State", "%s, since %s", l.State, l.Since.UTC().Format(timeForm))
	if l.Why != "" {
		line("Because", "%s", l.Why)
	}
	if l.Refused > 0 {
		line("Refused", "%d events since the server started", l.Refused)
	}
	line("Disk", "%s free of %s; alarm below %s, stop below %s", inUnits(l.Disk.Free), inUnits(l.Disk.Size), inUnits(l.Disk.Alarm), inUnits(l.Disk.Stop))
	line("Store", "%s, of which %s are used", inUnits(l.Store.Size), inUnits(l.Store.Used))
	line("Reserve", "%s of %s", inUnits(l.Reserve.Size), inUnits(l.Reserve.Wanted))
	kept := "everything"
	switch r := l.Retention; {
	case r.MaxDays > 0 && r.MaxSize > 0:
		kept = fmt.Sprintf("%d days, and no more than %s", r.MaxDays, inUnits(r.MaxSize))
	case r.MaxDays > 0:
		kept = fmt.Sprintf("%d days", r.MaxDays)
	case r.MaxSize > 0:
		kept = "no more than " + inUnits(r.MaxSize)
	}
	line("Kept", "%s", kept)
	if n := len(l.Days); n > 0 {
		var events int64
		for _, d := range l.Days {
			events += d.Events
		}
		line("Days", "%d, from %s to %s, with %d events", n, dayText(l.Days[0].Day), dayText(l.Days[n-1].Day), events)
	}
	return w.Flush()
}

func dayText(day int) string { return fmt.Sprintf("%04d-%02d-%02d", day/10000, day/100%100, day%100) }

// inUnits writes a number of bytes as people read it.
func inUnits(n int64) string {
	for _, u := range []struct {
		name  string
		bytes int64
	}{{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}} {
		if n >= u.bytes {
			return fmt.Sprintf("%.1f %s", float64(n)/float64(u.bytes), u.name)
		}
	}
	return fmt.Sprintf("%d bytes", n)
}

func releaseReserveCommand() *cobra.Command {
	return spec{
		use: "release-reserve", short: "Free the space that the server holds back on the disk of the activity log",
		more: "For when the disk is full: tokens are issued again for as long as the freed space lasts. Then make room; the reserve\n" +
			"is made again by itself when there is some. A full disk lets nobody log in: without a token that is still valid, remove\n" +
			"the file reserve in the data directory instead. For the administrator of the operator's account.",
		example: "tabard activity release-reserve",
		run: func(s *session, _ []string) error {
			s.announce("Freeing the reserve of the activity log")
			var o object
			if _, err := s.client.do(s.ctx(), request{method: http.MethodPost, path: "/v1/events/space/release"}, &o); err != nil {
				return err
			}
			if s.json {
				return s.printJSON(o)
			}
			var freed struct {
				Released int64  `json:"released"`
				Free     int64  `json:"free"`
				State    string `json:"state"`
			}
			if err := json.Unmarshal(o.raw, &freed); err != nil {
				return fmt.Errorf("read the answer: %w", err)
			}
			if freed.Released == 0 {
				s.ok("There is no reserve; %s are free on the disk, and the state is %s.", inUnits(freed.Free), freed.State)
				return nil
			}
			s.ok("%s were freed; %s are free on the disk now, and the state is %s.", inUnits(freed.Released), inUnits(freed.Free), freed.State)
			return nil
		},
	}.command()
}
