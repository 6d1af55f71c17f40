//go:build linux

package kubenode

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path"
	"regexp"
	"runtime"
	"slices"
	"strings"
)

// Image is a container image that a test makes of files of this machine.
type Image struct {
	Name       string            // as manifests name it, with its tag
	Files      map[string]string // path in the image to the file here that it is a copy of
	Links      map[string]string // path in the image to what a symbolic link there says
	Entrypoint []string
	User       string   // "65532:65532"; root when empty
	Env        []string // name=value
}

// load makes the image and gives it to containerd, in the form of `docker save`.
func (n *Node) load(image Image) error {
	layer, err := image.layer()
	if err != nil {
		return err
	}
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": map[string]any{"Entrypoint": image.Entrypoint, "User": image.User, "Env": image.Env},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + digest(layer)}},
	})
	if err != nil {
		return err
	}
	manifest, err := json.Marshal([]map[string]any{{
		"Config": digest(config) + ".json", "RepoTags": []string{image.Name}, "Layers": []string{"layer.tar"},
	}})
	if err != nil {
		return err
	}
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for _, f := range []struct {
		name string
		data []byte
	}{{digest(config) + ".json", config}, {"layer.tar", layer}, {"manifest.json", manifest}} {
		if err := writeFile(w, f.name, 0o644, f.data); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	return n.ctr(&archive, "images", "import", "-")
}

func (i Image) layer() ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, dir := range i.folders() {
		mode := int64(0o755)
		if dir == "tmp" {
			mode = 0o1777
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: mode}); err != nil {
			return nil, err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(i.Files)) {
		data, err := os.ReadFile(i.Files[name])
		if err != nil {
			return nil, err
		}
		if err := writeFile(w, strings.TrimPrefix(name, "/"), 0o755, data); err != nil {
			return nil, err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(i.Links)) {
		h := &tar.Header{Typeflag: tar.TypeSymlink, Name: strings.TrimPrefix(name, "/"), Linkname: i.Links[name]}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// folders returns the folders of all files, each after the one that it is in.
func (i Image) folders() []string {
	all := map[string]bool{"tmp": true}
	for _, names := range []map[string]string{i.Files, i.Links} {
		for name := range names {
			for dir := path.Dir(strings.TrimPrefix(name, "/")); dir != "."; dir = path.Dir(dir) {
				all[dir] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(all))
}

func writeFile(w *tar.Writer, name string, mode int64, data []byte) error {
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(data))}); err != nil {
		return err
	}
	_, err := w.Write(data)
	return err
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// Shell is an image with busybox as its shell and this machine's curl with the
// libraries that it needs.
func Shell(name string) (Image, error) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		return Image{}, err
	}
	out, err := exec.Command("ldd", curl).Output()
	if err != nil {
		return Image{}, fmt.Errorf("find the libraries of curl: %w", err)
	}
	i := Image{
		Name:  name,
		Files: map[string]string{"/bin/busybox": mustFind("busybox"), "/usr/bin/curl": curl},
		Links: map[string]string{},
		Env:   []string{"PATH=/usr/bin:/bin"},
		User:  "65532:65532",
	}
	for _, m := range regexp.MustCompile(`(?m)(/\S+) \(0x`).FindAllStringSubmatch(string(out), -1) {
		i.Files[m[1]] = m[1]
	}
	for _, applet := range []string{"sh", "cat", "sed", "grep", "tr", "head", "sleep", "ls", "id", "cut", "base64"} {
		i.Links["/bin/"+applet] = "busybox"
	}
	return i, nil
}
