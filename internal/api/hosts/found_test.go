package hosts

import (
	"strconv"
	"strings"
	"testing"

	"tabard.dev/tabard/internal/host/link"
)

func TestWhatAHostHasFoundCanBeShown(t *testing.T) {
	good := link.Machine{Name: "db", Device: "vnet0", MAC: "52:54:00:00:00:01", State: "running", Tags: map[string]string{"env": "prod"}}
	if !showable(good) {
		t.Error("an ordinary machine is left out")
	}
	many := map[string]string{}
	for n := range maxFoundTags + 1 {
		many[strconv.Itoa(n)] = ""
	}
	for name, m := range map[string]link.Machine{
		"a name that steers a terminal": {Name: "db\x1b[2J"},
		"a long name":                   {Name: strings.Repeat("a", maxFoundText+1)},
		"a tag with a line break":       {Name: "db", Tags: map[string]string{"env": "a\nb"}},
		"many tags":                     {Name: "db", Tags: many},
	} {
		if showable(m) {
			t.Errorf("%s is shown", name)
		}
	}
}
