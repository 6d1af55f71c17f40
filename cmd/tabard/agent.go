package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"tabard.dev/tabard/internal/cli"
	"tabard.dev/tabard/internal/host/agent"
)

func agentCommand() *cobra.Command {
	var cfg agent.Config
	var drivers agent.DriverConfig
	var common settings
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Run instances on this machine for an IAM server elsewhere",
		Long: `Run instances on this machine for an IAM server elsewhere.

The first start joins the machine to the server, with a token that an
administrator makes there:

  tabard host create-join-token NAME --file join-token

It works once. From then on the agent proves itself with a key that it has made
and that never leaves this machine. The key is sealed under a master key; without
a word about that one, it is kept in memory (/run) and gone after a reboot, and
the host then joins again: tabard host create-join-token --host NAME. To keep it,
give --master-key-file or --master-key-command; the systemd unit that comes with
Tabard has systemd keep it, sealed to this machine's TPM where there is one.

While the server is away, instances run on and get identity tokens and metadata;
access tokens come from the server, and instances are told to try again. Stopping
the agent does not stop them: the next one takes them up.

Every flag can also be given as an environment variable (--data-dir as
TABARD_DATA_DIR) or as a key of the configuration file (data-dir: …).`,
		Example: `  tabard agent --server https://iam.example.com:8470 --join-token-file join-token
  tabard agent --config /etc/tabard/agent.yaml
  tabard agent --server https://iam.example.com:8470 --join-token-file join-token --driver qemu --accel kvm`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := common.settle(cmd, cmd.Name())
			if err != nil {
				return err
			}
			if err := drivers.Validate(); err != nil {
				return cli.Usage("%v", err)
			}
			if os.Geteuid() != 0 {
				return errors.New("the agent makes network namespaces and devices, for which it needs root")
			}
			if err := os.Unsetenv("TABARD_MASTER_KEY"); err != nil {
				return err
			}
			dir, err := filepath.Abs(cfg.Dir)
			if err != nil {
				return fmt.Errorf("find the data directory: %w", err)
			}
			sum := sha256.Sum256([]byte(dir))
			drivers.State = hex.EncodeToString(sum[:4])
			cfg.Dir = dir
			if cfg.Master.File == "" {
				cfg.Master.File = masterKeyFile(os.LookupEnv, drivers.State)
			}
			cfg.Log = log
			cfg.Drivers, cfg.Found, cfg.Version = drivers.Open, drivers.Found, cli.Version
			a, err := agent.Open(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			return a.Run(cmd.Context())
		},
	}
	common.flags(cmd)
	f := cmd.Flags()
	f.StringVar(&cfg.Server, "server", "", "`URL` of the IAM server; remembered after joining")
	f.StringVar(&cfg.JoinToken, "join-token-file", "", "`FILE` with the join token; not looked at again once the host has joined with it")
	f.StringVar(&cfg.Dir, "data-dir", "/var/lib/tabard-agent", "`DIR`ectory of the host's key, machines and images; made if it does not exist")
	f.StringVar(&cfg.CAFile, "ca-file", "", "PEM `FILE` of the authority of the server's certificate, besides those of the system; needed at each start")
	f.BoolVar(&cfg.Insecure, "insecure-http", false, "reach a server on another machine by plain HTTP; tokens can then be read on the way")
	f.StringVar(&cfg.Master.File, "master-key-file", "", "`FILE` of the key that the host's key is sealed under (default: below /run, or what systemd provides)")
	f.StringVar(&cfg.Master.Value, "master-key", "", "the master key itself in base64; give it as TABARD_MASTER_KEY, a flag is visible to others")
	f.StringVar(&cfg.Master.Command, "master-key-command", "", "`COMMAND` that prints the master key in base64")
	f.StringVar(&drivers.Driver, "driver", agent.DriverAuto, "what runs instances: auto, qemu, netns, adopt, or several with commas; auto is all that this machine can")
	f.StringVar(&drivers.Accel, "accel", "auto", "acceleration of virtual machines: kvm, tcg, or auto, which tries kvm out first")
	f.IntVar(&drivers.MemoryMiB, "memory", 0, "memory for virtual machines in `MiB` (default: three quarters of this machine's)")
	f.IntVar(&drivers.MaxDiskGiB, "max-disk", 250, "largest disk of a virtual machine in `GiB`; one with a larger image does not start")
	f.BoolVar(&drivers.NoUplink, "no-uplink", false, "let instances reach nothing but their VPC and the metadata service")
	f.StringVar(&drivers.UplinkRange, "uplink-range", "", "addresses for the links between this machine and its instances' networks (default 100.127.0.0/16)")
	f.StringVar(&drivers.Address, "address", "", "IPv4 `ADDRESS` at which other hosts reach this machine, so that VPCs span hosts: they exchange packets in VXLAN, not encrypted, by UDP port 4789; none is never (default: the one by which it reaches the server)")
	f.StringVar(&drivers.User, "qemu-user", "", "`USER` that virtual machines run as (default: tabard-vm if there is one, else nobody; root only when you say so)")
	f.StringVar(&drivers.UIDs, "qemu-uids", "", "`FIRST-LAST` user ids, of which each virtual machine gets one to itself, such as 200000-265535; nothing else may use them (default: all run as one user)")
	f.StringVar(&drivers.Libvirt, "libvirt", "", "`SOCKET` of libvirt, whose domains can be adopted (default: the usual ones, where they are)")
	f.StringVar(&cfg.Metrics, "metrics", "", "`ADDRESS` of /metrics, /healthz and /readyz, such as 127.0.0.1:9471 (default: not served)")
	return cmd
}

// masterKeyFile is where the master key is when nobody has said: in what
// systemd has decrypted for this service, or in memory, so that nothing on the
// disk can be used elsewhere.
func masterKeyFile(env func(string) (string, bool), tag string) string {
	if dir, ok := env("CREDENTIALS_DIRECTORY"); ok && dir != "" {
		file := filepath.Join(dir, "tabard-agent-master")
		if _, err := os.Stat(file); err == nil {
			return file
		}
	}
	run := "/run"
	if dir, ok := env("XDG_RUNTIME_DIR"); ok && os.Geteuid() != 0 && strings.HasPrefix(dir, "/") {
		run = dir
	}
	return filepath.Join(run, "tabard-agent-"+tag, "master.key")
}
