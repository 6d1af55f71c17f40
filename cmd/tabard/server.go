package main

import (
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"tabard.dev/tabard/internal/cli"
	"tabard.dev/tabard/internal/server"
)

func serverCommand() *cobra.Command {
	var cfg server.Config
	var common settings
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Run the IAM server",
		Long: `Run the IAM server.

The first start makes the data directory, an account and its owner, and writes
the owner's API key to DIR/owner.json (mode 0600). Log in with it:

  tabard login -a http://127.0.0.1:8470 --apikey @DIR/owner.json

Every flag can also be given as an environment variable (--data-dir as
TABARD_DATA_DIR) or as a key of the configuration file (data-dir: …). A flag
beats the environment, the environment beats the file. Unknown keys are
refused.`,
		Example: `  tabard server --data-dir /var/lib/tabard
  tabard server --config /etc/tabard/server.yaml
  tabard server --listen 0.0.0.0:8470 --tls-cert cert.pem --tls-key key.pem --url https://iam.example.com:8470`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := common.settle(cmd, cmd.Name())
			if err != nil {
				return err
			}
			if err := cfg.Complete(); err != nil {
				return cli.Usage("%v", err)
			}
			// The master key has come from the environment; no child process
			// needs to see it there.
			if err := os.Unsetenv("TABARD_MASTER_KEY"); err != nil {
				return err
			}
			cfg.Log, cfg.Version = log, cli.Version
			s, err := server.Open(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			cfg.Log.Info("serving", "url", s.URL())
			if cfg.ActivityRoutes != "" {
				defer onHangup(func() { readRoutes(s, cfg) })()
			}
			return s.Run(cmd.Context())
		},
	}
	common.flags(cmd)
	f := cmd.Flags()
	f.StringVar(&cfg.DataDir, "data-dir", "tabard-data", "`DIR`ectory of the data; made if it does not exist")
	f.StringArrayVar(&cfg.Listen, "listen", []string{"127.0.0.1:8470"}, "`ADDRESS` to serve on; can be given several times")
	f.StringVar(&cfg.URL, "url", "", "`URL` under which clients reach the server (default: the first listen address)")
	f.StringVar(&cfg.Issuer, "issuer", "", "`URL` that stands as iss in tokens (default: the server's URL and /identity)")
	f.StringVar(&cfg.Store, "store", "sqlite", "where objects and events are kept: sqlite")
	f.StringVar(&cfg.Region, "region", "us-south", "region of the VPC API")
	f.StringVar(&cfg.CName, "cname", "bluemix", "cname segment of CRNs")
	f.StringVar(&cfg.CType, "ctype", "public", "ctype segment of CRNs")
	f.StringVar(&cfg.Account, "account-name", "Tabard", "name of the first account")
	f.StringVar(&cfg.TLSCert, "tls-cert", "", "certificate `FILE` in PEM")
	f.StringVar(&cfg.TLSKey, "tls-key", "", "private key `FILE` in PEM")
	f.BoolVar(&cfg.Insecure, "insecure-http", false, "serve plain HTTP beyond loopback; tokens can then be read on the way")
	f.StringVar(&cfg.Alg, "signing-alg", "ES256", "algorithm of new token signing keys: ES256 or RS256")
	f.DurationVar(&cfg.KeyRotation, "key-rotation", 0, "how long a signing key signs (default 720h)")
	f.DurationVar(&cfg.ClusterKeysMaxAge, "cluster-keys-max-age", 0, "how long a key counts at most that its cluster or issuer has withdrawn, 1s to 1h (default 5m)")
	f.StringVar(&cfg.Master.File, "master-key-file", "", "`FILE` of the key that secrets are sealed under (default: DIR/master.key, made at the first start)")
	f.StringVar(&cfg.Master.Value, "master-key", "", "the master key itself in base64; give it as TABARD_MASTER_KEY, a flag is visible to others")
	f.StringVar(&cfg.Master.Command, "master-key-command", "", "`COMMAND` that prints the master key in base64")
	f.StringVar(&cfg.Driver, "driver", server.DriverAuto, "what runs instances on this machine: auto, netns, local or none")
	f.StringVar(&cfg.ActivityRoutes, "activity-routes", "", "`FILE` in YAML that says where activity events are sent; read again on SIGHUP")
	f.IntVar(&cfg.ActivityMaxDays, "activity-max-days", 0, "drop days of the activity log that ended longer ago than so many `DAYS`; 0 keeps all")
	f.StringVar(&cfg.ActivityMaxSize, "activity-max-size", "", "drop the oldest days of the activity log while the store uses more than this `SIZE`, such as 20GiB (default: no bound)")
	f.StringVar(&cfg.DiskAlarm, "disk-alarm", "", "alarm when less than this `SIZE` is free on the disk (default: 1GiB or 5 %, at most a quarter of the disk)")
	f.StringVar(&cfg.DiskStop, "disk-stop", "", "refuse tokens and changes while less than this `SIZE` is free on the disk (default: 32MiB, at most 1/16 of the disk)")
	f.StringVar(&cfg.DiskReserve, "disk-reserve", "", "hold back this `SIZE` on the disk, to be freed when it is full; 0 for none (default: 64MiB, at most an eighth of the disk)")
	return cmd
}

// readRoutes reads the file of routes again, after somebody has changed it.
func readRoutes(s *server.Server, cfg server.Config) {
	if err := s.ReadRoutes(); err != nil {
		cfg.Log.Error("the routes of the activity log stay as they were: their file cannot be used", "error", err)
		return
	}
	cfg.Log.Info("the routes of the activity log were read again", "file", cfg.ActivityRoutes)
}

// onHangup calls f for each SIGHUP, until what it returns is called.
func onHangup(f func()) (stop func()) {
	hangups, done := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(hangups, syscall.SIGHUP)
	var waiting sync.WaitGroup
	waiting.Go(func() {
		for {
			select {
			case <-done:
				return
			case <-hangups:
				f()
			}
		}
	})
	return func() {
		signal.Stop(hangups)
		close(done)
		waiting.Wait()
	}
}

// settle sets the flags that the command line left alone from the environment
// and from the configuration file.
func settle(command string, flags *pflag.FlagSet, file string, env func(string) (string, bool)) error {
	given := map[string]bool{}
	flags.Visit(func(f *pflag.Flag) { given[f.Name] = true })
	set := func(source, name string, values []string) error {
		if given[name] {
			return nil
		}
		given[name] = true
		f := flags.Lookup(name)
		if list, ok := f.Value.(pflag.SliceValue); ok {
			if err := list.Replace(values); err != nil {
				return fmt.Errorf("%s: %s: %w", source, name, err)
			}
			f.Changed = true
			return nil
		}
		if len(values) != 1 {
			return fmt.Errorf("%s: %s takes one value", source, name)
		}
		if err := flags.Set(name, values[0]); err != nil {
			return fmt.Errorf("%s: %s: %w", source, name, err)
		}
		return nil
	}
	var err error
	flags.VisitAll(func(f *pflag.Flag) {
		variable := "TABARD_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		if value, ok := env(variable); ok && value != "" && err == nil {
			values := []string{value}
			if _, list := f.Value.(pflag.SliceValue); list {
				values = strings.Split(value, ",")
			}
			err = set("environment variable "+variable, f.Name, values)
		}
	})
	if err != nil {
		return err
	}
	if file == "" {
		file, _ = env("TABARD_CONFIG")
	}
	if file == "" {
		return nil
	}
	keys, err := readConfig(file)
	if err != nil {
		return err
	}
	names := make([]string, 0, len(keys))
	for name := range keys {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if name == "config" || name == "help" || flags.Lookup(name) == nil {
			return fmt.Errorf("%s: there is no setting %q; see 'tabard %s --help'", file, name, command)
		}
		if err := set(file, name, keys[name]); err != nil {
			return err
		}
	}
	return nil
}

// readConfig reads a flat YAML mapping of settings to a value or a list.
func readConfig(file string) (map[string][]string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read the configuration: %w", err)
	}
	var raw map[string]any
	if err := yaml.Unmarshal(b, &raw); err != nil {
		return nil, fmt.Errorf("read the configuration %s: %w", file, err)
	}
	out := make(map[string][]string, len(raw))
	for name, value := range raw {
		switch v := value.(type) {
		case []any:
			out[name] = []string{} // an empty list is a setting, too
			for _, e := range v {
				switch e.(type) {
				case []any, map[string]any, nil:
					return nil, fmt.Errorf("%s: %s takes a value or a list of values", file, name)
				}
				out[name] = append(out[name], fmt.Sprint(e))
			}
		case map[string]any, nil:
			return nil, fmt.Errorf("%s: %s takes a value or a list of values", file, name)
		default:
			out[name] = []string{fmt.Sprint(v)}
		}
	}
	return out, nil
}
