package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// BenchmarkCommandLine uses the command line as a person does: one command, and a gigabyte through a pipe, in and out, with its checksum.
func BenchmarkCommandLine(b *testing.B) {
	if b.N > 1 {
		return // it counts for itself, once
	}
	s := newSurroundings(b)
	id := strings.TrimSpace(s.run(b, "sandbox", "create", "--timeout", "2h"))
	var times []time.Duration
	for range 50 {
		began := time.Now()
		s.run(b, "exec", id, "--", "true")
		times = append(times, time.Since(began))
	}
	slices.Sort(times)
	fmt.Printf("%-60s p50 %s, p99 %s\n", "soulbox exec ID -- true, the program's start included",
		times[len(times)/2].Round(time.Millisecond/10), times[len(times)-1].Round(time.Millisecond/10))
	const size = 1 << 30
	part := make([]byte, 1<<20)
	for i := range part {
		part[i] = byte(rand.Uint32())
	}
	want, got := sha256.New(), sha256.New()
	began := time.Now()
	in := s.command("exec", "-i", id, "--", "sh", "-c", "cat >large")
	in.Stdin = io.TeeReader(io.LimitReader(repeated(part), size), want)
	if out, err := in.CombinedOutput(); err != nil {
		b.Fatalf("%v %s", err, out)
	}
	inTime := time.Since(began)
	began = time.Now()
	out := s.command("exec", id, "--", "cat", "large")
	out.Stdout = got
	if err := out.Run(); err != nil {
		b.Fatal(err)
	}
	outTime := time.Since(began)
	if !bytes.Equal(want.Sum(nil), got.Sum(nil)) {
		b.Error("1 GiB came back with another checksum")
	}
	fmt.Printf("%-60s %.0f and %.0f MB/s\n", "1 GiB through soulbox exec, in and out, checksums right", size/inTime.Seconds()/1e6,
		size/outTime.Seconds()/1e6)
}

// repeated reads a part repeatedly, without end.
type repeated []byte

// Read implements io.Reader.
func (r repeated) Read(p []byte) (int, error) { return copy(p, r), nil }
