package template

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/clearsign"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	"github.com/ulikunitz/xz"
)

// Signatures, xz and the order of versions are libraries' (pault.ag/go/debian/version). What is read by hand here is what its packages
// control and dependency do otherwise than apt or than we need: lines have a bound, names of fields may have any case (deb822(5)), a
// package whose fields make no sense is left out instead of failing the whole index, and of a dependency only the name counts.

// aptSource is one suite of a package archive.
type aptSource struct {
	uri, suite string
	keyring    string // file
}

// aptPackage is a package as an archive describes it.
type aptPackage struct {
	name, version, priority, file, sha256, uri string
	essential                                  bool
	depends                                    [][]string // groups; one package of each group is enough
	provides                                   []string
}

// Bounds of what an archive sends, in bytes.
const (
	maxRelease  = 4 << 20
	maxPackages = 256 << 20
	maxDeb      = 512 << 20
)

// keyrings are those of Debian and Ubuntu, for sources that name none.
var keyrings = []string{"/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/ubuntu-archive-keyring.gpg"}

// findSources reads the apt sources of this machine that belong to its own distribution (sources.list(5)).
func findSources(etc, codename string) ([]aptSource, error) {
	var all []aptSource
	names, err := filepath.Glob(filepath.Join(etc, "sources.list.d", "*"))
	if err != nil {
		return nil, err
	}
	for _, name := range append([]string{filepath.Join(etc, "sources.list")}, names...) {
		body, err := os.ReadFile(name)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		switch filepath.Ext(name) {
		case ".sources":
			more, err := deb822(body)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			all = append(all, more...)
		case ".list":
			all = append(all, oneLine(body)...)
		}
	}
	all = slices.DeleteFunc(all, func(s aptSource) bool {
		return s.suite != codename && !strings.HasPrefix(s.suite, codename+"-") || strings.HasSuffix(s.suite, "-backports") ||
			strings.HasSuffix(s.suite, "-proposed")
	})
	if len(all) == 0 {
		return nil, fmt.Errorf("apt on this machine has no source for %q; name a mirror by --mirror and --suite", codename)
	}
	for i := range all {
		if all[i].keyring == "" {
			all[i].keyring = defaultKeyring()
		}
	}
	return all, nil
}

func defaultKeyring() string {
	for _, k := range keyrings {
		if exists(k) {
			return k
		}
	}
	return ""
}

func deb822(body []byte) ([]aptSource, error) {
	parts, err := paragraphs(bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	var all []aptSource
	for _, fields := range parts {
		if !slices.Contains(strings.Fields(fields["types"]), "deb") || !slices.Contains(strings.Fields(fields["components"]), "main") ||
			fields["enabled"] == "no" {
			continue
		}
		for _, uri := range strings.Fields(fields["uris"]) {
			for _, suite := range strings.Fields(fields["suites"]) {
				all = append(all, aptSource{uri: uri, suite: suite, keyring: fields["signed-by"]})
			}
		}
	}
	return all, nil
}

func oneLine(body []byte) []aptSource {
	var all []aptSource
	for line := range strings.Lines(string(body)) {
		line, _, _ = strings.Cut(line, "#")
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "deb ")
		if !ok {
			continue
		}
		s := aptSource{}
		if rest = strings.TrimSpace(rest); strings.HasPrefix(rest, "[") {
			options, after, _ := strings.Cut(rest[1:], "]")
			for option := range strings.FieldsSeq(options) {
				if file, ok := strings.CutPrefix(option, "signed-by="); ok {
					s.keyring = file
				}
			}
			rest = after
		}
		if f := strings.Fields(rest); len(f) >= 3 && slices.Contains(f[2:], "main") {
			s.uri, s.suite = f[0], f[1]
			all = append(all, s)
		}
	}
	return all
}

// paragraphs reads paragraphs of fields (deb822(5)). Field names become lower case. Continuation lines are joined by newlines.
func paragraphs(r io.Reader) ([]map[string]string, error) {
	var all []map[string]string
	fields, last := map[string]string{}, ""
	flush := func() {
		if len(fields) > 0 {
			all = append(all, fields)
			fields, last = map[string]string{}, ""
		}
	}
	in := bufio.NewScanner(r)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		line := in.Text()
		switch {
		case strings.TrimSpace(line) == "":
			flush()
		case line[0] == '#':
		case line[0] == ' ' || line[0] == '\t':
			if last != "" {
				fields[last] += "\n" + strings.TrimSpace(line)
			}
		default:
			name, value, _ := strings.Cut(line, ":")
			last = strings.ToLower(name)
			fields[last] = strings.TrimSpace(value)
		}
	}
	flush()
	return all, in.Err() // half of an index is of no use
}

// archive reads packages of an archive. It trusts only what a signature covers.
type archive struct {
	client *http.Client
	say    func(format string, args ...any)
}

// get fetches a file of at most limit bytes.
func (a archive) get(ctx context.Context, address string, limit int64) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, err
	}
	res, err := a.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("fetch: %w", err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("fetch %s: %s", address, res.Status)
	}
	body, err := io.ReadAll(io.LimitReader(res.Body, limit+1))
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w", address, err)
	}
	if int64(len(body)) > limit {
		return nil, fmt.Errorf("fetch %s: it has more than %d bytes", address, limit)
	}
	return body, nil
}

// packages reads the package index of a source.
func (a archive) packages(ctx context.Context, s aptSource) ([]aptPackage, error) {
	base, err := url.Parse(s.uri)
	if err != nil || base.Scheme != "http" && base.Scheme != "https" {
		return nil, fmt.Errorf("the source %q is neither http nor https; name a mirror by --mirror", s.uri)
	}
	suite := base.JoinPath("dists", s.suite)
	release, err := a.get(ctx, suite.JoinPath("InRelease").String(), maxRelease)
	if err != nil {
		return nil, err
	}
	signed, err := verify(release, s.keyring)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", suite, err)
	}
	fields, err := paragraphs(bytes.NewReader(signed))
	if err != nil {
		return nil, fmt.Errorf("%s: read its InRelease: %w", suite, err)
	}
	if len(fields) == 0 {
		return nil, fmt.Errorf("%s: its InRelease is empty", suite)
	}
	if err := current(fields[0], s.suite); err != nil {
		return nil, fmt.Errorf("%s: %w", suite, err)
	}
	name := path.Join("main", "binary-"+debArch(), "Packages.xz")
	sum := ""
	for line := range strings.SplitSeq(fields[0]["sha256"], "\n") {
		if f := strings.Fields(line); len(f) == 3 && f[2] == name {
			sum = f[0]
		}
	}
	if !isHex(sum) {
		return nil, fmt.Errorf("%s: its InRelease names no %s", suite, name)
	}
	file := suite.JoinPath(name)
	if fields[0]["acquire-by-hash"] == "yes" {
		file = suite.JoinPath(path.Dir(name), "by-hash", "SHA256", sum)
	}
	body, err := a.get(ctx, file.String(), maxPackages)
	if err != nil {
		return nil, err
	}
	if got := sha256.Sum256(body); fmt.Sprintf("%x", got) != sum {
		return nil, fmt.Errorf("%s is not what the InRelease says", file)
	}
	plain, err := xz.NewReader(bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	list, err := parsePackages(io.LimitReader(plain, maxPackages), s.uri)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return list, nil
}

// current checks that a release belongs to the suite and has not expired: a mirror can give one that was signed for another suite, or long
// ago. Releases without Valid-Until do not expire, such as those of Debian's stable suites.
func current(release map[string]string, suite string) error {
	if release["suite"] != suite && release["codename"] != suite {
		return fmt.Errorf("its InRelease is of the suite %q, %q; use another mirror, or name that suite by --suite", release["suite"],
			release["codename"])
	}
	text := release["valid-until"]
	if text == "" {
		return nil
	}
	until, err := time.Parse(time.RFC1123, text)
	if err != nil {
		until, err = time.Parse(time.RFC1123Z, text)
	}
	if err != nil {
		return fmt.Errorf("its InRelease is valid until %q, which is no date; use another mirror", text)
	}
	if time.Now().After(until) {
		return fmt.Errorf("its InRelease expired at %s; use another mirror, or set the clock", until.Format(time.RFC3339))
	}
	return nil
}

// verify returns the signed part of a clear-signed text if a key of the keyring has signed it.
func verify(text []byte, keyring string) ([]byte, error) {
	block, _ := clearsign.Decode(text)
	if block == nil {
		return nil, errors.New("its InRelease is not signed")
	}
	if keyring == "" {
		return nil, errors.New("there is no keyring to check it with; install debian-archive-keyring, or name one by --keyring")
	}
	var body []byte
	if strings.Contains(keyring, "-----BEGIN") { // the source itself holds the key
		body = []byte(strings.ReplaceAll(keyring, "\n.\n", "\n\n"))
	} else {
		var err error
		if body, err = os.ReadFile(strings.Fields(keyring)[0]); err != nil {
			return nil, fmt.Errorf("read keyring: %w", err)
		}
	}
	read := openpgp.ReadKeyRing
	if bytes.Contains(body, []byte("-----BEGIN")) {
		read = openpgp.ReadArmoredKeyRing
	}
	keys, err := read(bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("read keyring: %w", err)
	}
	if _, err := openpgp.CheckDetachedSignature(keys, bytes.NewReader(block.Bytes), block.ArmoredSignature.Body,
		&packet.Config{}); err != nil {
		return nil, fmt.Errorf("check the signature of its InRelease: %w", err)
	}
	return block.Plaintext, nil
}

// debArch returns this machine's architecture by Debian's name.
func debArch() string {
	return cmp.Or(map[string]string{"arm": "armhf", "386": "i386", "ppc64le": "ppc64el"}[runtime.GOARCH], runtime.GOARCH)
}

func parsePackages(r io.Reader, uri string) ([]aptPackage, error) {
	parts, err := paragraphs(r)
	if err != nil {
		return nil, err
	}
	var all []aptPackage
	for _, f := range parts {
		p := aptPackage{name: f["package"], version: f["version"], priority: f["priority"], file: f["filename"], sha256: f["sha256"],
			uri: uri, essential: f["essential"] == "yes"}
		if p.name == "" || p.file == "" || !isHex(p.sha256) || strings.Contains(p.file, "..") {
			continue
		}
		for _, field := range []string{f["pre-depends"], f["depends"]} {
			for group := range strings.SplitSeq(field, ",") {
				var any []string
				for one := range strings.SplitSeq(group, "|") {
					if name := packageName(one); name != "" {
						any = append(any, name)
					}
				}
				if len(any) > 0 {
					p.depends = append(p.depends, any)
				}
			}
		}
		for one := range strings.SplitSeq(f["provides"], ",") {
			if name := packageName(one); name != "" {
				p.provides = append(p.provides, name)
			}
		}
		all = append(all, p)
	}
	return all, nil
}

// packageName strips the version and the architecture from a dependency.
func packageName(text string) string {
	name, _, _ := strings.Cut(strings.TrimSpace(text), " ")
	name, _, _ = strings.Cut(name, "(")
	name, _, _ = strings.Cut(name, ":")
	return name
}

// choose returns the packages to install: those of want, those that every system needs, and all that they depend on.
func choose(all []aptPackage, want ...string) ([]aptPackage, error) {
	best, providers := map[string]aptPackage{}, map[string][]string{}
	for _, p := range all {
		if old, ok := best[p.name]; !ok || compareVersions(p.version, old.version) > 0 {
			best[p.name] = p
		}
	}
	for name, p := range best {
		if p.essential || p.priority == "required" {
			want = append(want, name)
		}
		for _, provided := range p.provides {
			providers[provided] = append(providers[provided], name)
		}
	}
	slices.Sort(want)
	ranks := []string{"required", "important", "standard", "optional", "extra"}
	for _, names := range providers {
		slices.SortFunc(names, func(a, b string) int {
			return cmp.Or(slices.Index(ranks, best[a].priority)-slices.Index(ranks, best[b].priority), cmp.Compare(a, b))
		})
	}
	chosen := map[string]bool{}
	var queue [][]string
	for _, name := range want {
		queue = append(queue, []string{name})
	}
	for len(queue) > 0 {
		group := queue[0]
		queue = queue[1:]
		name := pick(group, chosen, best, providers)
		if name == "" {
			return nil, fmt.Errorf("the archive has no package %s", strings.Join(group, " or "))
		}
		if !chosen[name] {
			chosen[name] = true
			queue = append(queue, best[name].depends...)
		}
	}
	var list []aptPackage
	for _, name := range sortedKeys(chosen) {
		list = append(list, best[name])
	}
	return list, nil
}

// pick finds a package that satisfies a dependency: one that is chosen already, otherwise the first that exists.
func pick(group []string, chosen map[string]bool, best map[string]aptPackage, providers map[string][]string) string {
	for _, name := range group {
		if chosen[name] {
			return name
		}
		for _, p := range providers[name] {
			if chosen[p] {
				return p
			}
		}
	}
	for _, name := range group {
		if _, ok := best[name]; ok {
			return name
		}
		if p := providers[name]; len(p) > 0 {
			return p[0]
		}
	}
	return ""
}
