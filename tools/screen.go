package tools

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/charmbracelet/x/ansi"
	"github.com/charmbracelet/x/vt"

	"soulbox.dev/soulbox/agent"
)

// Bounds of rendering, since a guest decides how much work it is.
const (
	maxScreens  = 8       // small terminals that stay rendered; others are rendered again from their output
	maxCells    = 50_000  // cells of a small terminal: both its screens and the lines above
	cellSize    = 128     // approximate memory of a cell, in bytes
	maxReplay   = 1 << 20 // bytes of output that are rendered at most: earlier output has long scrolled away
	renderPart  = 512     // bytes between two checks of the time
	renderTime  = 2 * time.Second
	scrollLines = 200 // lines above the screen
	maxParams   = 64  // bytes of parameters of one sequence
	maxDigits   = 3   // digits of one parameter: nothing on a screen is further away
	maxCell     = 32  // bytes of one character including those combined with it
)

// screens are the rendered terminals, the one used last at the end.
type screens struct {
	mu  sync.Mutex
	all []*screen
}

// screen is the rendered output of a process, up to an offset. A full-screen program gets an emulator of its own, because the library's
// second screen would keep 10,000 lines that are never shown.
type screen struct {
	key string // sandbox and process

	mu     sync.Mutex
	main   *vt.Emulator
	alt    *vt.Emulator // nil while no full-screen program runs
	size   agent.Terminal
	offset int64
	title  string
	feed   sequence
	// appCursor and brackets are the keyboard modes that the program has set.
	appCursor, brackets bool
	noWrap              bool // the program has turned off wrapping at the margin
}

// sizeOf is the size at which a process's terminal is rendered, and how many cells that takes at most.
func sizeOf(p agent.Process) (size agent.Terminal, cells int) {
	size = agent.Terminal{Rows: 24, Cols: 80}
	if p.Terminal != nil {
		size = agent.Terminal{Rows: min(max(p.Terminal.Rows, 1), 300), Cols: min(max(p.Terminal.Cols, 1), 500)}
	}
	return size, (2*size.Rows + scrollLines) * size.Cols
}

// screen brings the screen of a process up to date and passes it to do, on the account of the call's owner.
func (s *Toolbox) screen(ctx context.Context, client *agent.Client, sandboxID string, p agent.Process, do func(*screen) error) error {
	_, cells := sizeOf(p)
	done, err := s.heavy(ctx, maxReplay+int64(cells)*cellSize)
	if err != nil {
		return err
	}
	defer done()
	return s.screens.with(ctx, client, sandboxID, p, do)
}

// with brings the screen of a process up to date and passes it to do.
func (s *screens) with(ctx context.Context, client *agent.Client, sandboxID string, p agent.Process, do func(*screen) error) error {
	key := sandboxID + "/" + p.ID
	s.mu.Lock()
	var sc *screen
	for i, old := range s.all {
		if old.key == key {
			sc, s.all = old, slices.Delete(s.all, i, i+1)
			break
		}
	}
	if sc == nil {
		sc = &screen{key: key}
	}
	if _, cells := sizeOf(p); p.Terminal != nil && cells <= maxCells {
		s.all = append(s.all, sc)
		if len(s.all) > maxScreens {
			s.all = slices.Delete(s.all, 0, 1) // nothing to close; its memory is freed
		}
	}
	s.mu.Unlock()
	sc.mu.Lock()
	defer sc.mu.Unlock()
	if err := sc.update(ctx, client, p); err != nil {
		return err
	}
	return do(sc)
}

// reset starts with an empty screen at an offset. sc.mu is held.
func (sc *screen) reset(size agent.Terminal, offset int64) {
	sc.size, sc.offset, sc.title, sc.appCursor, sc.brackets, sc.noWrap, sc.feed = size, offset, "", false, false, false, sequence{}
	sc.main, sc.alt = sc.emulator(scrollLines), nil
}

func (sc *screen) emulator(above int) *vt.Emulator {
	e := vt.NewEmulator(sc.size.Cols, sc.size.Rows)
	e.SetScrollbackSize(above)
	if answers, ok := e.InputPipe().(io.Closer); ok { // discards what a terminal would answer, so that no write waits for a reader
		_ = answers.Close()
	}
	mode := func(on bool) func(ansi.Mode) {
		return func(m ansi.Mode) {
			switch m {
			case ansi.ModeCursorKeys:
				sc.appCursor = on
			case ansi.ModeBracketedPaste:
				sc.brackets = on
			case ansi.ModeAutoWrap:
				sc.noWrap = !on
			}
		}
	}
	e.SetCallbacks(vt.Callbacks{EnableMode: mode(true), DisableMode: mode(false)})
	return e
}

// shown is the emulator of the screen that is shown.
func (sc *screen) shown() *vt.Emulator {
	if sc.alt != nil {
		return sc.alt
	}
	return sc.main
}

// write renders output.
func (sc *screen) write(p []byte) error {
	return sc.feed.each(p, sc.sink())
}

// sink renders parsed output on this screen.
func (sc *screen) sink() sink {
	return sink{flush: func(b []byte) error {
		if len(b) == 0 {
			return nil
		}
		_, err := sc.shown().Write(b)
		return err
	}, alternate: func(on bool) {
		switch {
		case on && sc.alt == nil:
			sc.alt = sc.emulator(1)
		case !on:
			sc.alt = nil
		}
	}, char: sc.char, title: func(t string) { sc.title = shorten(t, 200) }}
}

// errTooMuch is returned for output that takes too long to render.
var errTooMuch = badArgument("What the terminal shows takes too long to render. Read it with process_wait and raw.")

// update renders what the process has written since the last update.
func (sc *screen) update(ctx context.Context, client *agent.Client, p agent.Process) (err error) {
	defer func() {
		if r := recover(); r != nil { // a guest's bytes must break no more than their own screen
			sc.main = nil
			err = fmt.Errorf("render the terminal of %s: %v", p.ID, r)
		}
	}()
	size, _ := sizeOf(p)
	if sc.main == nil || p.Output-sc.offset > maxReplay || p.Output < sc.offset {
		sc.reset(size, max(0, p.Output-maxReplay))
	}
	if sc.size != size {
		sc.size = size
		sc.main.Resize(size.Cols, size.Rows)
		if sc.alt != nil {
			sc.alt.Resize(size.Cols, size.Rows)
		}
	}
	deadline, budget, again := time.Now().Add(renderTime), 2*maxReplay, true // the process may keep writing while we read
	err = client.Output(ctx, p.ID, sc.offset, false, func(f agent.OutputFrame) error {
		if budget -= max(1, len(f.Data)); budget < 0 {
			return errEnoughOutput
		}
		if f.Offset > sc.offset && len(f.Data) > 0 { // the bytes between are no longer kept
			if !again {
				return errEnoughOutput
			}
			again = false
			sc.reset(size, f.Offset)
		}
		for part := range slices.Chunk(f.Data, renderPart) {
			if err := sc.write(part); err != nil {
				return err
			}
			if time.Now().After(deadline) || ctx.Err() != nil {
				sc.main = nil
				return errTooMuch
			}
		}
		sc.offset = max(sc.offset, f.Offset+int64(len(f.Data)))
		return nil
	})
	if errors.Is(err, errEnoughOutput) {
		return nil
	}
	if err == nil && p.State == agent.StateExited {
		return sc.feed.end(sc.sink())
	}
	return err
}

var errEnoughOutput = errors.New("enough output")

// screenInfo describes a rendered screen besides its text.
type screenInfo struct {
	Rows      int    `json:"rows"`
	Cols      int    `json:"cols"`
	CursorRow int    `json:"cursor_row" jsonschema:"from 1"`
	CursorCol int    `json:"cursor_col" jsonschema:"from 1"`
	Title     string `json:"title,omitempty"`
	Alternate bool   `json:"alternate,omitempty" jsonschema:"a full-screen program has it"`
	Above     int    `json:"lines_above,omitempty" jsonschema:"that have scrolled away"`
}

// text renders the screen, one line per row, preceded by up to above lines that have scrolled away, in at most chars characters. sc.mu is
// held.
func (sc *screen) text(above, chars int) (string, *screenInfo) {
	e := sc.shown()
	at := e.CursorPosition()
	info := &screenInfo{Rows: sc.size.Rows, Cols: sc.size.Cols, CursorRow: at.Y + 1, CursorCol: at.X + 1, Title: render([]byte(sc.title)),
		Alternate: sc.alt != nil, Above: e.ScrollbackLen()}
	if info.Alternate {
		info.Above = 0 // the alternate screen has none
	}
	var lines []string
	for y := max(0, info.Above-above); y < info.Above; y++ {
		lines = append(lines, cells(sc.size.Cols, func(x int) (string, int) { return cellOf(e.ScrollbackCellAt(x, y)) }))
	}
	for y := range sc.size.Rows {
		lines = append(lines, cells(sc.size.Cols, func(x int) (string, int) { return cellOf(e.CellAt(x, y)) }))
	}
	return shorten(strings.TrimRight(strings.Join(lines, "\n"), "\n"), chars), info
}

// cells joins the cells of a line.
func cells(cols int, at func(x int) (content string, width int)) string {
	var b strings.Builder
	for x := 0; x < cols; {
		content, width := at(x)
		if content == "" {
			content, width = " ", 1
		}
		b.WriteString(renderRunes(string(agent.Whole([]byte(content[:min(len(content), maxCell)])))))
		x += max(1, width)
	}
	return strings.TrimRight(b.String(), " ")
}
