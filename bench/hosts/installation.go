//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
)

// installation is the server as its administrator uses it.
type installation struct {
	url     string
	account string
	token   string

	image   string
	profile string // id of a trusted profile that every instance may put on
	subnets []string
	vpcs    []string
	ids     []string // of the instances
}

const (
	zone       = "us-south-1"
	vpcVersion = "?version=2025-08-26&generation=2"
	atOnce     = 8 // calls of the administrator's
)

// login reads the first account's key and exchanges it for a token, which is
// good for an hour.
func login(ctx context.Context, base, data string) (*installation, error) {
	b, err := os.ReadFile(filepath.Join(data, "owner.json"))
	if err != nil {
		return nil, err
	}
	var owner struct {
		AccountID string `json:"account_id"`
		APIKey    string `json:"apikey"`
	}
	if err := json.Unmarshal(b, &owner); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	form := url.Values{"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}, "apikey": {owner.APIKey}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, base+"/identity/token", strings.NewReader(form.Encode()))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	var answer struct {
		AccessToken string `json:"access_token"`
	}
	if err := errors.Join(json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&answer), resp.Body.Close()); err != nil {
		return nil, err
	}
	return &installation{url: base, account: owner.AccountID, token: answer.AccessToken}, nil
}

func (x *installation) call(ctx context.Context, method, path string, body, into any) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return do(ctx, method, x.url+path, x.token, body, into)
}

type object = map[string]any

func byID(id string) object { return object{"id": id} }

type made struct {
	ID string `json:"id"`
}

// prepare makes what instances need: a trusted profile whose rule covers all of
// them, an image.
func (x *installation) prepare(ctx context.Context) error {
	var m made
	if err := x.call(ctx, http.MethodPost, "/v1/profiles", object{"name": "bench", "account_id": x.account}, &m); err != nil {
		return err
	}
	x.profile = m.ID
	rule := object{
		"type": "Profile-CR", "name": "all", "cr_type": "VSI",
		"conditions": []object{{"claim": "zone", "operator": "EQUALS", "value": `"` + zone + `"`}},
	}
	if err := x.call(ctx, http.MethodPost, "/v1/profiles/"+x.profile+"/rules", rule, nil); err != nil {
		return err
	}
	var images struct {
		Images []made `json:"images"`
	}
	if err := x.call(ctx, http.MethodGet, "/v1/images"+vpcVersion, nil, &images); err != nil {
		return err
	}
	if len(images.Images) == 0 {
		return errors.New("the server has no image")
	}
	x.image = images.Images[0].ID
	return nil
}

// joinToken lets a host join.
func (x *installation) joinToken(ctx context.Context) (string, error) {
	var t struct {
		Token string `json:"join_token"`
	}
	err := x.call(ctx, http.MethodPost, "/v1/hosts/join_tokens", object{"name": "bench"}, &t)
	return t.Token, err
}

// grow makes instances until there are n: so many in a VPC, whose one subnet
// has room for them.
func (x *installation) grow(ctx context.Context, n, perVPC int) error {
	for len(x.subnets)*perVPC < n {
		if err := x.network(ctx, perVPC); err != nil {
			return err
		}
	}
	from := len(x.ids)
	x.ids = append(x.ids, make([]string, n-from)...)
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(atOnce)
	for i := from; i < n; i++ {
		group.Go(func() error {
			var m made
			err := x.call(ctx, http.MethodPost, "/v1/instances"+vpcVersion, object{
				"name": fmt.Sprintf("i-%05d", i), "zone": object{"name": zone}, "image": byID(x.image),
				"vpc": byID(x.vpcs[i/perVPC]), "primary_network_interface": object{"subnet": byID(x.subnets[i/perVPC])},
				"metadata_service": object{"enabled": true},
			}, &m)
			x.ids[i] = m.ID
			return err
		})
	}
	return group.Wait()
}

// spare are the addresses of a subnet that are not for instances, and then some.
const spare = 8

// network makes another VPC and its subnet.
func (x *installation) network(ctx context.Context, perVPC int) error {
	name := fmt.Sprintf("bench-%d", len(x.vpcs))
	var v, s made
	if err := x.call(ctx, http.MethodPost, "/v1/vpcs"+vpcVersion, object{"name": name}, &v); err != nil {
		return err
	}
	err := x.call(ctx, http.MethodPost, "/v1/subnets"+vpcVersion, object{
		"name": name, "vpc": byID(v.ID), "zone": object{"name": zone}, "total_ipv4_address_count": 1 << bits.Len(uint(perVPC+spare)),
	}, &s)
	x.vpcs, x.subnets = append(x.vpcs, v.ID), append(x.subnets, s.ID)
	return err
}

// statuses counts the instances in each status.
func (x *installation) statuses(ctx context.Context) (map[string]int, error) {
	out := map[string]int{}
	for path := "/v1/instances" + vpcVersion + "&limit=100"; path != ""; {
		var page struct {
			Instances []struct {
				Status string `json:"status"`
			} `json:"instances"`
			Next struct {
				Href string `json:"href"`
			} `json:"next"`
		}
		if err := x.call(ctx, http.MethodGet, path, nil, &page); err != nil {
			return nil, err
		}
		for _, i := range page.Instances {
			out[i.Status]++
		}
		path = ""
		if next, err := url.Parse(page.Next.Href); err == nil && next.RawQuery != "" {
			path = "/v1/instances" + vpcVersion + "&limit=100&start=" + url.QueryEscape(next.Query().Get("start"))
		}
	}
	return out, nil
}

// remove deletes all instances.
func (x *installation) remove(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(atOnce)
	for _, id := range x.ids {
		group.Go(func() error { return x.call(ctx, http.MethodDelete, "/v1/instances/"+id+vpcVersion, nil, nil) })
	}
	return group.Wait()
}
