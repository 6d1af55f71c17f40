package activityapi

import (
	"cmp"
	"net/http"
	"slices"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
)

// eventSettings is both the action that a change of the settings needs and its
// event.
const eventSettings = "activity.settings.update"

// off is how the API writes activity.DecisionsOff.
const off = "off"

// RegisterSettings adds the routes of what an account asks of its log.
func RegisterSettings(mux *http.ServeMux, cfg *api.Config) {
	f := &api.Family{Config: cfg, Mux: mux, Service: "Activity Log", Shape: api.PlainShape}
	api.Read(f, "GET /v1/events/settings", actionRead, loadSettings, showSettings)
	api.Change(f, "PATCH /v1/events/settings", eventSettings, eventSettings, loadSettingsFor, updateSettings)
}

type settingsBody struct {
	Decisions *string `json:"decisions"`
}

type settingsView struct {
	AccountID string `json:"account_id"`
	Decisions string `json:"decisions"`
	EntityTag string `json:"entity_tag"`
}

func settingsTarget(c *api.Call) api.Target {
	t := target(c)
	t.CRN = c.Names.Of(service, "", c.Account(), "", "settings", c.Account()).String()
	t.Name, t.TypeURI = c.Account(), "activity/settings"
	return t
}

func settingsOf(c *api.Call) *activity.Settings {
	if s, ok := c.Directory.LogSettings.Get(c.Account()); ok {
		return s
	}
	return &activity.Settings{AccountID: c.Account()}
}

func loadSettings(c *api.Call) (*activity.Settings, api.Target, error) {
	return settingsOf(c), settingsTarget(c), nil
}

func showSettings(_ *api.Call, s *activity.Settings) (api.Reply, error) {
	v := settingsView{s.AccountID, cmp.Or(s.Decisions, off), s.Tag(s.AccountID)}
	return api.Reply{Body: v, ETag: v.EntityTag}, nil
}

func loadSettingsFor(c *api.Call, b *settingsBody) (*activity.Settings, api.Target, error) {
	if b.Decisions == nil || !slices.Contains([]string{off, activity.DecisionsDenied, activity.DecisionsAll}, *b.Decisions) {
		return nil, settingsTarget(c), fault.New(fault.Invalid, "invalid_body",
			"decisions must be one of %s, %s, %s.", off, activity.DecisionsDenied, activity.DecisionsAll).On("decisions")
	}
	return settingsOf(c), settingsTarget(c), nil
}

func updateSettings(c *api.Call, tx *directory.Tx, b *settingsBody, old *activity.Settings) (api.Reply, api.Target, error) {
	t := settingsTarget(c)
	if err := c.IfMatch(&old.Meta, old.AccountID, false); err != nil {
		return api.Reply{}, t, err
	}
	next := *old
	next.Decisions = *b.Decisions
	if next.Decisions == off {
		next.Decisions = activity.DecisionsOff
	}
	c.Directory.LogSettings.Put(tx, &next)
	reply, err := showSettings(c, &next)
	reply.RequestBody = map[string]any{"old_decisions": cmp.Or(old.Decisions, off), "new_decisions": *b.Decisions}
	return reply, t, err
}
