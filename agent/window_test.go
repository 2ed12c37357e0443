package agent

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"testing"
)

func dataFrame(id uint32, flags uint16, body int) []byte {
	f := make([]byte, frameHead+body)
	binary.BigEndian.PutUint16(f[2:], flags)
	binary.BigEndian.PutUint32(f[4:], id)
	binary.BigEndian.PutUint32(f[8:], uint32(body))
	return f
}

// TestWindow: the session of a guest that sends more on a narrow stream than it may ends; what was read is granted again; yamux's own
// window updates are left out; what arrives after the end is dropped, and nothing of the stream is kept.
func TestWindow(t *testing.T) {
	var told bytes.Buffer
	w := newWindows(&frameWriter{w: &told})
	w.byID[1] = &window{}
	read := func(frames ...[]byte) (int, error) {
		body, err := io.ReadAll(&guestFrames{r: bytes.NewReader(bytes.Join(frames, nil)), windows: w})
		return len(body), err
	}
	const part = 20 << 10
	if n, err := read(dataFrame(1, 0, part), dataFrame(3, 0, connWindow+1), dataFrame(1, 0, part)); err != nil || n != 3*frameHead+2*part+
		connWindow+1 {
		t.Fatal(n, err)
	}
	if err := w.took(1, 2*part); err != nil {
		t.Fatal(err)
	}
	grant := told.Bytes()
	if len(grant) != frameHead || grant[1] != frameWindow || binary.BigEndian.Uint32(grant[8:]) != 2*part {
		t.Fatal(grant)
	}
	told.Reset()
	own := make([]byte, frameHead) // a window update of yamux
	own[1], own[7], own[8] = frameWindow, 1, 1
	for _, flags := range []byte{0, flagFIN} {
		own[3] = flags
		if _, err := w.frames.Write(own); err != nil {
			t.Fatal(err)
		}
	}
	if fin := told.Bytes(); len(fin) != frameHead || fin[3] != flagFIN || binary.BigEndian.Uint32(fin[8:]) != 0 {
		t.Fatal(fin)
	}
	if _, err := read(dataFrame(1, 0, connWindow), dataFrame(1, 0, 1)); !errors.Is(err, errWindow) {
		t.Fatal(err)
	}
	w.drop(1)
	if n, err := read(dataFrame(1, 0, 100_000), dataFrame(1, flagFIN, 10)); err != nil || n != 2*frameHead {
		t.Fatal(n, err)
	}
	if len(w.byID) != 0 {
		t.Fatal(w.byID)
	}
}
