package template

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"runtime"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"soulbox.dev/soulbox/access"
)

// allocated returns how many bytes do allocates in total.
func allocated(do func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	do()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// TestExpansion: a short Dockerfile whose variables grow without bound is refused with its line before it takes memory; ordinary ones are
// not.
func TestExpansion(t *testing.T) {
	doubled := func(verb string) string {
		text := verb + " a0=0123456789abcdef\n"
		for i := 1; i < 14; i++ {
			text += fmt.Sprintf("%s a%d=$a%d$a%d$a%d$a%d\n", verb, i, i-1, i-1, i-1, i-1)
		}
		return text
	}
	many := func(format string, n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, format, i)
		}
		return b.String()
	}
	value := strings.Repeat("x", 60<<10)
	for name, c := range map[string]struct{ dockerfile, want string }{
		"ARG":            {"FROM scratch\n" + doubled("ARG"), `line 9: ARG a7=$a6$a6$a6$a6: "$a6$a6$a6$a6" has more than 64 KB`},
		"ENV":            {"FROM scratch\n" + doubled("ENV"), "line 9: "},
		"before FROM":    {doubled("ARG") + "FROM scratch\n", "line 8: "},
		"LABEL":          {"FROM scratch\nARG a=" + value + "\nLABEL b=$a$a\n", "line 3: "},
		"in all":         {"FROM scratch\nARG a=" + value + "\n" + many("ENV b%d=$a\n", 20), "longer; use shorter values"},
		"EXPOSE":         {"FROM scratch\nARG a=\"" + strings.Repeat("1 ", 30<<10) + "\"\nEXPOSE $a$a\n", "line 3: "},
		"replaced":       {"FROM scratch\nARG a=" + value + "\nENV b=${a//x/" + strings.Repeat("y", 60<<10) + "}\n", "line 3: "},
		"replaced in it": {"FROM scratch\nARG a=" + value[:1000] + "\nENV b=${a//x/${a//x/${a//x/xxxx}}}\n", "replaces too much text"},
		"instructions":   {"FROM scratch\n" + many("USER u%d\n", maxInstructions+1), "at most 2000 are possible"},
		"stages":         {many("FROM scratch AS s%d\n", maxInstructions+1), "at most 2000 are possible"},
		"variables":      {"FROM scratch\n" + many("ARG a%d\n", maxVariables+1), "at most 1000 are possible"},
		"what people do": {"ARG V=1.2.3\nFROM scratch\nARG V\nENV F=file-${V//./-}-${V%.*}${X:-none}.tar P=/a:$P\n" +
			"ENV P=/b:$P\nLABEL f=$F\nEXPOSE ${PORT:-80} 81\n", ""},
		"a text of its own": {"FROM scratch\nLABEL a=" + value + "\n", ""},
	} {
		b := &Builder{Store: &Store{Dir: t.TempDir()}, Log: slog.New(slog.DiscardHandler)}
		var built Built
		var err error
		took := allocated(func() { built, err = b.Build(t.Context(), BuildRequest{Name: "x", Dockerfile: c.dockerfile}, nil) })
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: %.300v, want %q", name, err, c.want)
		case took > 256<<20:
			t.Errorf("%s: %d MB", name, took>>20)
		}
		if name == "what people do" && !strings.Contains(strings.Join(built.Config.Env, " "), "F=file-1-2-3-1.2none.tar P=/b:/a:") {
			t.Errorf("%s: %v", name, built.Config.Env)
		}
	}
}

// xzFile compresses a text with xz, in blocks of the given size, and makes the file claim a dictionary size: 40 means 4 GB.
func xzFile(t *testing.T, text string, block int64, dictionary byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := xz.WriterConfig{BlockSize: block}.NewWriter(&b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	body := b.Bytes()
	if dictionary > 0 {
		header := body[12 : 12+(int(body[12])+1)*4]
		at := bytes.Index(header, []byte{0x21, 1})
		header[at+2] = dictionary
		binary.LittleEndian.PutUint32(header[len(header)-4:], crc32.ChecksumIEEE(header[:len(header)-4]))
	}
	return body
}

// zstdFrame returns a text as a zstd frame that claims to need a window of 1 << (10+exponent) bytes.
func zstdFrame(text string, exponent byte) []byte {
	head := uint32(len(text)<<3 | 1)
	return append([]byte{0x28, 0xb5, 0x2f, 0xfd, 0, exponent << 3, byte(head), byte(head >> 8), byte(head >> 16)}, text...)
}

// TestWindows: a file that names a large dictionary is refused before the dictionary is allocated, wherever the file names it. While a file
// is read, its owner is charged.
func TestWindows(t *testing.T) {
	s := &Store{Dir: t.TempDir(), Accounts: access.NewAccounts(map[access.Resource]access.Bound{
		access.Buffers: {Total: 200 << 20, Share: 100 << 20}, access.Work: {Total: 2, Share: 1},
	})}
	archive := pack(t, file("a", strings.Repeat("text ", 5000)))
	good := xzFile(t, archive, 10_000, 0)
	long := xzFile(t, archive, 10_000, 40)
	for name, c := range map[string]struct {
		body []byte
		want error
	}{
		"plain":                  {[]byte(archive), nil},
		"xz":                     {good, nil},
		"xz, more streams":       {slicesOf(xzFile(t, archive[:3000], 1000, 0), make([]byte, 8), xzFile(t, archive[3000:], 1<<20, 0)), nil},
		"zstd":                   {zstdFrame(archive, 16), nil},
		"xz of 4 GB":             {long, errWindow},
		"xz of 96 MB":            {xzFile(t, archive, 10_000, 29), errWindow},
		"xz, the second of 4 GB": {slicesOf(xzFile(t, archive[:3000], 1<<20, 0), long), errWindow},
		"zstd of 128 MB":         {zstdFrame(archive, 17), zstd.ErrWindowSizeExceeded},
		"zstd, the second":       {slicesOf(zstdFrame(archive[:3000], 10), zstdFrame(archive[3000:], 20)), zstd.ErrWindowSizeExceeded},
		"xz, cut short":          {good[:len(good)/2], io.ErrUnexpectedEOF},
	} {
		var err error
		took := allocated(func() {
			var files *Files
			if files, err = s.ReadContext(t.Context(), "ann", bytes.NewReader(c.body)); err == nil {
				err = files.Close()
			}
		})
		if !errors.Is(err, c.want) || c.want == nil && err != nil {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if took > 200<<20 {
			t.Errorf("%s: %d MB", name, took>>20)
		}
		if left := s.Accounts.Uses(); len(left) > 0 {
			t.Errorf("%s: still charged: %v", name, left)
		}
	}
	charged := map[access.Resource]int64{}
	r, err := uncompressed(t.Context(), s.payer("ann"), bytes.NewReader(good))
	if err == nil {
		_, err = tar.NewReader(r).Next()
	}
	for _, u := range s.Accounts.Uses() {
		charged[u.Resource] = u.Used
	}
	if err := errors.Join(err, r.Close()); err != nil || charged[access.Work] != 1 || charged[access.Buffers] != 8<<20 {
		t.Error(err, charged)
	}
}

func slicesOf(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

// FuzzXZ: the reader passes any file on unchanged, or ends.
func FuzzXZ(f *testing.F) {
	f.Add([]byte("\xfd7zXZ\x00\x00\x04"))
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := uncompressed(t.Context(), payer{}, io.MultiReader(strings.NewReader("\xfd7zXZ\x00"), bytes.NewReader(body)))
		if err != nil {
			return
		}
		defer r.Close()
		_, _ = io.Copy(io.Discard, io.LimitReader(r, 1<<20))
	})
}
