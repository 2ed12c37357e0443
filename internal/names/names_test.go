package names

import (
	"testing"
	"unicode/utf8"
)

func TestShow(t *testing.T) {
	for name, want := range map[string]string{
		"/tmp/plain": "/tmp/plain", "日本 é": "日本 é", `a\b\n\xyz`: `a\b\n\xyz`, "caf\xe9": `caf\xe9`, "two\nlines": `two\x0alines`,
		"\x1b[31m": `\x1b[31m`, "\u009b": `\xc2\x9b`, "a\u202eb\u2028": `a\xe2\x80\xaeb\xe2\x80\xa8`,
		`\xe9`: `\x5cxe9`, `\x41`: `\x41`, `\xE9`: `\xE9`, `\x5cxe9`: `\x5cx5cxe9`, `\x5c`: `\x5c`, `\x5cx41`: `\x5cx5cx41`,
		"\\x4\xff": `\x4\xff`, "\uFFFD": "\uFFFD", "\xe6\x97": `\xe6\x97`,
	} {
		if got := Show(name); got != want || Parse(got) != name {
			t.Errorf("%q is shown as %q, want %q, and read as %q", name, got, want, Parse(got))
		}
	}
	for shown, want := range map[string]string{`/tmp/\x2e\x2e/\x2f`: `/tmp/\x2e\x2e/\x2f`, `\xe6\x97\xa5`: "日", `\x`: `\x`, `\xf`: `\xf`} {
		if got := Parse(shown); got != want {
			t.Errorf("%q is read as %q, want %q", shown, got, want)
		}
	}
}

func FuzzNames(f *testing.F) {
	f.Add(`\x5cx5c\xff` + "\xff\n\u202e")
	f.Fuzz(func(t *testing.T, name string) {
		shown := Show(name)
		if text := Text(name); Parse(text) != name || !utf8.ValidString(text) {
			t.Errorf("%q as text is %q", name, text)
		}
		if Parse(shown) != name || !utf8.ValidString(shown) {
			t.Errorf("%q is shown as %q, and read as %q", name, shown, Parse(shown))
		}
		for _, r := range shown {
			if acts(r) {
				t.Errorf("%q acts", shown)
			}
		}
	})
}
