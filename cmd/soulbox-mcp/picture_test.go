package main

import (
	"encoding/xml"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"
)

// scene is a step of the demo in the picture: the beginning of what it says, and which lines of its output are shown.
type scene struct{ say, lines string }

// scenes are the steps that look the same on all machines.
var scenes = []scene{
	{"Who am I, and where?", `^uid=|^Linux`},
	{"Commands share a shell", `the shell is now`},
	{"... and the next one, even after an exit", `^hello`},
	{"Pause it all to disk", `.`},
	{"... and resume it", `.`},
	{"Really?", `<p>`},
	{"Make a copy of it", `.`},
	{"... any network", `lo|Network`},
	{"... and it cannot harm your programs", `Read-only`},
}

const (
	pictureColumns = 100
	pictureRows    = 34
)

// checkPicture compares docs/demo.svg with the demo's output, except for ids and numbers; UPDATE_GOLDEN=1 writes it anew.
func checkPicture(t *testing.T, said string) {
	t.Helper()
	rows := pictureOf(said)
	if len(rows) > pictureRows {
		t.Errorf("the picture has %d rows, at most %d fit", len(rows), pictureRows)
	}
	now := drawTerminal("make demo", rows)
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(filepath.Join(repository(t, "docs"), "demo.svg"), []byte(now), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	shown, err := os.ReadFile(repository(t, "docs/demo.svg"))
	if err != nil {
		t.Fatal(err)
	}
	was, is := strings.Split(masked(string(shown)), "\n"), strings.Split(masked(now), "\n")
	for i := range max(len(was), len(is)) {
		if i >= len(was) || i >= len(is) || was[i] != is[i] {
			t.Errorf("docs/demo.svg is not what the demo says from line %d on; 'make golden' records it anew\nit has   %q\nit wants %q", i+
				1,
				was[min(i, len(was)):min(i+1, len(was))], is[min(i, len(is)):min(i+1, len(is))])
			return
		}
	}
}

// masked is a picture without what differs each time: ids, numbers, a program of this machine. Text that is cut at the right edge may be
// cut at another place.
func masked(picture string) string {
	for _, m := range []struct{ found, shown string }{
		{`sb[a-z0-9]{20}`, "ID"}, {`/usr/bin/[^ ;]*&`, "PROGRAM&"}, {`[0-9]+(\.[0-9]+)?`, "N"}, {`[^<>]*…`, "…"},
	} {
		picture = regexp.MustCompile(m.found).ReplaceAllString(picture, m.shown)
	}
	return picture
}

// pictureOf takes the rows of the picture from the demo's output.
func pictureOf(said string) []string {
	parts := strings.Split(said, "\n# ")
	first := regexp.MustCompile(`An MCP client .*`).FindString(parts[0])
	rows := []string{"$ make demo", regexp.MustCompile(`soulbox \S+,`).ReplaceAllString(first, "soulbox,")} // without the version
	for _, s := range scenes {
		for _, part := range parts[1:] {
			if !strings.HasPrefix(part, s.say) {
				continue
			}
			lines := strings.Split(strings.TrimSpace(part), "\n")
			rows = append(rows, "# "+lines[0], lines[1])
			wanted, shown := regexp.MustCompile(s.lines), 0
			for _, line := range lines[2:] {
				if text := strings.TrimPrefix(line, "  | "); text != line && wanted.MatchString(text) && shown < 2 {
					rows = append(rows, line)
					shown++
				}
			}
		}
	}
	lines := strings.Split(strings.TrimSpace(said), "\n")
	rows = append(rows, strings.SplitAfter(lines[len(lines)-1], "as expected.")[0])
	for i, row := range rows {
		if utf8.RuneCountInString(row) > pictureColumns {
			rows[i] = string([]rune(row)[:pictureColumns-1]) + "…"
		}
	}
	return rows
}

// drawTerminal draws rows of text as a terminal with a title.
func drawTerminal(title string, rows []string) string {
	const cell, line, pad, bar = 8.4, 19, 18, 34
	width, height := pictureColumns*cell+2*pad, bar+len(rows)*line+2*pad
	var b strings.Builder
	b.WriteString(`<svg xmlns="http://www.w3.org/2000/svg" `)
	fmt.Fprintf(&b, `viewBox="0 0 %.0f %d" role="img" aria-label="%s">`+"\n", width, height, title)
	b.WriteString(`<style>text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;white-space:pre}` +
		`.say{fill:#7ee787}.call{fill:#79c0ff}.out{fill:#c9d1d9}.title{fill:#8b949e}</style>` + "\n")
	fmt.Fprintf(&b, `<rect width="%.0f" height="%d" rx="10" fill="#0d1117"/>`+"\n", width, height)
	for i, colour := range []string{"#ff5f57", "#febc2e", "#28c840"} {
		fmt.Fprintf(&b, `<circle cx="%d" cy="18" r="6" fill="%s"/>`+"\n", 20+i*20, colour)
	}
	fmt.Fprintf(&b, `<text class="title" x="%.0f" y="23" text-anchor="middle">%s</text>`+"\n", width/2, title)
	for i, row := range rows {
		class := "call"
		switch {
		case strings.HasPrefix(row, "# "):
			class = "say"
		case strings.HasPrefix(row, "  | "), i == 1, i == len(rows)-1:
			class = "out"
		}
		var text strings.Builder
		_ = xml.EscapeText(&text, []byte(row)) // a Builder accepts everything
		fmt.Fprintf(&b, `<text class="%s" x="%d" y="%d" xml:space="preserve">%s</text>`+"\n", class, pad, bar+pad+i*line, text.String())
	}
	b.WriteString("</svg>\n")
	return b.String()
}
