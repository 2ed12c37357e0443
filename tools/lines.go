package tools

import (
	"bytes"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/charmbracelet/x/ansi/parser"

	"soulbox.dev/soulbox/agent"
)

// maxHeld bounds, in bytes, what is held back of a sequence that is not complete yet.
const maxHeld = 4 << 10

// terminalText is a terminal's output as lines of text, without escapes. Of a line that was overwritten, only the last text remains.
func terminalText(p []byte) string {
	p = bytes.ReplaceAll(p, []byte("\r\n"), []byte("\n"))
	var done, line []string
	for len(p) > 0 {
		n := 1
		switch p[0] {
		case 0x1b:
			n, _ = escapeLen(p)
		case '\n':
			done, line = append(append(done, line...), "\n"), line[:0]
		case '\r':
			line = line[:0]
		case '\b':
			line = line[:max(0, len(line)-1)]
		default:
			var text string
			text, n = agent.InertRune(p)
			line = append(line, text)
		}
		p = p[n:]
	}
	return strings.Join(append(done, line...), "")
}

// escapeLen is the length of the sequence or string that p begins with, and whether it is complete. What ends a string is a sequence of
// its own (ST), or part of it (BEL).
func escapeLen(p []byte) (n int, whole bool) {
	var s scanner
	for i, c := range p {
		switch in, action := s.next(c); {
		case i > 0 && (c == 0x1b || action == parser.PrintAction), in == parser.EscapeState && action == parser.ExecuteAction:
			return i, true // these end it, and are not part of it
		case s.state == parser.GroundState:
			return i + 1, true
		}
	}
	return len(p), false
}

// held is how many bytes at the end of a terminal's output are better read together with what follows: an incomplete character or sequence,
// or a carriage return, which means something else before a line feed.
func held(p []byte) int {
	for at := 0; at < len(p); {
		next := bytes.IndexByte(p[at:], 0x1b)
		if next < 0 {
			break
		}
		n, whole := escapeLen(p[at+next:])
		if !whole {
			if n > maxHeld {
				return 0
			}
			return n
		}
		at += next + n
	}
	if bytes.HasSuffix(p, []byte("\r")) {
		return 1
	}
	return len(p) - len(agent.Whole(p))
}

// terminalHead shows as much from the start of a terminal's output as fits into room characters, and returns as used how many bytes that
// is. Unless p is whole, what is better read together with what follows is left for later.
func terminalHead(p []byte, room int, whole bool) (text string, used int) {
	used = len(p)
	if !whole {
		used -= held(p)
	}
	for {
		text = terminalText(p[:used])
		n := utf8.RuneCountInString(text)
		if n <= room {
			return text, used
		}
		used = min(used*room/n, used*7/8)
		used -= held(p[:used])
	}
}

// terminalTail shows as much from the end of a terminal's output as fits into room characters. skipped is how many bytes before that it
// left out, and later how many behind it.
func terminalTail(p []byte, room int, whole bool) (text string, skipped, later int) {
	if !whole {
		later = held(p)
		p = p[:len(p)-later]
	}
	for {
		skipped = len(p) - len(agent.AfterCut(p[skipped:]))
		text = terminalText(p[skipped:])
		n := utf8.RuneCountInString(text)
		if n <= room {
			return text, skipped, later
		}
		left := len(p) - skipped
		skipped += max(left-left*room/n, left/8, 1)
	}
}

// showTerminal shows a terminal's output as text. Offsets count its bytes, including escapes.
func showTerminal(sandboxID string, snap agent.Snapshot, w agent.Window, chars int) execOutput {
	out, o := describe(sandboxID, snap), snap.Output
	ended := snap.Process.State == agent.StateExited
	if len(o.Tail) > 0 && o.TailStart == o.HeadEnd && len(o.Head)+len(o.Tail) <= chars { // nothing lies between
		o.Head, o.Tail, o.HeadEnd, o.TailStart = append(o.Head[:len(o.Head):len(o.Head)], o.Tail...), nil, o.End, o.End
	}
	if len(o.Tail) == 0 {
		more := o.HeadEnd < o.End
		left, used := terminalHead(o.Head, chars, lastOf(o, w, ended))
		if used == 0 && more { // a sequence longer than what was asked for
			left, used = terminalHead(o.Head, chars, true)
		}
		out.Output, out.NextOffset = left, o.HeadEnd-int64(len(o.Head)-used)
		if more || used < len(o.Head)-held(o.Head) {
			out.leaveOut(o.End-out.NextOffset, out.NextOffset)
		}
		return out
	}
	left, used := terminalHead(o.Head, chars/2, false)
	headEnd := o.HeadEnd - int64(len(o.Head)-used)
	right, skipped, later := terminalTail(o.Tail, chars-utf8.RuneCountInString(left), ended)
	out.NextOffset = o.End - int64(later)
	out.LeftOut = o.TailStart + int64(skipped) - headEnd
	out.Output = fmt.Sprintf("%s\n[… %s left out; %s …]\n%s", left, plural(out.LeftOut, "byte"), rest(out.ProcessID, headEnd), right)
	return out
}

// lastOf reports whether nothing follows that could complete the last character of a head.
func lastOf(o agent.Output, w agent.Window, ended bool) bool {
	if o.HeadEnd < o.End {
		return len(o.Head) < w.Head // the bytes behind it are no longer kept
	}
	return ended
}

// rest says how to read what is left out of an output.
func rest(process string, offset int64) string {
	return fmt.Sprintf("process_wait with process_id %q and offset %d gives the rest", process, offset)
}

// leaveOut notes that n bytes of output behind an offset are left out.
func (o *execOutput) leaveOut(n, offset int64) {
	o.LeftOut = n
	o.Note = strings.Join(append(o.notes(), rest(o.ProcessID, offset)), "; ")
}

// progressText is what a running process has written, without incomplete characters at the ends.
func progressText(snap agent.Snapshot) string {
	o := snap.Output
	if len(o.Tail) == 0 {
		o.Head = o.Head[:len(o.Head)-held(o.Head)]
	}
	o.Tail = o.Tail[:len(o.Tail)-held(o.Tail)]
	if snap.Process.Terminal != nil {
		return terminalText(o.Head) + terminalText(o.Tail)
	}
	return agent.InertEnds(o)
}
