package main

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
)

// settled settles the server's settings and returns them as they stand then.
func settled(t *testing.T, args []string, env map[string]string, yaml string) (map[string]string, error) {
	t.Helper()
	file := ""
	if yaml != "" {
		file = write(t, yaml)
	}
	return settledFrom(t, args, env, file)
}

func write(t *testing.T, yaml string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "server.yaml")
	if err := os.WriteFile(file, []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func settledFrom(t *testing.T, args []string, env map[string]string, file string) (map[string]string, error) {
	t.Helper()
	cmd := serverCommand()
	if err := cmd.ParseFlags(args); err != nil {
		t.Fatal(err)
	}
	err := settle(cmd.Name(), cmd.Flags(), file, func(name string) (string, bool) { v, ok := env[name]; return v, ok })
	return values(cmd), err
}

func values(cmd *cobra.Command) map[string]string {
	out := map[string]string{}
	for _, name := range []string{"data-dir", "listen", "region", "insecure-http", "key-rotation", "account-name", "driver", "master-key"} {
		out[name] = cmd.Flags().Lookup(name).Value.String()
	}
	return out
}

func TestAFlagBeatsTheEnvironmentAndTheEnvironmentBeatsTheFile(t *testing.T) {
	const yaml = "data-dir: from-file\nregion: from-file\ndriver: from-file\n"
	env := map[string]string{"TABARD_DATA_DIR": "from-env", "TABARD_REGION": "from-env"}
	got, err := settled(t, []string{"--data-dir", "from-flag"}, env, yaml)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"data-dir": "from-flag", "region": "from-env", "driver": "from-file", "account-name": "Tabard",
	} {
		if got[name] != want {
			t.Errorf("%s is %q, want %q", name, got[name], want)
		}
	}
}

func TestAFlagThatRepeatsTheDefaultStillBeatsTheRest(t *testing.T) {
	got, err := settled(t, []string{"--region", "us-south", "--insecure-http=false"},
		map[string]string{"TABARD_REGION": "eu-de"}, "region: us-east\ninsecure-http: true\n")
	if err != nil {
		t.Fatal(err)
	}
	if got["region"] != "us-south" || got["insecure-http"] != "false" {
		t.Errorf("settings %v", got)
	}
}

func TestListsComeFromEverySource(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		env  map[string]string
		yaml string
		want string
	}{
		"flags":         {[]string{"--listen", "a:1", "--listen", "b:2"}, map[string]string{"TABARD_LISTEN": "c:3"}, "listen: [d:4]", "[a:1,b:2]"},
		"environment":   {nil, map[string]string{"TABARD_LISTEN": "a:1,b:2"}, "listen: [d:4]", "[a:1,b:2]"},
		"file":          {nil, nil, "listen:\n  - a:1\n  - b:2\n", "[a:1,b:2]"},
		"file, one":     {nil, nil, "listen: a:1\n", "[a:1]"},
		"default":       {nil, nil, "region: us-east\n", "[127.0.0.1:8470]"},
		"empty setting": {nil, map[string]string{"TABARD_LISTEN": ""}, "", "[127.0.0.1:8470]"},
	} {
		got, err := settled(t, c.args, c.env, c.yaml)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got["listen"] != c.want {
			t.Errorf("%s: listen %s, want %s", name, got["listen"], c.want)
		}
	}
}

func TestTheFilesValuesMayBeOfAnyScalarType(t *testing.T) {
	got, err := settled(t, nil, nil, "insecure-http: true\nkey-rotation: 1440h\naccount-name: 42\n")
	if err != nil {
		t.Fatal(err)
	}
	if got["insecure-http"] != "true" || got["key-rotation"] != (1440*time.Hour).String() || got["account-name"] != "42" {
		t.Errorf("settings %v", got)
	}
}

func TestTheFileCanBeNamedByTheEnvironment(t *testing.T) {
	file := write(t, "region: from-file\n")
	got, err := settledFrom(t, nil, map[string]string{"TABARD_CONFIG": file}, "")
	if err != nil || got["region"] != "from-file" {
		t.Errorf("region %s, error %v", got["region"], err)
	}
	other := write(t, "region: from-other\n")
	got, err = settledFrom(t, []string{"--config", other}, map[string]string{"TABARD_CONFIG": file}, other)
	if err != nil || got["region"] != "from-other" {
		t.Errorf("region %s, error %v", got["region"], err)
	}
}

func TestWhatIsNoSettingIsRefusedByName(t *testing.T) {
	for yaml, about := range map[string]string{
		"bogus: 1":                      "bogus",
		"bogus: []":                     "bogus",
		"bogus: null":                   "bogus",
		"data_dir: x":                   "data_dir",
		"Region: us-south":              "Region",
		"region: us-south\nregoin: x":   "regoin",
		"config: other.yaml":            "config",
		"help: true":                    "help",
		"region: [a, b]":                "region",
		"region: []":                    "region",
		"region: {name: us-south}":      "region",
		"region:":                       "region",
		"listen:":                       "listen",
		"listen: {a: b}":                "listen",
		"listen: [{a: b}]":              "listen",
		"listen: [[a]]":                 "listen",
		"listen: [a:1, null]":           "listen",
		"insecure-http: perhaps":        "insecure-http",
		"key-rotation: 30":              "key-rotation",
		"region: us-south\nregion: two": "region",
	} {
		if _, err := settled(t, nil, nil, yaml); err == nil || !strings.Contains(err.Error(), about) {
			t.Errorf("%q: error %v, want one about %s", yaml, err, about)
		}
	}
	for _, yaml := range []string{"[a, b]", "just text", "{", "\tregion: x"} {
		if _, err := settled(t, nil, nil, yaml); err == nil {
			t.Errorf("%q is taken", yaml)
		}
	}
}

func TestAnUnknownSettingIsRefusedEvenWhenAFlagIsGiven(t *testing.T) {
	if _, err := settled(t, []string{"--region", "us-east"}, nil, "regoin: x\n"); err == nil {
		t.Error("an unknown setting is taken")
	}
}

func TestABadValueNamesWhereItCameFrom(t *testing.T) {
	if _, err := settled(t, nil, map[string]string{"TABARD_KEY_ROTATION": "soon"}, ""); err == nil || !strings.Contains(err.Error(), "TABARD_KEY_ROTATION") {
		t.Errorf("error %v", err)
	}
	file := write(t, "key-rotation: soon\n")
	if _, err := settledFrom(t, nil, nil, file); err == nil || !strings.Contains(err.Error(), file) || !strings.Contains(err.Error(), "key-rotation") {
		t.Errorf("error %v", err)
	}
	missing := filepath.Join(t.TempDir(), "none.yaml")
	if _, err := settledFrom(t, nil, nil, missing); err == nil || !strings.Contains(err.Error(), missing) {
		t.Errorf("error %v", err)
	}
}

func TestAnEmptyFileSettlesNothing(t *testing.T) {
	want, err := settled(t, nil, nil, "")
	if err != nil {
		t.Fatal(err)
	}
	for _, yaml := range []string{"\n", "# only a comment\n", "---\n", "{}"} {
		got, err := settled(t, nil, nil, yaml)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %v, error %v", yaml, got, err)
		}
	}
}

func TestEverySettingCanComeFromTheEnvironment(t *testing.T) {
	env := map[string]string{
		"TABARD_DATA_DIR": "d", "TABARD_REGION": "r", "TABARD_INSECURE_HTTP": "true", "TABARD_KEY_ROTATION": "1h", "TABARD_ACCOUNT_NAME": "a",
		"TABARD_DRIVER": "none", "TABARD_MASTER_KEY": "secret", "TABARD_LISTEN": "x:1",
	}
	got, err := settled(t, nil, env, "")
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"data-dir": "d", "region": "r", "insecure-http": "true", "key-rotation": "1h0m0s", "account-name": "a", "driver": "none",
		"master-key": "secret", "listen": "[x:1]",
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("settings %v, want %v", got, want)
	}
}
