package cursor

import (
	"encoding/base64"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"
)

// made is a cursor.
func made(t *testing.T, list string, place ...any) string {
	t.Helper()
	text, err := Encode(list, place...)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestCursor(t *testing.T) {
	encode := func(list string, place ...any) string { return made(t, list, place...) }
	var watch string
	var from int64
	if err := Decode("watch", encode("watch", "w 1"), &watch); err != nil || watch != "w 1" {
		t.Error(watch, err)
	}
	if err := Decode("watch", encode("watch", "w1", int64(1)<<62), &watch, &from); err != nil || watch != "w1" || from != 1<<62 {
		t.Error(watch, from, err)
	}
	own := encode("watch", "w1", 7)
	for name, text := range map[string]string{
		"nothing": "", "another list": encode("logs", "w1", 7), "more": encode("watch", "w1", "7 8"), "less": encode("watch", "w1"),
		"negative": encode("watch", "w1", -1), "no number": encode("watch", "w1", "x"),
		"huge":       encode("watch", "w1", "9223372036854775808"),
		"not base64": "watch w1 7", "padded": own + "==", "a line more": own + "\n", "changed": own[:len(own)-1] + "_",
		"long":  base64.RawURLEncoding.EncodeToString([]byte("watch " + strings.Repeat("w", 2000) + " 7")),
		"plain": base64.RawURLEncoding.EncodeToString([]byte("w1 7")),
	} {
		if err := Decode("watch", text, &watch, &from); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v, %q %d", name, err, watch, from)
		}
	}
}

// TestBound: what is made can be read, and what could not be read is not made.
func TestBound(t *testing.T) {
	refused := 0
	for n := range 1000 {
		place, back := strings.Repeat("w", n), ""
		text, err := Encode("list", place)
		if err != nil {
			refused++
		} else if err := Decode("list", text, &back); err != nil || back != place {
			t.Errorf("%d bytes: %d come back, %v", n, len(back), err)
		}
	}
	if refused < 200 || refused > 400 {
		t.Error(refused)
	}
	long := func(n int) string { return strings.Repeat("w", 2000+n) }
	if page, _, err := Page("list", "", []int{1, 2}, 1, false, long); err == nil {
		t.Error("a page ends where no other can begin", page)
	}
}

// TestPage reads a list in pages while entries come and go: none is repeated or left out.
func TestPage(t *testing.T) {
	at := time.Unix(1_700_000_000, 0)
	same := func(text string) string { return text }
	for _, falling := range []bool{false, true} {
		all := []string{Key(at, "b"), Key(at.Add(time.Second), "a"), Key(at, "a"), Key(at.Add(-time.Hour), "x"), Key(at.Add(1), "a")}
		want := slices.Sorted(slices.Values(all))
		if falling {
			slices.Reverse(want)
		}
		var got []string
		for cursor := ""; ; {
			page, next, err := Page("list", cursor, all, 2, falling, same)
			if err != nil || len(page) > 2 {
				t.Fatal(page, err)
			}
			got = append(got, page...)
			all = slices.DeleteFunc(all, func(one string) bool { return one == page[0] }) // ended, and its cursor is still good
			if cursor = next; cursor == "" {
				break
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("falling %v: %q, want %q", falling, got, want)
		}
		for _, wrong := range []string{"x", made(t, "other", want[0])} {
			if _, _, err := Page("list", wrong, want, 2, falling, same); !errors.Is(err, ErrInvalid) {
				t.Error(err)
			}
		}
	}
	if page, next, err := Page("list", "", nil, 2, true, same); len(page) != 0 || next != "" || err != nil {
		t.Error(page, next, err)
	}
}
