package guest

import (
	"encoding/json"
	"io"
	"maps"
	"os"
	"path/filepath"

	"soulbox.dev/soulbox/agent"
)

// envFile keeps the environment of all processes for a later agent on the same files: the host does not keep it, as it may be secret.
const envFile = "env.json"

func (s *Server) saveEnv(env map[string]string) error {
	body, err := json.Marshal(env)
	if err != nil {
		return err
	}
	name := filepath.Join(s.opts.SpoolDir, envFile)
	if err := os.MkdirAll(s.opts.SpoolDir, 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(name+".new", body, 0o600); err != nil {
		return err
	}
	return os.Rename(name+".new", name)
}

// loadEnv reads what saveEnv has written. A missing or invalid file counts as an empty environment.
func (s *Server) loadEnv() {
	f, err := os.Open(filepath.Join(s.opts.SpoolDir, envFile))
	if err != nil {
		return
	}
	defer f.Close()
	body, err := io.ReadAll(io.LimitReader(f, 2*maxEnv))
	if err != nil || json.Unmarshal(body, &s.config.Env) != nil {
		s.log("the environment that was saved cannot be read")
		s.config.Env = nil
	}
}

// configure applies the host's configuration, and saves the environment.
func (s *Server) configure(c agent.Config) error {
	s.mu.Lock()
	env := maps.Clone(s.config.Env)
	if env == nil {
		env = map[string]string{}
	}
	maps.Copy(env, c.Env)
	if !maps.Equal(env, s.config.Env) {
		if err := s.saveEnv(env); err != nil {
			s.mu.Unlock()
			return err
		}
	}
	c.Env = env
	s.config = c
	s.mu.Unlock()
	if s.groups == nil {
		return nil
	}
	s.guard.wake()
	return s.groups.limit(groupLimits{c.MaxProcesses, c.MaxMemory, c.MaxCPU})
}

// givenEnv returns the environment that Configure has given to all processes.
func (s *Server) givenEnv() map[string]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.config.Env)
}
