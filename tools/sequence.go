package tools

import (
	"slices"
	"strings"
	"unicode/utf8"

	"soulbox.dev/soulbox/agent"
)

// sequence parses output as far as the screen needs it. Parameters of control sequences (ECMA-48, 5.4) are cut to what can be on a screen,
// since an emulator repeats a character as often as it is told. We handle the switch to the alternate screen ourselves, and also control
// strings (5.6), of which only titles matter. Each byte that is not text becomes a character of its own (byteRune), one cell each, as in a
// terminal.
type sequence struct {
	state  int
	part   []byte // of a character that is not complete yet
	params []byte
	long   bool // the parameters are longer than any that mean something
	osc    bool // the control string is an operating system command
	margin bool // the last character was a wide one that ends at the margin: the next one starts the next line
}

const (
	inText = iota
	afterEscape
	inEscape // behind its intermediate bytes
	inControl
	inString
)

// maxTitle bounds, in bytes, what is kept of a control string.
const maxTitle = 1 << 10

// alternate are the private modes that switch to the alternate screen.
var alternate = []string{"47", "1047", "1049"}

// stage receives the parsed output.
type stage struct {
	flush     func([]byte) error                                   // renders what came so far
	alternate func(on bool)                                        // switches screens, between two flushes
	char      func(c rune, atMargin bool) (margin bool, err error) // renders a character that is not ASCII
	title     func(string)
}

// each parses output and passes it to a stage.
func (s *sequence) each(p []byte, to stage) (err error) {
	var out []byte
	for _, c := range p {
		switch s.state {
		case inText:
			if c == 0x1b {
				out, err = s.drain(out, to, true)
				s.state = afterEscape
			} else {
				s.part = append(s.part, c)
				out, err = s.drain(out, to, false)
			}
			if err != nil {
				return err
			}
		case afterEscape:
			out = s.escape(out, c)
		case inEscape:
			if out = append(out, c); c >= 0x30 || c < 0x20 {
				s.state = inText
			}
		case inString:
			s.string(c, to.title)
		case inControl:
			switch {
			case c >= 0x20 && c < 0x40: // parameters and intermediate bytes
				if s.long = s.long || len(s.params) >= maxParams; !s.long {
					s.params = append(s.params, c)
				}
			case c >= 0x40 && c < 0x7f: // the end
				s.state = inText
				if s.long {
					continue
				}
				s.margin = s.margin && strings.IndexByte("mhlnc", c) >= 0 // the others move the cursor, or what is under it
				params, on, switches := s.finish(c)
				if switches {
					if err := to.flush(out); err != nil {
						return err
					}
					out = out[:0:0]
					to.alternate(on)
				}
				if params != nil {
					out = append(append(append(out, 0x1b, '['), params...), c)
				}
			case c == 0x1b:
				s.state = afterEscape
			case c == 0x18 || c == 0x1a: // cancelled
				s.state = inText
			default: // a control character within a sequence is executed
				out = append(out, c)
			}
		}
	}
	return to.flush(out)
}

// end passes on what is left of a character that will never be complete.
func (s *sequence) end(to stage) error {
	out, err := s.drain(nil, to, true)
	if err != nil {
		return err
	}
	return to.flush(out)
}

// drain takes the complete characters out of s.part; if all, it takes the rest too.
func (s *sequence) drain(out []byte, to stage, all bool) ([]byte, error) {
	for len(s.part) > 0 && (all || utf8.FullRune(s.part)) {
		r, n := utf8.DecodeRune(s.part)
		switch {
		case s.margin && r >= ' ' && r < 0x7f:
			out, s.margin = append(append(out, nextLine...), s.part[:n]...), false
		case r < 0xa0:
			s.margin = s.margin && r == '\a'
			out = append(out, s.part[:n]...)
		default:
			if err := to.flush(out); err != nil {
				return nil, err
			}
			out = out[:0:0]
			chars := []rune{r}
			if r == utf8.RuneError && n == 1 || r >= byteRune+0x80 {
				chars = []rune(string(appendBytes(nil, s.part[:n])))
			}
			for _, c := range chars {
				var err error
				if s.margin, err = to.char(c, s.margin); err != nil {
					return nil, err
				}
			}
		}
		s.part = s.part[:copy(s.part, s.part[n:])]
	}
	return out, nil
}

// escape handles the byte that follows an escape.
func (s *sequence) escape(out []byte, c byte) []byte {
	switch c {
	case '[':
		s.state, s.long, s.params = inControl, false, s.params[:0]
	case ']', 'P', 'X', '^', '_':
		s.state, s.osc, s.long, s.params = inString, c == ']', false, s.params[:0]
	case 0x1b:
	default:
		s.state = inText
		switch {
		case c >= 0x80: // part of a character, which ends the escape
			s.part = append(s.part, c)
			return out
		case c >= 0x20 && c < 0x30:
			s.state = inEscape
		default:
			s.margin = false
		}
		return append(out, 0x1b, c)
	}
	return out
}

// string handles a byte of a control string. An operating system command may end with BEL; every string may end with ESC \.
func (s *sequence) string(c byte, title func(string)) {
	switch {
	case c == 0x18 || c == 0x1a: // cancelled
		s.state = inText
	case c == 0x1b || c == 0x07 && s.osc:
		if s.state = inText; c == 0x1b {
			s.state = afterEscape
		}
		kind, text, ok := strings.Cut(string(s.params), ";")
		if s.osc && ok && (kind == "0" || kind == "2") { // xterm's control sequences, "Operating System Commands"
			body := []byte(text)
			if s.long {
				body = agent.Whole(body)
			}
			title(render(body))
		}
	case len(s.params) < maxTitle:
		s.params = append(s.params, c)
	default:
		s.long = true
	}
}

// finish returns the parameters of a sequence to render (nil: do not render the sequence), and whether it switches screens.
func (s *sequence) finish(final byte) (params []byte, on, switches bool) {
	if len(s.params) > 0 && s.params[0] == '?' {
		if final != 'h' && final != 'l' {
			return slices.Clone(s.params), false, false
		}
		modes := slices.DeleteFunc(strings.Split(string(s.params[1:]), ";"), func(m string) bool {
			is := slices.Contains(alternate, m)
			switches = switches || is
			return is
		})
		if len(modes) == 0 {
			return nil, final == 'h', switches
		}
		return []byte("?" + strings.Join(modes, ";")), final == 'h', switches
	}
	digits := 0
	params = []byte{}
	for _, c := range s.params {
		if c < '0' || c > '9' {
			digits = 0
		} else if digits++; digits > maxDigits {
			continue
		}
		params = append(params, c)
	}
	return params, false, false
}
