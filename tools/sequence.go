package tools

import (
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/charmbracelet/x/ansi/parser"

	"soulbox.dev/soulbox/agent"
)

// scanner tells text from escape sequences and control strings, a byte at a time, however the output is cut. What a byte means in which
// state is the library's table (https://vt100.net/emu/dec_ansi_parser). Its decoder (ansi.DecodeSequence) and its parser (ansi.Parser) go
// by the same rules, but are made for output that means no harm: both take the second half of a UTF-8 character for a C1 control, so that
// a title in Japanese ends within a character (docs/upstream/x-vt.md); the decoder panics when a sequence has more parameters than its
// parser has room for; and neither bounds what a parameter is. The table has no state for a control sequence that is malformed, which a
// terminal ignores up to its final byte: it shows the rest of one, and takes the other for a sequence that was not written.
type scanner struct {
	state     parser.State
	malformed bool // the control sequence is
}

// next takes a byte. It returns the state that the byte came in, and what a terminal does with it. Outside of sequences and strings all
// bytes from 0x80 on are text: their action is PrintAction.
func (s *scanner) next(c byte) (in parser.State, action parser.Action) {
	in = s.state
	s.malformed = s.malformed && c < 0x80 && c != 0x1b || in == parser.CsiIntermediateState && c >= '0' && c <= '?' ||
		in == parser.CsiParamState && c >= '<' && c <= '?'
	switch {
	case c >= 0x80 && inString(in):
		return in, parser.PutAction
	case c >= 0x80: // not a C1 control: output is UTF-8, in which these are part of a character, which ends a sequence
		s.state = parser.GroundState
		return in, parser.PrintAction
	case c == 0x1b: // the table lets a DCS begin with one, for tmux; then the string would never end
		if s.state = parser.EscapeState; inString(in) {
			return in, parser.DispatchAction
		}
		return in, parser.ClearAction
	}
	if s.malformed && c >= ' ' {
		if s.malformed = c < '@' || c == 0x7f; !s.malformed {
			s.state = parser.GroundState
		}
		return in, parser.IgnoreAction
	}
	s.state, action = parser.Table.Transition(in, c)
	s.malformed = s.malformed && s.state != parser.GroundState // CAN and SUB cancel it
	return in, action
}

// inString says that a state is within a control string (ECMA-48, 5.6): DCS, OSC, SOS, PM or APC.
func inString(s parser.State) bool {
	switch s {
	case parser.DcsEntryState, parser.DcsIntermediateState, parser.DcsParamState, parser.DcsStringState, parser.OscStringState,
		parser.SosStringState, parser.PmStringState, parser.ApcStringState:
		return true
	}
	return false
}

// sequence parses output as far as the screen needs it. Parameters of control sequences (ECMA-48, 5.4) are cut to what can be on a screen,
// since an emulator repeats a character as often as it is told. We handle the switch to the alternate screen ourselves, and also control
// strings, of which only titles matter. Each byte that is not text becomes a character of its own (byteRune), one cell each, as in a
// terminal.
type sequence struct {
	scanner
	part   []byte // of a character that is not complete yet
	params []byte // of a sequence, or the beginning of an operating system command
	long   bool   // they are longer than any that mean something
	margin bool   // the last character was a wide one that ends at the margin: the next one starts the next line
}

// maxTitle bounds, in bytes, what is kept of a control string.
const maxTitle = 1 << 10

// alternate are the private modes that switch to the alternate screen.
var alternate = []string{"47", "1047", "1049"}

// sink receives the parsed output.
type sink struct {
	flush     func([]byte) error                                   // renders what came so far
	alternate func(on bool)                                        // switches screens, between two flushes
	char      func(c rune, atMargin bool) (margin bool, err error) // renders a character that is not ASCII
	title     func(string)
}

// each parses output and passes it to a stage.
func (s *sequence) each(p []byte, to sink) (err error) {
	var out []byte
	for _, c := range p {
		in, action := s.next(c)
		text := s.state == parser.GroundState && (in == parser.GroundState || action == parser.PrintAction)
		switch {
		case text:
			s.part = append(s.part, c)
			out, err = s.drain(out, to, false)
		case in == parser.GroundState:
			out, err = s.drain(out, to, true)
		case inString(in):
			s.string(in, action, c, to.title)
		case action == parser.ExecuteAction: // a control character within a sequence
			if c != 0x18 && c != 0x1a { // these only cancel it
				out = append(out, c)
			}
		case action == parser.ParamAction || action == parser.PrefixAction || action == parser.CollectAction:
			s.keep(c, maxParams)
		case action == parser.DispatchAction && !s.long:
			out, err = s.dispatch(in, c, out, to)
		}
		if err != nil {
			return err
		}
		if c == 0x1b || s.state != in && (inString(in) || action == parser.ClearAction || action == parser.StartAction) {
			s.params, s.long = s.params[:0], false // of a string nothing may reach the emulator, as part of the ST that ends it
		}
	}
	return to.flush(out)
}

// keep keeps a byte of a sequence or a string, of which at most most bytes are kept.
func (s *sequence) keep(c byte, most int) {
	if s.long = s.long || len(s.params) >= most; !s.long {
		s.params = append(s.params, c)
	}
}

// end passes on what is left of a character that will never be complete.
func (s *sequence) end(to sink) error {
	out, err := s.drain(nil, to, true)
	if err != nil {
		return err
	}
	return to.flush(out)
}

// drain takes the complete characters out of s.part; if all, it takes the rest too.
func (s *sequence) drain(out []byte, to sink, all bool) ([]byte, error) {
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

// dispatch renders a sequence that is complete.
func (s *sequence) dispatch(in parser.State, final byte, out []byte, to sink) ([]byte, error) {
	if in == parser.EscapeState || in == parser.EscapeIntermediateState {
		s.margin = s.margin && in == parser.EscapeIntermediateState // these choose character sets; the others may move the cursor
		return append(append(append(out, 0x1b), s.params...), final), nil
	}
	s.margin = s.margin && strings.IndexByte("mhlnc", final) >= 0 // the others move the cursor, or what is under it
	params, on, switches := s.finish(final)
	if switches {
		if err := to.flush(out); err != nil {
			return nil, err
		}
		out = out[:0:0]
		to.alternate(on)
	}
	if params != nil {
		out = append(append(append(out, 0x1b, '['), params...), final)
	}
	return out, nil
}

// string handles a byte of a control string.
func (s *sequence) string(in parser.State, action parser.Action, c byte, title func(string)) {
	switch {
	case in != parser.OscStringState:
	case action == parser.PutAction:
		s.keep(c, maxTitle)
	case action == parser.DispatchAction:
		kind, text, ok := strings.Cut(string(s.params), ";")
		if ok && (kind == "0" || kind == "2") { // xterm's control sequences, "Operating System Commands"
			body := []byte(text)
			if s.long {
				body = agent.Whole(body)
			}
			title(render(body))
		}
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
