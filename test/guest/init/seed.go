//go:build linux

package main

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v2"
)

// seed is what a NoCloud volume says, all of it optional but the instance id.
type seed struct {
	InstanceID string
	Hostname   string
	Keys       []string // lines of authorized_keys
	Network    network
	Trusted    []string // PEM certificates
	Files      []file
	Scripts    [][]byte // to be run once, in this order
	Ignored    []string // what was there and is not understood
}

// file is an entry of write_files.
type file struct {
	Path        string `yaml:"path"`
	Content     string `yaml:"content"`
	Encoding    string `yaml:"encoding"`
	Permissions string `yaml:"permissions"`
	Append      bool   `yaml:"append"`
}

// cloudConfig is a #cloud-config document. PyYAML, which cloud-init uses, and
// this parser both follow YAML 1.1.
type cloudConfig struct {
	Hostname string         `yaml:"hostname"`
	FQDN     string         `yaml:"fqdn"`
	Keys     []string       `yaml:"ssh_authorized_keys"`
	CACerts  trusted        `yaml:"ca_certs"`
	OldCerts trusted        `yaml:"ca-certs"` // the name until cloud-init 22
	Files    []file         `yaml:"write_files"`
	Commands []any          `yaml:"runcmd"`
	Others   map[string]any `yaml:",inline"`
}

type trusted struct {
	Trusted []string       `yaml:"trusted"`
	Others  map[string]any `yaml:",inline"`
}

// readSeed reads the files of a mounted NoCloud volume.
func readSeed(volume fs.FS) (seed, error) {
	var s seed
	meta, err := fs.ReadFile(volume, "meta-data")
	if err != nil {
		return s, err
	}
	if err := s.metadata(meta); err != nil {
		return s, fmt.Errorf("meta-data: %w", err)
	}
	// What the user says goes before what the vendor says, so it comes last.
	for _, part := range []struct {
		name string
		read func([]byte) error
	}{{"network-config", s.network}, {"vendor-data", s.userdata}, {"user-data", s.userdata}} {
		b, err := fs.ReadFile(volume, part.name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = part.read(b)
		}
		if err != nil {
			return s, fmt.Errorf("%s: %w", part.name, err)
		}
	}
	return s, nil
}

func (s *seed) metadata(b []byte) error {
	var m struct {
		InstanceID string `yaml:"instance-id"`
		Local      string `yaml:"local-hostname"`
		Hostname   string `yaml:"hostname"`
		Keys       any    `yaml:"public-keys"`
	}
	if err := yaml.Unmarshal(b, &m); err != nil {
		return err
	}
	if m.InstanceID == "" {
		return errors.New("there is no instance-id")
	}
	s.InstanceID = m.InstanceID
	s.Hostname = cmp.Or(m.Local, m.Hostname)
	s.Keys = append(s.Keys, publicKeys(m.Keys)...)
	return nil
}

// publicKeys accepts what cloud-init does: text, a list, or a map of either.
func publicKeys(v any) []string {
	var keys []string
	switch v := v.(type) {
	case string:
		keys = strings.Split(strings.TrimSpace(v), "\n")
	case []any:
		for _, k := range v {
			keys = append(keys, publicKeys(k)...)
		}
	case map[any]any:
		for _, k := range v {
			keys = append(keys, publicKeys(k)...)
		}
		slices.Sort(keys)
	}
	return keys
}

func (s *seed) network(b []byte) error {
	n, err := parseNetwork(b)
	s.Network = n
	return err
}

// userdata reads user data or vendor data of the forms that are told apart by
// their first line.
func (s *seed) userdata(b []byte) error {
	switch {
	case len(bytes.TrimSpace(b)) == 0:
		return nil
	case bytes.HasPrefix(b, []byte("#!")):
		s.Scripts = append(s.Scripts, b)
		return nil
	case bytes.HasPrefix(b, []byte("#cloud-config")):
		return s.cloudConfig(b)
	default:
		first, _, _ := bytes.Cut(b, []byte("\n"))
		s.Ignored = append(s.Ignored, fmt.Sprintf("data that begin with %.40q", first))
		return nil
	}
}

func (s *seed) cloudConfig(b []byte) error {
	var c cloudConfig
	if err := yaml.Unmarshal(b, &c); err != nil {
		return err
	}
	name, _, _ := strings.Cut(c.FQDN, ".")
	s.Hostname = cmp.Or(c.Hostname, name, s.Hostname)
	for _, k := range c.Keys {
		if !slices.Contains(s.Keys, k) {
			s.Keys = append(s.Keys, k)
		}
	}
	s.Trusted = append(append(s.Trusted, c.CACerts.Trusted...), c.OldCerts.Trusted...)
	s.Files = append(s.Files, c.Files...)
	if len(c.Commands) > 0 {
		script, err := commands(c.Commands)
		if err != nil {
			return err
		}
		s.Scripts = append(s.Scripts, script)
	}
	for _, others := range []map[string]any{c.Others, c.CACerts.Others, c.OldCerts.Others} {
		for name := range others {
			s.Ignored = append(s.Ignored, name)
		}
	}
	slices.Sort(s.Ignored)
	return nil
}

// commands makes a script of runcmd: text is a line for the shell, a list the
// words of a command.
func commands(list []any) ([]byte, error) {
	script := []byte("#!/bin/sh\n")
	for _, c := range list {
		switch c := c.(type) {
		case string:
			script = append(script, c...)
		case []any:
			for i, word := range c {
				if i > 0 {
					script = append(script, ' ')
				}
				script = append(script, "'"+strings.ReplaceAll(fmt.Sprint(word), "'", `'\''`)+"'"...)
			}
		default:
			return nil, fmt.Errorf("runcmd: %v is neither text nor a list", c)
		}
		script = append(script, '\n')
	}
	return script, nil
}

// write puts the file below a root folder.
func (f file) write(root string) error {
	content := []byte(f.Content)
	switch f.Encoding {
	case "", "text/plain":
	case "b64", "base64":
		var err error
		if content, err = base64.StdEncoding.DecodeString(f.Content); err != nil {
			return err
		}
	default:
		return fmt.Errorf("encoding %q is not understood", f.Encoding)
	}
	mode := uint64(0o644)
	if f.Permissions != "" {
		var err error
		if mode, err = strconv.ParseUint(f.Permissions, 8, 12); err != nil {
			return err
		}
	}
	path := root + f.Path
	if err := os.MkdirAll(path[:strings.LastIndexByte(path, '/')+1], 0o755); err != nil {
		return err
	}
	flags := os.O_CREATE | os.O_WRONLY | os.O_TRUNC
	if f.Append {
		flags = os.O_CREATE | os.O_WRONLY | os.O_APPEND
	}
	w, err := os.OpenFile(path, flags, fs.FileMode(mode))
	if err != nil {
		return err
	}
	_, err = w.Write(content)
	return errors.Join(err, w.Chmod(fs.FileMode(mode)), w.Close())
}
