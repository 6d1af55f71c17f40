package server

import (
	"io"
	"net/http"
	"time"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/api/accessgroups"
	"tabard.dev/tabard/internal/api/accessuse"
	"tabard.dev/tabard/internal/api/accounts"
	"tabard.dev/tabard/internal/api/activityapi"
	"tabard.dev/tabard/internal/api/authzen"
	"tabard.dev/tabard/internal/api/catalogapi"
	"tabard.dev/tabard/internal/api/clusters"
	"tabard.dev/tabard/internal/api/hosts"
	"tabard.dev/tabard/internal/api/iamidentity"
	"tabard.dev/tabard/internal/api/iampolicy"
	"tabard.dev/tabard/internal/api/iamtoken"
	"tabard.dev/tabard/internal/api/resourcecontroller"
	"tabard.dev/tabard/internal/api/simulate"
	"tabard.dev/tabard/internal/api/vpcapi"
	"tabard.dev/tabard/internal/api/workloads"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/token"
)

type routesConfig struct {
	api         *api.Config
	grants      *grant.Service
	proofs      *attest.HostProofs
	sealer      *token.Sealer
	clusterKeys *attest.Keys
	workloads   *attest.Workloads
	metrics     *metrics
}

// routes registers every API family on one listener; they are told apart by
// path.
func (s *Server) routes(c routesConfig) *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusOK, "alive\n") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if s.draining.Load() {
			answer(w, http.StatusServiceUnavailable, "stopping\n")
			return
		}
		if s.host != nil && !s.instancesSeenTo() {
			answer(w, http.StatusServiceUnavailable, "starting instances\n")
			return
		}
		if state := s.watch.Status().State; !state.Takes() {
			// Still ready: what needs no event goes on, and another server on the
			// same disk could do no more.
			answer(w, http.StatusOK, "serving reads only; the store is "+string(state)+"\n")
			return
		}
		answer(w, http.StatusOK, "serving\n")
	})
	mux.Handle("GET /metrics", c.metrics.handler())

	iamtoken.Register(mux, iamtoken.Config{Grants: c.grants, Keys: s.keys, Issuer: s.cfg.Issuer, Now: s.cfg.Now, Log: s.cfg.Log})
	iamidentity.Register(mux, c.api, c.sealer)
	iampolicy.Register(mux, c.api)
	accessgroups.Register(mux, c.api)
	accessuse.Register(mux, c.api)
	authzen.Register(mux, c.api, c.grants)
	simulate.Register(mux, c.api, c.grants)
	resourcecontroller.Register(mux, c.api, c.sealer)
	clusters.Register(mux, c.api, clusters.Options{Keys: c.clusterKeys, Tokens: c.workloads, Reviewer: c.workloads.Reviewer, Sealer: c.sealer})
	workloads.Register(mux, c.api, workloads.Options{Keys: c.clusterKeys, Prover: c.workloads, Audience: s.cfg.Issuer})
	accounts.Register(mux, c.api, c.sealer, c.clusterKeys)
	catalogapi.Register(mux, c.api)
	activityapi.Register(mux, c.api, s.store, s.signer)
	activityapi.RegisterExports(mux, c.api, s.exports)
	activityapi.RegisterStream(mux, c.api, s.store, activityapi.StreamOptions{Stopping: s.stopping})
	activityapi.RegisterSpace(mux, c.api, activityapi.SpaceOptions{
		Disk: s.watch, Log: s.store, MaxDays: s.logKeeper.MaxDays, MaxBytes: s.logKeeper.MaxBytes,
	})
	activityapi.RegisterSettings(mux, c.api)
	vpcapi.Register(mux, c.api, vpcapi.Options{Place: s.scheduler.Choose, Images: s.images, Fits: s.scheduler.Fits, LocalAccess: s.localAccess})
	hosts.Register(mux, c.api, hosts.Options{
		Scheduler: s.scheduler, Proofs: c.proofs, Grants: c.grants, Sealer: c.sealer, Images: s.disks,
		KeyPrefix: attest.IdentityIssuer(s.cfg.Region) + "_", Stopping: s.stopping,
	})

	api.NotFoundRoute(mux, c.api)
	return mux
}

// instancePatience is how long the server waits for the instances of its own
// machine before it says that it is ready without them.
const instancePatience = 5 * time.Second

// instancesSeenTo reports whether the instances of the server's own machine run
// again, as far as they can, after a restart.
func (s *Server) instancesSeenTo() bool {
	select {
	case <-s.host.Settled():
		return true
	default:
		return time.Since(s.opened) > instancePatience
	}
}

func (s *Server) localAccess(id string) (any, bool) {
	if s.host == nil {
		return nil, false
	}
	return s.host.Access(id)
}

func answer(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	// The client may be gone; there is nobody left to tell.
	_, _ = io.WriteString(w, text)
}
