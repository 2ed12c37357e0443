package agent

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
)

// TestNames: names cross the pipe in the notation and arrive as their bytes, wherever they stand; the sender's value stays unchanged.
func TestNames(t *testing.T) {
	const name, shown = "/caf\xe9/\\xe9", `/caf\\xe9/\\x5cxe9` // shown as it is in JSON
	all := []any{
		&Header{Path: name}, &StartRequest{Cwd: name, Args: []string{"a", name}}, &Config{Cwd: name},
		&User{Home: name, Cwd: name}, &DirRequest{Path: name, After: name}, &PathRequest{Path: name}, &MoveRequest{From: name, To: name},
		&EditRequest{Path: name}, &SearchRequest{Path: name}, &TreeRequest{Path: name}, &ShellInfo{Cwd: name}, &Error{Path: name},
		&Snapshot{Process: Process{Cwd: name, ShellCwd: name, GoneCwd: name}},
		&[]Process{{Cwd: name}, {Cwd: "/plain"}},
		&DirResult{Entries: []FileInfo{{Path: "/plain"}, {Path: name, Target: name, Link: &Link{Target: name, Real: name}}}},
		&EditResult{Info: FileInfo{Path: name}}, &Answer{Info: &FileInfo{Path: name}, Error: &Error{Path: name}},
		&SearchResult{Matches: []Match{{Path: name, Text: "text"}}}, &TreeResult{Events: []TreeEvent{{Path: name, From: name}}},
		&WatchBatch{Events: []WatchEvent{{Path: name}}, Error: &Error{Path: name}}, &MountRequest{Target: name, Source: name},
	}
	for _, v := range all {
		before, _ := json.Marshal(v)
		body, err := json.Marshal(ForWire(v))
		if err != nil {
			t.Fatal(err)
		}
		after, _ := json.Marshal(v)
		if string(after) != string(before) {
			t.Errorf("%T has changed: %s", v, after)
		}
		if strings.Contains(string(body), `\ufffd`) || strings.Count(string(body), shown) == 0 {
			t.Errorf("%T: %s", v, body)
		}
		got := reflect.New(reflect.TypeOf(v).Elem())
		if err := Unmarshal(body, got.Interface()); err != nil {
			t.Fatal(err)
		}
		if s, ok := v.(*StartRequest); ok {
			s.Shown = true
		}
		if !reflect.DeepEqual(got.Interface(), v) {
			t.Errorf("%s became %+v", body, got.Elem())
		}
		if values, err := json.Marshal(ForWire(reflect.ValueOf(v).Elem().Interface())); err != nil || string(values) != string(body) {
			t.Errorf("%T as a value: %s %v", v, values, err)
		}
	}
	for v, want := range map[any]string{nil: "null", (*Header)(nil): "null", struct{}{}: "{}", "\xff": `"\ufffd"`} {
		if body, err := json.Marshal(ForWire(v)); err != nil || string(body) != want {
			t.Errorf("%v: %s %v", v, body, err)
		}
	}
}
