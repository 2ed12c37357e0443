package template

import (
	"strings"
	"testing"

	"soulbox.dev/soulbox/agent"
)

// TestLogLines: lines that are too long or arrive in pieces are cut at whole characters; bytes that are not text are escaped.
func TestLogLines(t *testing.T) {
	var got []string
	l := newLines(func(line string) { got = append(got, line) })
	x := strings.Repeat("x", maxLine-1)
	for _, part := range []string{"caf\xe9 \xe6", "\x97\xa5\n", x, "\xe6\x97", "\xa5y\n", "end\xf0\x9f"} {
		l.add(agent.OutputFrame{Stream: "stdout", Data: []byte(part)})
	}
	l.end()
	if want := []string{`caf\xe9 日`, x, "日y", `end\xf0\x9f`}; strings.Join(got, "|") != strings.Join(want, "|") {
		t.Errorf("%.80q", got)
	}
}
