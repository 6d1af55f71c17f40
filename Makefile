# make build   bin/tabard
# make test    lint, unit, race, property and end-to-end tests
# make demo    play both scenes on this machine
# make conformance    the published SDK's own integration suites; ARGS='-run TestPublishedSuites/iamidentityv1' for one
# make compatibility  the same, and docs/compatibility.md anew
# make test-terraform the published Terraform provider; compiles for 10 minutes on 2 cores the first time
# make test-kubernetes a real API server end to end; compiles Kubernetes for 9 minutes on 2 cores the first time; ARGS='-run Token' for some
# make test-crash the server killed under load KILLS times, and power cuts; 200 kills take some 10 minutes on 2 cores
# make collector the OpenTelemetry collector that the tests of exports send to; compiles for a minute and a half the first time
# make test-vm  virtual servers end to end: hosts, QEMU machines, attacks (root); ARGS='-run Article' for some
# make bench   token exchanges per second beside a bare handler; ARGS='-tree -exports' beside servers without the Merkle tree and with exporters
# make bench-hosts instances on one host: tokens per second beside the bare signing rate, start-up, memory; ARGS=-netns
# make bench-search filtered pages of an activity log of 10 million events beside a scan; takes 25 GB of disk; ARGS=-events=1000000
# make fuzz    each fuzz target for FUZZTIME

GO       ?= go
FUZZTIME ?= 30s
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
LDFLAGS  := -s -w -X tabard.dev/tabard/internal/cli.Version=$(VERSION)
LINT     := $(CURDIR)/.cache/golangci-lint
TF       := $(CURDIR)/.cache/terraform
KUBE     := $(CURDIR)/.cache/kube
COLLECTOR := $(CURDIR)/.cache/collector

.PHONY: build test demo bench bench-hosts bench-search fuzz lint unit e2e conformance compatibility terraform-binaries test-terraform \
	kube-binaries test-kubernetes test-vm test-crash collector samples examples clean

build:
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/tabard ./cmd/tabard

demo: build
	scripts/deps.sh demo
	bin/tabard demo $(ARGS)

# The linter is the slowest thing to build and needs nothing of ours, so it is
# built and run beside the tests.
test:
	scripts/deps.sh test
	scripts/test.sh

lint: $(LINT)
	$(GO) vet ./...
	$(LINT) run ./...
	cd test && $(LINT) run -c ../.golangci.yml ./...
	cd examples/resource-lister && $(LINT) run -c ../../.golangci.yml ./...

$(LINT): tools/go.mod tools/go.sum
	cd tools && $(GO) build -o $@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

unit:
	$(GO) test -race -timeout 25m ./...

examples:
	cd examples/resource-lister && $(GO) vet ./... && $(GO) test -race ./...

samples:
	mkdir -p bin && cd examples/resource-lister && CGO_ENABLED=0 $(GO) build -o $(CURDIR)/bin/resource-lister .
	CGO_ENABLED=0 $(GO) build -o bin/documents ./examples/documents

collector: $(COLLECTOR)

$(COLLECTOR): test/collector/go.mod test/collector/go.sum test/collector/main.go
	cd test/collector && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o $@ .

e2e: build samples collector
	cd test && TABARD_BIN=$(CURDIR)/bin/tabard LISTER_BIN=$(CURDIR)/bin/resource-lister DOCUMENTS_BIN=$(CURDIR)/bin/documents COLLECTOR_BIN=$(COLLECTOR) $(GO) test -count=1 -timeout 20m $$($(GO) list ./... | grep -v -e /conformance -e /vm -e /kube)

# Software emulation keeps a core busy for each virtual machine, so one test runs at a time.
test-vm: build
	scripts/deps.sh test
	cd test && TABARD_BIN=$(CURDIR)/bin/tabard $(GO) test -count=1 -timeout 30m -parallel 1 -v $(ARGS) ./vm

test-crash: KILLS ?= 200
test-crash: build
	scripts/deps.sh test
	cd test && TABARD_BIN=$(CURDIR)/bin/tabard KILLS=$(KILLS) $(GO) test -count=1 -timeout 3h -v -run 'AfterAKill|AfterAPowerCut|IsKilled' $(ARGS) .

# The suites wait more than they work, so that all of them run at once.
conformance: build
	cd test && TABARD_BIN=$(CURDIR)/bin/tabard $(GO) test -count=1 -timeout 30m -parallel 8 -v $(ARGS) ./conformance

compatibility:
	COMPATIBILITY=write $(MAKE) conformance

terraform-binaries: $(TF)/terraform $(TF)/terraform-provider-ibm

test-terraform: build terraform-binaries
	cd test && TABARD_BIN=$(CURDIR)/bin/tabard TERRAFORM_BIN=$(TF)/terraform TERRAFORM_PROVIDER_BIN=$(TF)/terraform-provider-ibm \
		$(GO) test -tags terraform -count=1 -timeout 15m $(ARGS) ./terraform

$(TF)/terraform: test/terraform/cli/go.mod test/terraform/cli/go.sum
	cd test/terraform/cli && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o $@ github.com/hashicorp/terraform

$(TF)/terraform-provider-ibm: test/terraform/provider/go.mod test/terraform/provider/go.sum
	cd test/terraform/provider && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o $@ github.com/IBM-Cloud/terraform-provider-ibm

# The versions are those of the module; a client reads the minor one to know what the API server can do.
KUBE_VERSION = $(shell sed -n 's|^.*k8s.io/kubernetes v\([0-9.]*\).*|\1|p' test/k8s/go.mod)
KUBE_LDFLAGS = -s -w -X k8s.io/component-base/version.gitVersion=v$(KUBE_VERSION) \
	-X k8s.io/component-base/version.gitMajor=$(word 1,$(subst ., ,$(KUBE_VERSION))) -X k8s.io/component-base/version.gitMinor=$(word 2,$(subst ., ,$(KUBE_VERSION)))
KUBE_COMMANDS := $(addprefix $(KUBE)/,kube-apiserver kube-controller-manager kubectl kubelet)

kube-binaries: $(KUBE)/etcd $(KUBE_COMMANDS) $(KUBE)/helm

$(KUBE)/etcd: test/k8s/go.mod test/k8s/go.sum
	cd test/k8s && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o $@ go.etcd.io/etcd/server/v3

$(KUBE_COMMANDS): $(KUBE)/%: test/k8s/go.mod test/k8s/go.sum
	cd test/k8s && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(KUBE_LDFLAGS)' -o $@ k8s.io/kubernetes/cmd/$*

$(KUBE)/helm: test/helm/go.mod test/helm/go.sum
	cd test/helm && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o $@ helm.sh/helm/v3/cmd/helm

test-kubernetes: build samples kube-binaries
	cd test && TABARD_BIN=$(CURDIR)/bin/tabard LISTER_BIN=$(CURDIR)/bin/resource-lister KUBE_BIN=$(KUBE) \
		$(GO) test -count=1 -timeout 20m $(ARGS) ./kubetest ./kubenode ./kubernetes

bench:
	$(GO) run ./bench $(ARGS)

bench-hosts:
	$(GO) run ./bench/hosts $(ARGS)

bench-search:
	$(GO) run ./bench/search $(ARGS)

fuzz:
	scripts/fuzz.sh $(FUZZTIME)

clean:
	rm -rf bin .cache
