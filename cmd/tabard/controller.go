package main

import (
	"crypto/rand"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"tabard.dev/tabard/internal/binding"
	"tabard.dev/tabard/internal/cli"
	"tabard.dev/tabard/internal/iamclient"
	"tabard.dev/tabard/internal/kube"
)

func controllerCommand() *cobra.Command {
	cfg := binding.Config{Now: time.Now}
	var common settings
	var kubeconfig, kubeContext string
	cmd := &cobra.Command{
		Use:   "controller",
		Short: "Make links of the TrustedProfileBindings in a cluster",
		Long: `Make links of the TrustedProfileBindings in a cluster.

A TrustedProfileBinding in a namespace gives one of its service accounts a
trusted profile:

  apiVersion: iam.tabard.dev/v1alpha1
  kind: TrustedProfileBinding
  metadata: {name: web, namespace: shop}
  spec: {serviceAccountName: web, profileName: shop-reader}

The controller makes the link, removes it with the binding, and says in the
binding's status how it stands. A namespace may bind only the profiles that its
annotation iam.tabard.dev/allowed-profiles names, such as "shop-*, backup";
without it, none.

It runs in the cluster and has no key: it exchanges its own pod's token for the
trusted profile --profile. That profile needs the role Editor on the profiles that
it may link, and Viewer on containers-kubernetes, to read the cluster's CRN.
Whoever takes over the cluster can be all profiles that it may link, so give it a
policy for each:

  tabard iam trusted-profile-policy-create tabard-controller --roles Editor \
    --service-name iam-identity --resource-type profile --resource PROFILE_ID

The cluster must be the one that its token is of: with the name of another one it
links and removes nothing. Several replicas may run; one works at a time.

To delete bindings while Tabard is gone for good, take their finalizers off:

  kubectl patch trustedprofilebinding NAME --type merge -p '{"metadata":{"finalizers":null}}'

Every flag can also be given as an environment variable (--iam-url as
TABARD_IAM_URL) or as a key of the configuration file (iam-url: …).`,
		Example: `  tabard ks controller --iam-url https://iam.example.com:8470 --cluster my-cluster
  tabard ks controller --config /etc/tabard/controller.yaml --metrics :9473
  tabard ks controller --kubeconfig admin.conf --token-file sa-token --iam-url http://127.0.0.1:8470 --cluster my-cluster`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := common.settle(cmd, "ks "+cmd.Name())
			if err != nil {
				return err
			}
			cfg.Log = log
			// What the command lacks is said before what its surroundings lack.
			if _, err := iamclient.CheckURL(cfg.IAM, cfg.Insecure); err != nil {
				return cli.Usage("iam-url: %v", err)
			}
			access, err := clusterAccess(kubeconfig, kubeContext)
			if err != nil {
				return err
			}
			if cfg.Kube, err = kube.New(access); err != nil {
				return err
			}
			if cfg.Namespace == "" {
				if cfg.Namespace, err = (kube.Pod{}).Namespace(); err != nil {
					cfg.Namespace = "tabard-system"
				}
			}
			host, err := os.Hostname()
			if err != nil {
				return fmt.Errorf("find this machine's name: %w", err)
			}
			cfg.Holder = host + "_" + rand.Text()[:8]
			c, err := binding.New(cfg)
			if err != nil {
				return cli.Usage("%v", err)
			}
			return c.Run(cmd.Context())
		},
	}
	common.flags(cmd)
	f := cmd.Flags()
	f.StringVar(&cfg.IAM, "iam-url", "", "`URL` of the IAM server")
	f.StringVar(&cfg.Cluster, "cluster", "", "`NAME` or ID that this cluster is registered by at the IAM server")
	f.StringVar(&cfg.Profile, "profile", binding.DefaultProfile, "trusted profile of the controller itself: name or ID")
	f.StringVar(&cfg.TokenFile, "token-file", "/var/run/secrets/tokens/sa-token", "`FILE` with the controller's own service-account token, for the audience iam")
	f.StringVar(&cfg.CAFile, "ca-file", "", "PEM `FILE` of the authority of the IAM server's certificate, besides those of the system")
	f.BoolVar(&cfg.Insecure, "insecure-http", false, "reach an IAM server on another machine by plain HTTP; tokens can then be read on the way")
	f.StringVar(&kubeconfig, "kubeconfig", "", "`FILE` that says how to reach the cluster (default: the cluster that this runs in)")
	f.StringVar(&kubeContext, "context", "", "context of the kubeconfig (default: its current one)")
	f.StringVar(&cfg.Namespace, "namespace", "", "namespace of the lease by which replicas take turns (default: the pod's, else tabard-system)")
	f.DurationVar(&cfg.Lease, "lease-duration", binding.DefaultLease, "how long a replica may work without renewing its lease; the next one waits as long after a crash")
	f.DurationVar(&cfg.Resync, "resync", binding.DefaultResync, "how often each binding is held against the IAM server, in case that something changed there")
	f.DurationVar(&cfg.Sweep, "sweep", binding.DefaultSweep, "how often links are searched for whose binding is gone")
	f.StringVar(&cfg.Metrics, "metrics", "", "`ADDRESS` of /metrics, /healthz and /readyz, such as :9473 (default: not served)")
	return cmd
}

// clusterAccess says how the API server is reached: as a kubeconfig says, or as
// a pod does.
func clusterAccess(kubeconfig, context string) (kube.Config, error) {
	if kubeconfig == "" {
		return kube.InCluster()
	}
	return kube.FromKubeconfig(kubeconfig, context)
}
