package vpcapi

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/store/blob"
	"tabard.dev/tabard/internal/vpc"
)

// Bounds on image files and on fetching them. They are our choice.
const (
	DefaultMaxImage     = 32 << 30  // bytes
	DefaultAccountBytes = 100 << 30 // of all image files of an account

	leastReserve = 1 << 30  // bytes
	reservePart  = 20       // of the file system: a twentieth
	roomEvery    = 64 << 20 // bytes written between two looks at the room that is left

	maxFetches     = 4 // at a time, each of another account
	maxRedirects   = 5
	fetchDial      = 10 * time.Second
	fetchPause     = 60 * time.Second // in which nothing comes
	fetchTime      = 2 * time.Hour    // for one file
	imageSweep     = 30 * time.Second // between looks without having been told
	maxImageReason = 300              // characters
)

// insufficientStorage is the code of the fault of a full disk.
const insufficientStorage = "insufficient_storage"

// ImagesConfig are the collaborators of [Images].
type ImagesConfig struct {
	Directory *directory.Directory
	Blobs     *blob.Store
	Log       *slog.Logger

	// MaxBytes bounds the file of one image; 0 means DefaultMaxImage.
	MaxBytes int64

	// AccountBytes bounds the files of all images of an account together, those
	// that are still coming included; 0 means DefaultAccountBytes.
	AccountBytes int64

	// Reserve is how many bytes of the file system that Blobs is on images leave
	// free for what else is on it, the IAM server's own records first; 0 means a
	// twentieth of it, at least 1 GiB.
	Reserve int64

	// Now tells how fast a fetched file comes; nil means time.Now.
	Now func() time.Time

	// OperatorAccount may have images fetched from the operator's own networks
	// and from this machine. What other accounts name must be on the internet:
	// whoever can boot a file can read it.
	OperatorAccount string
}

// Images keeps the files of registered images: it takes uploads, fetches what is
// at URLs, and removes the files of deleted images. Run must be running for the
// last two.
type Images struct {
	cfg ImagesConfig

	mu       sync.Mutex
	arriving map[string]*arrival // by image
	written  int64               // bytes since the last look at the room that is left
}

// arrival is a file that is coming.
type arrival struct {
	image *vpc.Image
	bytes int64
}

// NewImages returns the keeper of image files.
func NewImages(cfg ImagesConfig) *Images {
	cfg.MaxBytes = cmp.Or(cfg.MaxBytes, DefaultMaxImage)
	cfg.AccountBytes = cmp.Or(cfg.AccountBytes, DefaultAccountBytes)
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Images{cfg: cfg, arriving: map[string]*arrival{}}
}

func (m *Images) maxBytes() int64 {
	if m == nil {
		return 0
	}
	return m.cfg.MaxBytes
}

func tooLarge(limit int64) error {
	return fault.New(fault.TooLarge, "request_too_large", "The file is larger than %d bytes, the most an image may have.", limit)
}

// imageFile is a whole file that belongs to no image yet. Closing drops one that
// was not taken.
type imageFile struct {
	*blob.Writer
	format string
	disk   int64
	leave  func()
}

// Close drops the file unless it was taken.
func (f *imageFile) Close() error {
	defer f.leave()
	return f.Abort()
}

// arrive makes room for the file of an image, one at a time, of which bytes are
// known to come; 0 means that their number is not known.
func (m *Images) arrive(i *vpc.Image, bytes int64) (*arrival, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.arriving[i.ID] != nil {
		return nil, invalidState("The file of the image %s is coming already; wait for it, or delete the image.", i.ID)
	}
	a := &arrival{image: i}
	if err := m.quota(a, bytes); err != nil {
		return nil, err
	}
	if err := m.room(bytes); err != nil {
		return nil, err
	}
	m.arriving[i.ID] = a
	return a, nil
}

// leave ends an arrival: its bytes are the image's, or gone.
func (m *Images) leave(a *arrival) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.arriving[a.image.ID] == a {
		delete(m.arriving, a.image.ID)
	}
}

// grow admits n more bytes of a file.
func (m *Images) grow(a *arrival, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.quota(a, n); err != nil {
		return err
	}
	a.bytes += n
	if m.written += n; m.written < roomEvery {
		return nil
	}
	m.written = 0
	return m.room(n)
}

// quota refuses n more bytes of an account that has no room for them. A file
// that is being taken counts twice for that moment. The caller holds the lock.
func (m *Images) quota(a *arrival, n int64) error {
	sum := n
	for _, i := range m.cfg.Directory.ImagesByAccount.Get(a.image.AccountID) {
		sum += i.Bytes
	}
	for _, other := range m.arriving {
		if other.image.AccountID == a.image.AccountID {
			sum += other.bytes
		}
	}
	if sum > m.cfg.AccountBytes {
		return fault.New(fault.Invalid, "over_quota", "The image files of the account can have %d bytes together, and with this one they have more; delete other images first.", m.cfg.AccountBytes)
	}
	return nil
}

// room refuses n more bytes when they would leave less than the reserve.
func (m *Images) room(n int64) error {
	free, total, err := m.cfg.Blobs.Space()
	switch {
	case errors.Is(err, errors.ErrUnsupported):
		return nil // a full disk is seen when it is full
	case err != nil:
		return fault.Of(err)
	}
	if reserve := cmp.Or(m.cfg.Reserve, max(leastReserve, total/reservePart)); free-n < reserve {
		return fault.New(fault.Unavailable, insufficientStorage, "The server has no room for the file.").
			Because(fmt.Errorf("%d bytes are free, of which %d are kept for other things", free, reserve))
	}
	return nil
}

// admitted writes what of a file is admitted.
type admitted struct {
	w io.Writer
	m *Images
	a *arrival
}

func (x *admitted) Write(p []byte) (int, error) {
	if err := x.m.grow(x.a, int64(len(p))); err != nil {
		return 0, err
	}
	return x.w.Write(p)
}

// failing remembers why a write failed, to tell it from a failing read.
type failing struct {
	w   io.Writer
	err error
}

func (f *failing) Write(p []byte) (int, error) {
	n, err := f.w.Write(p)
	f.err = errors.Join(f.err, err)
	return n, err
}

// receive keeps a file of an image and checks it. bytes is how many are said to
// come; less than 1 means that nobody said. What is wrong with it is a fault.
func (m *Images) receive(i *vpc.Image, body io.Reader, bytes int64, expect string) (_ *imageFile, err error) {
	if m == nil {
		return nil, fault.New(fault.Invalid, "bad_request", "This server keeps no images.")
	}
	a, err := m.arrive(i, max(0, bytes))
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			m.leave(a)
		}
	}()
	w, err := m.cfg.Blobs.Create(i.ID)
	if err != nil {
		return nil, stored(err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.Abort())
		}
	}()
	sink := &failing{w: &admitted{w, m, a}}
	_, err = io.Copy(sink, io.LimitReader(body, m.cfg.MaxBytes+1))
	switch {
	case sink.err != nil:
		return nil, stored(sink.err)
	case fault.Is(err, fault.Invalid):
		return nil, err
	case err != nil:
		return nil, fault.New(fault.Invalid, "bad_request", "The file ended after %d bytes, before it was whole.", w.Size()).Because(err)
	case w.Size() > m.cfg.MaxBytes:
		return nil, tooLarge(m.cfg.MaxBytes)
	case expect != "" && w.SHA256() != expect:
		return nil, fault.New(fault.Invalid, "validation_failure", "The file has the SHA256 %s, not %s.", w.SHA256(), expect)
	}
	head, err := w.Head(vpc.DiskHeader)
	if err != nil {
		return nil, stored(err)
	}
	file := &imageFile{Writer: w, leave: func() { m.leave(a) }}
	if file.format, file.disk, err = vpc.InspectDisk(head, w.Size()); err != nil {
		return nil, fault.New(fault.Invalid, "validation_failure", "The file cannot be used: %v.", err)
	}
	// Here, so that nobody waits for the disk within the transaction.
	if err := w.Sync(); err != nil {
		return nil, stored(err)
	}
	return file, nil
}

// stored is the fault of a file that could not be kept.
func stored(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fault.New(fault.Unavailable, insufficientStorage, "The server has no room for the file.").Because(err)
	}
	return fault.Of(err)
}

// take makes a received file that of an image, and the image available.
func (m *Images) take(tx *directory.Tx, file *imageFile, i *vpc.Image) (*vpc.Image, error) {
	if err := file.Commit(); err != nil {
		return nil, stored(err)
	}
	changed := *i
	changed.Status, changed.Reason = vpc.Available, ""
	changed.Format, changed.Disk = file.format, file.disk
	changed.Bytes, changed.SHA256 = file.Size(), file.SHA256()
	m.cfg.Directory.Images.Put(tx, &changed)
	return &changed, nil
}

// Run fetches what is to be fetched and removes what is deleted, until the
// context ends. What it did not finish it begins again when it runs next.
func (m *Images) Run(ctx context.Context) {
	w := m.cfg.Directory.Watch(directory.KindImage)
	defer w.Stop()
	ticker := time.NewTicker(imageSweep)
	defer ticker.Stop()

	var jobs sync.WaitGroup
	defer jobs.Wait()
	done := make(chan *vpc.Image)
	fetching := map[string]fetch{} // by account
	defer func() {
		for _, f := range fetching {
			f.cancel()
		}
	}()
	line := turns{}
	for {
		for _, f := range fetching {
			if i, ok := m.cfg.Directory.Images.Get(f.image); !ok || i.Status != vpc.Pending {
				f.cancel()
			}
		}
		m.dropOrphans()
		for _, i := range line.order(m.waiting()) {
			if _, busy := fetching[i.AccountID]; busy || len(fetching) >= maxFetches {
				continue
			}
			fetchCtx, cancel := context.WithTimeout(ctx, fetchTime)
			fetching[i.AccountID] = fetch{i.ID, cancel}
			line.take(i.AccountID)
			jobs.Go(func() {
				m.fetch(fetchCtx, i)
				select {
				case done <- i:
				case <-ctx.Done():
				}
			})
		}
		select {
		case <-ctx.Done():
			return
		case i := <-done:
			fetching[i.AccountID].cancel()
			delete(fetching, i.AccountID)
		case <-w.C:
		case <-ticker.C:
		}
	}
}

// fetch is a fetch under way.
type fetch struct {
	image  string
	cancel context.CancelFunc
}

// waiting returns the images whose file is to be fetched.
func (m *Images) waiting() []*vpc.Image {
	return slices.DeleteFunc(m.cfg.Directory.Images.All(), func(i *vpc.Image) bool {
		return i.Status != vpc.Pending || i.Source == ""
	})
}

// turns says when the last turn of each account was. An account has one image
// fetched at a time, and when there is place for another fetch, it is the turn of
// the account that has waited longest since its last one: so nobody waits for all
// the images that somebody else has asked for.
type turns map[string]int

func (t turns) take(account string) {
	last := 0
	for _, n := range t {
		last = max(last, n)
	}
	t[account] = last + 1
}

// order sorts images by whose turn it is; those of one account, oldest first.
func (t turns) order(images []*vpc.Image) []*vpc.Image {
	slices.SortFunc(images, func(a, b *vpc.Image) int {
		return cmp.Or(cmp.Compare(t[a.AccountID], t[b.AccountID]), a.CreatedAt.Compare(b.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
	return images
}

// dropOrphans removes files without an image: those of deleted ones, and what a
// crash between the file and the image leaves. A file that is being taken has an
// image all the time.
func (m *Images) dropOrphans() {
	ids, err := m.cfg.Blobs.IDs()
	for _, id := range ids {
		if _, ok := m.cfg.Directory.Images.Get(id); !ok {
			err = errors.Join(err, m.cfg.Blobs.Delete(id))
		}
	}
	if err != nil {
		m.cfg.Log.Error("files without an image stay; will try again", "error", err)
	}
}

// change changes an image unless its status has changed in the meantime.
func (m *Images) change(ctx context.Context, seen *vpc.Image, f func(*directory.Tx, *vpc.Image) error) error {
	err := m.cfg.Directory.Update(ctx, "", func(tx *directory.Tx) error {
		now, ok := m.cfg.Directory.Images.Get(seen.ID)
		if !ok || now.Status != seen.Status {
			return fault.New(fault.Stale, "conflict", "The image was changed in the meantime.")
		}
		return f(tx, now)
	})
	if fault.Is(err, fault.Stale) {
		return nil
	}
	return err
}

// fetch fetches the file of an image, which becomes available or failed. When
// the context ends first it stays as it is.
func (m *Images) fetch(ctx context.Context, i *vpc.Image) {
	file, err := m.download(ctx, i)
	if errors.Is(context.Cause(ctx), context.Canceled) {
		// The server stops, or the image was deleted.
		if file != nil {
			err = errors.Join(err, file.Close())
		}
		m.cfg.Log.Info("fetching an image ended early", "image", i.ID, "error", err)
		return
	}
	if err == nil {
		err = m.change(ctx, i, func(tx *directory.Tx, now *vpc.Image) error {
			_, err := m.take(tx, file, now)
			return err
		})
		err = errors.Join(err, file.Close())
	}
	if err == nil {
		return
	}
	m.cfg.Log.Warn("an image could not be fetched", "image", i.ID, "url", publicPart(i.Source), "error", err)
	reason := m.reason(i, err)
	// The deadline of the fetch may be what ended it.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), fetchPause)
	defer cancel()
	if err := m.change(ctx, i, func(tx *directory.Tx, now *vpc.Image) error {
		failed := *now
		failed.Status, failed.Reason = vpc.Failed, reason
		m.cfg.Directory.Images.Put(tx, &failed)
		return nil
	}); err != nil {
		m.cfg.Log.Error("a failed image stays pending", "image", i.ID, "error", err)
	}
}

// told is an error that the image's account is told.
type told struct{ error }

// reason is what an account is told of a failed fetch. What the network around
// the server answers is for the operator's account alone.
func (m *Images) reason(i *vpc.Image, err error) string {
	var t told
	var f *fault.Error
	text := "The file could not be fetched."
	switch {
	case errors.As(err, &f) && f.Kind != fault.Internal:
		text = f.Message
	case i.AccountID == m.cfg.OperatorAccount:
		text = "The file could not be fetched: " + err.Error() + "."
	case errors.As(err, &t):
		text = "The file could not be fetched: " + t.Error() + "."
	}
	if runes := []rune(text); len(runes) > maxImageReason {
		text = string(runes[:maxImageReason]) + "…"
	}
	return text
}

// validSource reports why a URL cannot be that of an image. Without its checksum
// a file is only believed over TLS, except from this machine.
func validSource(raw string, checked bool) error {
	u, err := url.Parse(raw)
	switch {
	case err != nil || u.Host == "" || u.User != nil || u.Fragment != "" || len(raw) > 2048:
		return errors.New("it must be the http or https URL of the file")
	case u.Scheme == "https":
		return nil
	case u.Scheme != "http":
		return fmt.Errorf("a file cannot be fetched by %q; give an https URL, or upload the file", u.Scheme)
	}
	ip, err := netip.ParseAddr(u.Hostname())
	if checked || u.Hostname() == "localhost" || err == nil && ip.IsLoopback() {
		return nil
	}
	return errors.New("over plain http the file's checksum is needed, in file.checksums.sha256")
}

// publicPart returns a URL without its query, which may hold a signature that is
// as good as a password.
func publicPart(raw string) string {
	u, err := url.Parse(raw)
	if err != nil {
		return ""
	}
	u.RawQuery = ""
	return u.String()
}

// download fetches the file, following redirects itself: whether an address may
// be asked is decided anew for each.
func (m *Images) download(ctx context.Context, i *vpc.Image) (*imageFile, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	target := i.Source
	for range maxRedirects + 1 {
		if err := validSource(target, i.Expect != ""); err != nil {
			return nil, told{err}
		}
		//nolint:bodyclose // closeAll closes it
		resp, closeAll, err := m.ask(ctx, target, i.AccountID == m.cfg.OperatorAccount)
		if err != nil {
			return nil, err
		}
		file, next, err := m.answer(resp, i, cancel)
		closeAll()
		if next == "" || err != nil {
			return file, err
		}
		target = next
	}
	return nil, told{fmt.Errorf("there are more than %d redirects", maxRedirects)}
}

func (m *Images) ask(ctx context.Context, target string, trusted bool) (*http.Response, func(), error) {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	transport.DisableCompression = true // the file as it is
	transport.ResponseHeaderTimeout = fetchPause
	if !proxied(target) {
		dialer := net.Dialer{Timeout: fetchDial, Control: func(_, address string, _ syscall.RawConn) error { return admissible(address, trusted) }}
		transport.DialContext = dialer.DialContext
	}
	client := &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return nil, nil, told{errors.New("its URL cannot be asked for")}
	}
	resp, err := client.Do(req)
	if err != nil {
		transport.CloseIdleConnections()
		var plain *url.Error
		if errors.As(err, &plain) { // without the URL, which may hold a signature
			err = plain.Err
		}
		return nil, nil, fmt.Errorf("asking %s: %w", publicPart(target), err)
	}
	return resp, func() {
		// What is left of the body is not wanted.
		_ = resp.Body.Close()
		transport.CloseIdleConnections()
	}, nil
}

// answer keeps the file that came, or returns where it is to be asked for.
func (m *Images) answer(resp *http.Response, i *vpc.Image, cancel context.CancelCauseFunc) (*imageFile, string, error) {
	switch {
	case resp.StatusCode >= 300 && resp.StatusCode < 400:
		next, err := resp.Location()
		if err != nil {
			return nil, "", told{fmt.Errorf("a redirect leads nowhere: %w", err)}
		}
		next.Fragment = ""
		return nil, next.String(), nil
	case resp.StatusCode != http.StatusOK:
		return nil, "", told{fmt.Errorf("HTTP status %s", resp.Status)}
	case resp.ContentLength > m.cfg.MaxBytes:
		return nil, "", tooLarge(m.cfg.MaxBytes)
	}
	body := &restless{r: resp.Body, timer: time.AfterFunc(fetchPause, func() { cancel(errStalled) }), now: m.cfg.Now}
	defer body.timer.Stop()
	file, err := m.receive(i, body, resp.ContentLength, i.Expect)
	return file, "", err
}

var errStalled = fmt.Errorf("nothing came for %s", fetchPause)

// restless ends a fetch during which nothing comes, or too little.
type restless struct {
	r     io.Reader
	timer *time.Timer
	now   func() time.Time
	pace  api.Pace
}

func (r *restless) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.timer.Reset(fetchPause)
	if slow := r.pace.Add(r.now(), n); slow != nil {
		return n, slow
	}
	return n, err
}

// proxied reports whether the operator has requests to a URL go through a proxy,
// which then decides where they may go.
func proxied(target string) bool {
	u, err := url.Parse(target)
	if err != nil {
		return false
	}
	proxy, err := http.ProxyFromEnvironment(&http.Request{URL: u})
	return err == nil && proxy != nil
}

// carrierGrade are addresses that providers use inside their own networks (RFC
// 6598).
var carrierGrade = netip.MustParsePrefix("100.64.0.0/10")

// admissible refuses addresses that nobody may have the server ask: link-local
// ones, where clouds keep what their machines know; and those that only the
// operator may: this machine and the networks around it.
func admissible(address string, trusted bool) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("address %q: %w", address, err)
	}
	ip := ap.Addr().Unmap()
	switch {
	case ip.IsLinkLocalUnicast(), ip.IsMulticast(), ip.IsUnspecified():
		return fmt.Errorf("the address %s is not one of a file", ip)
	case trusted:
		return nil
	case ip.IsLoopback(), ip.IsPrivate(), carrierGrade.Contains(ip), !ip.IsGlobalUnicast(), embedded(ip):
		return told{errors.New("the server that it names is not on the internet; upload the file instead")}
	}
	return nil
}

// embedded reports whether an IPv6 address leads to an IPv4 address that is
// written inside it (RFC 6052, RFC 3056).
func embedded(ip netip.Addr) bool {
	for _, p := range []string{"64:ff9b::/96", "64:ff9b:1::/48", "2002::/16"} {
		if netip.MustParsePrefix(p).Contains(ip) {
			return true
		}
	}
	return ip.Is6() && strings.HasPrefix(ip.StringExpanded(), "0000:0000:0000:0000:0000:0000:")
}
