package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestNames: every command that takes a path accepts a sandbox's file whose name is not text, by its bytes or in the notation of names.
func TestNames(t *testing.T) {
	s := newSurroundings(t)
	id := strings.TrimSpace(s.run(t, "sandbox", "create"))
	s.run(t, "exec", id, "--", "sh", "-c", `mkdir "$(printf 'd\351\nx')"; printf hi > "$(printf 'd\351\nx/f\377')"; printf lit > '\xff'`)
	for _, c := range []struct{ cwd, file, want string }{{"d\xe9\nx", "f\xff", "hi"}, {`d\xe9\x0ax`, "f\xff", "hi"}, {".", `\xff`, "lit"}} {
		if got := s.run(t, "exec", id, "-w", c.cwd, "--", "cat", c.file); got != c.want {
			t.Errorf("exec in %q: %q, want %q", c.cwd, got, c.want)
		}
	}
	for _, dir := range []string{"d\xe9\nx", `d\xe9\x0ax`} {
		to := filepath.Join(s.dir, "copy")
		s.run(t, "cp", id+":"+dir+"/.", to)
		if got, err := os.ReadFile(filepath.Join(to, "f\xff")); err != nil || string(got) != "hi" {
			t.Errorf("%q: %q %v", dir, got, err)
		}
		if err := os.Rename(filepath.Join(to, "f\xff"), filepath.Join(to, "g\xfe")); err != nil {
			t.Fatal(err)
		}
		s.run(t, "cp", filepath.Join(to, "g\xfe"), id+":"+dir)
		if got := s.run(t, "exec", id, "-w", dir, "--", "cat", "g\xfe"); got != "hi" {
			t.Errorf("%q", got)
		}
		if err := os.RemoveAll(to); err != nil {
			t.Fatal(err)
		}
	}
	s.run(t, "cp", id+`:/home/user/\x5cxff`, filepath.Join(s.dir, "literal"))
	if got, err := os.ReadFile(filepath.Join(s.dir, "literal")); err != nil || string(got) != "lit" {
		t.Errorf("%q %v", got, err)
	}
	s.watchNames(t, id)
}

// watchNames checks that a watch shows such a name.
func (s surroundings) watchNames(t *testing.T, id string) {
	events := filepath.Join(s.dir, "events")
	out, err := os.Create(events)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	watch := s.command("watch", id, `/home/user/d\xe9\x0ax`)
	watch.Stdout = out
	if err := watch.Start(); err != nil {
		t.Fatal(err)
	}
	sawIt := false
	for range 100 { // the watch takes a moment to begin
		s.run(t, "exec", id, "-w", "d\xe9\nx", "--", "sh", "-c", `touch "$(printf 'new\376\nline')"; rm -f "$(printf 'new\376\nline')"`)
		body, err := os.ReadFile(events)
		if err != nil {
			t.Fatal(err)
		}
		if sawIt = strings.Contains(string(body), `create  new\xfe\x0aline`+"\n"); sawIt {
			break
		}
	}
	if !sawIt {
		t.Error("the watch has not shown the name")
	}
	if err := watch.Process.Signal(os.Interrupt); err != nil {
		t.Error(err)
	}
	if err := watch.Wait(); err != nil {
		t.Error(err)
	}
}
