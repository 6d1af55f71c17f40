package activityapi

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/diskwatch"
)

const actionSpace = "activity.space.update"

// Disk is who watches the disk of the log.
type Disk interface {
	Status() diskwatch.Status
	Release(ctx context.Context) (int64, error)
}

// SpaceOptions are what the routes about the log's space work with.
type SpaceOptions struct {
	Disk Disk
	Log  interface {
		Days(ctx context.Context) ([]store.DayInfo, error)
		Extent(ctx context.Context) (store.Extent, error)
	}
	MaxDays  int   // that are kept; 0 is all
	MaxBytes int64 // that the store may use; 0 is as many as it needs
}

// RegisterSpace adds the routes that tell how much space the log has, and free
// the reserve. They are for the operator: how much the accounts write together
// is nobody else's affair.
func RegisterSpace(mux *http.ServeMux, cfg *api.Config, o SpaceOptions) {
	f := &api.Family{Config: cfg, Mux: mux, Service: "Activity Log", Shape: api.PlainShape}
	api.Read(f, "GET /v1/events/space", actionLog, loadOperator, o.show)
	api.ChangeAfter(f, "POST /v1/events/space/release", actionSpace, activity.ReserveRelease, o.release, loadReleased, o.released)
}

func loadOperator(c *api.Call) (struct{}, api.Target, error) {
	return struct{}{}, target(c), operatorOnly(c)
}

func operatorOnly(c *api.Call) error {
	if c.Account() == c.OperatorAccount {
		return nil
	}
	return fault.New(fault.Denied, "not_authorized", "What concerns the log of all accounts is the operator's affair: log in to the account %s.", c.OperatorAccount)
}

// spaceState is how the log and its disk are. Sizes are in bytes.
type spaceState struct {
	State   store.State    `json:"state"`
	Why     string         `json:"why,omitempty"`
	Since   time.Time      `json:"since"`
	Refused int64          `json:"refused"`
	Disk    spaceDisk      `json:"disk"`
	Store   spaceStore     `json:"store"`
	Reserve spaceReserve   `json:"reserve"`
	Kept    spaceRetention `json:"retention"`
	Days    []spaceDay     `json:"days"`
}

type spaceDisk struct {
	Size  int64 `json:"size"`
	Free  int64 `json:"free"`
	Alarm int64 `json:"alarm_below"`
	Stop  int64 `json:"stop_below"`
}

type spaceStore struct {
	Size int64 `json:"size"`
	Used int64 `json:"used"` // the rest is free inside the file, and used again
}

type spaceReserve struct {
	Size   int64 `json:"size"` // that there is
	Wanted int64 `json:"wanted"`
}

type spaceRetention struct {
	MaxDays  int   `json:"max_days"`
	MaxBytes int64 `json:"max_size"`
}

type spaceDay struct {
	Day    int   `json:"day"` // yyyymmdd
	First  int64 `json:"first"`
	Last   int64 `json:"last"`
	Events int64 `json:"events"` // at most
}

func (o SpaceOptions) show(c *api.Call, _ struct{}) (api.Reply, error) {
	days, err := o.Log.Days(c.R.Context())
	if err != nil {
		return api.Reply{}, fmt.Errorf("read the days of the activity log: %w", err)
	}
	extent, err := o.Log.Extent(c.R.Context())
	if err != nil {
		return api.Reply{}, fmt.Errorf("read the size of the activity log: %w", err)
	}
	s := o.Disk.Status()
	answer := spaceState{
		State: s.State, Why: s.Why, Since: s.Since.UTC(), Refused: s.Refused,
		Disk:    spaceDisk{s.Total, s.Free, s.Alarm, s.Stop},
		Store:   spaceStore{extent.Bytes, extent.Bytes - extent.Free},
		Reserve: spaceReserve{s.Reserve, s.ReserveFull},
		Kept:    spaceRetention{o.MaxDays, o.MaxBytes}, Days: []spaceDay{},
	}
	for _, d := range days {
		answer.Days = append(answer.Days, spaceDay{d.Day, d.First, d.Last, d.Events})
	}
	return api.Reply{Body: answer}, nil
}

// freeing is a release under way. It has nothing that a body could set.
type freeing struct{ freed int64 }

// OptionalBody implements [api.OptionalBody].
func (freeing) OptionalBody() {}

// UnmarshalJSON takes an object, and nothing from it.
func (*freeing) UnmarshalJSON(b []byte) error {
	var none struct{}
	return json.Unmarshal(b, &none)
}

// release frees the reserve before the transaction: without the space that it
// makes there may be none to record it in.
func (o SpaceOptions) release(c *api.Call, f *freeing) error {
	c.About(target(c))
	if err := operatorOnly(c); err != nil {
		return err
	}
	err := c.Authorize(actionSpace, target(c).Resource)
	if err == nil {
		f.freed, err = o.Disk.Release(c.R.Context())
	}
	return err
}

func loadReleased(c *api.Call, f *freeing) (*freeing, api.Target, error) { return f, target(c), nil }

func (o SpaceOptions) released(c *api.Call, _ *directory.Tx, _ *freeing, f *freeing) (api.Reply, api.Target, error) {
	s := o.Disk.Status()
	return api.Reply{
		Body:         map[string]any{"released": f.freed, "state": s.State, "free": s.Free},
		ResponseData: map[string]any{"released": f.freed, "state": s.State, "free": s.Free},
	}, target(c), nil
}
