package main

import (
	"time"

	"github.com/spf13/cobra"

	"tabard.dev/tabard/internal/cli"
	"tabard.dev/tabard/internal/iamclient"
	"tabard.dev/tabard/internal/kube"
	"tabard.dev/tabard/internal/webhook"
)

func webhookCommand() *cobra.Command {
	var cfg webhook.Config
	var common settings
	var kubeconfig, kubeContext string
	cmd := &cobra.Command{
		Use:   "webhook",
		Short: "Give pods what they need to put on their trusted profile",
		Long: `Give pods what they need to put on their trusted profile.

The webhook runs in the cluster (deploy/kubernetes/webhook.yaml, or the chart
deploy/charts/tabard-kubernetes) and is called by its API servers when a pod is
created. A pod whose service account names a trusted profile gets a projected
token and the variables that the published SDKs read; nothing else of it changes:

  kubectl annotate serviceaccount web -n shop iam.tabard.dev/trusted-profile=shop-web

A namespace can demand that each of its pods has an identity. Pods without one are
then refused, also while the webhook is down:

  kubectl label namespace shop iam.tabard.dev/identity=required

Which services' SDKs get variables, a service account can say for its pods with
iam.tabard.dev/services: vpc,resource_controller. A pod with the annotation
iam.tabard.dev/inject: "false" is left alone, where no identity is demanded.

The webhook makes its certificate by itself, keeps it in the Secret
tabard-webhook-certificate, tells the API servers which authority to trust, and
replaces it at two thirds of its life, or sooner when somebody empties the Secret:
in steps that take 20 minutes, in which no call fails. Replicas share one certificate.

With --check-profiles it asks Tabard whether a profile exists, as the profile that
--profile names, which needs the role Viewer on iam-identity. A pod for a profile
that does not exist gets a warning, and is refused where an identity is demanded.
While Tabard does not answer, pods come in with a warning: without Tabard they get
no access token anyway.

Every flag can also be given as an environment variable (--iam-url as
TABARD_IAM_URL) or as a key of the configuration file (iam-url: …).`,
		Example: `  tabard ks webhook --iam-url https://iam.example.com:8470
  tabard ks webhook --iam-url https://iam.example.com:8470 --service-urls --check-profiles --profile tabard-webhook
  tabard ks webhook --iam-url https://iam.example.com:8470 --kubeconfig admin.conf --namespace tabard-system --certificate-name 192.0.2.7`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := common.settle(cmd, "ks "+cmd.Name())
			if err != nil {
				return err
			}
			cfg.Log = log
			// What the command lacks is said before what its surroundings lack.
			if _, err := iamclient.CheckURL(cfg.IAMURL, cfg.InsecureHTTP); err != nil {
				return cli.Usage("iam-url: %v", err)
			}
			cluster, err := clusterAccess(kubeconfig, kubeContext)
			if err == nil && kubeconfig == "" && cfg.Namespace == "" {
				cfg.Namespace, err = kube.Pod{}.Namespace()
			}
			if err != nil {
				return err
			}
			if err := cfg.Complete(); err != nil {
				return cli.Usage("%v", err)
			}
			if cfg.Kube, err = kube.New(cluster); err != nil {
				return err
			}
			defer cfg.Kube.Close()
			w, err := webhook.New(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			cfg.Log.Info("serving", "address", w.Address().String(), "names", cfg.CertificateNames)
			return w.Run(cmd.Context())
		},
	}
	common.flags(cmd)
	f := cmd.Flags()
	f.StringVar(&cfg.IAMURL, "iam-url", "", "`URL` under which pods reach Tabard")
	f.BoolVar(&cfg.InsecureHTTP, "insecure-http", false, "let --iam-url be plain HTTP beyond loopback; pods' tokens can then be read on the way")
	f.StringVar(&cfg.Audience, "audience", "iam", "audience of pods' tokens, as registered with the cluster")
	f.DurationVar(&cfg.TokenLifetime, "token-lifetime", time.Hour, "life of pods' tokens, which the kubelet replaces in time")
	f.StringSliceVar(&cfg.Services, "services", webhook.DefaultServices, "services whose SDKs get variables, by the names under which SDKs look for them")
	f.BoolVar(&cfg.ServiceURLs, "service-urls", false, "also send the SDKs of those services that Tabard speaks for to Tabard")
	f.StringVar(&cfg.Listen, "listen", ":8443", "`ADDRESS` that API servers call")
	f.StringVar(&cfg.Metrics, "metrics", "", "`ADDRESS` of /metrics, /healthz and /readyz, such as :9472 (default: not served)")
	f.StringVar(&kubeconfig, "kubeconfig", "", "`FILE` that says how to reach the API server, outside of the cluster")
	f.StringVar(&kubeContext, "context", "", "context in the kubeconfig (default: its current one)")
	f.StringVar(&cfg.Namespace, "namespace", "", "namespace of the webhook and its Secret (default: the pod's)")
	f.StringVar(&cfg.Secret, "secret", "tabard-webhook-certificate", "Secret that holds the certificate")
	f.StringVar(&cfg.Configuration, "configuration", "tabard-webhook", "MutatingWebhookConfiguration to put the certificate's authority into")
	f.StringSliceVar(&cfg.CertificateNames, "certificate-name", nil, "DNS `NAME` or address by which API servers call; can be given several times (default: tabard-webhook.NAMESPACE.svc)")
	f.DurationVar(&cfg.CertificateLife, "certificate-life", 90*24*time.Hour, "life of certificates, which are replaced at two thirds of it")
	f.BoolVar(&cfg.CheckProfiles, "check-profiles", false, "ask Tabard whether the profiles exist that service accounts name")
	f.StringVar(&cfg.Profile, "profile", "tabard-webhook", "trusted profile of the webhook itself, for --check-profiles")
	f.StringVar(&cfg.TokenFile, "token-file", "/var/run/secrets/tokens/sa-token", "`FILE` with the webhook's own token, for --check-profiles")
	f.StringVar(&cfg.CAFile, "ca-file", "", "PEM `FILE` of the authority of Tabard's certificate, besides those of the system, for --check-profiles")
	f.DurationVar(&cfg.Drain, "drain", 5*time.Second, "how long calls are still taken after SIGTERM, until API servers know that this replica leaves")
	return cmd
}
