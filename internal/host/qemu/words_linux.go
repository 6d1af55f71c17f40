package qemu

import (
	"bufio"
	"errors"
	"log/slog"
	"os"
	"strings"
	"sync"
)

// maxWords is how many lines of one QEMU go to the log: a guest may know how to
// make it complain without end.
const maxWords = 50

// words are what QEMU writes to its standard error.
type words struct {
	pipe    *os.File
	last    tail
	reading sync.WaitGroup
}

func listenTo(pipe *os.File, log *slog.Logger) *words {
	w := &words{pipe: pipe}
	w.reading.Go(func() {
		r := bufio.NewReaderSize(pipe, tailBytes)
		for n := 0; ; n++ {
			// A longer line comes in parts.
			line, err := r.ReadSlice('\n')
			if len(line) > 0 {
				_, _ = w.last.Write(line)
				if n < maxWords {
					log.Warn("QEMU says", "line", strings.ToValidUTF8(strings.TrimSpace(string(line)), "?"))
				}
			}
			if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
				return
			}
		}
	})
	return w
}

// close stops listening. QEMU, which may run on, then writes to nobody.
func (w *words) close() {
	w.pipe.Close()
	w.reading.Wait()
}
