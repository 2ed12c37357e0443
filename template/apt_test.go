package template

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/clearsign"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	"github.com/ulikunitz/xz"
)

// suite is what a fixture has: a name that is nobody's.
const suite = "testing-only"

// debian is an archive of packages on loopback, with a key of its own.
type debian struct {
	*testing.T
	url, keyring string
	key          *openpgp.Entity

	release map[string]string // fields of the Release
	list    []string          // paragraphs of Packages
	edit    func(packages []byte) []byte
	signer  *openpgp.Entity

	mu    sync.Mutex
	files map[string][]byte // by path
}

func newDebian(t *testing.T) *debian {
	t.Helper()
	d := &debian{T: t, key: newKey(t, time.Now()), files: map[string][]byte{},
		release: map[string]string{"Codename": suite, "Suite": "stable", "Acquire-By-Hash": "yes",
			"Valid-Until": time.Now().Add(time.Hour).UTC().Format(time.RFC1123)}}
	d.signer = d.key
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		d.mu.Lock()
		body, ok := d.files[strings.TrimPrefix(r.URL.Path, "/debian/")]
		d.mu.Unlock()
		if !ok {
			http.NotFound(w, r)
			return
		}
		_, _ = w.Write(body) // a client that is gone is the test's matter
	}))
	t.Cleanup(server.Close)
	d.url = server.URL + "/debian"
	d.keyring = filepath.Join(t.TempDir(), "keyring.gpg")
	var keys bytes.Buffer
	if err := errors.Join(d.key.Serialize(&keys), os.WriteFile(d.keyring, keys.Bytes(), 0o644)); err != nil {
		t.Fatal(err)
	}
	return d
}

func newKey(t *testing.T, at time.Time) *openpgp.Entity {
	t.Helper()
	key, err := openpgp.NewEntity("Archive", "", "archive@example.org", &packet.Config{Algorithm: packet.PubKeyAlgoEdDSA,
		Time: func() time.Time { return at }, KeyLifetimeSecs: 24 * 60 * 60})
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// put puts a file into the archive, or takes it away.
func (d *debian) put(name string, body []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.files[name] = body; body == nil {
		delete(d.files, name)
	}
}

// add adds a package with some files. The fields are further lines of its paragraph.
func (d *debian) add(name, version string, files map[string]string, fields ...string) (pool string) {
	d.Helper()
	return d.addTar(name, version, d.tar(files), fields...)
}

func (d *debian) addTar(name, version string, data []byte, fields ...string) (pool string) {
	d.Helper()
	pool = fmt.Sprintf("pool/main/%s_%s.deb", name, version)
	body := deb(data)
	d.put(pool, body)
	d.list = append(d.list, strings.Join(append([]string{"Package: " + name, "Version: " + version, "Filename: " + pool,
		fmt.Sprintf("SHA256: %x", sha256.Sum256(body))}, fields...), "\n")+"\n")
	return pool
}

// minimal adds what every system begins with.
func (d *debian) minimal() *debian {
	d.Helper()
	d.add("apt", "2.0", map[string]string{"usr/bin/apt": "apt 2.0"}, "Depends: libc6 (>= 2.1), awk | mawk:any")
	d.add("libc6", "2.1", map[string]string{"lib/libc.so.6": "libc"})
	d.add("mawk", "1.0", map[string]string{"usr/bin/mawk": "mawk"}, "Provides: awk (= 1)")
	d.add("gawk", "1.0", map[string]string{"usr/bin/gawk": "gawk"}, "Provides: awk", "Priority: extra")
	d.add("debian-archive-keyring", "1", map[string]string{"usr/share/keyrings/k": "k"})
	d.add("ca-certificates", "1", map[string]string{"etc/ssl/c": "c"})
	d.add("base-files", "1", map[string]string{"etc/debian_version": "0"}, "Essential: yes")
	d.add("not-wanted", "1", map[string]string{"etc/not-wanted": ""})
	return d
}

func (d *debian) tar(files map[string]string) []byte {
	d.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, name := range sortedKeys(files) {
		err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "./" + name, Mode: 0o755, Size: int64(len(files[name]))})
		if _, werr := io.WriteString(w, files[name]); err != nil || werr != nil {
			d.Fatal(err, werr)
		}
	}
	if err := w.Close(); err != nil {
		d.Fatal(err)
	}
	return out.Bytes()
}

// deb makes a package (deb(5)) of the tar of its files.
func deb(data []byte) []byte {
	var out bytes.Buffer
	out.WriteString("!<arch>\n")
	for _, m := range []struct {
		name string
		body []byte
	}{{"debian-binary", []byte("2.0\n")}, {"control.tar", []byte("odd")}, {"data.tar", data}} {
		fmt.Fprintf(&out, "%-16s%-12d%-6d%-6d%-8s%-10d`\n%s", m.name, 0, 0, 0, "100644", len(m.body), m.body)
		if len(m.body)%2 == 1 {
			out.WriteByte('\n')
		}
	}
	return out.Bytes()
}

func (d *debian) xz(plain []byte) []byte {
	d.Helper()
	var out bytes.Buffer
	w, err := xz.NewWriter(&out)
	if err != nil {
		d.Fatal(err)
	}
	if _, err := w.Write(plain); err != nil {
		d.Fatal(err)
	}
	if err := w.Close(); err != nil {
		d.Fatal(err)
	}
	return out.Bytes()
}

// publish signs what there is. It gives the path of the index, by its hash.
func (d *debian) publish() (index string) {
	d.Helper()
	packages := d.xz([]byte(strings.Join(d.list, "\n")))
	if d.edit != nil {
		packages = d.edit(packages)
	}
	sum := fmt.Sprintf("%x", sha256.Sum256(packages))
	dir := "main/binary-" + debArch()
	var release strings.Builder
	for _, name := range sortedKeys(d.release) {
		fmt.Fprintf(&release, "%s: %s\n", name, d.release[name])
	}
	fmt.Fprintf(&release, "SHA256:\n %064d 10 main/binary-other/Packages.xz\n %s %d %s/Packages.xz\n", 0, sum, len(packages), dir)
	d.sign(release.String())
	index = "dists/" + suite + "/" + dir + "/Packages.xz"
	if d.release["Acquire-By-Hash"] == "yes" {
		index = "dists/" + suite + "/" + dir + "/by-hash/SHA256/" + sum
	}
	d.put(index, packages)
	return index
}

func (d *debian) sign(release string) {
	d.Helper()
	var signed bytes.Buffer
	// As of when the key was made: one that is over signs as when it was not.
	then := func() time.Time { return d.signer.PrivateKey.CreationTime }
	w, err := clearsign.Encode(&signed, d.signer.PrivateKey, &packet.Config{Time: then})
	if err != nil {
		d.Fatal(err)
	}
	if _, err := io.WriteString(w, release); err != nil {
		d.Fatal(err)
	}
	if err := w.Close(); err != nil {
		d.Fatal(err)
	}
	d.put(inRelease, signed.Bytes())
}

const inRelease = "dists/" + suite + "/InRelease"

// change changes a file of the archive behind its signature.
func (d *debian) change(name, from, to string) {
	d.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	if !bytes.Contains(d.files[name], []byte(from)) {
		d.Fatalf("%s has no %q", name, from)
	}
	d.files[name] = bytes.Replace(d.files[name], []byte(from), []byte(to), 1)
}

// distribution has a builder that can run nothing make a minimal system of the archive: it comes as far as the packages.
func (d *debian) distribution(ctx context.Context, o BaseOptions) error {
	d.Helper()
	store := &Store{Dir: d.TempDir()}
	o.Mirror, o.Suite, o.Keyring = cmp.Or(o.Mirror, d.url), cmp.Or(o.Suite, suite), cmp.Or(o.Keyring, d.keyring)
	o.Say = func(string, ...any) {}
	_, err := (&Builder{Store: store}).distribution(ctx, o)
	left, gerr := filepath.Glob(store.Dir + "/builds/*")
	if gerr != nil || len(left) > 0 {
		d.Errorf("%v is left: %v", left, gerr)
	}
	return err
}

// TestArchiveRefused: a mirror whose files are forged, altered or missing is refused, and the error says what is wrong.
func TestArchiveRefused(t *testing.T) {
	const changed = "is not what the InRelease says"
	for name, test := range map[string]struct {
		do   func(d *debian) // with the archive as it is before it is published, and before it is served
		then func(d *debian, index string)
		want string
	}{
		"not signed": {then: func(d *debian, _ string) { d.put(inRelease, []byte("Codename: "+suite+"\n")) },
			want: "its InRelease is not signed"},
		"nothing at all": {then: func(d *debian, _ string) { d.put(inRelease, nil) }, want: "InRelease: 404 Not Found"},
		"another key": {do: func(d *debian) { d.signer = newKey(d.T, time.Now()) },
			want: "check the signature of its InRelease: "},
		"changed after it was signed": {then: func(d *debian, _ string) { d.change(inRelease, "stable", "sTable") },
			want: "check the signature of its InRelease: "},
		"a key that is over": {do: func(d *debian) {
			d.signer = newKey(d.T, time.Now().AddDate(-1, 0, 0))
			var keys bytes.Buffer
			if err := errors.Join(d.signer.Serialize(&keys), os.WriteFile(d.keyring, keys.Bytes(), 0o644)); err != nil {
				d.Fatal(err)
			}
		}, want: "check the signature of its InRelease: "},
		"expired": {do: func(d *debian) { d.release["Valid-Until"] = "Sat, 07 Dec 2024 20:13:11 UTC" },
			want: "its InRelease expired at 2024-12-07T20:13:11Z; use another mirror, or set the clock"},
		"expired, in another form": {do: func(d *debian) { d.release["Valid-Until"] = "Sat, 07 Dec 2024 20:13:11 +0000" },
			want: "its InRelease expired at 2024-12-07T20:13:11Z"},
		"valid until who knows": {do: func(d *debian) { d.release["Valid-Until"] = "tomorrow" },
			want: `its InRelease is valid until "tomorrow", which is no date`},
		"that of an older suite": {do: func(d *debian) { d.release["Codename"], d.release["Suite"] = "older", "oldstable" },
			want: `its InRelease is of the suite "oldstable", "older"; use another mirror`},
		"no such architecture": {then: func(d *debian, _ string) { d.sign("Codename: " + suite + "\nSHA256:\n") },
			want: "its InRelease names no main/binary-"},
		"a sum that is none": {then: func(d *debian, _ string) {
			d.sign("Codename: " + suite + "\nSHA256:\n ../../etc 1 main/binary-" + debArch() + "/Packages.xz\n")
		}, want: "its InRelease names no main/binary-"},
		"an empty release": {then: func(d *debian, _ string) { d.sign("\n") }, want: "its InRelease is empty"},
		"another index":    {then: func(d *debian, index string) { d.put(index, d.xz([]byte("Package: evil\n"))) }, want: changed},
		"another index, not by its hash": {do: func(d *debian) { d.release["Acquire-By-Hash"] = "no" },
			then: func(d *debian, index string) { d.put(index, d.xz([]byte("Package: evil\n"))) }, want: "Packages.xz " + changed},
		"an index cut short": {then: func(d *debian, index string) { d.put(index, d.files[index][:40]) }, want: changed},
		"no index":           {then: func(d *debian, index string) { d.put(index, nil) }, want: "404 Not Found"},
		"an index that is none": {do: func(d *debian) { d.edit = func([]byte) []byte { return []byte("Package: apt\n") } },
			want: "xz:"},
		"half an index": {do: func(d *debian) { d.edit = func(p []byte) []byte { return p[:len(p)-40] } }, want: "EOF"},
		"a line without end": {do: func(d *debian) { d.list = append(d.list, "Package: "+strings.Repeat("x", 2<<20)) },
			want: "token too long"},
		"another package": {then: func(d *debian, _ string) { d.change("pool/main/apt_2.0.deb", "apt 2.0", "apt 6.6") },
			want: "package apt is not what the archive says it is"},
		"an older package in its place": {do: func(d *debian) { d.add("apt", "1.9", map[string]string{"usr/bin/apt": "apt 1.9"}) },
			then: func(d *debian, _ string) { d.put("pool/main/apt_2.0.deb", d.files["pool/main/apt_1.9.deb"]) },
			want: "package apt is not what the archive says it is"},
		"a package that is not there": {then: func(d *debian, _ string) { d.put("pool/main/mawk_1.0.deb", nil) },
			want: "pool/main/mawk_1.0.deb: 404 Not Found"},
		"a package that nobody has": {do: func(d *debian) {
			d.add("base", "1", nil, "Essential: yes",
				"Depends: no-such | nor-this (>= 1)")
		},
			want: "the archive has no package no-such or nor-this"},
		"a package from elsewhere": {do: func(d *debian) {
			d.list[0] = strings.Replace(d.list[0], "pool/main/", "../../other/", 1) // the first is apt
		}, want: "the archive has no package apt"},
		"a package without a sum": {do: func(d *debian) { d.list[0] = strings.Replace(d.list[0], "SHA256: ", "SHA256: no", 1) },
			want: "the archive has no package apt"},
		"a package that is none": {do: func(d *debian) { d.bad("!<arch>\n") }, want: "package bad: it has no files"},
		"a package of nothing":   {do: func(d *debian) { d.bad("") }, want: "package bad: it is not a package"},
		"a package cut short":    {do: func(d *debian) { d.bad(string(deb([]byte("x"))[:70])) }, want: "package bad: it is cut short"},
		"a package that says so": {do: func(d *debian) {
			d.bad("!<arch>\n" + fmt.Sprintf("%-48s%-10d`\n", "data.tar", -1))
		}, want: "package bad: it is broken"},
		"files that are none": {do: func(d *debian) { d.addTar("bad", "1", []byte(strings.Repeat("x", 1024)), "Essential: yes") },
			want: "package bad: "},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDebian(t).minimal()
			if test.do != nil {
				test.do(d)
			}
			index := d.publish()
			if test.then != nil {
				test.then(d, index)
			}
			if err := d.distribution(t.Context(), BaseOptions{}); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
		})
	}
}

// bad adds an essential package that is nothing but some bytes, which the archive has signed.
func (d *debian) bad(body string) {
	d.Helper()
	d.put(d.add("bad", "1", nil, "Essential: yes"), []byte(body))
	last := &d.list[len(d.list)-1]
	sum := strings.Index(*last, "SHA256: ") + len("SHA256: ")
	*last = (*last)[:sum] + fmt.Sprintf("%x", sha256.Sum256([]byte(body))) + (*last)[sum+64:]
}

// TestArchiveOptions: wrong options give an error that says so, and a cancelled build ends.
func TestArchiveOptions(t *testing.T) {
	d := newDebian(t).minimal()
	d.publish()
	for name, test := range map[string]struct {
		o    BaseOptions
		want string
	}{
		"no mirror of ours":   {BaseOptions{Mirror: "ftp://127.0.0.1/debian"}, "is neither http nor https; name a mirror by --mirror"},
		"a file":              {BaseOptions{Mirror: "/var/debian"}, "is neither http nor https"},
		"no such suite":       {BaseOptions{Suite: "other"}, "dists/other/InRelease: 404 Not Found"},
		"no such keyring":     {BaseOptions{Keyring: "/no/such"}, "read keyring: open /no/such"},
		"a keyring of others": {BaseOptions{Keyring: "/etc/passwd"}, "read keyring: "},
		"nobody answers":      {BaseOptions{Mirror: "http://127.0.0.1:1/debian"}, "connection refused"},
	} {
		if err := d.distribution(t.Context(), test.o); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want %q", name, err, test.want)
		}
	}
	if _, err := (&Builder{}).BuildBase(t.Context(), BaseOptions{Variant: "rust"}); err == nil ||
		err.Error() != `there is no variant "rust"; the variants are node and python` {
		t.Error(err)
	}
	release, err := archive{client: http.DefaultClient}.get(t.Context(), d.url+"/"+inRelease, maxRelease)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := verify(release, ""); err == nil || !strings.Contains(err.Error(), "there is no keyring to check it with") {
		t.Error(err)
	}
	if _, err := (archive{client: http.DefaultClient}).get(t.Context(), d.url+"/"+inRelease, 10); err == nil ||
		!strings.HasSuffix(err.Error(), "it has more than 10 bytes") {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := d.distribution(ctx, BaseOptions{}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestArchive reads an archive that is as it should be: of each package the newest, what they need, and nothing else.
func TestArchive(t *testing.T) {
	d := newDebian(t).minimal()
	for _, version := range []string{"2.0~rc1", "1:0.1", "9"} { // in the order of an archive, which is none
		d.add("apt", version, map[string]string{"usr/bin/apt": "apt " + version}, "Pre-Depends: libc6, awk")
	}
	d.release["Valid-Until"] = time.Now().Add(time.Hour).UTC().Format(time.RFC1123Z)
	d.publish()
	d.mu.Lock() // what is before the signed part is not believed
	d.files[inRelease] = append([]byte("Valid-Until: Sat, 07 Dec 2024 20:13:11 UTC\nSuite: evil\n\n"), d.files[inRelease]...)
	d.mu.Unlock()
	a := archive{client: http.DefaultClient, say: t.Logf}
	all, err := a.packages(t.Context(), aptSource{uri: d.url, suite: suite, keyring: d.keyring})
	if err != nil {
		t.Fatal(err)
	}
	if again, err := a.packages(t.Context(), aptSource{uri: d.url, suite: suite, keyring: d.armored()}); err != nil ||
		len(again) != len(all) {
		t.Errorf("by a key in the source itself: %d packages, %v", len(again), err)
	}
	slices.Reverse(all) // an older index after the newer one changes nothing
	chosen, err := choose(all, minimal...)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, p := range chosen {
		got = append(got, p.name+" "+p.version)
	}
	want := []string{"apt 1:0.1", "base-files 1", "ca-certificates 1", "debian-archive-keyring 1", "libc6 2.1", "mawk 1.0"}
	if !slices.Equal(got, want) {
		t.Fatalf("got %q, want %q", got, want)
	}
	store := &Store{Dir: t.TempDir()}
	files, err := store.newContext(t.Context(), "", func(m *merger) error { return a.fill(t.Context(), m, chosen) })
	if err != nil {
		t.Fatal(err)
	}
	defer files.Close()
	for name, want := range map[string]string{"usr/bin/apt": "apt 1:0.1", "usr/lib/libc.so.6": "libc", "usr/bin/mawk": "mawk",
		"etc/debian_version": "0", ".soulbox-build/debs/mawk.deb": string(d.files["pool/main/mawk_1.0.deb"])} {
		if body, err := readNode(files, name); err != nil || body != want {
			t.Errorf("%s: %.40q, %v", name, body, err)
		}
	}
	for _, name := range []string{"etc/not-wanted", "usr/bin/gawk"} {
		if _, err := readNode(files, name); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := files.root.Children["lib"]; n == nil || n.Target != "usr/lib" {
		t.Errorf("/lib is %+v", n)
	}
}

// armored is the key as a source has it in itself (sources.list(5)).
func (d *debian) armored() string {
	d.Helper()
	var out bytes.Buffer
	w, err := armor.Encode(&out, openpgp.PublicKeyType, nil)
	if err != nil {
		d.Fatal(err)
	}
	if err := errors.Join(d.key.Serialize(w), w.Close()); err != nil {
		d.Fatal(err)
	}
	return strings.ReplaceAll(out.String(), "\n\n", "\n.\n")
}

func readNode(f *Files, name string) (string, error) {
	n := f.root
	for part := range strings.SplitSeq(name, "/") {
		if n = n.Children[part]; n == nil {
			return "", os.ErrNotExist
		}
	}
	body, err := io.ReadAll(f.image.Content(n.Data))
	return string(body), err
}

// TestSources reads what apt of a machine has, in both its forms, and keeps to its own distribution.
func TestSources(t *testing.T) {
	etc := t.TempDir()
	if err := os.Mkdir(filepath.Join(etc, "sources.list.d"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"sources.list": "# deb http://a/ one main\ndeb [arch=amd64 signed-by=/k.gpg] http://b/ one contrib main # why\n" +
			"deb-src http://c/ one main\ndeb http://d/ one contrib\ndeb http://e/ two main\ndeb http://f/ one-backports main\n" +
			"deb [signed-by=/l.gpg] http://g/ one-security main\n",
		"sources.list.d/x.sources": "Types: deb deb-src\nURIs: http://h/ http://i/\nSuites: one one-updates\n one-proposed\nComponents: " +
			"main\n" +
			"Signed-By:\n -----BEGIN\n .\n key\n\n# a comment\nEnabled: no\nTypes: deb\nURIs: http://j/\nSuites: one\nComponents: main\n",
		"sources.list.d/y.disabled": "deb http://k/ one main\n",
	} {
		if err := os.WriteFile(filepath.Join(etc, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := findSources(etc, "one")
	if err != nil {
		t.Fatal(err)
	}
	key := "\n-----BEGIN\n.\nkey"
	want := []aptSource{{"http://b/", "one", "/k.gpg"}, {"http://g/", "one-security", "/l.gpg"}, {"http://h/", "one", key},
		{"http://h/", "one-updates", key}, {"http://i/", "one", key}, {"http://i/", "one-updates", key}}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if _, err := findSources(etc, "three"); err == nil || !strings.Contains(err.Error(), "--mirror and --suite") {
		t.Error(err)
	}
}
