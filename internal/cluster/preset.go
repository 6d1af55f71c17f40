package cluster

import (
	"cmp"
	"embed"
	"fmt"
	"slices"

	"github.com/goccy/go-yaml"

	"tabard.dev/tabard/internal/identity"
)

// Preset is what is known of a service that issues tokens to its jobs. It is
// data: one more service is one more file.
type Preset struct {
	Name    string                          `yaml:"name" json:"name"`
	Title   string                          `yaml:"title" json:"title"`
	Issuer  string                          `yaml:"issuer" json:"issuer"`                   // of the service that everybody uses
	Issuers string                          `yaml:"issuers" json:"other_issuers,omitempty"` // of installations of its own, in words
	Notes   string                          `yaml:"notes" json:"notes"`                     // how a job gets its token, and what to compare; AUDIENCE stands for the audience
	Mapping `yaml:",inline" json:"mapping"` //
	Example []identity.Condition            `yaml:"example" json:"example_rule"` // beside the one on the issuer
}

//go:embed presets/*.yaml
var presetFiles embed.FS

// Presets returns the presets that ship with the server, by name.
func Presets() ([]*Preset, error) {
	entries, err := presetFiles.ReadDir("presets")
	if err != nil {
		return nil, fmt.Errorf("list the presets: %w", err)
	}
	out := make([]*Preset, 0, len(entries))
	for _, e := range entries {
		b, err := presetFiles.ReadFile("presets/" + e.Name())
		if err != nil {
			return nil, fmt.Errorf("read a preset: %w", err)
		}
		p := &Preset{}
		if err := yaml.UnmarshalWithOptions(b, p, yaml.Strict()); err != nil {
			return nil, fmt.Errorf("read preset %s: %w", e.Name(), err)
		}
		if err := p.Validate(); err != nil {
			return nil, fmt.Errorf("preset %s: %w", e.Name(), err)
		}
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b *Preset) int { return cmp.Compare(a.Name, b.Name) })
	return out, nil
}
