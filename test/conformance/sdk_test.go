package conformance

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	"tabard.dev/tabard/test/harness"
)

// The module whose suites are run. Its sum is pinned here because it is not in
// go.sum: what the suites depend on stays out of our module graph.
const (
	sdkModule  = "github.com/IBM/platform-services-go-sdk"
	sdkVersion = "v0.97.2"
	sdkSum     = "h1:CdiLSFB0+oaAsucgVnpwn31YTAr47qFROPes4zXJalk="
)

// sdkDir is the module's folder in the module cache, which is read-only.
var sdkDir = sync.OnceValues(func() (string, error) {
	// Outside of any module, whose go.mod and go.sum would play a part.
	out, err := goCommand(os.TempDir(), "mod", "download", "-json", sdkModule+"@"+sdkVersion)
	if err != nil {
		return "", fmt.Errorf("download %s@%s: %w\n%s", sdkModule, sdkVersion, err, out) // its Error is in out
	}
	var info struct{ Dir, Sum string }
	if err := json.Unmarshal(out, &info); err != nil {
		return "", fmt.Errorf("download %s@%s: %w", sdkModule, sdkVersion, err)
	}
	if info.Sum != sdkSum {
		return "", fmt.Errorf("%s@%s has the sum %s instead of %s", sdkModule, sdkVersion, info.Sum, sdkSum)
	}
	return info.Dir, nil
})

// compiling is held by the suite that compiles: they share most of their
// packages, and the second finds them in the build cache.
var compiling sync.Mutex

// compile returns the test binary of a suite, made once per version of the
// module and of Go.
func compile(pkg string) (string, error) {
	cache := filepath.Join(harness.Root(), ".cache", "conformance", sdkVersion+"-"+runtime.Version())
	bin := filepath.Join(cache, pkg+".test")
	compiling.Lock()
	defer compiling.Unlock()
	if _, err := os.Stat(bin); err == nil {
		return bin, nil
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	dir, err := sdkDir()
	if err != nil {
		return "", err
	}
	src, err := os.MkdirTemp("", "tabard-suite-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(src)
	for _, name := range []string{"go.mod", "go.sum", "common", pkg} {
		if err := copySources(filepath.Join(src, name), filepath.Join(dir, name)); err != nil {
			return "", fmt.Errorf("copy the suite %s: %w", pkg, err)
		}
	}
	// A binary that another run makes at the same time must not be seen half
	// written.
	fresh := filepath.Join(cache, fmt.Sprintf(".%s.%d", pkg, os.Getpid()))
	defer os.Remove(fresh)
	if _, err := goCommand(src, "test", "-c", "-trimpath", "-tags=integration", "-o", fresh, "./"+pkg); err != nil {
		return "", fmt.Errorf("compile the suite %s: %w", pkg, err)
	}
	if err := os.Rename(fresh, bin); err != nil {
		return "", err
	}
	return bin, nil
}

// copySources copies a file, or a folder without the tests that are not part
// of its integration suite.
func copySources(dst, src string) error {
	return filepath.WalkDir(src, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(src, path)
		if err != nil {
			return err
		}
		to := filepath.Join(dst, rel)
		if d.IsDir() {
			return os.MkdirAll(to, 0o755)
		}
		name := d.Name()
		if strings.HasSuffix(name, "_test.go") && !strings.HasSuffix(name, "_integration_test.go") && !strings.HasSuffix(name, "_suite_test.go") {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(to, b, 0o644)
	})
}

// goCommand runs the go command without the settings of whoever started the
// tests that would put the suites on other versions than their go.mod's.
func goCommand(dir string, args ...string) ([]byte, error) {
	cmd := exec.Command("go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=")
	var out, log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &log
	if err := cmd.Run(); err != nil {
		return out.Bytes(), fmt.Errorf("go %s: %w\n%s", args[0], err, log.Bytes())
	}
	return out.Bytes(), nil
}
