package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ulikunitz/xz"

	"soulbox.dev/soulbox/internal/sandboxtest"
)

const (
	mayRise  = 10                     // times: the p99 of a neighbour's command under an attack, compared with its quiet one
	mayLast  = 100 * time.Millisecond // counts as no rise, whatever the quiet one is
	visitors = 505                    // almost as many as one sandbox accepts
)

// neighbours are two owners of one server: ann attacks, bob works.
type neighbours struct {
	t        *testing.T
	w        *web
	ann, bob *sandboxtest.MCP
	hers     string // ann's sandbox
	his      string
	sum      string // checksum of bob's file
	fresh    *http.Client
}

// attack is what ann does until ctx ends.
type attack struct {
	name string
	do   func(n *neighbours, ctx context.Context)
}

var attacks = []attack{
	{"idle connections of strangers", (*neighbours).idleStrangers},
	{"connections through the proxy", (*neighbours).throughProxy},
	{"visitors who read nothing", (*neighbours).readNothing},
	{"64 processes that take 40 MB each", (*neighbours).takeMemory},
	{"slow merges and endless builds", (*neighbours).slowBuilds},
	{"a Dockerfile that doubles itself", (*neighbours).doubledArguments},
	{"a context that unpacks to gigabytes", (*neighbours).bombs},
	{"60 rendered screens", (*neighbours).screens},
	{"256 tunnels of one visitor", (*neighbours).tunnels},
}

// TestSoakNeighbours: whatever one owner does to the server, the commands of another are answered nearly as fast as before, and neither
// owner loses anything.
func TestSoakNeighbours(t *testing.T) {
	v := os.Getenv(soakVar)
	if v == "" {
		t.Skip("it takes ten minutes of a quiet machine: 'make soak' runs it")
	}
	sandboxtest.AsUserAlone(t)
	length, err := time.ParseDuration(v)
	if err != nil {
		t.Fatal(err)
	}
	length = min(length/30, time.Minute)
	state := importMini(t)
	n := &neighbours{t: t, w: serve(t, state, "--rate=1e6"), fresh: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}}
	n.ann = &sandboxtest.MCP{URL: n.w.url, Key: makeKey(t, state, "ann"), Modern: true}
	n.bob = &sandboxtest.MCP{URL: n.w.url, Key: makeKey(t, state, "bob"), Modern: true}
	n.his = n.call(n.bob, "sandbox_create", nil).Field("sandbox_id")
	n.sum = n.call(n.bob, "exec", map[string]any{"sandbox_id": n.his,
		"command": "head -c 1000000 /dev/urandom > f; sha256sum < f"}).Field("output")
	n.call(n.bob, "exec", map[string]any{"sandbox_id": n.his, "command": "sleep 1000000", "background": true, "tag": "kept"})
	table := fmt.Sprintf("%-45s %10s %10s %10s %10s %8s  %s\n", "attack, and bob's exec of true",
		"quiet p50", "quiet p99", "then p50", "then p99", "times", "the server, before and at most")
	for _, a := range attacks {
		t.Run(a.name, func(t *testing.T) {
			on := *n
			on.t = t
			table += on.under(a, length)
		})
	}
	t.Logf("for %s each\n%s", length, table)
}

// under measures bob's commands, quiet and under an attack, checks that nothing is lost, and returns a row of the table.
func (n *neighbours) under(a attack, length time.Duration) string {
	n.t.Helper()
	n.hers = n.call(n.ann, "sandbox_create", map[string]any{"network": "full"}).Field("sandbox_id")
	quiet := n.measure(max(length/4, time.Second))
	before := n.costs()
	ctx, cancel := context.WithTimeout(n.t.Context(), length)
	defer cancel()
	over := make(chan struct{})
	go func() {
		defer close(over)
		a.do(n, ctx)
	}()
	then := n.measure(length)
	<-over
	n.nothingLost(a.name)
	bound := max(mayRise*quiet.p99, mayLast)
	if then.p99 > bound {
		n.t.Errorf("%s: the p99 of bob's commands is %s, more than %s", a.name, then.p99, bound)
	}
	for _, i := range n.listOf(n.ann) { // also the sandboxes of builds
		n.call(n.ann, "sandbox_kill", map[string]any{"sandbox_id": i, "confirm": true})
	}
	row := fmt.Sprintf("%-45s %10s %10s %10s %10s %8d  %v; %v\n", a.name, millisecondsOf(quiet.p50), millisecondsOf(quiet.p99),
		millisecondsOf(then.p50),
		millisecondsOf(then.p99), then.count, before, then.most)
	n.t.Log(row)
	return row
}

func millisecondsOf(d time.Duration) string {
	return fmt.Sprintf("%.1f ms", d.Seconds()*1000)
}

// answerTimes are the times of a command.
type answerTimes struct {
	p50, p99 time.Duration
	count    int
	most     costs // of the server during the measurement
}

// costs are what a server uses of the machine.
type costs struct {
	descriptors int
	memory      int64
}

func (c costs) String() string {
	return fmt.Sprintf("%d descriptors, %d MB", c.descriptors, c.memory>>20)
}

func (n *neighbours) costs() costs {
	return costs{entriesOf(n.t, n.w.cmd.Process.Pid), rssOf(n.t, n.w.cmd.Process.Pid)}
}

// measure runs bob's command again and again, alternating between an open connection and a new one.
func (n *neighbours) measure(length time.Duration) answerTimes {
	n.t.Helper()
	var all []time.Duration
	var most costs
	looked := time.Now()
	clients := []*http.Client{http.DefaultClient, n.fresh}
	for end := time.Now().Add(length); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		r, _, err := n.bob.Prepare(n.t.Context(), "tools/call",
			map[string]any{"name": "exec", "arguments": map[string]any{"sandbox_id": n.his, "command": "true"}})
		if err != nil {
			n.t.Fatal(err)
		}
		began := time.Now()
		res, err := clients[len(all)%2].Do(r)
		if err != nil {
			n.t.Fatal("bob is not answered:", err)
		}
		body, err := io.ReadAll(res.Body)
		all = append(all, time.Since(began))
		if err = errors.Join(err, res.Body.Close()); err != nil || !bytes.Contains(body, []byte(`"exit_code":0`)) {
			n.t.Fatalf("bob's command: %v %d %s", err, res.StatusCode, body)
		}
		if time.Since(looked) > time.Second {
			now := n.costs()
			most, looked = costs{max(most.descriptors, now.descriptors), max(most.memory, now.memory)}, time.Now()
		}
	}
	slices.Sort(all)
	return answerTimes{all[len(all)/2], all[len(all)*99/100], len(all), most}
}

// nothingLost checks that bob has his file and his process, and ann her sandbox.
func (n *neighbours) nothingLost(what string) {
	n.t.Helper()
	if got := n.call(n.bob, "exec", map[string]any{"sandbox_id": n.his, "command": "sha256sum < f"}).Field("output"); got != n.sum {
		n.t.Errorf("%s: bob's file has the sum %q, had %q", what, got, n.sum)
	}
	if a := n.call(n.bob, "process_wait", map[string]any{"sandbox_id": n.his, "process_id": "kept",
		"yield_ms": 0}); a.Field("state") != "running" {
		n.t.Errorf("%s: bob's process: %s", what, a.Text())
	}
	sandboxtest.Eventually(n.t, "ann's sandbox is usable", func() bool {
		a, err := n.ann.Call(n.t.Context(), "exec", map[string]any{"sandbox_id": n.hers, "command": "echo alive", "isolated": true})
		if err == nil && strings.Contains(a.Text(), "Call sandbox_") { // it has ended, or is paused
			n.t.Fatalf("%s: ann's sandbox: %s", what, a.Text())
		}
		return err == nil && a.Field("output") == "alive\n"
	})
	for _, c := range []*sandboxtest.MCP{n.ann, n.bob} {
		if a := n.call(c, "sandbox_list", map[string]any{"state": "failed"}); !strings.Contains(a.Text(), "no such sandboxes") {
			n.t.Errorf("%s: %s", what, a.Text())
		}
	}
}

func (n *neighbours) call(c *sandboxtest.MCP, tool string, args map[string]any) sandboxtest.Answer {
	n.t.Helper()
	return must2(n.t)(c.Call(n.t.Context(), tool, args))
}

func (n *neighbours) listOf(c *sandboxtest.MCP) (ids []string) {
	n.t.Helper()
	for _, line := range strings.Split(n.call(c, "sandbox_list", nil).Text(), "\n") {
		if fields := strings.Fields(line); len(fields) > 1 && fields[0] == "sandbox" {
			ids = append(ids, fields[1])
		}
	}
	return ids
}

// hits makes ann call a tool in her sandbox again and again, atOnce calls at a time, until ctx ends. The calls are refused, or take long.
func (n *neighbours) hits(ctx context.Context, atOnce int, tool string, args func(i int) map[string]any) {
	var all sync.WaitGroup
	var mu sync.Mutex
	count, last := 0, ""
	for i := range atOnce {
		all.Go(func() {
			for ctx.Err() == nil {
				given := args(i)
				given["sandbox_id"] = n.hers
				a, err := n.ann.Call(ctx, tool, given)
				if err != nil {
					continue // ctx has ended, or the attack makes the call fail
				}
				mu.Lock()
				count++
				last = strings.TrimSpace(a.Text())
				mu.Unlock()
			}
		})
	}
	all.Wait()
	n.t.Logf("ann's %s was answered %d times, at last: %.300s", tool, count, last)
}

// begin starts a program in ann's sandbox.
func (n *neighbours) begin(command string) {
	n.t.Helper()
	n.call(n.ann, "exec", map[string]any{"sandbox_id": n.hers, "command": command, "background": true})
}

// idleStrangers opens 20,800 connections in ten seconds, or as many as this process may have; from then on it replaces the oldest with new
// ones.
func (n *neighbours) idleStrangers(ctx context.Context) {
	soft, err := softLimit()
	if err != nil {
		n.t.Error(err)
		return
	}
	const dialers, most = 50, 20_800
	each := min(most, soft-1000) / dialers
	address := strings.TrimSuffix(strings.TrimPrefix(n.w.url, "http://"), "/mcp")
	var all sync.WaitGroup
	for range dialers {
		all.Go(func() {
			var conns []net.Conn
			for pace := 10 * time.Second * dialers / most; ctx.Err() == nil; time.Sleep(pace) {
				if c, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp", address); err == nil {
					conns = append(conns, c)
				}
				if len(conns) >= each {
					_ = conns[0].Close()
					conns = conns[1:]
					pace = 500 * time.Millisecond
				}
			}
			for _, c := range conns {
				_ = c.Close()
			}
		})
	}
	all.Wait()
}

// throughProxy opens connections from ann's sandbox to its proxy, some of them to an address that does not answer.
func (n *neighbours) throughProxy(ctx context.Context) {
	for range 8 {
		n.begin(`perl -MIO::Socket::INET -e '$SIG{PIPE} = "IGNORE"; while (1) { $c = IO::Socket::INET->new(PeerAddr => "127.0.0.1:3128", Timeout => 5) or select(undef, undef, undef, 0.1), next;
	syswrite $c, "CONNECT 192.0.2.1:443 HTTP/1.1\r\nHost: 192.0.2.1\r\n\r\n" if $i++ % 2; push @all, $c; shift @all if @all > 500 }'`)
	}
	<-ctx.Done()
	a := n.call(n.ann, "exec", map[string]any{"sandbox_id": n.hers, "command": "cat /proc/net/tcp | wc -l", "isolated": true})
	n.t.Logf("ann has %s sockets", strings.TrimSpace(a.Field("output")))
}

// floodServer answers every client at once with as much as it takes, also clients that want a tunnel. It reads only heads.
const floodServer = `perl -MIO::Socket::INET -MIO::Select -e '$l = IO::Socket::INET->new(LocalAddr => "127.0.0.1", LocalPort => 8000, Listen => 1024, ReuseAddr => 1) or die; $l->blocking(0); $SIG{PIPE} = "IGNORE";
	$b = "x" x 65536; $in = IO::Select->new($l); $out = IO::Select->new; while (1) { ($r, $w) = IO::Select->select($in, $out, undef, 1); for $s (@$r) { if ($s == $l) { while ($c = $l->accept) { $c->blocking(0); $in->add($c) } }
	else { $in->remove($s); if (!sysread $s, $q, 65536) { close $s; next } syswrite $s, $q =~ /upgrade/i ? "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n" :
	"HTTP/1.1 200 OK\r\nContent-Length: 41943040\r\n\r\n"; $out->add($s) } } for $s (@$w) { defined syswrite $s, $b or $!{EAGAIN} or do { $out->remove($s); close $s } } }'`

// public makes ann's sandbox serve floods to everyone, and returns its address.
func (n *neighbours) public() (address string) {
	n.begin(floodServer)
	sandboxtest.Eventually(n.t, "ann's server listens", func() bool {
		a := n.call(n.ann, "port_expose", map[string]any{"sandbox_id": n.hers, "port": 8000, "public": true})
		address = strings.TrimPrefix(a.Field("url"), "http://")
		return a.Field("listening") == "true"
	})
	return address
}

// readLittle makes count visitors, again and again, send a head, read the first line of the answer, and then nothing for a while.
func readLittle(ctx context.Context, address string, count int, head string) {
	var all sync.WaitGroup
	for range count {
		all.Go(func() {
			for ctx.Err() == nil {
				stay, cancel := context.WithTimeout(ctx, 15*time.Second)
				if c, err := (&net.Dialer{}).DialContext(stay, "tcp", address); err == nil {
					context.AfterFunc(stay, func() { _ = c.Close() })
					_, werr := io.WriteString(c, head)
					_, rerr := bufio.NewReaderSize(c, 16).ReadString('\n')
					if errors.Join(werr, rerr) == nil {
						<-stay.Done()
					}
				}
				select {
				case <-ctx.Done():
				case <-time.After(100 * time.Millisecond):
				}
				cancel()
			}
		})
	}
	all.Wait()
}

func (n *neighbours) readNothing(ctx context.Context) {
	readLittle(ctx, n.public(), visitors, "GET /big HTTP/1.0\r\n\r\n")
}

func (n *neighbours) tunnels(ctx context.Context) {
	n.public()
	address := strings.TrimSuffix(strings.TrimPrefix(n.w.url, "http://"), "/mcp")
	readLittle(ctx, address, 256, "GET /socket HTTP/1.1\r\nHost: "+address+"\r\nE2b-Sandbox-Id: "+n.hers+
		"\r\nE2b-Sandbox-Port: 8000\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
}

// takeMemory starts processes that take more memory than there is, again and again: the command that started them may be ended with them.
func (n *neighbours) takeMemory(ctx context.Context) {
	n.hits(ctx, 1, "exec", func(int) map[string]any {
		return map[string]any{"isolated": true, "command": `perl -e 'for (1..64) { $p = fork; defined $p or last; $p or
			do { $x = "a" x 41943040; select undef, undef, undef, 0.5; exit } } 1 while wait > 0'`}
	})
}

// bomb is an archive of a few hundred KB, in streams of xz, that contains a file of gigabytes.
func bomb(t *testing.T) []byte {
	var head bytes.Buffer
	if err := tar.NewWriter(&head).WriteHeader(&tar.Header{Name: "big", Mode: 0o644, Size: 6 << 30}); err != nil {
		t.Fatal(err)
	}
	stream := func(plain []byte) []byte {
		var b bytes.Buffer
		w, err := xz.NewWriter(&b)
		if err == nil {
			_, err = w.Write(plain)
			err = errors.Join(err, w.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	return append(stream(head.Bytes()), bytes.Repeat(stream(make([]byte, 16<<20)), 128)...)
}

// layBomb writes a bomb into ann's sandbox.
func (n *neighbours) layBomb() {
	all := bomb(n.t)
	for at := 0; at < len(all); at += 500_000 {
		n.call(n.ann, "file_write", map[string]any{"sandbox_id": n.hers, "path": "/home/user/context.tar.xz",
			"content": base64.StdEncoding.EncodeToString(all[at:min(at+500_000, len(all))]), "encoding": "base64", "mode": "append"})
	}
}

func (n *neighbours) bombs(ctx context.Context) {
	n.layBomb()
	n.hits(ctx, 8, "template_build", func(i int) map[string]any {
		return map[string]any{"name": fmt.Sprint("bomb", i), "dockerfile": "FROM mini\nCOPY . /x\n",
			"context_path": "/home/user/context.tar.xz"}
	})
}

// slowBuilds runs two merges that take long and more builds than an owner has places for, while bob builds something.
func (n *neighbours) slowBuilds(ctx context.Context) {
	n.layBomb()
	var all sync.WaitGroup
	all.Go(func() {
		n.hits(ctx, 2, "template_build", func(i int) map[string]any {
			return map[string]any{"name": fmt.Sprint("merge", i), "dockerfile": "FROM mini\nCOPY . /x\n",
				"context_path": "/home/user/context.tar.xz"}
		})
	})
	all.Go(func() {
		n.hits(ctx, 16, "template_build", func(i int) map[string]any {
			return map[string]any{"name": fmt.Sprint("endless", i), "dockerfile": fmt.Sprintf("FROM mini\nRUN sleep 1000 # %d\n", i)}
		})
	})
	began := time.Now()
	a, err := n.bob.Call(ctx, "template_build", map[string]any{"name": "bobs",
		"dockerfile": "FROM mini\nCOPY a /a\nRUN test -s /a\n", "files": map[string]any{"a": "a"}, "no_cache": true})
	if err != nil || !strings.Contains(a.Text(), "is built") {
		n.t.Errorf("bob's build under ann's: %v %s", err, a.Text())
	}
	n.t.Logf("bob's build under ann's took %s", time.Since(began).Round(time.Millisecond))
	all.Wait()
}

func (n *neighbours) doubledArguments(ctx context.Context) {
	doubled := "FROM mini\nARG a0=0123456789abcdef\n"
	for i := 1; i < 14; i++ {
		doubled += fmt.Sprintf("ARG a%d=$a%d$a%d$a%d$a%d\n", i, i-1, i-1, i-1, i-1)
	}
	n.hits(ctx, 8, "template_build", func(i int) map[string]any {
		return map[string]any{"name": fmt.Sprint("doubled", i), "dockerfile": doubled}
	})
}

// screens makes ann look at 60 large terminals at once, all the time.
func (n *neighbours) screens(ctx context.Context) {
	const count = 60
	var all sync.WaitGroup
	for i := range count {
		all.Go(func() {
			n.call(n.ann, "exec", map[string]any{"sandbox_id": n.hers, "tty": true, "background": true,
				"tag": fmt.Sprint("t", i), "rows": 300, "cols": 500, "isolated": true,
				"command": `perl -e '$| = 1; print "\e[", int(rand 300), ";", int(rand 500), "H\e[3", int(rand 8), "m",
					"ab\x{cc}\x{81}c" x 20 for 1..10000; sleep 1000000'`})
		})
	}
	all.Wait()
	n.hits(ctx, count, "process_wait", func(i int) map[string]any {
		return map[string]any{"tag": fmt.Sprint("t", i), "screen": true, "yield_ms": 0}
	})
}
