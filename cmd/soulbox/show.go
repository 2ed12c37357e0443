package main

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"
)

// table prints rows in columns.
type table struct {
	w   *tabwriter.Writer
	err error
}

func (a *app) table(head ...string) *table {
	t := &table{w: tabwriter.NewWriter(a.stdout, 0, 8, 2, ' ', 0)}
	if len(head) > 0 {
		t.row(head...)
	}
	return t
}

func (t *table) row(cells ...string) {
	for i, c := range cells {
		cells[i] = printable(c)
	}
	if _, err := fmt.Fprintln(t.w, strings.TrimRight(strings.Join(cells, "\t"), "\t")); err != nil && t.err == nil {
		t.err = err
	}
}

func (t *table) flush() error {
	if t.err != nil {
		return t.err
	}
	return t.w.Flush()
}

// printable replaces the characters of a text that would act on the terminal or break a line; the text may be a guest's.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, text)
}

// inert writes a guest's output to a terminal so that only line ends, tabs and returns act on the terminal: a program that needs a terminal
// is given one. Bytes that are not text become \xNN, and an incomplete character is held back, because output of the other stream may come
// between. If w is not a terminal, inertly passes everything on unchanged.
type inert struct {
	to   io.Writer
	part []byte // of an incomplete character
}

// inertly returns w, made inert if it is a terminal. The caller calls writeRest after its last write.
func inertly(w io.Writer) io.Writer {
	if _, ok := terminalOf(w); ok {
		return &inert{to: w}
	}
	return w
}

// writeRest writes what is held back of an incomplete character.
func writeRest(w io.Writer) error {
	i, ok := w.(*inert)
	if !ok || len(i.part) == 0 {
		return nil
	}
	_, err := i.to.Write(i.taken(true))
	return err
}

// Write implements io.Writer.
func (i *inert) Write(p []byte) (int, error) {
	i.part = append(i.part, p...)
	if _, err := i.to.Write(i.taken(false)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// taken removes and returns the complete characters, with all also an incomplete one.
func (i *inert) taken(all bool) []byte {
	out := make([]byte, 0, len(i.part)+16)
	p := i.part
	for len(p) > 0 && (all || utf8.FullRune(p)) {
		r, n := utf8.DecodeRune(p)
		switch {
		case r == utf8.RuneError && n == 1:
			out = fmt.Appendf(out, `\x%02x`, p[0])
		case r >= 0x80 && r < 0xa0:
			out = append(out, '?')
		case r < ' ' && r != '\n' && r != '\t' && r != '\r':
			out = append(out, '^', byte(r)+'@')
		case r == 0x7f:
			out = append(out, '^', '?')
		default:
			out = append(out, p[:n]...)
		}
		p = p[n:]
	}
	i.part = append(i.part[:0], p...)
	return out
}

// json prints a value as JSON, with C1 controls escaped; encoding/json escapes C0 controls itself.
func (a *app) json(v any) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	var out strings.Builder
	for _, r := range string(text) {
		if r >= 0x7f && r < 0xa0 {
			fmt.Fprintf(&out, "\\u%04x", r)
		} else {
			out.WriteRune(r)
		}
	}
	return a.printf("%s\n", out.String())
}

// format is how results are printed.
type format string

const (
	formatTable = "table"
	formatWide  = "wide"
	formatJSON  = "json"
	formatName  = "name"
)

func (f *format) flag(c *cobra.Command, allowed ...string) {
	*f = format(allowed[0])
	c.Flags().VarP(formatFlag{f, allowed}, "output", "o", "`format`: "+strings.Join(allowed, ", "))
	check(c.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(allowed, cobra.ShellCompDirectiveNoFileComp)))
}

type formatFlag struct {
	f       *format
	allowed []string
}

// String implements pflag.Value.
func (f formatFlag) String() string { return string(*f.f) }

// Type implements pflag.Value.
func (f formatFlag) Type() string { return "format" }

// Set implements pflag.Value.
func (f formatFlag) Set(text string) error {
	if !slices.Contains(f.allowed, text) {
		return fmt.Errorf("the formats are %s", strings.Join(f.allowed, ", "))
	}
	*f.f = format(text)
	return nil
}

// ago formats a past time for people.
func ago(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return short(time.Since(t)) + " ago"
}

// until formats a future time for people.
func until(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return short(time.Until(t))
}

func short(d time.Duration) string {
	d = max(d, 0)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

func bytesOf(n int64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	value, i := float64(n)/unit, 0
	for value >= unit && i < 4 {
		value, i = value/unit, i+1
	}
	return fmt.Sprintf("%.1f %ciB", value, "KMGTP"[i])
}

// pairs formats a map, sorted.
func pairs(m map[string]string) string {
	var all []string
	for k, v := range m {
		all = append(all, k+"="+v)
	}
	slices.Sort(all)
	return strings.Join(all, ",")
}

// readPairs parses KEY=VALUE arguments.
func readPairs(what string, given []string) (map[string]string, error) {
	out := map[string]string{}
	for _, g := range given {
		k, v, ok := strings.Cut(g, "=")
		if !ok || k == "" {
			return nil, usageError{fmt.Errorf("%s is KEY=VALUE, not %q", what, g)}
		}
		out[k] = v
	}
	return out, nil
}

// Colours of output on a terminal (ECMA-48, SGR).
const (
	green  = "\x1b[32m"
	yellow = "\x1b[33m"
	red    = "\x1b[31m"
	dim    = "\x1b[2m"
	plain  = "\x1b[0m"
)

func (a *app) coloured(colour, text string) string {
	if !a.colours() {
		return text
	}
	return colour + text + plain
}

// repaint writes a text. If again is set and w is a terminal, it replaces the text before; otherwise it is added below.
func (a *app) repaint(w io.Writer, text string, again bool) error {
	if _, ok := terminalOf(w); ok && again {
		text = "\x1b[H\x1b[2J" + text
	}
	_, err := io.WriteString(w, text)
	return err
}
