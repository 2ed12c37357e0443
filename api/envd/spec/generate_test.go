// Package spec_test makes the Go code of the services in this directory, and checks that it is what is committed: UPDATE_GOLDEN=1 writes
// it.
package spec_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bufbuild/protocompile"
	"github.com/bufbuild/protocompile/protoutil"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/pluginpb"
)

var plugins = []string{"protoc-gen-go", "protoc-gen-connect-go"} // go.mod pins them

func TestGenerated(t *testing.T) {
	sources := []string{"process/process.proto", "filesystem/filesystem.proto"}
	compiler := protocompile.Compiler{Resolver: protocompile.WithStandardImports(&protocompile.SourceResolver{}),
		SourceInfoMode: protocompile.SourceInfoStandard}
	files, err := compiler.Compile(t.Context(), sources...)
	if err != nil {
		t.Fatal(err)
	}
	request := &pluginpb.CodeGeneratorRequest{FileToGenerate: sources, Parameter: proto.String("paths=source_relative")}
	seen := map[string]bool{}
	var add func(protoreflect.FileDescriptor)
	add = func(f protoreflect.FileDescriptor) { // what is imported comes first
		if seen[f.Path()] {
			return
		}
		seen[f.Path()] = true
		for i := range f.Imports().Len() {
			add(f.Imports().Get(i).FileDescriptor)
		}
		request.ProtoFile = append(request.ProtoFile, protoutil.ProtoFromFileDescriptor(f))
	}
	for _, f := range files {
		add(f)
	}
	body, err := proto.Marshal(request)
	if err != nil {
		t.Fatal(err)
	}
	for _, plugin := range plugins {
		for name, content := range run(t, plugin, body) {
			if os.Getenv("UPDATE_GOLDEN") != "" {
				if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if old, err := os.ReadFile(name); err != nil || string(old) != content {
				t.Errorf("%s is not what %s makes; run 'make golden': %v", name, plugin, err)
			}
		}
	}
}

// run is the plugin protocol of protoc (google/protobuf/compiler/plugin.proto).
func run(t *testing.T, plugin string, request []byte) map[string]string {
	cmd := exec.CommandContext(t.Context(), "go", "tool", plugin)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(request), &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v\n%s", plugin, err, errs.String())
	}
	var response pluginpb.CodeGeneratorResponse
	if err := proto.Unmarshal(out.Bytes(), &response); err != nil || response.GetError() != "" {
		t.Fatalf("%s: %v %s", plugin, err, response.GetError())
	}
	made := map[string]string{}
	for _, f := range response.File {
		if strings.Contains(f.GetName(), "..") {
			t.Fatalf("%s makes %q", plugin, f.GetName())
		}
		made[f.GetName()] = f.GetContent()
	}
	return made
}
