package cli

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"tabard.dev/tabard/internal/kube"
)

// kubeFlags say which API server a command talks to, and with whose rights.
type kubeFlags struct{ file, context string }

func (k *kubeFlags) add(f *pflag.FlagSet) {
	f.StringVar(&k.file, "kubeconfig", "", "`FILE` that says how the cluster is reached (default $KUBECONFIG)")
	f.StringVar(&k.context, "context", "", "context in it (default the current one)")
}

// given reports whether there is something to read: a flag, or what kubectl
// would follow too.
func (k *kubeFlags) given() bool {
	return k.file != "" || k.context != "" || os.Getenv("KUBECONFIG") != ""
}

// files returns what kubectl would read.
func (k *kubeFlags) files() ([]string, error) {
	if k.file != "" {
		return []string{k.file}, nil
	}
	if files := filepath.SplitList(os.Getenv("KUBECONFIG")); len(files) > 0 {
		return files, nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return nil, fmt.Errorf("find the kubeconfig (give --kubeconfig): %w", err)
	}
	return []string{filepath.Join(home, ".kube", "config")}, nil
}

// config reads the kubeconfig. A program that it names for credentials is told
// of before it runs.
func (k *kubeFlags) config(cmd *cobra.Command) (kube.Config, error) {
	files, err := k.files()
	if err != nil {
		return kube.Config{}, err
	}
	read, err := kube.ReadKubeconfig(files...)
	if err != nil {
		return kube.Config{}, err
	}
	advise := func(cfg kube.Config, err error) (kube.Config, error) {
		if err != nil && len(read.Contexts()) > 0 && k.context == "" {
			err = &noted{error: err, note: "Name another context with: --context NAME"}
		}
		return cfg, err
	}
	stderr := cmd.ErrOrStderr()
	stdin, _ := cmd.InOrStdin().(*os.File)
	return advise(read.Config(k.context, kube.ExecOptions{
		Tell: func(command string) {
			fmt.Fprintf(stderr, "Running the program that the kubeconfig names for credentials: %s\n", plain(command))
		},
		Stdin: stdin, Stderr: stderr,
	}))
}

// clusterError says what to do about an API server that does not do as asked;
// doing is what it was asked for, and right who may grant what it wants.
func clusterError(server, doing string, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, context.Canceled) {
		return errInterrupted
	}
	note := ""
	var plugin *kube.PluginError
	switch code := kube.Code(err); {
	case errors.As(err, &plugin):
		err = plugin
		note = "Run it by hand to see what it lacks: " + plugin.Command
	case code == http.StatusUnauthorized:
		note = "The cluster does not know the kubeconfig's credential, or it has ended: log in to the cluster again, or name another --context."
	case code == http.StatusForbidden:
		note = "The kubeconfig's user lacks the right: use one of a cluster administrator, or have the right granted."
	case code == 0 && !errors.Is(err, os.ErrNotExist):
		err = fmt.Errorf("cannot talk to the API server at %s: %w", server, cause(err))
		note = "Check --kubeconfig and --context, and that this machine reaches the cluster: kubectl version asks the same server."
	}
	return &noted{error: fmt.Errorf("%s: %w", doing, err), note: note}
}
