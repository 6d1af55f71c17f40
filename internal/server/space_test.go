package server

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestSizesAreReadAsPeopleWriteThem(t *testing.T) {
	for s, want := range map[string]int64{
		"": -7, "0": 0, "1": 1, "20GiB": 20 << 30, "512 MiB": 512 << 20, "64KiB": 64 << 10, "2TiB": 2 << 40,
	} {
		if got, err := parseSize(s, -7); err != nil || got != want {
			t.Errorf("%q is %d, %v; want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"-1", "1GB", "GiB", "1.5GiB", "9999999999TiB", "99999999999999999999", "1 GiB x", "0x10", " "} {
		if got, err := parseSize(s, -7); err == nil {
			t.Errorf("%q is %d", s, got)
		}
	}
}

func TestSettingsOfSpaceThatContradictEachOtherAreRefused(t *testing.T) {
	for want, set := range map[string]func(*Config){
		"the alarm comes first":                 func(c *Config) { c.DiskAlarm, c.DiskStop = "1MiB", "2MiB" },
		"activity-max-days -1 is negative":      func(c *Config) { c.ActivityMaxDays = -1 },
		`disk-reserve "much" is not a size`:     func(c *Config) { c.DiskReserve = "much" },
		`activity-max-size "20G" is not a size`: func(c *Config) { c.ActivityMaxSize = "20G" },
	} {
		c := config(t.TempDir())
		set(&c)
		if err := c.Complete(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

func TestAnInstallationWhoseStoreIsGoneDoesNotBeginAnew(t *testing.T) {
	dir := t.TempDir()
	s := open(t, config(dir))
	closed(t, s)
	if err := os.Rename(filepath.Join(dir, "tabard.db"), filepath.Join(dir, "away")); err != nil {
		t.Fatal(err)
	}
	if why := refused(t, config(dir)); !strings.Contains(why, "Put a backup back") {
		t.Errorf("refused because %s", why)
	}
	if err := os.Rename(filepath.Join(dir, "away"), filepath.Join(dir, "tabard.db")); err != nil {
		t.Fatal(err)
	}
	open(t, config(dir))
}
