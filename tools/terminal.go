package tools

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	uv "github.com/charmbracelet/ultraviolet"
	"github.com/charmbracelet/x/ansi"
	"github.com/charmbracelet/x/vt"

	"soulbox.dev/soulbox/agent"
)

const (
	maxScreens  = 32      // terminals that are kept rendered; one that is not is rendered anew from its output
	maxReplay   = 1 << 20 // bytes of output that are rendered at most: what was before has long scrolled away
	scrollLines = 500     // lines above the screen
)

// screens are the terminals that somebody has looked at, the latest last.
type screens struct {
	mu  sync.Mutex
	all []*screen
}

// screen is the rendered output of a process, up to an offset.
type screen struct {
	key string // sandbox and process

	mu     sync.Mutex
	emu    *vt.Emulator
	size   agent.Terminal
	offset int64
	title  string
	// appCursor and brackets are what the program has asked of the keyboard.
	appCursor, brackets bool
}

// get finds the screen of a process, or makes one.
func (s *screens) get(key string) *screen {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, sc := range s.all {
		if sc.key == key {
			s.all = append(slices.Delete(s.all, i, i+1), sc)
			return sc
		}
	}
	if len(s.all) >= maxScreens {
		old := s.all[0]
		s.all = slices.Delete(s.all, 0, 1)
		go old.close() // it may be in use
	}
	sc := &screen{key: key}
	s.all = append(s.all, sc)
	return sc
}

func (sc *screen) close() {
	sc.mu.Lock()
	defer sc.mu.Unlock()
	if sc.emu != nil {
		_ = sc.emu.Close() // its pipe only
		sc.emu = nil
	}
}

// reset begins with an empty screen at an offset. sc.mu is held.
func (sc *screen) reset(size agent.Terminal, offset int64) {
	if sc.emu != nil {
		_ = sc.emu.Close() // its pipe only
	}
	sc.emu, sc.size, sc.offset, sc.title, sc.appCursor, sc.brackets = vt.NewEmulator(size.Cols, size.Rows), size, offset, "", false, false
	sc.emu.SetScrollbackSize(scrollLines)
	mode := func(on bool) func(ansi.Mode) {
		return func(m ansi.Mode) {
			switch m {
			case ansi.ModeCursorKeys:
				sc.appCursor = on
			case ansi.ModeBracketedPaste:
				sc.brackets = on
			}
		}
	}
	sc.emu.SetCallbacks(vt.Callbacks{Title: func(t string) { sc.title = shorten(t, 200) }, EnableMode: mode(true), DisableMode: mode(false)})
	go func(e *vt.Emulator) { _, _ = io.Copy(io.Discard, e) }(sc.emu) // what a terminal would answer; ends with Close
}

// update renders what the process has written since.
func (sc *screen) update(ctx context.Context, client *agent.Client, p agent.Process) (err error) {
	defer func() {
		if r := recover(); r != nil { // a guest's bytes must not end more than their own screen
			sc.emu = nil
			err = fmt.Errorf("render the terminal of %s: %v", p.ID, r)
		}
	}()
	size := agent.Terminal{Rows: 24, Cols: 80}
	if p.Terminal != nil {
		size = agent.Terminal{Rows: min(max(p.Terminal.Rows, 1), 300), Cols: min(max(p.Terminal.Cols, 1), 500)}
	}
	if sc.emu == nil || p.Output-sc.offset > maxReplay || p.Output < sc.offset {
		sc.reset(size, max(0, p.Output-maxReplay))
	}
	if sc.size != size {
		sc.emu.Resize(size.Cols, size.Rows)
		sc.size = size
	}
	budget := 2 * maxReplay // it may write on while we read
	err = client.Output(ctx, p.ID, sc.offset, false, func(f agent.OutputFrame) error {
		if budget -= len(f.Data); budget < 0 {
			return errEnoughOutput
		}
		if f.Offset > sc.offset && len(f.Data) > 0 { // what lies between is no longer kept
			sc.reset(size, f.Offset)
		}
		if _, err := sc.emu.Write(f.Data); err != nil {
			return err
		}
		sc.offset = max(sc.offset, f.Offset+int64(len(f.Data)))
		return nil
	})
	if errors.Is(err, errEnoughOutput) {
		return nil
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

// text renders the screen, a line for each row, with up to above lines that have scrolled away before it. sc.mu is held.
func (sc *screen) text(above int) (string, *screenInfo) {
	at := sc.emu.CursorPosition()
	info := &screenInfo{Rows: sc.size.Rows, Cols: sc.size.Cols, CursorRow: at.Y + 1, CursorCol: at.X + 1, Title: render([]byte(sc.title)), Alternate: sc.emu.IsAltScreen(), Above: sc.emu.ScrollbackLen()}
	var lines []string
	for y := max(0, info.Above-above); y < info.Above; y++ {
		lines = append(lines, cells(sc.size.Cols, func(x int) (string, int) { return cellOf(sc.emu.ScrollbackCellAt(x, y)) }))
	}
	for y := range sc.size.Rows {
		lines = append(lines, cells(sc.size.Cols, func(x int) (string, int) { return cellOf(sc.emu.CellAt(x, y)) }))
	}
	return strings.TrimRight(strings.Join(lines, "\n"), "\n"), info
}

// cells joins the cells of a line.
func cells(cols int, at func(x int) (content string, width int)) string {
	var b strings.Builder
	for x := 0; x < cols; {
		content, width := at(x)
		if content == "" {
			content, width = " ", 1
		}
		b.WriteString(render([]byte(content)))
		x += max(1, width)
	}
	return strings.TrimRight(b.String(), " ")
}

// terminalText is output of a terminal as lines of text: without escapes, and of a line that was written over only what stands there.
func terminalText(p []byte) string {
	lines := strings.Split(ansi.Strip(strings.ToValidUTF8(string(bytes.ReplaceAll(p, []byte("\r\n"), []byte("\n"))), "\uFFFD")), "\n")
	for i, line := range lines {
		line = strings.TrimRight(line, "\r")
		if over := strings.LastIndexByte(line, '\r'); over >= 0 {
			line = line[over+1:]
		}
		for strings.Contains(line, "\b") {
			at := strings.IndexByte(line, '\b')
			runes := []rune(line[:at])
			line = string(runes[:max(0, len(runes)-1)]) + line[at+1:]
		}
		lines[i] = line
	}
	return strings.Join(lines, "\n")
}

// keyBytes are what keys send (xterm's control sequences, "PC-Style Function Keys").
var keyBytes = map[string]string{
	"enter": "\r", "tab": "\t", "shift-tab": "\x1b[Z", "esc": "\x1b", "space": " ", "backspace": "\x7f", "delete": "\x1b[3~", "insert": "\x1b[2~",
	"up": "\x1b[A", "down": "\x1b[B", "right": "\x1b[C", "left": "\x1b[D", "home": "\x1b[H", "end": "\x1b[F", "page-up": "\x1b[5~", "page-down": "\x1b[6~",
	"f1": "\x1bOP", "f2": "\x1bOQ", "f3": "\x1bOR", "f4": "\x1bOS", "f5": "\x1b[15~", "f6": "\x1b[17~", "f7": "\x1b[18~", "f8": "\x1b[19~", "f9": "\x1b[20~",
	"f10": "\x1b[21~", "f11": "\x1b[23~", "f12": "\x1b[24~", "ctrl-space": "\x00", "ctrl-[": "\x1b", "ctrl-\\": "\x1c", "ctrl-]": "\x1d", "ctrl-^": "\x1e", "ctrl-_": "\x1f",
	"ctrl-up": "\x1b[1;5A", "ctrl-down": "\x1b[1;5B", "ctrl-right": "\x1b[1;5C", "ctrl-left": "\x1b[1;5D",
}

// keyNames are other names of keys.
var keyNames = map[string]string{"return": "enter", "escape": "esc", "pgup": "page-up", "pageup": "page-up", "pgdn": "page-down", "pagedown": "page-down", "del": "delete", "bs": "backspace"}

// encodeKeys turns names of keys into what they send. appCursor is the mode in which programs want other arrows.
func encodeKeys(keys []string, appCursor bool) (string, error) {
	var b strings.Builder
	for _, key := range keys {
		name := strings.ToLower(strings.ReplaceAll(strings.TrimSpace(key), "+", "-"))
		if other, ok := keyNames[name]; ok {
			name = other
		}
		alt := false
		if rest, ok := strings.CutPrefix(name, "alt-"); ok {
			alt, name = true, rest
		}
		text, ok := keyBytes[name]
		switch {
		case ok && appCursor && len(text) == 3 && text[1] == '[' && strings.ContainsRune("ABCDHF", rune(text[2])):
			text = "\x1bO" + text[2:]
		case ok:
		case strings.HasPrefix(name, "ctrl-") && len(name) == 6 && name[5] >= 'a' && name[5] <= 'z':
			text = string(rune(name[5] - 'a' + 1))
		case len([]rune(strings.TrimSpace(key))) == 1 || alt && len([]rune(name)) == 1:
			text = strings.TrimPrefix(strings.TrimSpace(key), key[:len(key)-len(name)])
			if !alt {
				text = strings.TrimSpace(key)
			}
		default:
			return "", badArgument("There is no key %q. Keys are: enter, tab, shift-tab, esc, backspace, delete, insert, space, up, down, left, right, home, end, page-up, page-down, f1 to f12, ctrl-a to ctrl-z, alt- before another; text goes into \"input\".", shorten(key, 40))
		}
		if alt {
			text = "\x1b" + text
		}
		b.WriteString(text)
	}
	return b.String(), nil
}

func cellOf(c *uv.Cell) (content string, width int) {
	if c == nil {
		return "", 1
	}
	return c.Content, c.Width
}
