package resourcecontroller

import (
	"strings"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
)

// change registers a route whose events bear the name of the service that the
// instance or key belongs to, such as kms.instance.create
// (reference/access-and-audit.md section 6.2). Where nothing was found they
// bear this service's.
func change[B, T any](r *routes, pattern, action, what string,
	load func(*api.Call, *B) (T, api.Target, error), do func(*api.Call, *directory.Tx, *B, T) (api.Reply, api.Target, error),
) {
	api.Change(r.Family, pattern, action, service+"."+what,
		func(c *api.Call, b *B) (T, api.Target, error) {
			obj, target, err := load(c, b)
			return obj, eventful(target, what), err
		},
		func(c *api.Call, tx *directory.Tx, b *B, obj T) (api.Reply, api.Target, error) {
			reply, target, err := do(c, tx, b, obj)
			return reply, eventful(target, what), err
		})
}

// eventful names the event after the service in the target's type URI, unless
// the target has named it already.
func eventful(t api.Target, what string) api.Target {
	if service, _, ok := strings.Cut(t.TypeURI, "/"); ok && t.Event == "" {
		t.Event = service + "." + what
	}
	return t
}
