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

// Bounds of rendering, which is work that a guest can make us do.
const (
	maxScreens  = 8       // small terminals that are kept rendered; others are rendered anew from their output
	maxCells    = 50_000  // of a small one, of both its screens and above
	cellSize    = 128     // bytes of memory of a cell, about
	maxReplay   = 1 << 20 // bytes of output that are rendered at most: what was before has long scrolled away
	renderPart  = 512     // bytes between two looks at the time
	renderTime  = 2 * time.Second
	scrollLines = 200 // lines above the screen
	maxParams   = 64  // bytes of parameters of one sequence
	maxDigits   = 3   // of one parameter: nothing on a screen is further away
	maxCell     = 32  // bytes of one character with what is combined with it
)

// screens are the terminals that somebody has looked at, the latest last.
type screens struct {
	mu  sync.Mutex
	all []*screen
}

// screen is the rendered output of a process, up to an offset. A full-screen program has an emulator of its own: the library's second
// screen would keep 10,000 lines that nobody sees.
type screen struct {
	key string // sandbox and process

	mu     sync.Mutex
	main   *vt.Emulator
	alt    *vt.Emulator // nil while no full-screen program runs
	size   agent.Terminal
	offset int64
	title  string
	feed   sequence
	// appCursor and brackets are what the program has asked of the keyboard.
	appCursor, brackets bool
	noWrap              bool // the program has asked that lines are not continued at the margin
}

// sizeOf is the size at which a process' terminal is rendered, and how many cells that takes at most.
func sizeOf(p agent.Process) (size agent.Terminal, cells int) {
	size = agent.Terminal{Rows: 24, Cols: 80}
	if p.Terminal != nil {
		size = agent.Terminal{Rows: min(max(p.Terminal.Rows, 1), 300), Cols: min(max(p.Terminal.Cols, 1), 500)}
	}
	return size, (2*size.Rows + scrollLines) * size.Cols
}

// screen finds the screen of a process, up to date, and does something with it, in the account of whose call it is.
func (s *Service) screen(ctx context.Context, client *agent.Client, sandboxID string, p agent.Process, do func(*screen) error) error {
	_, cells := sizeOf(p)
	done, err := s.heavy(ctx, maxReplay+int64(cells)*cellSize)
	if err != nil {
		return err
	}
	defer done()
	return s.screens.with(ctx, client, sandboxID, p, do)
}

// with finds the screen of a process, up to date, and does something with it.
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
			s.all = slices.Delete(s.all, 0, 1) // it has nothing to close but memory
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

// reset begins with an empty screen at an offset. sc.mu is held.
func (sc *screen) reset(size agent.Terminal, offset int64) {
	sc.size, sc.offset, sc.title, sc.appCursor, sc.brackets, sc.noWrap, sc.feed = size, offset, "", false, false, false, sequence{}
	sc.main, sc.alt = sc.emulator(scrollLines), nil
}

func (sc *screen) emulator(above int) *vt.Emulator {
	e := vt.NewEmulator(sc.size.Cols, sc.size.Rows)
	e.SetScrollbackSize(above)
	if answers, ok := e.InputPipe().(io.Closer); ok { // what a terminal would answer goes nowhere, instead of waiting to be read
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

// shown is the emulator that has the screen.
func (sc *screen) shown() *vt.Emulator {
	if sc.alt != nil {
		return sc.alt
	}
	return sc.main
}

// write renders output.
func (sc *screen) write(p []byte) error {
	return sc.feed.each(p, sc.stage())
}

// stage is where output is rendered.
func (sc *screen) stage() stage {
	return stage{flush: func(b []byte) error {
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

// errTooMuch is of output that takes too long to render.
var errTooMuch = badArgument("What the terminal shows takes too long to render. Read it with process_wait and raw.")

// update renders what the process has written since.
func (sc *screen) update(ctx context.Context, client *agent.Client, p agent.Process) (err error) {
	defer func() {
		if r := recover(); r != nil { // a guest's bytes must not end more than their own screen
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
	deadline, budget, again := time.Now().Add(renderTime), 2*maxReplay, true // it may write on while we read
	err = client.Output(ctx, p.ID, sc.offset, false, func(f agent.OutputFrame) error {
		if budget -= max(1, len(f.Data)); budget < 0 {
			return errEnoughOutput
		}
		if f.Offset > sc.offset && len(f.Data) > 0 { // what lies between is no longer kept
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
		return sc.feed.end(sc.stage())
	}
	return err
}

var errEnoughOutput = errors.New("enough output")

// screenInfo tells about a rendered screen beside its text.
type screenInfo struct {
	Rows      int    `json:"rows"`
	Cols      int    `json:"cols"`
	CursorRow int    `json:"cursor_row" jsonschema:"from 1"`
	CursorCol int    `json:"cursor_col" jsonschema:"from 1"`
	Title     string `json:"title,omitempty"`
	Alternate bool   `json:"alternate,omitempty" jsonschema:"a full-screen program has it"`
	Above     int    `json:"lines_above,omitempty" jsonschema:"that have scrolled away"`
}

// text renders the screen, a line for each row, with up to above lines that have scrolled away before it, in at most chars characters.
// sc.mu is held.
func (sc *screen) text(above, chars int) (string, *screenInfo) {
	e := sc.shown()
	at := e.CursorPosition()
	info := &screenInfo{Rows: sc.size.Rows, Cols: sc.size.Cols, CursorRow: at.Y + 1, CursorCol: at.X + 1, Title: render([]byte(sc.title)),
		Alternate: sc.alt != nil, Above: e.ScrollbackLen()}
	if info.Alternate {
		info.Above = 0 // it has none
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
