package template

import (
	"archive/tar"
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/internal/erofs"
)

// BaseOptions say where the base template comes from.
type BaseOptions struct {
	Name    string // default "base"
	Variant string // "", "node" or "python": packages in addition to those of every base
	Mirror  string // a package archive; default those of this machine's apt
	Suite   string // of the mirror; default this machine's
	Keyring string // that checks the mirror's signatures; default this machine's
	Say     func(format string, args ...any)
}

// basePackages are what the base template has in addition to a minimal system.
const basePackages = "bash-completion build-essential ca-certificates curl file git gnupg jq less libnss-myhostname ncurses-term netbase " +
	"openssh-client procps python3 python3-pip python3-venv " +
	"python-is-python3 rsync sudo tmux tzdata unzip vim-tiny wget xz-utils zip"

var variants = map[string]string{"": "", "node": "nodejs npm",
	"python": "python3-dev python3-numpy python3-pandas python3-matplotlib python3-requests ipython3 pipx"}

// CheckVariant rejects unknown variants of the base.
func CheckVariant(name string) error {
	if _, ok := variants[name]; !ok {
		return fmt.Errorf("there is no variant %q; the variants are node and python", name)
	}
	return nil
}

// minimal are the packages of the smallest system that can install others.
var minimal = []string{"apt", "debian-archive-keyring", "ca-certificates"}

// BuildBase makes the base template from a distribution's archive: first a minimal system, which is kept as "debian:CODENAME" or the like,
// then the rest with that system's apt. The operator owns the template, so everybody may use it.
func (b *Builder) BuildBase(ctx context.Context, o BaseOptions) (Built, error) {
	o.Name = cmp.Or(o.Name, BaseName)
	if err := CheckVariant(o.Variant); err != nil {
		return Built{}, err
	}
	if o.Variant != "" && o.Name == BaseName {
		o.Name = o.Variant
	}
	if o.Say == nil {
		o.Say = func(string, ...any) {}
	}
	root, err := b.distribution(ctx, o)
	if err != nil {
		return Built{}, fmt.Errorf("build %s: %w", o.Name, err)
	}
	dockerfile := fmt.Sprintf(baseDockerfile, root.Name, basePackages+" "+variants[o.Variant])
	return b.Build(ctx, BuildRequest{Name: o.Name, Dockerfile: dockerfile}, func(l Line) { o.Say("%s", l.Text) })
}

// baseDockerfile turns a minimal system into one for everyday work.
const baseDockerfile = `FROM %s
ENV DEBIAN_FRONTEND=noninteractive LANG=C.UTF-8
RUN apt-get update && apt-get install -y --no-install-recommends %s && apt-get clean && rm -rf /var/lib/apt/lists/* /var/log/*.log /var/log/apt/* /var/cache/debconf/*-old
RUN <<EOF
set -e
groupadd --gid 1000 user
useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash user
echo 'user ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/user
echo 'Defaults env_keep += "http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY DEBIAN_FRONTEND"' > /etc/sudoers.d/proxy
chmod 440 /etc/sudoers.d/*
rm -f /usr/lib/python3*/EXTERNALLY-MANAGED
ln -sf vim.tiny /usr/bin/vim
` + noContainers + `EOF
`

// noContainers installs stand-ins for docker and podman, which do not work in a sandbox because they need mounts and cgroups of their own.
// A stand-in says what to do instead. A package with that command replaces it, and a command found earlier in PATH comes first.
const noContainers = `for name in docker podman; do
  if command -v $name >/dev/null; then continue; fi
  { echo '#!/bin/sh'
    echo "echo '$name: containers do not run in a sandbox; run the program itself, or build a template with template_build.' >&2"
    echo 'exit 125'; } > /usr/bin/$name
  chmod 755 /usr/bin/$name
done
`

// distribution makes a minimal system, or finds one that exists.
func (b *Builder) distribution(ctx context.Context, o BaseOptions) (Manifest, error) {
	id, codename, err := osRelease("/etc/os-release")
	if err != nil && (o.Mirror == "" || o.Suite == "") {
		return Manifest{}, err
	}
	id = cmp.Or(id, "debian")
	sources := []aptSource{{uri: o.Mirror, suite: cmp.Or(o.Suite, codename), keyring: cmp.Or(o.Keyring, defaultKeyring())}}
	if o.Mirror == "" {
		if sources, err = findSources("/etc/apt", codename); err != nil {
			return Manifest{}, err
		}
	} else {
		codename, id = cmp.Or(o.Suite, codename), "debian"
		if strings.Contains(o.Mirror, "ubuntu") {
			id = "ubuntu"
		}
	}
	name, err := CheckName(id + ":" + codename)
	if err != nil {
		return Manifest{}, err
	}
	if m, err := b.Store.Get("", name); err == nil && o.Mirror == "" && o.Keyring == "" {
		o.Say("using the template %s, which exists already", name)
		return m, nil
	}
	return b.bootstrap(ctx, name, sources, o.Say)
}

// osRelease reads the distribution of this machine (os-release(5)).
func osRelease(file string) (id, codename string, err error) {
	body, err := os.ReadFile(file)
	if err != nil {
		return "", "", err
	}
	fields := map[string]string{}
	for line := range strings.Lines(string(body)) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), "=")
		fields[k] = strings.Trim(v, `"'`)
	}
	if id, codename = fields["ID"], fields["VERSION_CODENAME"]; id != "debian" && id != "ubuntu" {
		id = "debian"
	}
	if codename == "" {
		return "", "", errors.New("this machine is neither Debian nor Ubuntu; name a mirror by --mirror and --suite")
	}
	return id, codename, nil
}

// debsDir holds the packages of the minimal system while it is made.
const debsDir = "/.soulbox-build/debs"

// bootstrap makes a minimal system. The host fetches the packages, verifies them and unpacks them into an image; their scripts run in a
// sandbox.
func (b *Builder) bootstrap(ctx context.Context, name string, sources []aptSource, say func(string, ...any)) (_ Manifest, err error) {
	a := archive{client: &http.Client{Timeout: 10 * time.Minute}, say: say}
	var all []aptPackage
	for _, s := range sources {
		say("reading %s %s", s.uri, s.suite)
		list, err := a.packages(ctx, s)
		if err != nil {
			return Manifest{}, err
		}
		all = append(all, list...)
	}
	want := minimal
	if strings.HasPrefix(name, "ubuntu") {
		want = []string{"apt", "ubuntu-keyring", "ca-certificates"}
	}
	chosen, err := choose(all, want...)
	if err != nil {
		return Manifest{}, err
	}
	files, err := b.Store.newContext(ctx, "", func(m *merger) error { return a.fill(ctx, m, chosen) })
	if err != nil {
		return Manifest{}, err
	}
	defer func() { err = errors.Join(err, files.Close()) }()
	say("%d packages fetched; installing them in a sandbox", len(chosen))
	return b.secondStage(ctx, name, files, sources, say)
}

// secondStage runs the scripts of the packages and keeps the result.
func (b *Builder) secondStage(ctx context.Context, name string, files *Files, sources []aptSource, say func(string, ...any)) (_ Manifest,
	err error) {
	j := b.Store.begin("")
	defer j.end()
	r := &buildRun{Builder: b, job: j, req: BuildRequest{Name: name}, id: NewBuildID()}
	if r.log, err = b.Store.newLog(r.id, "", BaseName, func(l Line) { say("%s", l.Text) }); err != nil {
		return Manifest{}, err
	}
	defer func() { err = errors.Join(err, r.log.close()) }()
	l, err := j.packedLayer(ctx, files, "unpacked")
	if err != nil {
		return Manifest{}, err
	}
	s := &stageRun{buildRun: r, result: &result{layers: []Layer{l}}, name: "install"}
	defer func() {
		if s.sb != nil {
			err = errors.Join(err, s.sb.Kill(errors.New("the build is done with it")))
		}
	}()
	if err := s.bootSandbox(ctx); err != nil {
		return Manifest{}, err
	}
	var list strings.Builder
	for _, src := range sources {
		fmt.Fprintf(&list, "deb %s %s main\n", src.uri, src.suite)
	}
	s.args = pairs{{Key: "SOURCES", Value: ptr(list.String())}}
	if err := s.exec(ctx, "install", []string{"/bin/sh", "-ec", installScript}, nil); err != nil {
		return Manifest{}, err
	}
	made, err := s.capture(ctx, "installed")
	if err != nil {
		return Manifest{}, err
	}
	s.take(made)
	return j.flatten(ctx, Manifest{Name: name, Parent: sources[0].uri + " " + sources[0].suite, Build: r.id, Config: v1.Config{
		Cmd: []string{"bash"}, Env: []string{"PATH=" + defaultPath}}}, s.layers)
}

func ptr[T any](v T) *T { return &v }

// installScript is the second stage of debootstrap(8).
const installScript = `export DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin
cd ` + debsDir + `
printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d
[ -e /usr/bin/awk ] || ln -s mawk /usr/bin/awk
[ -e /etc/localtime ] || ln -s /usr/share/zoneinfo/UTC /etc/localtime
mkdir -p /var/lib/dpkg/info /var/lib/dpkg/updates; : > /var/lib/dpkg/status; : > /var/lib/dpkg/available
echo force-unsafe-io > /etc/dpkg/dpkg.cfg.d/soulbox-install
for p in base-passwd base-files dpkg libc6 perl-base mawk debconf; do
  [ ! -e $p.deb ] || dpkg --force-depends --force-overwrite --install $p.deb
done
dpkg --force-depends --force-confold --unpack *.deb
dpkg --force-depends --force-confold --configure --pending
dpkg --configure -a
rm -f /usr/sbin/policy-rc.d /etc/dpkg/dpkg.cfg.d/soulbox-install /var/log/*.log /var/log/apt/* /etc/machine-id /var/lib/dbus/machine-id
rm -rf /var/cache/debconf/*-old /var/lib/dpkg/*-old
printf '%s' "$SOURCES" > /etc/apt/sources.list
printf '127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n' > /etc/hosts
chmod 1777 /tmp
[ -z "$(dpkg --audit)" ]
`

// flatten merges layers into one and leaves out what only the build needed.
func (j *job) flatten(ctx context.Context, m Manifest, layers []Layer) (Manifest, error) {
	image, err := j.image(ctx, layers)
	if err != nil {
		return m, err
	}
	files, err := openFiles(image)
	if err != nil {
		return m, err
	}
	defer files.Close()
	for _, name := range []string{".soulbox-build", ".soulbox", "proc", "sys", "dev"} {
		if n := files.root.Children[name]; n != nil && !strings.HasPrefix(name, ".") {
			n.Children = map[string]*erofs.Node{} // mount points
		} else {
			delete(files.root.Children, name)
		}
	}
	l, err := j.packedLayer(ctx, files, m.Name)
	if err != nil {
		return m, err
	}
	m.Layers = []Layer{l}
	return j.finish(ctx, m)
}

// packedLayer stores files as a layer.
func (j *job) packedLayer(ctx context.Context, files *Files, createdBy string) (l Layer, err error) {
	err = files.packed(func(r io.Reader) error {
		l, err = j.newLayer(ctx, r, maxImage, createdBy)
		return err
	})
	return l, err
}

// debsAtOnce is how many packages are fetched at the same time.
const debsAtOnce = 4

// fill puts the packages into a tree: the files of each, and the package itself for dpkg.
func (a archive) fill(ctx context.Context, m *merger, chosen []aptPackage) error {
	m.keepLinks = true
	for link, target := range map[string]string{"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib",
		"lib64": "usr/lib64"} { // all files are below /usr
		m.root.Children[link] = &erofs.Node{Mode: unix.S_IFLNK | 0o777, Target: target}
		if _, err := (layer{m, map[place]bool{}}).dir(target); err != nil {
			return err
		}
	}
	type fetched struct {
		body []byte
		err  error
	}
	bodies := make([]chan fetched, len(chosen))
	ctx, cancel := context.WithCancel(ctx)
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	slots := make(chan struct{}, debsAtOnce)
	for i := range chosen {
		bodies[i] = make(chan fetched, 1)
	}
	all.Go(func() {
		for i, p := range chosen {
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return
			}
			all.Go(func() {
				body, err := a.deb(ctx, p)
				bodies[i] <- fetched{body, err}
			})
		}
	})
	for i, p := range chosen {
		var got fetched
		select {
		case got = <-bodies[i]:
			<-slots
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if got.err != nil {
			return got.err
		}
		if i%10 == 0 {
			a.say("fetching packages: %d of %d", i, len(chosen))
		}
		if err := m.addDeb(p.name, got.body); err != nil {
			return fmt.Errorf("package %s: %w", p.name, err)
		}
	}
	return nil
}

// deb fetches a package and checks it against the index.
func (a archive) deb(ctx context.Context, p aptPackage) ([]byte, error) {
	base, err := url.Parse(p.uri)
	if err != nil {
		return nil, err
	}
	body, err := a.get(ctx, base.JoinPath(p.file).String(), maxDeb)
	if err != nil {
		return nil, err
	}
	if sum := sha256.Sum256(body); hex.EncodeToString(sum[:]) != p.sha256 {
		return nil, fmt.Errorf("package %s is not what the archive says it is", p.name)
	}
	return body, nil
}

// addDeb unpacks a package (deb(5)) into the tree and stores the package itself in debsDir.
func (m *merger) addDeb(name string, body []byte) error {
	data, err := debData(body)
	if err != nil {
		return err
	}
	plain, err := uncompressed(m.ctx, payer{}, data)
	if err != nil {
		return err
	}
	if err := errors.Join(m.apply(plain), plain.Close()); err != nil {
		return err
	}
	h := &tar.Header{Typeflag: tar.TypeReg, Name: debsDir + "/" + name + ".deb", Mode: 0o644, Size: int64(len(body))}
	return layer{m, map[place]bool{}}.entry(h, bytes.NewReader(body))
}

// debData finds the files of a package, which is an ar(5) archive.
func debData(body []byte) (io.Reader, error) {
	r := bufio.NewReader(bytes.NewReader(body))
	magic := make([]byte, 8)
	if _, err := io.ReadFull(r, magic); err != nil || string(magic) != "!<arch>\n" {
		return nil, errors.New("it is not a package")
	}
	for {
		head := make([]byte, 60)
		if _, err := io.ReadFull(r, head); err != nil {
			return nil, errors.New("it has no files")
		}
		size, err := strconv.ParseInt(strings.TrimSpace(string(head[48:58])), 10, 64)
		if err != nil || size < 0 || size > int64(len(body)) {
			return nil, errors.New("it is broken")
		}
		if strings.HasPrefix(string(head[:16]), "data.tar") {
			return io.LimitReader(r, size), nil
		}
		if _, err := io.CopyN(io.Discard, r, size+size%2); err != nil {
			return nil, errors.New("it is cut short")
		}
	}
}
